"""SparseGPT: drop column by column, and let the later columns make up for it, arXiv:2301.00774.

Dropping w from column i costs e = w / U_ii and moves column j > i by -e U_ij, where H⁻¹ = Uᵀ U. The
published loop inverts the Hessian for that. We factor H = R Rᵀ, R upper; so U = R⁻¹, of which the
walk through a panel needs only the panel's own corner, R_PP⁻¹. What earlier panels did to it
follows from what they lost (D = trained - pruned, e = D R):

    current_P = trained_P + (sum over earlier i of D_i R_iP) R_PP⁻¹

Weights are held transposed, so that a step touches consecutive memory, and updates wait until they
make a matrix product: within a panel of leaf, 2, 4 ... columns, then of the panel as a whole.

Shape letters: O output features (of all stacked layers), I input features, P inputs of a panel,
L of a leaf.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.methods import SparseGPTSpec
from jobs.pattern import Target
from workers.masks import drop_in_groups, drop_smallest, keep_mask, kth_smallest
from workers.methods.common import Pruned, need
from workers.methods.hessian import factor_hessian
from workers.statistics import Statistics

MAX_LEAF = 8
"""Columns walked one by one between two matrix products."""


def prune_sparsegpt(
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> list[Pruned]:
    """Prune layers that read one input and have one pattern; thresholds are each layer's own.

    The weights on an input that is always 0 are set to 0 first, so that they cost nothing to drop.
    """
    statistics = need(statistics)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    factor_II, damping = factor_hessian(
        statistics,
        options.damping,
        normalised=options.mode == "improved" and options.damping_rule == "normalised",
        dtype=dtype,
    )
    trained_IO = torch.cat([weight.T.to(dtype) for weight in weights], dim=1)
    trained_IO[statistics.gram_II.diagonal() == 0] = 0
    sizes = [len(weight) for weight in weights]
    pruned_IO, keep_IO = _walk_panels(trained_IO, factor_II, sizes, targets, options)
    layers = zip(
        weights, torch.split(pruned_IO, sizes, 1), torch.split(keep_IO, sizes, 1), strict=True
    )
    return [
        Pruned(pruned_IO.T.to(weight.dtype).contiguous(), keep_IO.T.contiguous(), damping)
        for weight, pruned_IO, keep_IO in layers
    ]


def _walk_panels(
    trained_IO: Tensor,
    factor_II: Tensor,
    sizes: list[int],
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> tuple[Tensor, Tensor]:
    """The pruned weights and the mask, (I, O) each. Overwrites `trained_IO` with what was lost."""
    pattern = targets[0].pattern
    group, num_dropped = pattern.group or 1, (pattern.group or 0) - (pattern.kept or 0)
    panel = max(options.block_size - options.block_size % group, group)
    leaf = group if num_dropped else _leaf(panel)
    pruned_IO = torch.zeros_like(trained_IO)  # until its turn, a row holds the sum of D_i R_ij
    drop_IO = torch.empty_like(trained_IO)  # 1 where dropped; a float, to multiply with
    scope = "panel" if options.mode == "reference" else options.threshold
    if not num_dropped and scope != "panel":
        saliency_IO = (trained_IO * factor_II.diagonal()[:, None]).square_()
        keeps = [
            keep_mask(layer_IO.T, target, compare=scope).T
            for layer_IO, target in zip(torch.split(saliency_IO, sizes, 1), targets, strict=True)
        ]
        drop_IO.copy_(torch.cat(keeps, dim=1).logical_not_())
    for start in range(0, len(trained_IO), panel):
        here, after = slice(start, start + panel), slice(start + panel, None)
        inverse_PP = _inverse(factor_II[here, here])
        current_PO = torch.addmm(trained_IO[here], inverse_PP.T, pruned_IO[here])
        if not num_dropped and scope == "panel":
            drop_IO[here] = _drop_in_panel(
                current_PO / inverse_PP.diagonal()[:, None], sizes, targets, options, start
            )
        dropped_PO = _walk_panel(current_PO, inverse_PP, drop_IO[here], leaf, num_dropped)
        torch.sub(current_PO, dropped_PO, out=pruned_IO[here])
        trained_IO[here] -= pruned_IO[here]
        pruned_IO[after].addmm_(factor_II[here, after].T, trained_IO[here])
    return pruned_IO, drop_IO == 0


def _walk_panel(
    current_PO: Tensor, inverse_PP: Tensor, drop_PO: Tensor, leaf: int, num_dropped: int
) -> Tensor:
    """Prune a panel's columns from first to last. Returns what each dropped weight had become.

    Updates `current_PO`, dropped weights not yet zeroed. If `num_dropped` is not 0, a leaf is a
    group of N:M, whose mask is decided when its turn comes and written to `drop_PO`.
    """
    cost_P1 = inverse_PP.diagonal().pow(-2)[:, None]
    push_PP = inverse_PP / -inverse_PP.diagonal()[:, None]  # per unit dropped from each column
    dropped_PO = torch.empty_like(current_PO)
    for low in range(0, len(current_PO), leaf):
        current_LO, drop_LO = current_PO[low : low + leaf], drop_PO[low : low + leaf]
        high = low + len(current_LO)
        if num_dropped:
            drop_LO.copy_(drop_in_groups(current_LO.square() * cost_P1[low:high], num_dropped))
        push_LLO = push_PP[low:high, low:high, None] * drop_LO[:, None]
        for i in range(len(current_LO) - 1):
            current_LO[i + 1 :].addcmul_(push_LLO[i, i + 1 :], current_LO[i])
        torch.mul(current_LO, drop_LO, out=dropped_PO[low:high])
        leaves_done = high // leaf
        block = leaf * (leaves_done & -leaves_done)  # largest power of 2 that divides them
        rest = slice(high, high + block)
        if high < len(current_PO):
            current_PO[rest].addmm_(
                push_PP[high - block : high, rest].T, dropped_PO[high - block : high]
            )
    return dropped_PO


def _drop_in_panel(
    change_PO: Tensor,
    sizes: list[int],
    targets: Sequence[Target],
    options: SparseGPTSpec,
    num_before: int,
) -> Tensor:
    """Threshold each layer's part of a panel by what dropping would cost, the square of `change`.

    Over all panels (`num_before` inputs were in earlier ones) a layer loses round(sparsity * size).
    """
    drops = []
    for layer_PO, target in zip(torch.split(change_PO.square(), sizes, 1), targets, strict=True):
        num_inputs, num_outputs = layer_PO.shape
        saliency = layer_PO.reshape(1, -1)
        if options.mode == "reference":
            drops.append(
                layer_PO <= kth_smallest(saliency, int(layer_PO.numel() * target.sparsity) + 1)
            )
        else:
            num_dropped = round(target.sparsity * num_outputs * (num_before + num_inputs)) - round(
                target.sparsity * num_outputs * num_before
            )
            drops.append(drop_smallest(saliency, num_dropped).reshape(layer_PO.shape))
    return torch.cat(drops, dim=1)


def _inverse(factor_PP: Tensor) -> Tensor:
    inverse_PP = torch.eye(len(factor_PP), dtype=factor_PP.dtype, device=factor_PP.device)
    torch.linalg.solve_triangular(factor_PP, inverse_PP, upper=True, out=inverse_PP)
    return inverse_PP


def _leaf(panel: int) -> int:
    leaf = panel
    while leaf > MAX_LEAF and leaf % 2 == 0:
        leaf //= 2
    return leaf
