"""What a layer is worth, measured on the dense model: the scores that allocations go by.

A score is a function `(Question) -> {layer name: score}`; the higher, the more the layer keeps.
Sparsity has no part in it, so a grid measures once for all its sparsities and methods.

Shape letters: O output features, I input features.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.allocation import AllocationOptions, ECoFLaPSpec, ModuleDropSpec, OWLSpec
from jobs.spec import CalibrationSpec, PruneSpec, Tower
from workers.calibrate import calibration_batches
from workers.context import Context
from workers.losses import Batch, Replay, mean_over_workers, pieces
from workers.methods.wanda import wanda_saliency
from workers.models import Layer, VisionLanguageModel
from workers.prune import load_taps, statistics_file

SCORES_FILE = "scores.json"

Scores = dict[str, float]


@dataclass(frozen=True)
class Question:
    """What a score, and an allocation, may look at."""

    model: VisionLanguageModel
    """Dense. To be left as it was, bit for bit."""
    spec: PruneSpec
    calibration: CalibrationSpec
    statistics: Path | None
    """The folder of the dense model's statistics, for those that need them."""
    bank: Path | None
    """The folder of the bank, for a search."""
    seed: int
    ctx: Context
    key: str
    """Of the stage, for its checkpoints."""
    folder: Path
    """Where this worker may leave files beside its result; rank 0's are kept."""

    @property
    def layers(self) -> list[Layer]:
        """Those to be pruned, in the order they run."""
        return [
            layer for layer in self.model.layers() if self.spec.sparsity.get(layer.tower, 0) > 0
        ]

    def batches(self, num_samples: int | None = None) -> list[Batch]:
        """This worker's share of the calibration samples, or of `num_samples` if those are fewer.

        Of W workers, worker r gets the batches r, r + W, r + 2 W and so on.
        """
        spec = self.calibration
        wanted = min(num_samples or spec.num_samples, spec.num_samples)
        with self.ctx.timed("calibrate"):
            chosen = spec.model_copy(update={"num_samples": wanted})
            return calibration_batches(self.model, chosen, self.seed, self.ctx)

    def input_norms(self, tower: Tower, block: int) -> dict[str, Tensor]:
        """Of one block's layers: the 2-norm of each input in the dense model. Float32, (I,)."""
        assert self.statistics is not None, "the allocation did not say that it needs them"
        layers = {layer.name: layer for layer in self.model.layers(tower) if layer.block == block}
        norms: dict[str, Tensor] = {}
        for tap in load_taps(statistics_file(self.statistics, tower, block), layers, self.ctx):
            statistics = tap.mixed(self.calibration)
            assert statistics is not None
            norms |= {layer.name: statistics.input_norm_I for layer in tap.layers}
        return norms


def measure(question: Question) -> Scores:
    """Score every layer that is to be pruned. Every worker calls it, all get the same scores.

    Raises:
        NumericError: a loss that is NaN or infinite.
    """
    with torch.no_grad():
        return MEASURES[type(question.spec.allocation)](question)


def save_scores(scores: Scores, folder: Path) -> None:
    (folder / SCORES_FILE).write_text(json.dumps(scores, indent=1))


def load_scores(folder: Path) -> Scores:
    scores: Scores = json.loads((folder / SCORES_FILE).read_text())
    return scores


# ---- outliers (OWL) ----


def outliers(question: Question) -> Scores:
    """Of each layer's block: how many of |weight| times input norm are outliers, in percent.

    An outlier is more than M times the mean of all of the block's products.

    Source: the layerwise outlier distribution of OWL, arXiv:2310.05175, section 3.2.
    """
    spec = question.spec.allocation
    assert isinstance(spec, OWLSpec)
    scores: Scores = {}
    for layers in by_block(question.layers):
        norms = question.input_norms(layers[0].tower, layers[0].block)
        products = [wanda_saliency(layer.linear.weight, norms[layer.name]) for layer in layers]
        share = outlier_share(products, spec.outlier_multiple)
        scores |= {layer.name: 100 * share for layer in layers}
    return scores


def outlier_share(products: Sequence[Tensor], multiple: float) -> float:
    """The fraction of all entries that are above `multiple` times their mean."""
    entries = torch.cat([product_OI.flatten() for product_OI in products])
    return float((entries > multiple * entries.mean(dtype=torch.float64)).double().mean())


def by_block(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each block, in order."""
    blocks: dict[tuple[Tower, int], list[Layer]] = {}
    for layer in layers:
        blocks.setdefault((layer.tower, layer.block), []).append(layer)
    return list(blocks.values())


# ---- noise (ECoFLaP) ----


def noise(question: Question) -> Scores:
    """How much the loss of a sample changes along a random direction in each layer's weights.

    |L(W + εz) - L(W - εz)| / 2ε with z from N(0, 1), new for every layer and batch, averaged over
    the samples. A layer's loss is taken from the first block it changes on: see `Replay`.

    On losses in bfloat16 the differences drown in rounding; calibrate in float32 there.

    Source: zeroth-order scores of ECoFLaP, arXiv:2310.02998, section 3.2. Its code adds and
    subtracts the noise, which does not restore the weights; we put back the tensor itself.
    """
    spec, ctx = question.spec.allocation, question.ctx
    assert isinstance(spec, ECoFLaPSpec)
    changes: dict[str, list[float]] = {layer.name: [] for layer in question.layers}
    batches = question.batches(spec.num_samples)
    for number, batch in enumerate(batches):
        for piece in pieces([batch], ctx):
            replay = Replay(question.model, piece, ctx.device)
            for layer in question.layers:
                place = ctx.rank + number * ctx.world  # of the batch, among those of all workers
                seed = _seed(question.seed, layer.name, place)
                changes[layer.name] += noise_changes(
                    question.model, replay, layer, spec.noise, seed=seed
                )
        ctx.progress("score", number + 1, len(batches))
    return {
        name: mean_over_workers(values, ctx, f"ecoflap at {name}")
        for name, values in changes.items()
    }


def noise_changes(
    model: VisionLanguageModel, replay: Replay, layer: Layer, scale: float, *, seed: int
) -> list[float]:
    """|L(W + εz) - L(W - εz)| / 2ε of each sample. The weights are put back, bit for bit."""
    weight, dense_OI = layer.linear.weight, layer.linear.weight.data
    block = model.blocks(layer.tower)[layer.block]
    if not replay.reaches(block):
        return [0.0] * len(replay.dense)
    generator = torch.Generator(dense_OI.device).manual_seed(seed)
    z_OI = torch.randn(
        dense_OI.shape, generator=generator, device=dense_OI.device, dtype=dense_OI.dtype
    )
    try:
        weight.data = dense_OI + scale * z_OI
        above = replay.losses(block)
        weight.data = dense_OI - scale * z_OI
        below = replay.losses(block)
    finally:
        weight.data = dense_OI
    return [abs(a - b) / (2 * scale) for a, b in zip(above, below, strict=True)]


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


# ---- module drop (MoPE-CLIP) ----


def module_drop(question: Question) -> Scores:
    """How much the loss rises without the attention, or the MLP, that a layer belongs to.

    Source: MoPE-CLIP (CVPR 2024) takes a module's importance from the drop of a cross-modal metric
    such as zero-shot accuracy when it is removed. We take the rise of the cross-entropy of the
    answer tokens: on a hundred samples an accuracy moves in steps of a percent.
    """
    ctx = question.ctx
    modules = by_module(question.layers)
    rises: dict[str, list[float]] = {name: [] for name in modules}
    batches = question.batches()
    for number, batch in enumerate(batches):
        for piece in pieces([batch], ctx):
            replay = Replay(question.model, piece, ctx.device)
            for name, layers in modules.items():
                block = question.model.blocks(layers[0].tower)[layers[0].block]
                with removed(question.model.module.get_submodule(name)):
                    without = replay.losses(block) if replay.reaches(block) else replay.dense
                rises[name] += [a - b for a, b in zip(without, replay.dense, strict=True)]
        ctx.progress("score", number + 1, len(batches))
    means = {
        name: mean_over_workers(values, ctx, f"without {name}") for name, values in rises.items()
    }
    return {layer.name: means[name] for name, layers in modules.items() for layer in layers}


def by_module(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The layers of each attention and each MLP: of each direct child of a block, by its path."""
    modules: dict[str, list[Layer]] = {}
    for layer in layers:
        inside = layer.name[: layer.name.index(f".{layer.block}.") + len(f".{layer.block}.")]
        child = layer.name.removeprefix(inside).split(".")[0]
        modules.setdefault(inside + child, []).append(layer)
    return modules


@contextmanager
def removed(module: nn.Module) -> Iterator[None]:
    """The module adds nothing to the residual stream: its output is zeros."""

    def zeros(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        handle.remove()


MEASURES: dict[type[AllocationOptions], Callable[[Question], Scores]] = {
    OWLSpec: outliers,
    ECoFLaPSpec: noise,
    ModuleDropSpec: module_drop,
}
