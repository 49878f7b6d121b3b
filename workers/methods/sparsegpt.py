"""SparseGPT: drop column by column, and let the later columns make up for it, arXiv:2301.00774.

Dropping w from column i costs e = w / U_ii and moves column j > i by -e U_ij, where H⁻¹ = Uᵀ U. The
published loop inverts the Hessian for that. We factor H = R Rᵀ, R upper; so U = R⁻¹, of which the
walk through a panel needs only the panel's own corner, R_PP⁻¹. What earlier panels did to it
follows from what they lost (D = trained - pruned, e = D R):

    current_P = trained_P + (sum over earlier i of D_i R_iP) R_PP⁻¹

All is held transposed, so that a step touches consecutive memory. What happens within a panel is
in panel_numba.py (on a CPU), panel_triton.py (on CUDA) and, in plain torch, panel_torch.py.

Shape letters: O output features (of all stacked layers), I input features, P inputs of a panel.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from jobs.methods import SparseGPTSpec
from jobs.pattern import Target
from workers.masks import drop_smallest, kth_smallest
from workers.methods.common import Pruned, need
from workers.methods.hessian import Factor, factor_hessian
from workers.statistics import Statistics

WalkPanel = Callable[[Tensor, Tensor, Tensor, int, int], None]
"""See `panel_torch.walk_panel`."""


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
    several = len(weights) > 1
    stacked_OI = torch.cat(list(weights)) if several else weights[0].detach()
    trained_OI = stacked_OI.to(factor.above_II.dtype)
    dead_I = statistics.gram_II.diagonal() == 0
    if dead_I.any():
        trained_OI = trained_OI.masked_fill(dead_I, 0)
    sizes = [len(weight) for weight in weights]
    pruned_OI, keep_OI = _walk_panels(trained_OI, factor, sizes, targets, options)
    layers = zip(weights, torch.split(pruned_OI, sizes), torch.split(keep_OI, sizes), strict=True)
    return [  # copied, or each would keep them all alive
        Pruned(layer_OI.to(weight.dtype, copy=several), mask_OI.to(copy=several), damping)
        for weight, layer_OI, mask_OI in layers
    ]


def _walk_panels(
    trained_OI: Tensor,
    factor: Factor,
    sizes: list[int],
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> tuple[Tensor, Tensor]:
    """The pruned weights, and the mask. A panel is transposed while it is worked on."""
    pruned_OI = trained_OI.new_empty(trained_OI.shape)
    keep_OI = trained_OI.new_empty(trained_OI.shape, dtype=torch.bool)
    pushed_IO = trained_OI.new_zeros(trained_OI.shape[::-1])  # the sum of R_ij D_i so far
    kept, group = targets[0].pattern.kept, targets[0].pattern.group
    num_dropped = group - kept if group and kept else 0
    layers = zip(torch.split(trained_OI, sizes), targets, strict=True)
    budgets = [
        [] if num_dropped else _budgets(layer_OI, factor, target, options)
        for layer_OI, target in layers
    ]
    walk_panel = panel_walker(trained_OI.device)
    start = 0
    for number, inverse_PP in enumerate(factor.inverses):
        stop = start + len(inverse_PP)
        trained_PO = _transposed(trained_OI[:, start:stop])
        current_PO = torch.addmm(trained_PO, inverse_PP.T, pushed_IO[start:stop])
        drop_PO = torch.empty_like(current_PO, dtype=torch.bool)
        if not num_dropped:
            saliency_PO = (current_PO / inverse_PP.diagonal()[:, None]).square_()
            of_panel = [budget[number] for budget in budgets]
            _drop_in_panel(saliency_PO, sizes, of_panel, options.mode, out_PO=drop_PO)
        walk_panel(current_PO, inverse_PP, drop_PO, group or 0, num_dropped)
        _transpose(current_PO, pruned_OI[:, start:stop])
        _transpose(drop_PO.logical_not_(), keep_OI[:, start:stop])
        if stop < len(pushed_IO):
            lost_PO = trained_PO.sub_(current_PO)
            pushed_IO[stop:].addmm_(factor.above_II[start:stop, stop:].T, lost_PO)
        start = stop
    return pruned_OI, keep_OI


def _transposed(matrix: Tensor) -> Tensor:
    """A copy of (A, B), in order."""
    result = matrix.new_empty(matrix.shape[::-1])
    _transpose(matrix, result)
    return result


def _transpose(matrix: Tensor, result: Tensor) -> None:
    """Write (A, B) into (B, A)."""
    if matrix.device.type == "cpu":
        from workers.methods.panel_numba import transpose

        transpose(matrix, result)
    else:
        result.copy_(matrix.T)


def panel_walker(device: torch.device) -> WalkPanel:
    """The fastest there is. Imported late: compilers take their time."""
    if device.type == "cpu":
        from workers.methods.panel_numba import walk_panel
    elif device.type == "cuda" and find_spec("triton"):
        from workers.methods.panel_triton import walk_panel
    else:
        from workers.methods.panel_torch import walk_panel
    return walk_panel


def _budgets(
    trained_OI: Tensor, factor: Factor, target: Target, options: SparseGPTSpec
) -> list[int]:
    """How many weights one layer loses in each panel. They sum to round(sparsity * size).

    But in reference mode a panel's threshold takes one more, and ties.
    """
    widths = [len(inverse_PP) for inverse_PP in factor.inverses]
    num_outputs = len(trained_OI)
    per_input = target.sparsity * num_outputs
    if options.mode == "reference":
        return [int(num_outputs * width * target.sparsity) + 1 for width in widths]
    if options.budget == "panel":
        return [b - a for a, b in pairwise(round(per_input * n) for n in accumulate([0, *widths]))]
    scale_I = torch.cat([inverse_PP.diagonal() for inverse_PP in factor.inverses])
    saliency_OI = (trained_OI / scale_I).square_()
    drop_OI = drop_smallest(saliency_OI.view(1, -1), round(target.sparsity * saliency_OI.numel()))
    panels = torch.split(drop_OI.view(saliency_OI.shape), widths, dim=1)
    return [int(drop_OP.count_nonzero()) for drop_OP in panels]


def _drop_in_panel(
    saliency_PO: Tensor,
    sizes: list[int],
    budgets: list[int],
    mode: Literal["improved", "reference"],
    *,
    out_PO: Tensor,
) -> None:
    """Threshold each layer's part of a panel."""
    layers = zip(
        torch.split(saliency_PO, sizes, 1), torch.split(out_PO, sizes, 1), budgets, strict=True
    )
    for layer_PO, drop_PO, num_dropped in layers:
        saliency = layer_PO.reshape(1, -1)
        if mode == "reference":
            torch.le(layer_PO, kth_smallest(saliency, num_dropped), out=drop_PO)
        else:
            drop_PO.copy_(drop_smallest(saliency, num_dropped).view(layer_PO.shape))
