"""SparseSwaps as a compiled loop, for the CPU: a row at a time, each until none of its swaps gains.

Shape letters: O output features, I input features.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from torch import Tensor

from jobs.methods import SparseSwapsSpec
from workers.compiled import compiled
from workers.methods.sparseswaps import TOLERANCE


def swap(
    trained_OI: Tensor,
    gram_II: Tensor,
    keep_OI: Tensor,
    lost_OI: Tensor,
    group: int | None,
    options: SparseSwapsSpec,
) -> None:
    """The same as `sparseswaps.swap_in_torch`, up to rounding."""
    _swap(
        trained_OI.numpy(),
        gram_II.numpy(),
        keep_OI.numpy(),
        lost_OI.numpy(),
        group or 0,
        options.max_swaps,
        min(options.candidates, len(gram_II)),
    )


@compiled
def _swap(
    trained: Any, gram: Any, keep: Any, lost: Any, group: int, max_swaps: int, num_candidates: int
) -> None:
    num_inputs = trained.shape[1]
    own_energy = np.diag(gram).copy()
    two = trained.dtype.type(2)  # with a plain 2 all would be computed in 64 bits
    zero, infinite = two - two, trained.dtype.type(np.inf)
    for row in prange(len(trained)):
        weight, is_kept, pull = trained[row], keep[row], lost[row]
        drop_cost = np.empty(num_inputs, weight.dtype)
        back_cost = np.empty(num_inputs, weight.dtype)
        drops: Any = np.empty(num_candidates, np.int64)
        backs: Any = np.empty(num_candidates, np.int64)
        for _ in range(max_swaps):
            error = zero
            for i in range(num_inputs):
                own, cross = weight[i] * weight[i] * own_energy[i], two * weight[i] * pull[i]
                drop_cost[i] = own + cross if is_kept[i] else infinite
                back_cost[i] = infinite if is_kept[i] or own_energy[i] == 0 else own - cross
                error += zero if is_kept[i] else weight[i] * pull[i]
            least, out, back = zero, 0, 0
            if group:
                for top in range(0, num_inputs, group):
                    for p in range(top, top + group):
                        if is_kept[p]:
                            for u in range(top, top + group):
                                change = drop_cost[p] + back_cost[u]
                                change -= two * weight[p] * weight[u] * gram[p, u]
                                if change < least:
                                    least, out, back = change, p, u
            else:
                _find_least(drop_cost, drops)
                _find_least(back_cost, backs)
                for p in drops:
                    twice = two * weight[p]
                    for u in backs:
                        change = drop_cost[p] + back_cost[u] - twice * weight[u] * gram[p, u]
                        if change < least:
                            least, out, back = change, p, u
            if least >= -TOLERANCE * error:
                break
            is_kept[out], is_kept[back] = False, True
            for i in range(num_inputs):
                pull[i] += weight[out] * gram[out, i] - weight[back] * gram[back, i]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _find_least(costs: Any, indices: Any) -> None:
    """Write the indices of the smallest costs, smallest first."""
    last = len(indices) - 1
    for i in range(len(costs)):
        if i > last and not costs[i] < costs[indices[last]]:
            continue
        place = min(i, last)
        while place > 0 and costs[i] < costs[indices[place - 1]]:
            indices[place] = indices[place - 1]
            place -= 1
        indices[place] = i
