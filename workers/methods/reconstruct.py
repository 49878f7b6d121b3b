"""A polish after any mask: solve for all kept weights at once by masked conjugate gradients.

Shape letters: O output features, I input features.
"""

from dataclasses import replace

import torch
from torch import Tensor

from jobs.methods import MethodOptions
from workers.methods.common import Pruned
from workers.methods.hessian import correlations
from workers.statistics import Statistics


def reconstruct(
    trained_OI: Tensor, pruned: Pruned, statistics: Statistics, options: MethodOptions
) -> Pruned:
    """Move the kept weights so that |X (W - trained)ᵀ|² falls, plus damping |W - trained|².

    Starts from the pruned weights and never gets worse than they are. All rows advance together.
    """
    norm_I, hessian_II = correlations(statistics)
    hessian_II.diagonal().add_(options.reconstruct_damping)
    start_OI = pruned.weight_OI.float() * norm_I
    keep_OI = pruned.keep_OI
    right_OI = (trained_OI.float() * norm_I - start_OI) @ hessian_II
    step_OI = conjugate_gradients(hessian_II, right_OI, keep_OI, options.reconstruct_iterations)
    weight_OI = (start_OI + step_OI) / norm_I
    return replace(pruned, weight_OI=weight_OI.to(trained_OI.dtype))


def conjugate_gradients(
    hessian_II: Tensor, right_OI: Tensor, keep_OI: Tensor, iterations: int
) -> Tensor:
    """Solve x H = right where kept, x = 0 elsewhere, each row for itself. Starts from 0."""
    solved_OI = torch.zeros_like(right_OI)
    residual_OI = right_OI * keep_OI
    direction_OI = residual_OI
    square_O1 = residual_OI.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        image_OI = (direction_OI @ hessian_II).mul_(keep_OI)
        curvature_O1 = (direction_OI * image_OI).sum(dim=1, keepdim=True)
        length_O1 = torch.where(curvature_O1 > 0, square_O1 / curvature_O1, 0)  # 0: row is solved
        solved_OI = solved_OI + length_O1 * direction_OI
        residual_OI = residual_OI - length_O1 * image_OI
        before_O1, square_O1 = square_O1, residual_OI.square().sum(dim=1, keepdim=True)
        turn_O1 = torch.where(before_O1 > 0, square_O1 / before_O1, 0)
        direction_OI = residual_OI + turn_O1 * direction_OI
    return solved_OI
