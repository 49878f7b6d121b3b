"""What the dense model would have answered: distillation targets, computed once for a whole grid.

For every answer token of every sample we keep the dense model's K most likely next tokens and the
probability mass of all others together. That is 8 K + 4 bytes per answer token: at K = 64 a
million answer tokens are 0.5 GB. It works for every method, those that updated weights included.

Shape letters: S samples, N answer tokens, V vocabulary, K tokens kept, B batch, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.errors import CorruptError, NumericError
from workers.context import Context
from workers.encode import IGNORED_LABEL, collate

TOP_K = 64
TARGETS_FILE = "targets.safetensors"

Targets = dict[str, Tensor]
"""`start`: int64 (S + 1,), the rows of sample i are start[i] to start[i + 1]. `token`: int32
(N, K). `log_prob`: float32 (N, K). `log_rest`: float32 (N,), -inf if the K are all there are."""


@torch.no_grad()
def dense_targets(
    model: nn.Module,
    samples: Sequence[dict[str, Tensor]],
    *,
    pad_id: int,
    temperature: float,
    batch_size: int,
    ctx: Context,
) -> Targets:
    """Run the dense model over all samples; every rank takes its share and returns the whole.

    Args:
        samples: single inputs as `repair` takes them.
        temperature: of the softmax on both sides; the targets are good for this one only.

    Raises:
        NumericError: the dense model's logits are NaN or infinite.
    """
    parts: list[Targets] = []
    mine = range(ctx.rank, len(samples), ctx.world)
    for first in range(0, len(mine), batch_size):
        batch = collate([samples[i] for i in mine[first : first + batch_size]], pad_id)
        logits_NV, _ = answer_logits(model, batch, ctx.device)
        check_finite(logits_NV)
        rows = {name: tensor.cpu() for name, tensor in _top(logits_NV / temperature).items()}
        counts = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1).tolist()
        split = {name: torch.split(tensor, counts) for name, tensor in rows.items()}
        parts += [{name: split[name][i] for name in split} for i in range(len(counts))]
        ctx.progress("teacher", ctx.world * len(parts), len(samples))
    by_rank = ctx.gather(parts)
    return _join([by_rank[i % ctx.world][i // ctx.world] for i in range(len(samples))])


def rows_of(targets: Targets, samples: Sequence[int]) -> Targets:
    """The rows of some samples, one after the other, without `start`."""
    start = targets["start"].tolist()
    return {
        name: torch.cat([tensor[:0], *(tensor[start[i] : start[i + 1]] for i in samples)])
        for name, tensor in targets.items()
        if name != "start"
    }


def kl_to_teacher(student_NV: Tensor, rows: Targets, temperature: float) -> Tensor:
    """τ² KL(teacher ‖ student), summed over the N answer tokens.

    The tokens outside the teacher's top K count as one; with K = V this is the exact divergence.
    """
    student_NV = student_NV / temperature
    tokens_NK = rows["token"].to(student_NV.device, torch.int64)
    teacher_log_NK = rows["log_prob"].to(student_NV.device)
    normaliser_N1 = student_NV.logsumexp(dim=1, keepdim=True)
    student_log_NK = student_NV.gather(1, tokens_NK) - normaliser_N1
    divergence = _relative_entropy(teacher_log_NK, student_log_NK)
    if tokens_NK.shape[1] < student_NV.shape[1]:
        others_NV = student_NV.scatter(1, tokens_NK, -torch.inf)
        student_rest_N = others_NV.logsumexp(dim=1) - normaliser_N1[:, 0]
        teacher_rest_N = rows["log_rest"].to(student_NV.device)
        divergence = divergence + _relative_entropy(teacher_rest_N, student_rest_N)
    return temperature**2 * divergence


def answer_logits(
    model: nn.Module, batch: dict[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits where an answer token is to be predicted, sample by sample, and those tokens.

    Only these positions reach the head: a whole batch of logits would be gigabytes.

    Returns:
        float32 (N, V) and int64 (N,). N is 0 if no sample has an answer.
    """
    next_BT = batch["labels"][:, 1:].to(device)
    is_answer_BT = next_BT != IGNORED_LABEL
    positions = is_answer_BT.any(dim=0).nonzero()[:, 0]
    if not len(positions):
        positions = positions.new_zeros(1)
    output = model(**_inputs(model, batch, device), logits_to_keep=positions, use_cache=False)
    chosen_BT = is_answer_BT[:, positions]
    return output.logits[chosen_BT].float(), next_BT[:, positions][chosen_BT]


def all_logits(
    model: nn.Module, batch: dict[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of every position, prompt and padding included: large.

    Returns:
        float32 (B, T, V), then what `answer_logits` returns.
    """
    logits_BTV = model(**_inputs(model, batch, device), use_cache=False).logits.float()
    next_BT = batch["labels"][:, 1:].to(device)
    is_answer_BT = next_BT != IGNORED_LABEL
    return logits_BTV, logits_BTV[:, :-1][is_answer_BT], next_BT[is_answer_BT]


def _inputs(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    return inputs


def check_finite(logits: Tensor) -> None:
    """Raises NumericError for a dense model that answers with NaN or infinity."""
    if not logits.isfinite().all():
        raise NumericError("teacher: the dense model's logits are NaN or infinite")


def save_targets(targets: Targets, path: Path) -> None:
    save_file(targets, path)


def load_targets(path: Path) -> Targets:
    """Raises CorruptError for a file that is missing or damaged."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"the distillation targets {path} cannot be read: {error}") from error


def _top(logits_NV: Tensor) -> Targets:
    log_prob_NV = logits_NV.log_softmax(dim=1)
    top = log_prob_NV.topk(min(TOP_K, logits_NV.shape[1]), dim=1)
    others_NV = log_prob_NV.scatter(1, top.indices, -torch.inf)
    return {
        "token": top.indices.to(torch.int32),
        "log_prob": top.values,
        "log_rest": others_NV.logsumexp(dim=1),
    }


def _join(parts: Sequence[Targets]) -> Targets:
    counts = torch.tensor([0] + [len(part["token"]) for part in parts])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {"start": counts.cumsum(0), **joined}


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum()  # 0 log 0 is 0, not NaN
