"""Magnitude: the smallest weights go. Needs no data."""

from torch import Tensor

from jobs.methods import MagnitudeSpec
from jobs.pattern import Target
from workers.masks import keep_mask
from workers.methods.common import Pruned, without_dropped
from workers.statistics import Statistics


def prune_magnitude(
    weight_OI: Tensor, statistics: Statistics | None, target: Target, options: MagnitudeSpec
) -> Pruned:
    return without_dropped(
        weight_OI, keep_mask(weight_OI.float().abs(), target, compare=options.compare)
    )
