"""Wanda: a weight matters as much as what it multiplies, arXiv:2306.11695, section 3."""

from torch import Tensor

from jobs.methods import WandaSpec
from jobs.pattern import Target
from workers.masks import keep_mask
from workers.methods.common import Pruned, need, without_dropped
from workers.statistics import Statistics


def prune_wanda(
    weight_OI: Tensor, statistics: Statistics | None, target: Target, options: WandaSpec
) -> Pruned:
    saliency_OI = wanda_saliency(weight_OI, need(statistics).input_norm_I)
    return without_dropped(weight_OI, keep_mask(saliency_OI, target, compare=options.compare))


def wanda_saliency(weight_OI: Tensor, input_norm_I: Tensor) -> Tensor:
    """What the output loses with a weight alone: |weight| times its input's norm. Float32."""
    return weight_OI.float().abs() * input_norm_I
