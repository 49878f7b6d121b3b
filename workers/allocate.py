"""How sparse each layer is to be: a score per layer, what to keep by it, the budget that it meets.

An allocation is a function `(Question) -> Answer`. It looks at the dense model only, so all methods
share it; it names wishes, and `project` fits them to the budget, layer sizes respected.

Shape letters: O output features, I input features, L layers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.allocation import AllocationOptions, OWLSpec, SlimLLaVASpec
from jobs.errors import NumericError
from jobs.spec import CalibrationSpec, PruneSpec, Tower
from workers.context import Context
from workers.methods.wanda import wanda_saliency
from workers.models import Layer, VisionLanguageModel
from workers.prune import load_taps, statistics_file

ALLOCATION_FILE = "allocation.json"
PROJECTOR_FILE = "projector.safetensors"
"""The weights of a projector that was tuned for the allocation, by their names in the model."""

LEAST_SHARE = 0.1
"""No layer keeps less than this share of what uniform leaves it: an empty one cuts the model."""


@dataclass(frozen=True)
class Question:
    """What an allocation may look at."""

    model: VisionLanguageModel
    """Dense. To be left as it was, bit for bit."""
    spec: PruneSpec
    calibration: CalibrationSpec
    batches: Sequence[dict[str, Tensor]]
    """This worker's calibration batches."""
    statistics: Path | None
    """The folder of the dense model's statistics, for those that need them."""
    bank: Path | None
    """The folder of the bank, for a search."""
    seed: int
    ctx: Context
    key: str
    """Of the stage, for its checkpoints."""
    folder: Path
    """Where this worker may leave files beside the answer; rank 0's are kept."""

    @property
    def layers(self) -> list[Layer]:
        """Those to be pruned, in the order they run."""
        return [
            layer for layer in self.model.layers() if self.spec.sparsity.get(layer.tower, 0) > 0
        ]


@dataclass(frozen=True)
class Answer:
    """What an allocation decided, the same on every worker."""

    sparsity: dict[str, float]
    """Fraction of zeros by layer name, in [0, 1)."""
    scores: dict[str, float] | None
    """What it was decided by, on the allocation's own scale; None where there is no score."""


def allocate(question: Question) -> Answer:
    """Decide each layer's sparsity. Every worker calls it, all get the same answer.

    Raises:
        NumericError: a score that is NaN or infinite, or a budget that cannot be met.
    """
    return ALLOCATIONS[type(question.spec.allocation)](question)


def save_allocation(answer: Answer, spec: PruneSpec, folder: Path) -> None:
    """Write `allocation.json`."""
    content = {
        "allocation": spec.allocation.model_dump(mode="json"),
        "budget": spec.sparsity,
        "sparsity": answer.sparsity,
        "scores": answer.scores or dict.fromkeys(answer.sparsity),
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


def project(
    keep: Sequence[float],
    sizes: Sequence[int],
    budget: float,
    *,
    low: Sequence[float],
    high: Sequence[float],
) -> list[float]:
    """Fit wishes to a budget: every layer is moved by the same amount, then held to its bounds.

    Args:
        keep: fraction of its weights that each layer would like to keep. Only differences count.
        sizes: weights in each layer.
        budget: fraction of all weights to keep.
        low: the least that each layer may keep.
        high: the most.

    Returns:
        clip(keep + c, low, high) with the c for which the sum of sizes * keep is the budget's, up
        to rounding. Already within budget and bounds, the wishes come back as they are.

    Raises:
        NumericError: a wish that is NaN or infinite, or bounds between which no budget like this
            lies.
    """
    wish_L, low_L, high_L = (
        torch.tensor(values, dtype=torch.float64) for values in (keep, low, high)
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
    below, above = float((low_L - wish_L).min()), float((high_L - wish_L).max())
    for _ in range(200):  # halves until below and above are neighbours
        middle = (below + above) / 2
        if float(share_L @ (wish_L + middle).clamp(low_L, high_L)) < budget:
            below = middle
        else:
            above = middle
    return [float(k) for k in (wish_L + above).clamp(low_L, high_L)]


def _budgets(question: Question) -> list[list[Layer]]:
    """The layers that share a budget: a tower's, or all."""
    layers = question.layers
    if getattr(question.spec.allocation, "budget", "tower") == "model":
        return [layers]
    towers: dict[Tower, list[Layer]] = {}
    for layer in layers:
        towers.setdefault(layer.tower, []).append(layer)
    return list(towers.values())


def _to_budget(
    question: Question,
    wishes: Callable[[list[Layer], float], Sequence[float]],
    *,
    cap: float = 1.0,
) -> dict[str, float]:
    """Each layer's sparsity, budget by budget.

    Args:
        wishes: of layers under one budget and of the fraction they keep together: what each would
            like to keep.
        cap: how far a layer's sparsity may be above that of its budget.
    """
    sparsity: dict[str, float] = {}
    for layers in _budgets(question):
        sizes = [layer.linear.weight.numel() for layer in layers]
        dropped = [question.spec.sparsity[layer.tower] for layer in layers]
        kept = 1 - sum(n * s for n, s in zip(sizes, dropped, strict=True)) / sum(sizes)
        low = max(kept - cap, LEAST_SHARE * kept)
        keeps = project(
            wishes(layers, kept),
            sizes,
            kept,
            low=[low] * len(layers),
            high=[1.0] * len(layers),
        )
        sparsity |= {layer.name: 1 - keep for layer, keep in zip(layers, keeps, strict=True)}
    return sparsity


# ---- OWL ----


def owl(question: Question) -> Answer:
    """Outlier-weighed sparsity: blocks with more outliers keep more.

    A block's score is the percentage of its |weight| times input norm above M times their mean
    (over all of its layers); what it keeps is the score, stretched to a range of 2 lambda.

    Source: arXiv:2310.05175, section 3.2 and its code. There a block's mean is over blocks of equal
    size and nothing is clipped; here `project` does both by the layers' sizes.
    """
    spec = question.spec.allocation
    assert isinstance(spec, OWLSpec)
    ratios = outlier_ratios(question, spec.outlier_multiple)

    def wishes(layers: list[Layer], _: float) -> list[float]:
        return stretched([ratios[layer.name] for layer in layers], 2 * spec.spread)

    return Answer(_to_budget(question, wishes), ratios)


def outlier_ratios(question: Question, multiple: float) -> dict[str, float]:
    """Each layer's block's outliers, in percent."""
    ratios: dict[str, float] = {}
    for tower, index in _blocks(question):
        salience = block_saliency(question, tower, index)
        products = torch.cat([salience_OI.flatten() for salience_OI in salience.values()])
        share = (products > multiple * products.mean()).double().mean()
        ratios |= dict.fromkeys(salience, 100 * float(share))
    return ratios


def block_saliency(question: Question, tower: Tower, index: int) -> dict[str, Tensor]:
    """|weight| times input norm of one block's layers, of the dense model. Float32, (O, I) each."""
    assert question.statistics is not None
    layers = {
        layer.name: layer
        for layer in question.layers
        if (layer.tower, layer.block) == (tower, index)
    }
    saliency: dict[str, Tensor] = {}
    for tap in load_taps(statistics_file(question.statistics, tower, index), layers, question.ctx):
        statistics = tap.mixed(question.calibration)
        assert statistics is not None
        for layer in tap.layers:
            saliency[layer.name] = wanda_saliency(layer.linear.weight, statistics.input_norm_I)
    return saliency


def _blocks(question: Question) -> list[tuple[Tower, int]]:
    return list(dict.fromkeys((layer.tower, layer.block) for layer in question.layers))


def stretched(scores: Sequence[float], width: float) -> list[float]:
    """Scores shifted and scaled to [0, width]; all 0 where they are all equal."""
    low, high = min(scores), max(scores)
    if high == low:
        return [0.0] * len(scores)
    return [(score - low) / (high - low) * width for score in scores]


def _slimllava(question: Question) -> Answer:
    from workers.slimllava import slimllava  # which starts from what this module answers

    return slimllava(question)


ALLOCATIONS: dict[type[AllocationOptions], Callable[[Question], Answer]] = {
    OWLSpec: owl,
    SlimLLaVASpec: _slimllava,
}
