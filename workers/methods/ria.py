"""RIA: relative importance and activations, ICLR 2024. Without its channel permutation."""

import torch
from torch import Tensor

from jobs.methods import RIASpec
from jobs.pattern import Target
from workers.masks import keep_mask
from workers.methods.common import Pruned, need, without_dropped
from workers.statistics import Statistics


def prune_ria(
    weight_OI: Tensor, statistics: Statistics | None, target: Target, options: RIASpec
) -> Pruned:
    size_OI = weight_OI.float().abs()
    tiny = torch.finfo(size_OI.dtype).tiny  # a row or column of zeros has no shares
    of_row_OI = size_OI / size_OI.sum(dim=1, keepdim=True).clamp(min=tiny)
    of_column_OI = size_OI / size_OI.sum(dim=0, keepdim=True).clamp(min=tiny)
    loudness_I = need(statistics).input_norm_I.pow(options.activation_power)
    saliency_OI = (of_row_OI + of_column_OI) * loudness_I
    return without_dropped(weight_OI, keep_mask(saliency_OI, target, compare=options.compare))
