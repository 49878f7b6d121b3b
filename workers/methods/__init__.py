"""The pruning methods, behind one interface: `prune` for a layer, `prune_shared` for several that
read the same input.

Shape letters: O output features, I input features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.errors import NumericError
from jobs.methods import (
    ADMMSpec,
    DenseSpec,
    DSnoTSpec,
    MagnitudeSpec,
    MethodOptions,
    RIASpec,
    SparseGPTSpec,
    SparseSwapsSpec,
    WandaSpec,
)
from jobs.pattern import Pattern, Target
from workers.methods.admm import prune_admm
from workers.methods.common import Pruned, need
from workers.methods.dsnot import prune_dsnot
from workers.methods.magnitude import prune_magnitude
from workers.methods.reconstruct import reconstruct
from workers.methods.ria import prune_ria
from workers.methods.sparsegpt import prune_sparsegpt
from workers.methods.sparseswaps import prune_sparseswaps
from workers.methods.wanda import prune_wanda
from workers.statistics import Statistics, all_finite

__all__ = ["Pattern", "Pruned", "Target", "prune", "prune_shared"]

Method = Callable[[Tensor, Statistics | None, Target, Any], Pruned]
SharedMethod = Callable[[list[Tensor], Statistics | None, list[Target], Any], list[Pruned]]

METHODS: dict[type[MethodOptions], Method] = {
    MagnitudeSpec: prune_magnitude,
    WandaSpec: prune_wanda,
    RIASpec: prune_ria,
    SparseSwapsSpec: prune_sparseswaps,
}
SHARED_METHODS: dict[type[MethodOptions], SharedMethod] = {
    SparseGPTSpec: prune_sparsegpt,
    ADMMSpec: prune_admm,
}
"""Those that factor the Hessian once for all layers of one input and one pattern."""


def prune(
    weight_OI: Tensor,
    statistics: Statistics | None,
    target: Target,
    options: MethodOptions,
    *,
    where: str = "layer",
) -> Pruned:
    """Prune one linear layer.

    Args:
        weight_OI: any float type, on the device of the statistics. Left as it is.
        statistics: of the layer's input; None for a method that needs none.
        where: the layer's name, for errors.

    Returns:
        New tensors; but at sparsity 0, and from `dense`, the weight itself, bit for bit.

    Raises:
        ValueError: the layer's inputs do not fill groups of M, or do not fit the statistics.
        NumericError: NaN or infinity in the weight or the statistics, no calibration token, or a
            Hessian that no damping makes positive definite. Names the layer.
    """
    return prune_shared([weight_OI], statistics, target, options, where=where)[0]


@torch.no_grad()
def prune_shared(
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    target: Target | Sequence[Target],
    options: MethodOptions,
    *,
    where: str = "layer",
) -> list[Pruned]:
    """Prune layers that read one input (q, k and v), each to its own target; see `prune`.

    The result is that of pruning them one by one, up to rounding; SparseGPT factors the Hessian
    only once and walks through the columns of all of them together.
    """
    targets = [target] * len(weights) if isinstance(target, Target) else list(target)
    for weight_OI, each in zip(weights, targets, strict=True):
        _check(weight_OI, statistics, each, where)
    if statistics is not None:
        statistics.check_finite(where)
    results = [Pruned(weight, torch.ones_like(weight, dtype=torch.bool)) for weight in weights]
    if isinstance(options, DenseSpec):
        return results
    try:
        for pattern in dict.fromkeys(each.pattern for each in targets if each.sparsity):
            those = [
                i for i, each in enumerate(targets) if each.sparsity and each.pattern == pattern
            ]
            trained = [weights[i] for i in those]
            pruned = _dispatch(trained, statistics, [targets[i] for i in those], options)
            if options.reconstruct == "pcg":
                pruned = reconstruct(trained, pruned, need(statistics), options)
            for i, one in zip(those, pruned, strict=True):
                if not all_finite(one.weight_OI):
                    raise NumericError(
                        f"a pruned weight is NaN or does not fit in {one.weight_OI.dtype}"
                    )
                results[i] = one
    except NumericError as error:
        raise NumericError(f"{where}: {error.message}") from error
    return results


def _check(weight_OI: Tensor, statistics: Statistics | None, target: Target, where: str) -> None:
    num_inputs = weight_OI.shape[1]
    if target.sparsity:
        target.pattern.check_inputs(num_inputs, where)
    if not all_finite(weight_OI):
        num_bad = int((~weight_OI.isfinite()).sum())
        raise NumericError(f"{where}: {num_bad} of {weight_OI.numel()} weights are NaN or infinite")
    if statistics is not None and len(statistics.sum_I) != num_inputs:
        raise ValueError(
            f"{where}: the layer has {num_inputs} inputs, its statistics {len(statistics.sum_I)}"
        )


def _dispatch(
    weights: list[Tensor],
    statistics: Statistics | None,
    targets: list[Target],
    options: MethodOptions,
) -> list[Pruned]:
    if isinstance(options, DSnoTSpec):
        dead_I = need(statistics).gram_II.diagonal() == 0  # these go first, whoever starts
        without_dead = [weight.masked_fill(dead_I, 0) for weight in weights]
        starts = _dispatch(without_dead, statistics, targets, options.start)
        return [
            prune_dsnot(weight, statistics, target, options, start.keep_OI)
            for weight, target, start in zip(weights, targets, starts, strict=True)
        ]
    if type(options) in SHARED_METHODS:
        return SHARED_METHODS[type(options)](weights, statistics, targets, options)
    method = METHODS[type(options)]
    return [method(w, statistics, t, options) for w, t in zip(weights, targets, strict=True)]
