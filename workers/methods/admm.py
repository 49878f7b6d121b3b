"""ADMM with a mask that tightens gradually, arXiv:2401.02938.

Two bugs of the release are not here: its unstructured mask was at the final sparsity from the
first iteration on, and its N:M took M to be 4. Two things differ: an N:M mask tightens within its
groups, and a weight's saliency is what dropping it costs once the others have made up for it.

Shape letters: O output features, I input features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.methods import ADMMSpec
from jobs.pattern import Target
from workers.masks import keep_mask
from workers.methods.common import Pruned, need, tf32
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
    results = []
    for weight_OI, target in zip(weights, targets, strict=True):
        with tf32():
            solved_OI, keep_OI = _iterate(weight_OI * alive_I * norm_I, inverse_II, target, options)
        results.append(Pruned((solved_OI / norm_I).to(weight_OI.dtype), keep_OI, damping))
    return results


def _iterate(
    trained_OI: Tensor, inverse_II: Tensor, target: Target, options: ADMMSpec
) -> tuple[Tensor, Tensor]:
    """The published iteration, in coordinates in which every input is equally loud.

    `inverse_II` is K = (H + rho)⁻¹, so H K, which the trained weights pull by, is 1 - rho K.
    """
    pull_OI = torch.addmm(trained_OI, trained_OI, inverse_II, alpha=-options.rho)
    solved_OI, owed_OI = trained_OI.clone(), torch.zeros_like(trained_OI)
    keep_OI = torch.ones_like(trained_OI, dtype=torch.bool)
    scale_I = inverse_II.diagonal().rsqrt()
    for step in range(options.iterations):
        proposed_OI = solved_OI.add_(owed_OI)
        if step < options.masking_iterations:
            progress = (step + 1) / options.masking_iterations
            keep_OI = _tightening_mask(proposed_OI.abs() * scale_I, target, progress, options)
        owed_OI = proposed_OI.masked_fill(keep_OI, 0)
        masked_less_owed_OI = proposed_OI.sub_(owed_OI, alpha=2)
        solved_OI = torch.addmm(pull_OI, masked_less_owed_OI, inverse_II, alpha=options.rho)
    return solved_OI.add_(owed_OI).masked_fill_(~keep_OI, 0), keep_OI


def _tightening_mask(
    saliency_OI: Tensor, target: Target, progress: float, options: ADMMSpec
) -> Tensor:
    """The mask when the share `progress` of its tightening is done, by a cubic schedule.

    Under N:M only weights that would go at the end may go earlier: a mask over the whole layer
    empties some groups and spares others, and its last step then undoes what was solved for.
    """
    if progress == 1:
        return keep_mask(saliency_OI, target, compare=options.compare)
    if target.pattern.group:
        stays_OI = keep_mask(saliency_OI, target)
        saliency_OI = saliency_OI.masked_fill(stays_OI, torch.finfo(saliency_OI.dtype).max)
    now = Target(target.sparsity * (1 - (1 - progress) ** 3))
    return keep_mask(saliency_OI, now, compare=options.compare)
