"""An N:M mask as a compiled loop, for the CPU."""

from typing import Any

import torch
from numba import prange
from torch import Tensor

from workers.compiled import compiled


def keep_in_groups(saliency_OI: Tensor, group: int, num_dropped: int) -> Tensor:
    """True for all but the `num_dropped` least of each `group` in a row; among equals the leftmost.

    (O, I) float32 or float64 in, bool out.
    """
    keep_OI = torch.empty(saliency_OI.shape, dtype=torch.bool)
    _keep_in_groups(saliency_OI.contiguous().numpy(), keep_OI.numpy(), group, num_dropped)
    return keep_OI


@compiled
def _keep_in_groups(saliency: Any, keep: Any, group: int, num_dropped: int) -> None:
    for row in prange(len(saliency)):
        rated, is_kept = saliency[row], keep[row]
        for start in range(0, len(rated), group):
            for i in range(start, start + group):
                rank = 0
                for j in range(start, i):
                    rank += rated[j] <= rated[i]
                for j in range(i + 1, start + group):
                    rank += rated[j] < rated[i]
                is_kept[i] = rank >= num_dropped
