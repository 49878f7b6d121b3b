"""ADMM with a mask that tightens gradually, arXiv:2401.02938.

Two bugs of the release are not here: its unstructured mask was at the final sparsity from the
first iteration on, and its N:M took M to be 4.

Shape letters: O output features, I input features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.methods import ADMMSpec
from jobs.pattern import Target
from workers.masks import keep_mask
from workers.methods.common import Pruned, need
from workers.methods.hessian import correlations, try_dampings
from workers.statistics import Statistics


def prune_admm(
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    targets: Sequence[Target],
    options: ADMMSpec,
) -> list[Pruned]:
    """Prune layers that read one input. They share the one inverse that it takes."""
    statistics = need(statistics)
    norm_I, hessian_II = correlations(statistics)
    alive_I = statistics.gram_II.diagonal() > 0

    def invert(damping: float) -> Tensor | None:
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(damping + options.rho)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        return None if failed else torch.cholesky_inverse(lower_II)

    inverse_II, damping = try_dampings(invert, options.damping, statistics)
    hessian_II.diagonal().add_(damping)
    results = []
    for weight_OI, target in zip(weights, targets, strict=True):
        solved_OI, keep_OI = _iterate(
            weight_OI * alive_I * norm_I, hessian_II, inverse_II, target, options
        )
        results.append(Pruned((solved_OI / norm_I).to(weight_OI.dtype), keep_OI, damping))
    return results


def _iterate(
    trained_OI: Tensor, hessian_II: Tensor, inverse_II: Tensor, target: Target, options: ADMMSpec
) -> tuple[Tensor, Tensor]:
    """The published iteration, in coordinates in which every input is equally loud."""
    goal_OI = trained_OI @ hessian_II
    solved_OI, owed_OI = trained_OI, torch.zeros_like(trained_OI)
    keep_OI = torch.ones_like(trained_OI, dtype=torch.bool)
    for step in range(options.iterations):
        proposed_OI = solved_OI + owed_OI
        if step < options.masking_iterations:
            progress = (step + 1) / options.masking_iterations
            now = Target(target.sparsity * (1 - (1 - progress) ** 3))
            keep_OI = keep_mask(
                proposed_OI.abs(), target if progress == 1 else now, compare=options.compare
            )
        masked_OI = proposed_OI * keep_OI
        owed_OI = proposed_OI - masked_OI
        solved_OI = (goal_OI + options.rho * (masked_OI - owed_OI)) @ inverse_II
    return (solved_OI + owed_OI) * keep_OI, keep_OI
