"""How sparse each layer is to be: what each would like to keep, fitted to the budget.

An allocation looks at the dense model only, so all methods share it. It names wishes; `project`
meets the budget with them, layer sizes respected.

Shape letters: L layers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.allocation import (
    AllocationOptions,
    ATPSpec,
    BudgetedSpec,
    ECoFLaPSpec,
    ModuleDropSpec,
    OWLSpec,
    SlimLLaVASpec,
    steepest,
)
from jobs.errors import NumericError
from jobs.pattern import Target
from jobs.spec import PruneSpec, Tower
from workers.losses import Batch, answer_losses, mean_over_workers, pieces
from workers.masks import keep_mask
from workers.methods.wanda import wanda_saliency
from workers.models import Layer, VisionLanguageModel
from workers.scores import Question, Scores, by_block

ALLOCATION_FILE = "allocation.json"
PROJECTOR_FILE = "projector.safetensors"
"""The weights of a projector that was tuned for the allocation, by their names in the model."""

LEAST_SHARE = 0.1
"""No layer keeps less than this share of what uniform leaves it: an empty one cuts the model."""


@dataclass(frozen=True)
class Answer:
    """What an allocation decided, the same on every worker."""

    sparsity: dict[str, float]
    """Fraction of zeros by layer name, in [0, 1)."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else a reader of `allocation.json` may want to know: slopes and their losses."""


def allocate(question: Question, scores: Scores | None) -> Answer:
    """Decide each layer's sparsity. Every worker calls it, all get the same answer.

    Args:
        scores: of every layer to be pruned, for the allocations that go by scores.

    Raises:
        NumericError: a score or a loss that is NaN or infinite, a budget that cannot be met.
    """
    if scores is not None:
        return Answer(_by_scores(question, scores))
    return ALLOCATIONS[type(question.spec.allocation)](question)


def save_allocation(answer: Answer, scores: Scores | None, spec: PruneSpec, folder: Path) -> None:
    """Write `allocation.json`."""
    content = {
        "allocation": spec.allocation.model_dump(mode="json"),
        "budget": spec.sparsity,
        "sparsity": answer.sparsity,
        "scores": scores or dict.fromkeys(answer.sparsity),
        "details": answer.details,
    }
    (folder / ALLOCATION_FILE).write_text(json.dumps(content, indent=1))


def load_allocation(folder: Path, model: VisionLanguageModel) -> dict[str, float]:
    """Each layer's sparsity out of `allocation.json`; a tuned projector is put into the model."""
    projector = folder / PROJECTOR_FILE
    if projector.exists():
        known = dict(model.module.named_parameters())
        for name, tensor in load_file(projector).items():
            known[name].data.copy_(tensor)
    sparsity: dict[str, float] = json.loads((folder / ALLOCATION_FILE).read_text())["sparsity"]
    return sparsity


# ---- the budget ----


def project(
    keep: Sequence[float],
    sizes: Sequence[int],
    budget: float,
    *,
    low: float | Sequence[float],
    high: float | Sequence[float] = 1.0,
) -> list[float]:
    """Fit wishes to a budget: every layer is moved by the same amount, then held to its bounds.

    Args:
        keep: fraction of its weights that each layer would like to keep. Only differences count.
        sizes: weights in each layer.
        budget: fraction of all weights to keep.
        low: the least that each layer may keep, or all of them.
        high: the most.

    Returns:
        clip(keep + c, low, high) with the c for which the layers keep the budget together, up to
        rounding.

    Raises:
        NumericError: a wish that is NaN or infinite, or bounds between which no budget like this
            lies.
    """
    wish_L = torch.tensor(keep, dtype=torch.float64)
    low_L, high_L = (
        torch.as_tensor(bound, dtype=torch.float64).expand(len(keep)) for bound in (low, high)
    )
    share_L = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    if not wish_L.isfinite().all():
        raise NumericError(f"a layer's score is NaN or infinite: {wish_L.tolist()}")
    least, most = float(share_L @ low_L), float(share_L @ high_L)
    if (low_L > high_L).any() or not least - 1e-12 <= budget <= most + 1e-12:
        raise NumericError(
            f"the layers' bounds allow keeping {least:.4f} to {most:.4f} of the weights, and "
            f"{budget:.4f} is asked for"
        )
    too_little, enough = float((low_L - wish_L).min()), float((high_L - wish_L).max())
    for _ in range(100):  # of halving: the two are neighbours by then
        middle = (too_little + enough) / 2
        if float(share_L @ (wish_L + middle).clamp(low_L, high_L)) < budget:
            too_little = middle
        else:
            enough = middle
    return [float(k) for k in (wish_L + enough).clamp(low_L, high_L)]


def budgets(layers: Sequence[Layer], allocation: AllocationOptions) -> list[list[Layer]]:
    """The layers that share a budget: a tower's, or all."""
    if isinstance(allocation, BudgetedSpec) and allocation.budget == "model":
        return [list(layers)]
    towers: dict[Tower, list[Layer]] = {}
    for layer in layers:
        towers.setdefault(layer.tower, []).append(layer)
    return list(towers.values())


def _kept(layers: Sequence[Layer], asked: Mapping[Tower, float]) -> float:
    """The fraction of their weights that the layers are to keep together."""
    sizes = [layer.linear.weight.numel() for layer in layers]
    zeros = [size * asked[layer.tower] for size, layer in zip(sizes, layers, strict=True)]
    return 1 - sum(zeros) / sum(sizes)


def _to_budget(
    layers: Sequence[Layer], wishes: Sequence[float], kept: float, *, low: float = 0.0
) -> dict[str, float]:
    """Each layer's sparsity: wishes for what to keep, fitted to what all keep together."""
    sizes = [layer.linear.weight.numel() for layer in layers]
    keeps = project(wishes, sizes, kept, low=max(low, LEAST_SHARE * kept))
    return {layer.name: 1 - keep for layer, keep in zip(layers, keeps, strict=True)}


# ---- by scores: OWL, ECoFLaP, module drop ----


def _by_scores(question: Question, scores: Scores) -> dict[str, float]:
    spec = question.spec.allocation
    sparsity: dict[str, float] = {}
    for layers in budgets(question.layers, spec):
        kept = _kept(layers, question.spec.sparsity)
        if isinstance(spec, ECoFLaPSpec):
            low = max(0.0, kept - spec.cap)
            wishes = in_proportion(layers, scores, kept, low=low, granularity=spec.granularity)
            sparsity |= _to_budget(layers, wishes, kept, low=low)
        else:
            assert isinstance(spec, OWLSpec | ModuleDropSpec)
            wishes = stretched([scores[layer.name] for layer in layers], 2 * spec.spread)
            sparsity |= _to_budget(layers, wishes, kept)
    return sparsity


def stretched(scores: Sequence[float], width: float) -> list[float]:
    """Scores shifted and scaled to [0, width]; all 0 where they are all equal.

    Source: OWL, arXiv:2310.05175, section 3.2. There the mean over blocks of equal size is then
    shifted to the budget; here `project` does it, by size.
    """
    low, high = min(scores), max(scores)
    if high == low:
        return [0.0] * len(scores)
    return [(score - low) / (high - low) * width for score in scores]


def in_proportion(
    layers: Sequence[Layer], scores: Scores, kept: float, *, low: float, granularity: str
) -> list[float]:
    """Every layer keeps `low`, and what remains is shared out in proportion to the scores.

    A group's share is a number of weights, not a fraction: of two with one score the smaller keeps
    the larger fraction. A group is a layer, or a block with its layers' scores added up.

    Source: ECoFLaP's code. What a group cannot take it hands on in proportion there; `project`
    hands it on in equal parts.
    """
    groups = by_block(layers) if granularity == "block" else [[layer] for layer in layers]
    total = sum(scores[layer.name] for layer in layers)
    num_weights = sum(layer.linear.weight.numel() for layer in layers)
    wishes: dict[str, float] = {}
    for group in groups:
        size = sum(layer.linear.weight.numel() for layer in group)
        score = sum(scores[layer.name] for layer in group)
        part = score / total if total else size / num_weights
        wishes |= dict.fromkeys(
            (layer.name for layer in group), low + (kept - low) * num_weights * part / size
        )
    return [wishes[layer.name] for layer in layers]


# ---- ATP ----


@torch.no_grad()
def atp(question: Question) -> Answer:
    """Arithmetic progression over depth: each block is sparser than the one before by one step.

    The step is given, or the one of the least calibration loss. A candidate is pruned by Wanda with
    the dense model's statistics, which takes no pass of its own; towers take turns in the order
    they run, each with those before it as they were decided.

    Source: arXiv:2502.14770, section 3. There the method to be used prunes each candidate, and
    perplexity decides; here all methods share one allocation.
    """
    spec = question.spec.allocation
    assert isinstance(spec, ATPSpec)
    towers = budgets(question.layers, spec)
    if spec.slope != "search":
        given = [_sloped(question, layers, spec.slope) for layers in towers]
        return Answer({name: value for tower in given for name, value in tower.items()})
    dense = {layer.name: layer.linear.weight.data for layer in question.layers}
    sparsity: dict[str, float] = {}
    details: dict[str, Any] = {}
    try:
        batches = list(pieces(question.batches(), question.ctx))
        for layers in towers:
            losses = _losses_by_slope(question, layers, batches, dense)
            slope = min(losses, key=lambda each: (losses[each], each))
            sparsity |= _sloped(question, layers, slope)
            _prune_by_wanda(question, layers, sparsity, dense)
            details[layers[0].tower] = {"slope": slope, "loss_by_slope": losses}
    finally:
        for layer in question.layers:
            layer.linear.weight.data = dense[layer.name]
    return Answer(sparsity, details)


def progression(sparsity: float, slope: float, num_blocks: int) -> list[float]:
    """Each block's sparsity: in steps of `slope`, `sparsity` on average."""
    return [sparsity + slope * (index - (num_blocks - 1) / 2) for index in range(num_blocks)]


def _sloped(question: Question, layers: Sequence[Layer], slope: float) -> dict[str, float]:
    """A tower's sparsities under a slope."""
    asked = question.spec.sparsity[layers[0].tower]
    by_index = progression(asked, slope, len(by_block(layers)))
    wishes = [1 - by_index[layer.block] for layer in layers]
    return _to_budget(layers, wishes, 1 - asked)


def _losses_by_slope(
    question: Question, layers: Sequence[Layer], batches: Sequence[Batch], dense: dict[str, Tensor]
) -> dict[float, float]:
    spec, ctx = question.spec.allocation, question.ctx
    assert isinstance(spec, ATPSpec)
    tower = layers[0].tower
    limit = steepest(question.spec.sparsity[tower], len(by_block(layers)))
    losses: dict[float, float] = {}
    for number in range(spec.num_slopes):
        slope = limit * number / spec.num_slopes
        _prune_by_wanda(question, layers, _sloped(question, layers, slope), dense)
        values = [
            loss
            for batch in batches
            for loss in answer_losses(question.model.module, batch, ctx.device)
        ]
        losses[slope] = mean_over_workers(values, ctx, f"atp with slope {slope:g}")
        ctx.progress(f"allocate {tower}", number + 1, spec.num_slopes)
    return losses


def _prune_by_wanda(
    question: Question,
    layers: Sequence[Layer],
    sparsity: Mapping[str, float],
    dense: Mapping[str, Tensor],
) -> None:
    for block in by_block(layers):
        norms = question.input_norms(block[0].tower, block[0].block)
        for layer in block:
            weight_OI = dense[layer.name]
            saliency_OI = wanda_saliency(weight_OI, norms[layer.name])
            layer.linear.weight.data = weight_OI * keep_mask(
                saliency_OI, Target(sparsity[layer.name])
            )


def _slimllava(question: Question) -> Answer:
    from workers.slimllava import slimllava  # which starts from what this module answers

    return slimllava(question)


ALLOCATIONS: dict[type[AllocationOptions], Callable[[Question], Answer]] = {
    ATPSpec: atp,
    SlimLLaVASpec: _slimllava,
}
"""Those that do not go by scores."""
