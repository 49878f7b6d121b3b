"""DSnoT: swap weights until what a row lost has mean 0, arXiv:2310.08915. Weights stay trained.

Written from the paper. Unlike the published code it stops a row that has run out of weights to
swap, heeds `same_sign` in unstructured pruning too, and takes it to refuse what ends further off.

Shape letters: O output features, I input features.
"""

import torch
from torch import Tensor

from jobs.methods import DSnoTSpec
from jobs.pattern import Target
from workers.methods.common import Pruned, need, without_dropped
from workers.methods.wanda import wanda_saliency
from workers.statistics import Statistics


def prune_dsnot(
    weight_OI: Tensor,
    statistics: Statistics | None,
    target: Target,
    options: DSnoTSpec,
    start_OI: Tensor,
) -> Pruned:
    """`start_OI` is the mask to start from, bool, True is kept."""
    statistics = need(statistics)
    trained_OI = weight_OI.float()
    saliency_OI = wanda_saliency(weight_OI, statistics.input_norm_I)
    keep_OI = start_OI.clone()
    mean_OI, variance_I = moments(trained_OI, statistics)
    worth_OI = mean_OI / variance_I.pow(options.variance_power)
    may_move_OI = torch.ones_like(keep_OI)
    off_O = mean_OI.masked_fill(keep_OI, 0).sum(dim=1)
    rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
    active_O = torch.ones_like(rows_O, dtype=torch.bool)
    for _ in range(options.max_cycles):
        sign_O1 = off_O.sign()[:, None]
        helps_OI = worth_OI * sign_O1
        back_OI = ~keep_OI & may_move_OI & (helps_OI > 0)
        back_O = helps_OI.masked_fill(~back_OI, -torch.inf).argmax(dim=1)
        drop_OI = keep_OI & may_move_OI
        if target.pattern.group is None:
            drop_OI &= mean_OI * sign_O1 < 0
        else:
            group_I = torch.arange(len(variance_I), device=weight_OI.device) // target.pattern.group
            drop_OI &= group_I == group_I[back_O][:, None]
        dropped_O = saliency_OI.masked_fill(~drop_OI, torch.inf).argmin(dim=1)
        after_O = off_O + mean_OI[rows_O, dropped_O] - mean_OI[rows_O, back_O]
        active_O &= (off_O.abs() > options.stop_below) & back_OI.any(dim=1) & drop_OI.any(dim=1)
        if options.same_sign:
            active_O &= (after_O.sign() == off_O.sign()) & (after_O.abs() < off_O.abs())
        if not active_O.any():
            break
        rows, dropped, back = rows_O[active_O], dropped_O[active_O], back_O[active_O]
        keep_OI[rows, dropped], keep_OI[rows, back] = False, True
        may_move_OI[rows, dropped] = may_move_OI[rows, back] = False
        off_O = torch.where(active_O, after_O, off_O)
    return without_dropped(weight_OI, keep_OI)


def moments(trained_OI: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean of each weight's part of the output, summed over a sequence; variance of the inputs."""
    sum_I = statistics.sum_I / max(statistics.num_sequences, 1)
    mean_I = statistics.sum_I / statistics.num_tokens
    variance_I = statistics.gram_II.diagonal() / statistics.num_tokens - mean_I.square()
    tiny = torch.finfo(torch.float32).tiny
    return trained_OI * sum_I.float(), variance_I.float().clamp(min=tiny)
