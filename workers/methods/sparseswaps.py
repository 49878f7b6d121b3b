"""SparseSwaps: refine Wanda's mask by the exact change of the squared error. Weights stay trained.

With r the dropped part of a row and c = G r, dropping p and bringing back u changes rᵀ G r by

    2 w_p c_p + w_p² G_pp  -  2 w_u c_u + w_u² G_uu  -  2 w_p w_u G_pu

Shape letters: O output features, I input features, P and U candidates to drop and to bring back,
N groups of M inputs.
"""

import torch
from torch import Tensor

from jobs.methods import SparseSwapsSpec
from jobs.pattern import Target
from workers.masks import keep_mask
from workers.methods.common import Pruned, need, without_dropped
from workers.methods.wanda import wanda_saliency
from workers.statistics import Statistics

TOLERANCE = 1e-6
"""A swap has to save this share of its row's error, or rounding could swap for ever."""


def prune_sparseswaps(
    weight_OI: Tensor, statistics: Statistics | None, target: Target, options: SparseSwapsSpec
) -> Pruned:
    statistics = need(statistics)
    keep_OI = keep_mask(wanda_saliency(weight_OI, statistics.input_norm_I), target)
    gram_II, trained_OI = statistics.gram_II, weight_OI.float()
    lost_OI = trained_OI.masked_fill(keep_OI, 0) @ gram_II
    if weight_OI.device.type == "cpu":
        from workers.methods.swaps_numba import swap  # compilers take their time
    else:
        swap = swap_in_torch
    swap(trained_OI, gram_II, keep_OI, lost_OI, target.pattern.group, options)
    return without_dropped(weight_OI, keep_OI)


def swap_in_torch(
    trained_OI: Tensor,
    gram_II: Tensor,
    keep_OI: Tensor,
    lost_OI: Tensor,
    group: int | None,
    options: SparseSwapsSpec,
) -> None:
    """Make each row's best swap, of all rows at once, as long as one of them gains.

    Args:
        trained_OI: float32, (O, I).
        gram_II: of the inputs, float32, (I, I).
        keep_OI: the mask to start from, bool. Is changed in place.
        lost_OI: r G for each row, float32. Is changed in place.
        group: M of N:M; None: any pair in a row may swap.
    """
    own_OI = trained_OI.square() * gram_II.diagonal()
    rows_O = torch.arange(len(trained_OI), device=trained_OI.device)
    dead_I = gram_II.diagonal() == 0
    for _ in range(options.max_swaps):
        cross_OI = 2 * trained_OI * lost_OI
        drop_cost_OI = (own_OI + cross_OI).masked_fill(~keep_OI, torch.inf)
        back_cost_OI = (own_OI - cross_OI).masked_fill(keep_OI | dead_I, torch.inf)
        if group is None:
            change_O, out_O, in_O = _best_pair(
                trained_OI, gram_II, drop_cost_OI, back_cost_OI, options.candidates
            )
        else:
            change_O, out_O, in_O = _best_pair_in_groups(
                trained_OI, gram_II, drop_cost_OI, back_cost_OI, group
            )
        error_O = (trained_OI * lost_OI).masked_fill(keep_OI, 0).sum(dim=1)
        better_O = change_O < -TOLERANCE * error_O
        if not better_O.any():
            break
        rows, dropped, back = rows_O[better_O], out_O[better_O], in_O[better_O]
        keep_OI[rows, dropped], keep_OI[rows, back] = False, True
        lost_OI[rows] += trained_OI[rows, dropped][:, None] * gram_II[dropped]
        lost_OI[rows] -= trained_OI[rows, back][:, None] * gram_II[back]


def _best_pair(
    trained_OI: Tensor, gram_II: Tensor, drop_cost_OI: Tensor, back_cost_OI: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The change of the error, what to drop and what to bring back, (O,) each."""
    num = min(candidates, trained_OI.shape[1])
    drop_OP, out_OP = drop_cost_OI.topk(num, dim=1, largest=False)
    back_OU, in_OU = back_cost_OI.topk(num, dim=1, largest=False)
    between_OPU = gram_II[out_OP[:, :, None], in_OU[:, None]]
    between_OPU *= trained_OI.gather(1, out_OP)[:, :, None] * trained_OI.gather(1, in_OU)[:, None]
    change_OPU = drop_OP[:, :, None] + back_OU[:, None] - 2 * between_OPU
    change_O, pair_O = change_OPU.flatten(1).min(dim=1)
    out_O = out_OP.gather(1, (pair_O // num)[:, None])[:, 0]
    in_O = in_OU.gather(1, (pair_O % num)[:, None])[:, 0]
    return change_O, out_O, in_O


def _best_pair_in_groups(
    trained_OI: Tensor, gram_II: Tensor, drop_cost_OI: Tensor, back_cost_OI: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same among the pairs inside a group of N:M, all of them."""
    shape = (len(trained_OI), -1, group)
    num_groups = len(gram_II) // group
    gram_MMN = gram_II.reshape(num_groups, group, num_groups, group).diagonal(dim1=0, dim2=2)
    gram_NMM = gram_MMN.movedim(-1, 0)
    trained_ONM = trained_OI.view(shape)
    change_ONMM = drop_cost_OI.view(shape)[..., :, None] + back_cost_OI.view(shape)[..., None, :]
    change_ONMM -= 2 * gram_NMM * trained_ONM[..., :, None] * trained_ONM[..., None, :]
    change_O, pair_O = change_ONMM.flatten(1).min(dim=1)
    first_O = pair_O // (group * group) * group
    return change_O, first_O + pair_O // group % group, first_O + pair_O % group
