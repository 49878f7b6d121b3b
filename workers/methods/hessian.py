"""The damped Hessian of a layer's squared output error, and its factor.

Shape letters: I input features, P inputs of one panel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.errors import NumericError
from workers.statistics import Statistics

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
    damping: float
    """What made the Hessian positive definite."""


def factor_hessian(
    statistics: Statistics,
    damping: float,
    *,
    normalised: bool,
    panel: int = 128,
    dtype: torch.dtype = torch.float32,
) -> Factor:
    """Factor the damped Hessian, which is never inverted.

    Args:
        damping: added to the diagonal, as a share of each input's own energy if `normalised`, of
            the mean energy otherwise. An input that is always 0 counts as of energy 1.

    Raises:
        NumericError: not positive definite with any damping of the ladder.
    """
    tried = (damping, *(larger for larger in LADDER if larger > damping))
    for attempt in tried:
        hessian_II = statistics.gram_II.to(dtype) * (2 / max(statistics.num_sequences, 1))
        energy_I = hessian_II.diagonal()
        energy_I[energy_I == 0] = 1
        energy_I += attempt * (energy_I if normalised else energy_I.mean())
        inverses = _factor_in_place(hessian_II, panel)
        if inverses is not None:
            return Factor(hessian_II, inverses, attempt)
    raise NumericError(
        f"the damped Hessian ({len(energy_I)} x {len(energy_I)}) is not positive definite (damping "
        f"tried: {', '.join(map(str, tried))}). Calibrate on more than "
        f"{statistics.num_tokens:.0f} tokens, or raise prune.method.damping"
    )


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
