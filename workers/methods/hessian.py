"""The damped Hessian of a layer's squared output error, and its factor.

Shape letters: I input features, P inputs of one panel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from jobs.errors import NumericError
from workers.statistics import Statistics

T = TypeVar("T")

LADDER = (0.1, 1.0)
"""Dampings tried, after the one asked for, where the Hessian is not positive definite."""


@dataclass(frozen=True)
class Factor:
    """R, upper triangular, with R Rᵀ the damped Hessian, in panels of consecutive inputs.

    R⁻¹ is the upper Cholesky factor of the inverse Hessian, which SparseGPT is written with.
    """

    above_II: Tensor
    """R above the panels on its diagonal. Below them, and in them, it is not R."""
    inverses: list[Tensor]
    """The inverse of each panel on R's diagonal, upper triangular, (P, P)."""


def factor_hessian(
    statistics: Statistics,
    damping: float,
    *,
    normalised: bool,
    panel: int = 128,
    dtype: torch.dtype = torch.float32,
) -> tuple[Factor, float]:
    """Factor the damped Hessian, which is never inverted.

    Args:
        damping: added to the diagonal, as a share of each input's own energy if `normalised`, of
            the mean energy otherwise. An input that is always 0 counts as of energy 1.

    Returns:
        The factor, and the damping that made the Hessian positive definite.
    """

    def factor(attempt: float) -> Factor | None:
        hessian_II = statistics.gram_II.to(dtype) * (2 / max(statistics.num_sequences, 1))
        energy_I = hessian_II.diagonal()
        energy_I[energy_I == 0] = 1
        energy_I += attempt * (energy_I if normalised else energy_I.mean())
        inverses = _factor_in_place(hessian_II, panel)
        return None if inverses is None else Factor(hessian_II, inverses)

    return try_dampings(factor, damping, statistics)


def try_dampings(
    solve: Callable[[float], T | None], damping: float, statistics: Statistics
) -> tuple[T, float]:
    """What `solve` gives for the smallest damping that it does not give None for, and that one.

    Raises:
        NumericError: it gives None for every damping of the ladder.
    """
    tried = (damping, *(larger for larger in LADDER if larger > damping))
    for attempt in tried:
        solved = solve(attempt)
        if solved is not None:
            return solved, attempt
    num_inputs = len(statistics.sum_I)
    raise NumericError(
        f"the damped Hessian ({num_inputs} x {num_inputs}) is not positive definite (damping "
        f"tried: {', '.join(map(str, tried))}). Calibrate on more than "
        f"{statistics.num_tokens:.0f} tokens, or raise prune.method.damping"
    )


def correlations(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """The norm of each input, 1 where it is always 0, and the Gram of inputs divided by it."""
    norm_I = statistics.input_norm_I
    norm_I = torch.where(norm_I == 0, 1, norm_I)
    return norm_I, statistics.gram_II / norm_I[:, None] / norm_I


def _factor_in_place(hessian_II: Tensor, panel: int) -> list[Tensor] | None:
    """Write R above the panels, from the last to the first. The inverses; None if not definite.

    All but the panels on the diagonal is matrix products, 3 times as fast as LAPACK on a CPU.
    """
    inverses = []
    for start in reversed(range(0, len(hessian_II), panel)):
        stop = min(start + panel, len(hessian_II))
        here, after = slice(start, stop), slice(stop, None)
        column = hessian_II[:stop, here]
        column.addmm_(hessian_II[:stop, after], hessian_II[here, after].T, alpha=-1)
        # with J the reversal, J H J = L Lᵀ gives R = J L J
        lower_PP, failed = torch.linalg.cholesky_ex(column[start:].flip(0, 1))
        if failed or not lower_PP.diagonal().isfinite().all():
            return None
        inverse_PP = torch.eye(stop - start, dtype=lower_PP.dtype, device=lower_PP.device)
        torch.linalg.solve_triangular(lower_PP.flip(0, 1), inverse_PP, upper=True, out=inverse_PP)
        column[:start] = column[:start] @ inverse_PP.T
        inverses.append(inverse_PP)
    return inverses[::-1]
