"""The damped Hessian of a layer's squared output error, and its factor.

Shape letters: I input features.
"""

import torch
from torch import Tensor

from jobs.errors import NumericError
from workers.statistics import Statistics

LADDER = (0.1, 1.0)
"""Dampings tried, after the one asked for, where the Hessian is not positive definite."""


def factor_hessian(
    statistics: Statistics, damping: float, *, normalised: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """Factor the damped Hessian H as R Rᵀ.

    Args:
        damping: added to the diagonal, as a share of each input's own energy if `normalised`, of
            the mean energy otherwise.

    Returns:
        R, upper triangular, (I, I), and the damping that made it possible. An input that is
        always 0 has energy 1 and is uncorrelated with every other.

    Raises:
        NumericError: not positive definite with any damping of the ladder.

    With J the reversal of the inputs, J H J = L Lᵀ gives R = J L J. Then R⁻¹ is the upper Cholesky
    factor of H⁻¹ that SparseGPT is written with, and H is never inverted.
    """
    reversed_II = statistics.gram_II.to(dtype).flip(0, 1)
    reversed_II *= 2 / max(statistics.num_sequences, 1)
    energy_I = reversed_II.diagonal().clone()
    energy_I[energy_I == 0] = 1
    added_I = energy_I if normalised else energy_I.mean()
    tried = (damping, *(d for d in LADDER if d > damping))
    for attempt in tried:
        reversed_II.diagonal().copy_(energy_I + attempt * added_I)
        lower_II, failed = torch.linalg.cholesky_ex(reversed_II)
        if not failed and lower_II.isfinite().all():
            return lower_II.flip(0, 1), attempt
    raise NumericError(
        f"the damped Hessian ({len(energy_I)} x {len(energy_I)}) is not positive definite (damping "
        f"tried: {', '.join(map(str, tried))}). Calibrate on more than "
        f"{statistics.num_tokens:.0f} tokens, or raise prune.method.damping"
    )
