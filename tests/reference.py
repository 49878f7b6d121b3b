"""The published algorithms as plain loops, to hold the fast ones against. Slow on purpose.

Shape letters: O output features, I input features, B columns of a panel.
"""

import torch
from torch import Tensor

from jobs.methods import DSnoTSpec
from workers.statistics import Statistics


def inverse_factor(
    gram_II: Tensor, num_sequences: float, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The damped Hessian, U with H⁻¹ = Uᵀ U, upper, and which inputs are always 0."""
    hessian_II = gram_II * (2 / num_sequences)
    dead_I = hessian_II.diagonal() == 0
    hessian_II[dead_I, dead_I] = 1
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    return hessian_II, torch.linalg.cholesky(inverse_II, upper=True), dead_I


def sparsegpt_loop(
    weight_OI: Tensor,
    gram_II: Tensor,
    num_sequences: float,
    sparsity: float,
    *,
    kept_of: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor, float]:
    """SparseGPT, arXiv:2301.00774, column by column as its authors run it.

    Returns:
        Pruned weight, dropped mask (True is dropped), and the sum of the squared errors.
    """
    _, upper_II, dead_I = inverse_factor(gram_II, num_sequences, damping)
    weight_OI = weight_OI.clone()
    weight_OI[:, dead_I] = 0
    drop_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    loss = 0.0
    for start in range(0, weight_OI.shape[1], block_size):
        stop = min(start + block_size, weight_OI.shape[1])
        panel_OB = weight_OI[:, start:stop].clone()
        upper_BB = upper_II[start:stop, start:stop]
        error_OB = torch.zeros_like(panel_OB)
        drop_OB = drop_OI[:, start:stop]
        if kept_of is None:
            cost_OB = panel_OB**2 / upper_BB.diagonal() ** 2
            threshold = cost_OB.flatten().sort().values[int(cost_OB.numel() * sparsity)]
            drop_OB[:] = cost_OB <= threshold
        for i in range(stop - start):
            if kept_of is not None and i % kept_of[1] == 0:
                group = slice(i, i + kept_of[1])
                cost = panel_OB[:, group] ** 2 / upper_BB.diagonal()[group] ** 2
                least = cost.topk(kept_of[1] - kept_of[0], dim=1, largest=False).indices
                drop_OB[:, group].scatter_(1, least, True)
            old_O = panel_OB[:, i].clone()
            new_O = old_O.masked_fill(drop_OB[:, i], 0)
            error_O = (old_O - new_O) / upper_BB[i, i]
            panel_OB[:, i:] -= error_O[:, None] @ upper_BB[i : i + 1, i:]
            panel_OB[:, i] = new_O
            error_OB[:, i] = error_O
        weight_OI[:, start:stop] = panel_OB
        weight_OI[:, stop:] -= error_OB @ upper_II[start:stop, stop:]
        loss += float(error_OB.square().sum())
    return weight_OI, drop_OI, loss


def drop_loop(saliency_OI: Tensor, sparsity: float, kept_of: tuple[int, int] | None) -> Tensor:
    """Per row (or group of a row), the least salient weights, leftmost first. True is dropped."""
    drop_OI = torch.zeros_like(saliency_OI, dtype=torch.bool)
    num_inputs = saliency_OI.shape[1]
    kept, size = kept_of or (num_inputs - round(sparsity * num_inputs), num_inputs)
    for row, saliencies in enumerate(saliency_OI.tolist()):
        for start in range(0, num_inputs, size):
            ranked = sorted(range(start, start + size), key=lambda i: saliencies[i])
            for i in ranked[: size - kept]:
                drop_OI[row, i] = True
    return drop_OI


def dsnot_loop(
    weight_OI: Tensor,
    statistics: Statistics,
    keep_OI: Tensor,
    options: DSnoTSpec,
    group: int | None,
) -> Tensor:
    """DSnoT, arXiv:2310.08915: a row at a time, a swap at a time. The mask, True is kept."""
    tokens, gram_II = statistics.num_tokens, statistics.gram_II.double()
    mean_I = statistics.sum_I.double() / tokens
    variance_I = gram_II.diagonal() / tokens - mean_I**2
    norm_I = gram_II.diagonal().sqrt()
    keep_OI = keep_OI.clone()
    for row, keep_I in zip(weight_OI.double(), keep_OI, strict=True):
        part_I = row * statistics.sum_I.double() / statistics.num_sequences
        moved: set[int] = set()
        off = float(part_I[~keep_I].sum())
        for _ in range(options.max_cycles):
            sign = 1 if off > 0 else -1
            free = [j for j in range(len(row)) if j not in moved]
            helpful = [j for j in free if not keep_I[j] and part_I[j] * sign > 0]
            if abs(off) <= options.stop_below or not helpful:
                break
            worth = {
                j: float(part_I[j] * sign / variance_I[j] ** options.variance_power)
                for j in helpful
            }
            back = max(helpful, key=lambda j: worth[j])
            droppable = [
                j
                for j in free
                if keep_I[j]
                and (part_I[j] * sign < 0 if group is None else j // group == back // group)
            ]
            if not droppable:
                break
            drop = min(droppable, key=lambda j: float(row[j].abs() * norm_I[j]))
            after = off + float(part_I[drop] - part_I[back])
            if options.same_sign and (after * off <= 0 or abs(after) >= abs(off)):
                break
            keep_I[back], keep_I[drop], off = True, False, after
            moved |= {back, drop}
    return keep_OI


def admm_loop(
    weight_OI: Tensor,
    gram_II: Tensor,
    sparsity: float,
    *,
    kept_of: tuple[int, int] | None = None,
    damping: float = 0.01,
    rho: float = 1.0,
    iterations: int = 20,
    masking_iterations: int = 15,
) -> tuple[Tensor, Tensor]:
    """ADMM, arXiv:2401.02938, step by step, ranked and tightened as `workers/methods/admm.py` says.

    Returns:
        Pruned weight, dropped mask (True is dropped).
    """
    norm_I = gram_II.diagonal().sqrt()
    hessian_II = gram_II / norm_I[:, None] / norm_I
    hessian_II += damping * torch.eye(len(norm_I), dtype=gram_II.dtype)
    inverse_II = torch.linalg.inv(hessian_II + rho * torch.eye(len(norm_I), dtype=gram_II.dtype))
    right_OI = (weight_OI * norm_I) @ hessian_II
    solved_OI = weight_OI * norm_I
    dual_OI = torch.zeros_like(solved_OI)
    for step in range(1, iterations + 1):
        if step <= masking_iterations:
            cost_OI = (solved_OI + dual_OI) ** 2 / inverse_II.diagonal()
            part = 1 - (1 - step / masking_iterations) ** 3
            if kept_of is not None:  # only what the groups would lose in the end may go
                in_the_end_OI = drop_loop(cost_OI, sparsity, kept_of)
                cost_OI[~in_the_end_OI] = torch.inf
            drop_OI = drop_loop(cost_OI.reshape(1, -1), part * sparsity, None).view_as(cost_OI)
        masked_OI = (solved_OI + dual_OI) * ~drop_OI
        dual_OI = dual_OI + solved_OI - masked_OI
        solved_OI = (right_OI + rho * (masked_OI - dual_OI)) @ inverse_II
    return (solved_OI + dual_OI) * ~drop_OI / norm_I, drop_OI


def squared_output_change(change_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(dW H dWᵀ), what every method here tries to keep small."""
    return float(((change_OI @ hessian_II) * change_OI).sum())


def masked_least_squares(weight_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Per row, the kept weights that change the output least. In float64."""
    solved_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    hessian_II = hessian_II.double()
    for row, keep_I in enumerate(keep_OI):
        right = (weight_OI[row].double() @ hessian_II)[keep_I]
        solved_OI[row, keep_I] = torch.linalg.solve(hessian_II[keep_I][:, keep_I], right)
    return solved_OI


def best_swap(
    weight_I: Tensor, keep_I: Tensor, gram_II: Tensor, pairs: list[tuple[int, int]]
) -> tuple[float, int, int]:
    """The pair (drop, bring back) that lowers one row's error most, by trying each."""

    def error(mask_I: Tensor) -> float:
        lost_I = weight_I.masked_fill(mask_I, 0)
        return float(lost_I @ gram_II @ lost_I)

    found = []
    for dropped, back in pairs:
        if keep_I[dropped] and not keep_I[back]:
            swapped_I = keep_I.clone()
            swapped_I[dropped], swapped_I[back] = False, True
            found.append((error(swapped_I) - error(keep_I), dropped, back))
    return min(found)


def ressa_loss(
    student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, weight: float, temperature: float
) -> tuple[float, float, float]:
    """RESSA's loss as its code runs, arXiv:2404.02424, one position at a time.

    Returns:
        The loss, the mean cross-entropy of the answers (labels of -100 are none), and the KL.
    """
    entropies, divergence = [], 0.0
    for student_TV, teacher_TV, labels_T in zip(student_BTV, teacher_BTV, labels_BT, strict=True):
        for t, (student_V, teacher_V) in enumerate(zip(student_TV, teacher_TV, strict=True)):
            p_V = (teacher_V / temperature).softmax(0)
            q_V = (student_V / temperature).softmax(0)
            divergence += sum(float(p * (p.log() - q.log())) for p, q in zip(p_V, q_V, strict=True))
            label = labels_T[t + 1] if t + 1 < len(labels_T) else -100
            if label != -100:
                entropies.append(-float(student_V.softmax(0)[label].log()))
    task, divergence = sum(entropies) / len(entropies), divergence / len(labels_BT)
    return (1 - weight) * task + weight * divergence, task, divergence
