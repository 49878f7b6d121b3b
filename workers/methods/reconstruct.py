"""A polish after any mask: solve for all kept weights at once by masked conjugate gradients.

Shape letters: O output features, I input features.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from jobs.methods import MethodOptions
from workers.methods.common import Pruned, tf32
from workers.methods.hessian import correlations
from workers.statistics import Statistics


def reconstruct(
    weights: Sequence[Tensor],
    pruned: Sequence[Pruned],
    statistics: Statistics,
    options: MethodOptions,
) -> list[Pruned]:
    """Move the kept weights so that |X (W - trained)ᵀ|² falls, plus damping |W - trained|².

    Starts from the pruned weights and never gets worse than they are. All rows advance together,
    those of all layers that read one input.
    """
    norm_I, hessian_II = correlations(statistics)
    hessian_II.diagonal().add_(options.reconstruct_damping)
    start_OI = torch.cat([one.weight_OI.float() for one in pruned]).mul_(norm_I)
    keep_OI = torch.cat([one.keep_OI for one in pruned])
    with tf32():
        lost_OI = torch.cat([weight.float() for weight in weights]).mul_(norm_I).sub_(start_OI)
        step_OI = conjugate_gradients(
            hessian_II, lost_OI @ hessian_II, keep_OI, options.reconstruct_iterations
        )
    solved_OI = start_OI.add_(step_OI).div_(norm_I)
    parts = torch.split(solved_OI, [len(weight) for weight in weights])
    return [
        replace(one, weight_OI=part_OI.to(weight.dtype, copy=True))
        for one, weight, part_OI in zip(pruned, weights, parts, strict=True)
    ]


def conjugate_gradients(
    hessian_II: Tensor, right_OI: Tensor, keep_OI: Tensor, iterations: int
) -> Tensor:
    """Solve x H = right where kept, x = 0 elsewhere, each row for itself. Starts from 0."""
    keep_OI = keep_OI.to(right_OI.dtype)  # multiplying with bools is slower
    solved_OI, image_OI = torch.zeros_like(right_OI), torch.empty_like(right_OI)
    residual_OI = right_OI * keep_OI
    direction_OI = residual_OI.clone()
    square_O1 = _products_of_rows(residual_OI, residual_OI)
    for _ in range(iterations):
        torch.mm(direction_OI, hessian_II, out=image_OI).mul_(keep_OI)
        curvature_O1 = _products_of_rows(direction_OI, image_OI)
        length_O1 = torch.where(curvature_O1 > 0, square_O1 / curvature_O1, 0)  # 0: row is solved
        solved_OI.addcmul_(direction_OI, length_O1)
        residual_OI.addcmul_(image_OI, length_O1, value=-1)
        before_O1, square_O1 = square_O1, _products_of_rows(residual_OI, residual_OI)
        turn_O1 = torch.where(before_O1 > 0, square_O1 / before_O1, 0)
        direction_OI.mul_(turn_O1).add_(residual_OI)
    return solved_OI


def _products_of_rows(first_OI: Tensor, second_OI: Tensor) -> Tensor:
    products_O: Tensor = torch.linalg.vecdot(first_OI, second_OI)
    return products_O[:, None]
