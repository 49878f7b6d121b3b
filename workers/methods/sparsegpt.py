"""SparseGPT: drop column by column, and let the later columns make up for it, arXiv:2301.00774.

Dropping w from column i costs e = w / U_ii and moves column j > i by -e U_ij, where H⁻¹ = Uᵀ U. The
published loop inverts the Hessian for that. We factor H = R Rᵀ, R upper; so U = R⁻¹, of which the
walk through a panel needs only the panel's own corner, R_PP⁻¹. What earlier panels did to it
follows from what they lost (D = trained - pruned, e = D R):

    current_P = trained_P + (sum over earlier i of D_i R_iP) R_PP⁻¹

A panel is held transposed, so that a step touches consecutive memory, and updates wait until they
make a matrix product: within a panel of leaf, 2, 4 ... columns, then of the panel as a whole.

Shape letters: O output features (of all stacked layers), I input features, P inputs of a panel,
L of a leaf.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from jobs.methods import SparseGPTSpec
from jobs.pattern import Target
from workers.masks import drop_smallest, keep_mask, kth_smallest, rank_in_groups
from workers.methods.common import Pruned, need
from workers.methods.hessian import Factor, factor_hessian
from workers.statistics import Statistics

LEAF = 8
"""Columns walked one by one between two matrix products, unstructured. Under N:M it is M."""


def prune_sparsegpt(
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> list[Pruned]:
    """Prune layers that read one input and have one pattern; thresholds are each layer's own.

    Stacking q, k and v of 576 x 576 takes half the time of pruning them one by one. The weights on
    an input that is always 0 are set to 0 first, so that they cost nothing to drop.
    """
    statistics = need(statistics)
    group = targets[0].pattern.group or 1
    factor, damping = factor_hessian(
        statistics,
        options.damping,
        normalised=options.mode == "improved" and options.damping_rule == "normalised",
        panel=max(options.block_size - options.block_size % group, group),
        dtype=torch.float64 if weights[0].dtype == torch.float64 else torch.float32,
    )
    trained_OI = weights[0].contiguous() if len(weights) == 1 else torch.cat(list(weights))
    dead_I = statistics.gram_II.diagonal() == 0
    if dead_I.any():
        trained_OI = trained_OI.masked_fill(dead_I, 0)
    sizes = [len(weight) for weight in weights]
    pruned_OI, keep_OI = _walk_panels(trained_OI, factor, sizes, targets, options)
    layers = zip(weights, torch.split(pruned_OI, sizes), torch.split(keep_OI, sizes), strict=True)
    return [
        Pruned(pruned_OI.to(weight.dtype, copy=True), keep_OI.clone(), damping)
        for weight, pruned_OI, keep_OI in layers
    ]


def _walk_panels(
    trained_OI: Tensor,
    factor: Factor,
    sizes: list[int],
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> tuple[Tensor, Tensor]:
    """The pruned weights, in the factor's type, and the mask."""
    above_II = factor.above_II
    # until its turn, a column of it holds the sum of D_i R_ij
    pruned_OI = torch.zeros_like(trained_OI, dtype=above_II.dtype)
    keep_OI = torch.empty_like(trained_OI, dtype=torch.bool)
    kept, group = targets[0].pattern.kept, targets[0].pattern.group
    num_dropped = group - kept if group and kept else 0
    layers = zip(torch.split(trained_OI, sizes), targets, strict=True)
    budgets = [
        [] if num_dropped else _budgets(layer_OI, factor, target, options)
        for layer_OI, target in layers
    ]
    start = 0
    for number, inverse_PP in enumerate(factor.inverses):
        stop = start + len(inverse_PP)
        here, after = slice(start, stop), slice(stop, None)
        # a copy before the transpose: 5 times as fast where a row fills whole cache sets
        trained_OP = trained_OI[:, here].to(above_II.dtype, copy=True)
        trained_PO = trained_OP.T.clone(memory_format=torch.contiguous_format)
        current_PO = torch.addmm(trained_PO, inverse_PP.T, pruned_OI[:, here].T)
        drop_PO = torch.empty_like(current_PO)  # 1 where dropped; a float, to multiply with
        if not num_dropped:
            saliency_PO = (current_PO / inverse_PP.diagonal()[:, None]).square_()
            of_panel = [budget[number] for budget in budgets]
            drop_PO.copy_(_drop_in_panel(saliency_PO, sizes, of_panel, options.mode))
        dropped_PO = _walk_panel(current_PO, inverse_PP, drop_PO, group or LEAF, num_dropped)
        kept_PO = current_PO.sub_(dropped_PO)
        pruned_OI[:, here] = kept_PO.T
        keep_OI[:, here] = (drop_PO == 0).T
        pruned_OI[:, after].addmm_(trained_PO.sub_(kept_PO).T, above_II[here, after])
        start = stop
    return pruned_OI, keep_OI


def _walk_panel(
    current_PO: Tensor, inverse_PP: Tensor, drop_PO: Tensor, leaf: int, num_dropped: int
) -> Tensor:
    """Prune a panel's columns from first to last. Returns what each dropped weight had become.

    Updates `current_PO`, dropped weights not yet zeroed. If `num_dropped` is not 0, a leaf is a
    group of N:M, whose mask is decided when its turn comes and written to `drop_PO`.
    """
    num_columns, num_outputs = current_PO.shape
    if num_columns % leaf:
        leaf = 1
    cost_P1 = inverse_PP.diagonal().pow(-2)[:, None]
    push_PP = inverse_PP / -inverse_PP.diagonal()[:, None]  # per unit dropped from each column
    dropped_PO = torch.empty_like(current_PO)
    work_LO = current_PO.new_empty(leaf, num_outputs)
    push_LLO = current_PO.new_empty(leaf, leaf, num_outputs)
    # views are made once, and all leaves' in one call: making one takes as long as using it
    steps = [(work_LO[i + 1 :], push_LLO[i, i + 1 :], work_LO[i]) for i in range(leaf - 1)]
    blocks = push_PP.view(-1, leaf, num_columns // leaf, leaf).diagonal(dim1=0, dim2=2)
    leaves = zip(
        range(leaf, num_columns + 1, leaf),
        torch.split(current_PO, leaf),
        torch.split(drop_PO, leaf),
        torch.split(dropped_PO, leaf),
        torch.split(cost_P1, leaf),
        blocks[..., None].unbind(2),
        strict=True,
    )
    for high, current_LO, drop_LO, dropped_LO, cost_L1, push_LL1 in leaves:
        work_LO.copy_(current_LO)
        if num_dropped:
            torch.lt(rank_in_groups(work_LO.square().mul_(cost_L1)), num_dropped, out=drop_LO)
        torch.mul(push_LL1, drop_LO[:, None], out=push_LLO)
        for later_LO, push_LO, column_O in steps:
            later_LO.addcmul_(push_LO, column_O)
        torch.mul(work_LO, drop_LO, out=dropped_LO)
        current_LO.copy_(work_LO)
        if high < num_columns:
            leaves_done = high // leaf
            block = leaf * (leaves_done & -leaves_done)  # largest power of 2 that divides them
            back, ahead = slice(high - block, high), slice(high, high + block)
            current_PO[ahead].addmm_(push_PP[back, ahead].T, dropped_PO[back])
    return dropped_PO


def _budgets(
    trained_OI: Tensor, factor: Factor, target: Target, options: SparseGPTSpec
) -> list[int]:
    """How many weights one layer loses in each panel. They sum to round(sparsity * size).

    But in reference mode a panel's threshold takes one more, and ties.
    """
    widths = [len(inverse_PP) for inverse_PP in factor.inverses]
    per_input = target.sparsity * len(trained_OI)
    if options.mode == "reference":
        return [int(len(trained_OI) * width * target.sparsity) + 1 for width in widths]
    if options.budget == "panel":
        return [b - a for a, b in pairwise(round(per_input * n) for n in accumulate([0, *widths]))]
    scale_I = torch.cat([inverse_PP.diagonal() for inverse_PP in factor.inverses])
    keep_OI = keep_mask((trained_OI / scale_I).square_(), target, compare="layer")
    return [part_OP.numel() - int(part_OP.sum()) for part_OP in torch.split(keep_OI, widths, dim=1)]


def _drop_in_panel(
    saliency_PO: Tensor,
    sizes: list[int],
    budgets: list[int],
    mode: Literal["improved", "reference"],
) -> Tensor:
    """Threshold each layer's part of a panel. Bool, True is dropped."""
    drops = []
    for layer_PO, num_dropped in zip(torch.split(saliency_PO, sizes, 1), budgets, strict=True):
        saliency = layer_PO.reshape(1, -1)
        if mode == "reference":
            drops.append(layer_PO <= kth_smallest(saliency, num_dropped))
        else:
            drops.append(drop_smallest(saliency, num_dropped).reshape(layer_PO.shape))
    return torch.cat(drops, dim=1)
