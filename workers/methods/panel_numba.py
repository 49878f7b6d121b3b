"""SparseGPT's walk through one panel, and what goes with it, as compiled loops for the CPU.

Plain torch takes a dozen calls for every group of 4 columns, each of a few microseconds.

Shape letters: O output features, P inputs of a panel.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from workers.compiled import compiled

BLOCK = 64
"""Output features that go from the first column to the last while they stay in the cache."""
TILE = 64
"""Rows and columns that are transposed together."""
LEAF = 8
"""Columns that see the earlier ones' losses at once, unstructured. Under N:M it is M."""


def walk_panel(
    current_PO: Tensor, inverse_PP: Tensor, drop_PO: Tensor, group: int, num_dropped: int
) -> None:
    """The same as `panel_torch.walk_panel`, up to rounding."""
    diagonal_P = inverse_PP.diagonal()
    push_PP = (inverse_PP / -diagonal_P[:, None]).T.contiguous()  # row j: what pushes column j
    _walk(
        current_PO.numpy(),
        drop_PO.numpy(),
        push_PP.numpy(),
        diagonal_P.pow(-2).numpy(),
        group or LEAF,
        num_dropped,
    )


def transpose(matrix: Tensor, result: Tensor) -> None:
    """Write a matrix of any type of 1 to 8 bytes, (A, B), into one of (B, A).

    By small tiles: numbers in strides of 2048 would all fall into one cache set.
    """
    of_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = of_size[matrix.element_size()]
    _transpose(matrix.view(bits).numpy(), result.view(bits).numpy())


@compiled
def _walk(current: Any, drop: Any, push: Any, cost: Any, leaf: int, num_dropped: int) -> None:
    """Loops over lanes are innermost and of fixed length: those become vector instructions."""
    num_columns, num_outputs = current.shape
    number = current.dtype.type
    for block in prange((num_outputs + BLOCK - 1) // BLOCK):
        top = block * BLOCK
        work = np.zeros((num_columns, BLOCK), current.dtype)
        gone = np.zeros((num_columns, BLOCK), current.dtype)
        gate = np.zeros((num_columns, BLOCK), current.dtype)
        lanes = min(BLOCK, num_outputs - top)
        for i in range(num_columns):
            for t in range(lanes):
                work[i, t] = current[i, top + t]
            if not num_dropped:
                for t in range(lanes):
                    gate[i, t] = drop[i, top + t]
        for low in range(0, num_columns, leaf):
            high = min(low + leaf, num_columns)
            for j in range(low, high):
                in_fours = low - low % 4  # so that a sum is read and written once for four
                for i in range(0, in_fours, 4):
                    a, b, c, d = push[j, i], push[j, i + 1], push[j, i + 2], push[j, i + 3]
                    for t in range(BLOCK):
                        work[j, t] += (
                            a * gone[i, t]
                            + b * gone[i + 1, t]
                            + c * gone[i + 2, t]
                            + d * gone[i + 3, t]
                        )
                for i in range(in_fours, low):
                    a = push[j, i]
                    for t in range(BLOCK):
                        work[j, t] += a * gone[i, t]
            if num_dropped:
                for i in range(low, high):
                    for t in range(BLOCK):
                        gate[i, t] = 0
                for i in range(low, high):
                    for j in range(i + 1, high):
                        a, b = cost[i], cost[j]
                        for t in range(BLOCK):
                            first = number(
                                work[i, t] * work[i, t] * a <= work[j, t] * work[j, t] * b
                            )
                            gate[i, t] += 1 - first
                            gate[j, t] += first
                for i in range(low, high):
                    for t in range(BLOCK):
                        gate[i, t] = number(gate[i, t] < num_dropped)
            for i in range(low, high):
                for t in range(BLOCK):
                    gone[i, t] = work[i, t] * gate[i, t]
                for j in range(i + 1, high):
                    a = push[j, i]
                    for t in range(BLOCK):
                        work[j, t] += a * gone[i, t]
        for i in range(num_columns):
            for t in range(lanes):
                current[i, top + t] = work[i, t] - gone[i, t]
            if num_dropped:
                for t in range(lanes):
                    drop[i, top + t] = gate[i, t] != 0


@compiled
def _transpose(matrix: Any, result: Any) -> None:
    num_rows, num_columns = matrix.shape
    for strip in prange((num_columns + TILE - 1) // TILE):
        left = strip * TILE
        right = min(left + TILE, num_columns)
        for top in range(0, num_rows, TILE):
            bottom = min(top + TILE, num_rows)
            for j in range(left, right):
                for i in range(top, bottom):
                    result[j, i] = matrix[i, j]
