"""Score a model on benchmarks: exact match of generated answers, perplexity of plain text.

Shape letters: B samples in a batch, T tokens, N answer tokens of a batch, V vocabulary.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from jobs.errors import DataError, NumericError
from jobs.spec import BenchmarkSpec
from workers.context import Context
from workers.data import Sample, evenly_spaced, load_dataset
from workers.encode import IGNORED_LABEL, Encoder, collate, text_windows
from workers.models import VisionLanguageModel
from workers.teacher import answer_logits

Z_95 = 1.959964
SCORE_FIELDS = ("metric", "score", "score_low", "score_high", "num_items")
SMALLER_IS_BETTER = {"perplexity", "answer_loss"}
PREDICTIONS_FILE = "predictions.jsonl"


def evaluate(
    model: VisionLanguageModel, spec: BenchmarkSpec, ctx: Context, folder: Path
) -> dict[str, Any]:
    """Score a model on one benchmark. Workers share the items.

    Writes what was predicted for every item to `folder/predictions.jsonl`.

    Returns:
        metric, score, score_low, score_high (95% interval), num_items; and under "also" a list of
        the same for further metrics.

    Raises:
        DataError: fewer items than asked for, a text shorter than one window.
        NumericError: a loss that is NaN or infinite.
    """
    if spec.dataset.is_text:
        return _perplexity(model, spec, ctx, folder) | {"also": []}
    further = [_answer_loss(model, spec, ctx)] if spec.answer_loss else []
    return _exact_match(model, spec, ctx, folder) | {"also": further}


def _exact_match(
    model: VisionLanguageModel, spec: BenchmarkSpec, ctx: Context, folder: Path
) -> dict[str, Any]:
    """Share of items whose whole generated answer is the right one, case and spaces aside."""
    items = evenly_spaced(load_dataset(spec.dataset, "test"), spec.num_items, spec.label)
    mine = list(enumerate(items))[ctx.rank :: ctx.world]
    encoder = Encoder(model)
    mine.sort(key=lambda item: len(item[1].turns[-1][0]))  # little padding within a batch
    records = []
    size = ctx.smaller(spec.batch_size)
    for start in range(0, len(mine), size):
        batch = mine[start : start + size]
        answers = generate(model, encoder, [sample for _, sample in batch], spec, ctx)
        for (index, sample), answer in zip(batch, answers, strict=True):
            question, expected = sample.turns[-1]
            records.append(
                {
                    "item": index,
                    "question": question,
                    "expected": expected,
                    "answer": answer,
                    "correct": normalise(answer) == normalise(expected),
                }
            )
        ctx.progress(f"evaluate {spec.label}", start + len(batch), len(mine))
    everyone = [record for share in ctx.gather(records) for record in share]
    _write_predictions(everyone, ctx, folder)
    num_correct = sum(record["correct"] for record in everyone)
    low, high = wilson_interval(num_correct, len(everyone))
    return {
        "metric": "exact_match",
        "score": num_correct / len(everyone),
        "score_low": low,
        "score_high": high,
        "num_items": len(everyone),
    }


@torch.inference_mode()
def _answer_loss(model: VisionLanguageModel, spec: BenchmarkSpec, ctx: Context) -> dict[str, Any]:
    """Mean over items of the cross-entropy of their answers, nats per token."""
    items = evenly_spaced(load_dataset(spec.dataset, "test"), spec.num_items, spec.label)
    encoder = Encoder(model)
    losses = []
    for start in range(ctx.rank * spec.batch_size, len(items), ctx.world * spec.batch_size):
        encoded = [encoder.supervised(one) for one in items[start : start + spec.batch_size]]
        batch = collate(encoded, encoder.pad_id)
        logits_NV, answers_N = answer_logits(model.module, batch, ctx.device)
        loss_N = torch.nn.functional.cross_entropy(logits_NV, answers_N, reduction="none")
        counts = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1).tolist()
        losses += [(start, [float(part.mean()) for part in torch.split(loss_N, counts)])]
        ctx.progress(f"evaluate {spec.label}, answer loss", start + len(encoded), len(items))
    everyone = sorted(share for shares in ctx.gather(losses) for share in shares)
    mean, spread = _mean_and_spread([loss for _, share in everyone for loss in share], spec.label)
    return {
        "metric": "answer_loss",
        "score": mean,
        "score_low": None if spread is None else mean - spread,
        "score_high": None if spread is None else mean + spread,
        "num_items": len(items),
    }


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    encoder: Encoder,
    samples: list[Sample],
    spec: BenchmarkSpec,
    ctx: Context,
) -> list[str]:
    """Greedy answers to the samples' last questions, up to the end-of-sequence token.

    Raises:
        NumericError: logits that are NaN or infinite, from which `generate` would still answer.
    """
    inputs = encoder.prompts(samples)
    prompt_length = inputs["input_ids"].shape[1]
    inputs = {name: value.to(ctx.device) for name, value in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    module: Any = model.module
    all_finite = torch.ones((), dtype=torch.bool, device=ctx.device)

    def watch(head: Any, _: Any, logits: torch.Tensor) -> None:
        all_finite.logical_and_(logits.isfinite().all())

    watched = module.get_output_embeddings().register_forward_hook(watch)
    try:
        tokens = module.generate(
            **inputs,
            max_new_tokens=spec.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=encoder.pad_id,
        )
    finally:
        watched.remove()
    if not all_finite:
        raise NumericError(
            f"{spec.label}: the model's logits are NaN or infinite; look for NaN in its weights"
        )
    answers: list[str] = encoder.tokenizer.batch_decode(
        tokens[:, prompt_length:], skip_special_tokens=True
    )
    return answers


@torch.inference_mode()
def _perplexity(
    model: VisionLanguageModel, spec: BenchmarkSpec, ctx: Context, folder: Path
) -> dict[str, Any]:
    """exp of the mean loss per token over windows that do not overlap."""
    text = load_dataset(spec.dataset, "test")[0].text
    windows = text_windows(Encoder(model), text, spec.sequence_length)[: spec.num_items]
    if not windows or (spec.num_items and len(windows) < spec.num_items):
        raise DataError(
            f"{spec.label} has {len(windows)} windows of {spec.sequence_length} tokens, "
            f"{spec.num_items or 'at least 1'} were asked for"
        )
    losses = []
    for index in range(ctx.rank, len(windows), ctx.world):
        ids = windows[index][None].to(ctx.device)
        logits_TV = model.module(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:])
        losses.append({"item": index, "loss": float(loss)})
        ctx.progress(f"evaluate {spec.label}", index + 1, len(windows))
    everyone = [record for share in ctx.gather(losses) for record in share]
    _write_predictions(everyone, ctx, folder)
    mean, spread = _mean_and_spread([record["loss"] for record in everyone], spec.label)
    return {
        "metric": "perplexity",
        "score": math.exp(mean),
        "score_low": None if spread is None else math.exp(mean - spread),
        "score_high": None if spread is None else math.exp(mean + spread),
        "num_items": len(everyone),
    }


def _mean_and_spread(losses: list[float], label: str) -> tuple[float, float | None]:
    """The mean, and half its 95% interval; None of a single item."""
    mean = statistics.fmean(losses)
    if not math.isfinite(mean):
        raise NumericError(f"{label}: the mean loss per token is {mean}")
    if len(losses) == 1:
        return mean, None
    return mean, Z_95 * statistics.stdev(losses) / math.sqrt(len(losses))


def normalise(answer: str) -> str:
    """Lower case, spaces folded, no full stop at the end."""
    return " ".join(answer.lower().split()).removesuffix(".")


def wilson_interval(num_correct: int, num_items: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927): stays inside [0, 1], also at the ends."""
    share = num_correct / num_items
    z2_n = Z_95**2 / num_items
    centre = (share + z2_n / 2) / (1 + z2_n)
    half = Z_95 * math.sqrt(share * (1 - share) / num_items + z2_n / num_items / 4) / (1 + z2_n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _write_predictions(records: list[dict[str, Any]], ctx: Context, folder: Path) -> None:
    if ctx.rank == 0:
        lines = [json.dumps(record) for record in sorted(records, key=lambda r: r["item"])]
        (folder / PREDICTIONS_FILE).write_text("\n".join(lines) + "\n")
