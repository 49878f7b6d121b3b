"""SparseGPT's walk through one panel as one Triton kernel, for CUDA.

It is tested in Triton's interpreter and compiled for two kinds of GPU. It has never run on one.

Shape letters: O output features, P inputs of a panel (padded to a power of two), B output features
of one program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
"""Output features a program. Three tiles of 128 x 16 are 48 numbers a thread of four warps."""


def walk_panel(
    current_PO: Tensor, inverse_PP: Tensor, drop_PO: Tensor, group: int, num_dropped: int
) -> None:
    """The same as `panel_torch.walk_panel`, up to rounding."""
    num_columns, num_outputs = current_PO.shape
    diagonal_P = inverse_PP.diagonal()
    push_PP = (inverse_PP / -diagonal_P[:, None]).contiguous()
    with torch.cuda.device_of(current_PO):  # type: ignore[no-untyped-call]
        _walk[(triton.cdiv(num_outputs, BLOCK),)](
            current_PO,
            drop_PO,
            push_PP,
            diagonal_P.pow(-2),
            num_columns,
            num_outputs,
            PADDED=triton.next_power_of_2(num_columns),
            GROUP=group or 1,
            NUM_DROPPED=num_dropped,
            BLOCK=BLOCK,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _walk(  # type: ignore[no-untyped-def]
    current_ptr,
    drop_ptr,
    push_ptr,
    cost_ptr,
    num_columns,
    num_outputs,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program holds its outputs' whole panel in registers. A column is picked out of it by a
    masked sum, since registers cannot be indexed."""
    columns_P = tl.arange(0, PADDED)
    outputs_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here_PB = columns_P[:, None] * num_outputs + outputs_B[None, :]
    exists_PB = (columns_P < num_columns)[:, None] & (outputs_B < num_outputs)[None, :]
    current_PB = tl.load(current_ptr + here_PB, mask=exists_PB, other=0.0)
    if NUM_DROPPED == 0:
        drop_PB = tl.load(drop_ptr + here_PB, mask=exists_PB, other=0).to(current_PB.dtype)
    else:
        drop_PB = tl.zeros_like(current_PB)
        cost_P = tl.load(cost_ptr + columns_P, mask=columns_P < num_columns, other=0.0)
    for low in range(0, num_columns, GROUP):
        if NUM_DROPPED > 0:
            saliency_PB = current_PB * current_PB * cost_P[:, None]
            rank_PB = tl.zeros((PADDED, BLOCK), dtype=tl.int32)
            for member in tl.static_range(GROUP):
                is_it_P = columns_P == low + member
                its_B = tl.sum(tl.where(is_it_P[:, None], saliency_PB, 0.0), axis=0)
                after_it_P1 = (columns_P > low + member)[:, None]
                goes_first_PB = its_B[None, :] < saliency_PB
                ties_PB = (its_B[None, :] == saliency_PB) & after_it_P1
                rank_PB += (goes_first_PB | ties_PB).to(tl.int32)
            in_group_P1 = ((columns_P >= low) & (columns_P < low + GROUP))[:, None]
            goes_PB = in_group_P1 & (rank_PB < NUM_DROPPED)
            drop_PB = tl.where(goes_PB, 1.0, drop_PB).to(current_PB.dtype)
        for i in range(low, low + GROUP):
            lost_PB = tl.where((columns_P == i)[:, None], current_PB * drop_PB, 0.0)
            lost_B = tl.sum(lost_PB, axis=0)
            later_P = (columns_P > i) & (columns_P < num_columns)
            push_P = tl.load(push_ptr + i * num_columns + columns_P, mask=later_P, other=0.0)
            current_PB += push_P[:, None] * lost_B[None, :]
    tl.store(current_ptr + here_PB, current_PB - current_PB * drop_PB, mask=exists_PB)
    if NUM_DROPPED > 0:
        tl.store(drop_ptr + here_PB, drop_PB != 0, mask=exists_PB)
