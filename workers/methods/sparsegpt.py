"""SparseGPT: drop column by column, and let the later columns make up for it, arXiv:2301.00774.

The published loop inverts the Hessian and works with U, the upper Cholesky factor of the inverse:
dropping w from column i costs e = w / U_ii and moves column j > i by -e U_ij. We factor H = R Rᵀ
instead, U = R⁻¹, and never invert. With D = (trained - pruned) weights, e = D R, so a column moves
by what the columns before it lost:

    current_j = trained_j + (sum over i < j of D_i R_ij) / R_jj          e_j = current_j R_jj

Weights are held transposed, so that a step touches consecutive memory, and updates wait until they
make a matrix product (within a panel, blocks of 1, 2, 4 ... leaves; then the panel as a whole).

Shape letters: O output features (of all stacked layers), I input features, P inputs of one panel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.methods import SparseGPTSpec
from jobs.pattern import Target
from workers.masks import drop_in_groups, drop_smallest, kth_smallest
from workers.methods.common import Pruned, need
from workers.methods.hessian import factor_hessian
from workers.statistics import Statistics

LEAF = 8
"""Columns walked one by one between two matrix products; unstructured."""


def prune_sparsegpt(
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> list[Pruned]:
    """Prune layers that read one input and have one pattern; thresholds are each layer's own.

    An input that is always 0 counts as already dropped, so its weights go first and become 0.
    """
    statistics = need(statistics)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    normalised = options.mode == "improved" and options.damping_rule == "normalised"
    factor_II, damping = factor_hessian(
        statistics, options.damping, normalised=normalised, dtype=dtype
    )
    trained_IO = torch.cat([weight.T.to(dtype) for weight in weights], dim=1)
    trained_IO[statistics.gram_II.diagonal() == 0] = 0
    sizes = [len(weight) for weight in weights]
    pruned_IO, keep_IO = solve(trained_IO, factor_II, sizes, targets, options)
    layers = zip(
        weights, torch.split(pruned_IO, sizes, 1), torch.split(keep_IO, sizes, 1), strict=True
    )
    return [
        Pruned(pruned.T.to(weight.dtype).contiguous(), keep.T.contiguous(), damping)
        for weight, pruned, keep in layers
    ]


def solve(
    trained_IO: Tensor,
    factor_II: Tensor,
    sizes: list[int],
    targets: Sequence[Target],
    options: SparseGPTSpec,
) -> tuple[Tensor, Tensor]:
    """Walk the columns. Returns the pruned weights and the mask, (I, O) each.

    Overwrites `trained_IO` with what was lost.
    """
    pattern = targets[0].pattern
    lost_IO = trained_IO
    pruned_IO = torch.zeros_like(trained_IO)  # until its turn, a row holds the sum of D_i R_ij
    keep_IO = torch.empty_like(trained_IO, dtype=torch.bool)
    leaf, panel = _strides(options.block_size, pattern.group)
    for start in range(0, len(trained_IO), panel):
        here = slice(start, start + panel)
        factor_PP = factor_II[here, here]
        upper_PP = torch.linalg.solve_triangular(
            factor_PP,
            torch.eye(len(factor_PP), dtype=factor_PP.dtype, device=factor_PP.device),
            upper=True,
        )
        current_PO = torch.addmm(trained_IO[here], upper_PP.T, pruned_IO[here])
        cost_P1 = upper_PP.diagonal().pow(-2)[:, None]
        share_PP = upper_PP / -upper_PP.diagonal()[:, None]
        drop_PO = torch.empty_like(current_PO)
        if pattern.group is None:
            saliency_PO = current_PO.square().mul_(cost_P1)
            drop_PO.copy_(_drop_in_panel(saliency_PO, sizes, targets, options))
        dropped_PO = torch.empty_like(current_PO)
        num = len(current_PO)
        for low in range(0, num, leaf):
            high = min(low + leaf, num)
            current_MO, drop_MO = current_PO[low:high], drop_PO[low:high]
            if pattern.group is not None and pattern.kept is not None:
                saliency_MO = current_MO.square().mul_(cost_P1[low:high])
                drop_MO.copy_(drop_in_groups(saliency_MO, pattern.group - pattern.kept))
            push_MMO = share_PP[low:high, low:high, None] * drop_MO[:, None]
            for i in range(high - low - 1):
                current_MO[i + 1 :].addcmul_(push_MMO[i, i + 1 :], current_MO[i])
            torch.mul(current_MO, drop_MO, out=dropped_PO[low:high])
            if high < num:
                leaves_done = high // leaf
                block = leaf * (leaves_done & -leaves_done)
                current_PO[high : high + block].addmm_(
                    share_PP[high - block : high, high : high + block].T,
                    dropped_PO[high - block : high],
                )
        torch.sub(current_PO, dropped_PO, out=pruned_IO[here])
        lost_IO[here] -= pruned_IO[here]
        torch.eq(drop_PO, 0, out=keep_IO[here])
        rest = slice(start + panel, None)
        pruned_IO[rest].addmm_(factor_II[here, rest].T, lost_IO[here])
    return pruned_IO, keep_IO


def _drop_in_panel(
    saliency_PO: Tensor, sizes: list[int], targets: Sequence[Target], options: SparseGPTSpec
) -> Tensor:
    """Threshold each layer's part of a panel."""
    drops = []
    for layer_PO, target in zip(torch.split(saliency_PO, sizes, 1), targets, strict=True):
        flat = layer_PO.reshape(1, -1)
        if options.mode == "reference":
            drops.append(layer_PO <= kth_smallest(flat, int(flat.numel() * target.sparsity) + 1))
        else:
            num_dropped = round(flat.numel() * target.sparsity)
            drops.append(drop_smallest(flat, num_dropped).reshape(layer_PO.shape))
    return torch.cat(drops, dim=1)


def _strides(block_size: int, group: int | None) -> tuple[int, int]:
    if group is not None:
        return group, max(block_size - block_size % group, group)
    leaf = block_size
    while leaf > LEAF and leaf % 2 == 0:
        leaf //= 2
    return leaf, block_size
