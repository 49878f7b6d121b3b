"""What a method is given and gives back, and what several of them need.

A method is a function of one layer, `(weight_OI, statistics, target, options) -> Pruned`. It knows
no policy: how much each layer loses is decided before.

Shape letters: O output features, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.statistics import Statistics


@dataclass(frozen=True)
class Pruned:
    """One layer after pruning."""

    weight_OI: Tensor
    """In the type of the weight that came in. Exactly 0 where dropped."""
    keep_OI: Tensor
    """Bool; True is kept. A kept weight may happen to be 0."""
    damping_used: float | None = None
    """What made the Hessian positive definite; None where none was factored."""


def need(statistics: Statistics | None) -> Statistics:
    """The statistics, or an error for whoever forgot to calibrate."""
    if statistics is None:
        raise ValueError("this method needs calibration statistics, and there are none")
    return statistics


def without_dropped(weight_OI: Tensor, keep_OI: Tensor) -> Pruned:
    """The trained weights under a mask."""
    return Pruned(weight_OI.masked_fill(~keep_OI, 0), keep_OI)


@contextmanager
def tf32() -> Iterator[None]:
    """Let CUDA round what it multiplies to 10 bits, and add in fp32: several times as fast.

    For what corrects itself from step to step. A factorization stays in fp32.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
