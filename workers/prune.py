"""Prune a model block by block, vision before language, and be able to go on after a kill.

Shape letters: O output features, I input features.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from jobs.crash import crash_point
from jobs.errors import CorruptError, ModelError
from jobs.pattern import Pattern, Target
from jobs.spec import CalibrationSpec, PruneSpec, Tower
from workers.calibrate import Tap, TowerWalk
from workers.context import Context
from workers.methods import prune_shared
from workers.methods.common import need
from workers.models import Layer, VisionLanguageModel
from workers.refine import Refinement
from workers.statistics import Statistics

MASKS_FILE = "masks.safetensors"
REPORT_FILE = "pruning.json"
STATISTICS_TENSORS = ("gram_II", "sum_I", "counts")


@dataclass(frozen=True)
class LayerReport:
    """What pruning did to one layer."""

    name: str
    tower: Tower
    asked: float
    """Fraction of weights that was to be dropped."""
    sparsity: float
    """Fraction that was dropped: whole weights of each row, or of the layer."""
    layer_error: float | None
    """|X dW^T|^2 / |X W^T|^2 on the calibration inputs; null without statistics."""
    damping: float | None
    """Share added to the Hessian's diagonal; null where none was factored."""
    num_inputs: int
    tokens: dict[str, int] | None
    """Calibration tokens that reached its input, by modality; null without statistics. With fewer
    than `num_inputs` in all, the Gram matrix has not full rank."""
    bias: Literal["kept", "compensated"] | None
    """Whether the bias took up the change of the mean output; null where there is no bias."""


def check_shapes(model: VisionLanguageModel, spec: PruneSpec) -> None:
    """Raise ModelError for a layer that the pattern does not fit or a tower that is not there."""
    pattern = Pattern.parse(spec.pattern)
    for tower in spec.sparsity:
        if tower not in model.towers:
            raise ModelError(f"the model has no {tower} tower; it has {', '.join(model.towers)}")
        for layer in model.layers(tower):
            try:
                pattern.check_inputs(layer.linear.in_features, layer.name)
            except ValueError as error:
                raise ModelError(str(error)) from error


def prune_sequentially(
    model: VisionLanguageModel,
    spec: PruneSpec,
    calibration: CalibrationSpec,
    batches: Sequence[dict[str, Tensor]],
    ctx: Context,
    *,
    key: str,
    sparsity: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Prune in place, each block calibrated on activations that passed the pruned ones before it.

    Args:
        sparsity: by layer name; default: each layer its tower's, as `spec` says.

    Every finished block is kept under the stage's `key`; the next attempt takes it up from there.

    Returns:
        The masks (bool, (O, I), True is kept) by layer name, and a report per layer.
    """
    sparsity = sparsity or uniform_sparsity(model, spec)
    finished = _FinishedBlocks(ctx, key)
    masks: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    num_blocks = sum(len(model.blocks(tower)) for tower in _towers(model, spec))
    for tower in _towers(model, spec):
        walk = (
            TowerWalk(model, tower, batches, calibration, ctx) if spec.needs_activations else None
        )
        for index in range(len(model.blocks(tower))):
            layers = [layer for layer in model.layers(tower) if layer.block == index]
            restored = finished.restore(tower, index, layers)
            if restored is None:
                refinement = Refinement(walk, spec.refine, ctx) if walk and spec.refine else None
                stages = walk.stages() if walk else [[Tap((layer,), {}) for layer in layers]]
                restored = _prune_stages(stages, spec, calibration, ctx, sparsity)
                if refinement:
                    refinement.run(layers, restored[0])
                finished.keep(tower, index, layers, restored)
                crash_point(f"prune-{tower}-{index}")
            elif walk:
                walk.advance()
            masks |= restored[0]
            reports += restored[1]
            ctx.progress("prune", len({r.name.rsplit(".", 2)[0] for r in reports}), num_blocks)
    return masks, reports


def _prune_stages(
    stages: Iterable[list[Tap]],
    spec: PruneSpec,
    calibration: CalibrationSpec,
    ctx: Context,
    sparsity: Mapping[str, float],
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Prune the layers of one block in place, stage by stage."""
    masks: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for taps in stages:
        stage_masks, stage_reports = prune_taps(taps, spec, calibration, ctx, sparsity=sparsity)
        masks |= stage_masks
        reports += stage_reports
    return masks, reports


def prune_from_statistics(
    model: VisionLanguageModel,
    spec: PruneSpec,
    calibration: CalibrationSpec,
    statistics_folder: Path,
    ctx: Context,
    *,
    sparsity: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Prune in place from the dense model's statistics: a solve per layer, no forward pass.

    Args:
        sparsity: by layer name; default: each layer its tower's, as `spec` says.
    """
    sparsity = sparsity or uniform_sparsity(model, spec)
    masks: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for tower in _towers(model, spec):
        for index in range(len(model.blocks(tower))):
            layers = {layer.name: layer for layer in model.layers(tower) if layer.block == index}
            taps = load_taps(statistics_file(statistics_folder, tower, index), layers, ctx)
            block_masks, block_reports = prune_taps(taps, spec, calibration, ctx, sparsity=sparsity)
            masks |= block_masks
            reports += block_reports
            ctx.progress("prune", index + 1, len(model.blocks(tower)))
    return masks, reports


def collect_dense_statistics(
    model: VisionLanguageModel,
    calibration: CalibrationSpec,
    batches: Sequence[dict[str, Tensor]],
    ctx: Context,
    folder: Path,
) -> None:
    """Write the dense model's statistics of every block to `folder`, a file per block.

    Text and visual tokens are kept apart and unweighted, for jobs that mix them differently. Where
    no sample has an image the vision tower has no statistics.
    """
    sees = any(ctx.gather(any("pixel_values" in batch for batch in batches)))
    for tower in [tower for tower in model.towers if sees or tower == "language"]:
        walk = TowerWalk(model, tower, batches, calibration.unmixed(), ctx)
        for index in range(len(walk.blocks)):
            taps = walk.statistics(advance=True)
            if ctx.rank == 0:
                save_taps(taps, statistics_file(folder, tower, index))
            ctx.progress(f"calibrate {tower}", index + 1, len(walk.blocks))


def statistics_file(folder: Path, tower: Tower, index: int) -> Path:
    """Where a block's statistics lie in the folder of the dense model's."""
    return folder / f"{tower}-{index:03d}.safetensors"


def save_taps(taps: Sequence[Tap], file: Path) -> None:
    """One safetensors file: tensors `TAP/MODALITY/NAME`, the taps' layer names as metadata."""
    tensors = {
        f"{number}/{modality}/{name}": tensor.contiguous()
        for number, tap in enumerate(taps)
        for modality, part in tap.statistics.items()
        for name, tensor in part.to_tensors().items()
    }
    names = [[layer.name for layer in tap.layers] for tap in taps]
    save_file(tensors, file, metadata={"taps": json.dumps(names)})


def load_taps(file: Path, layers: dict[str, Layer], ctx: Context) -> list[Tap]:
    """Read what `save_taps` wrote."""
    with safe_open(file, framework="pt") as opened:
        names: list[list[str]] = json.loads(opened.metadata()["taps"])
    tensors = load_file(file, device=str(ctx.device))
    taps = []
    for number, layer_names in enumerate(names):
        statistics = {
            modality: Statistics.from_tensors(
                {name: tensors[f"{number}/{modality}/{name}"] for name in STATISTICS_TENSORS}
            )
            for modality in ("text", "visual")
        }
        taps.append(Tap(tuple(layers[name] for name in layer_names), statistics))
    return taps


def uniform_sparsity(model: VisionLanguageModel, spec: PruneSpec) -> dict[str, float]:
    """Every layer of a pruned tower gets the tower's sparsity."""
    return {
        layer.name: spec.sparsity[tower] for tower in spec.sparsity for layer in model.layers(tower)
    }


def prune_taps(
    taps: Sequence[Tap],
    spec: PruneSpec,
    calibration: CalibrationSpec,
    ctx: Context,
    *,
    sparsity: Mapping[str, float],
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Prune the layers of one block in place. Workers share the taps out among themselves."""
    masks: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for number, tap in enumerate(taps):
        owner = number % ctx.world
        if ctx.rank == owner:
            solved = _prune_tap(tap, spec, calibration, sparsity)
        else:
            solved = {
                layer.name: (torch.empty_like(layer.linear.weight, dtype=torch.bool), None)
                for layer in tap.layers
            }
        for layer in tap.layers:
            keep_OI, report = solved[layer.name]
            if ctx.world > 1:
                bits = keep_OI.to(torch.uint8)
                dist.broadcast(bits, src=owner)
                dist.broadcast(layer.linear.weight.data, src=owner)
                if layer.linear.bias is not None:
                    dist.broadcast(layer.linear.bias.data, src=owner)
                keep_OI = bits.bool()
                box = [report]
                dist.broadcast_object_list(box, src=owner)
                report = box[0]
            assert report is not None
            masks[layer.name] = keep_OI
            reports.append(report)
    return masks, reports


def _prune_tap(
    tap: Tap, spec: PruneSpec, calibration: CalibrationSpec, sparsity: Mapping[str, float]
) -> dict[str, tuple[Tensor, LayerReport | None]]:
    statistics = tap.mixed(calibration)
    pattern = Pattern.parse(spec.pattern)
    pruned = prune_shared(
        [layer.linear.weight.data for layer in tap.layers],
        statistics,
        [Target(sparsity[layer.name], pattern) for layer in tap.layers],
        spec.method.of_layer(tap.layers[0].name),
        where=tap.layers[0].name,
    )
    compensates = spec.method.bias == "compensate"
    solved: dict[str, tuple[Tensor, LayerReport | None]] = {}
    for layer, result in zip(tap.layers, pruned, strict=True):
        linear = layer.linear
        shift_O = None
        if compensates and linear.bias is not None:
            shift_O = _compensate(linear, result.weight_OI, need(statistics).mean_I)
        report = LayerReport(
            name=layer.name,
            tower=layer.tower,
            asked=sparsity[layer.name],
            sparsity=1 - int(result.keep_OI.count_nonzero()) / result.keep_OI.numel(),
            layer_error=_layer_error(linear.weight.data, result.weight_OI, statistics, shift_O),
            damping=result.damping_used,
            num_inputs=linear.in_features,
            tokens=tap.num_tokens(calibration),
            bias=None if linear.bias is None else "compensated" if compensates else "kept",
        )
        linear.weight.data = result.weight_OI
        solved[layer.name] = (result.keep_OI, report)
    return solved


def _compensate(linear: nn.Linear, pruned_OI: Tensor, mean_I: Tensor) -> Tensor:
    """Give the bias what the new weights take from the mean output, after FLAP (arXiv:2312.11983).

    Returns:
        What the outputs' means changed by, and no longer do. Float64, (O,).
    """
    shift_O = (pruned_OI.double() - linear.weight.double()) @ mean_I
    linear.bias.data = (linear.bias - shift_O).to(linear.bias)
    return shift_O


def _layer_error(
    before_OI: Tensor, after_OI: Tensor, statistics: Statistics | None, shift_O: Tensor | None
) -> float | None:
    if statistics is None:
        return None
    dense_OI = before_OI.float()
    change_OI = after_OI.float() - dense_OI
    energy = ((dense_OI @ statistics.gram_II) * dense_OI).sum()
    lost = ((change_OI @ statistics.gram_II) * change_OI).sum()
    if shift_O is not None:
        lost = (lost - statistics.num_tokens * shift_O.square().sum()).clamp(min=0)
    return float(lost / energy) if energy > 0 else None


def _towers(model: VisionLanguageModel, spec: PruneSpec) -> list[Tower]:
    """The towers to prune, in the order they run, so that language sees pruned vision."""
    return [tower for tower in model.towers if spec.sparsity.get(tower, 0) > 0]


class _FinishedBlocks:
    """The blocks that an earlier attempt at this stage has pruned, in the storage."""

    def __init__(self, ctx: Context, key: str) -> None:
        self.ctx = ctx
        self.folder = f"work/{key}"

    def keep(
        self,
        tower: Tower,
        index: int,
        layers: Sequence[Layer],
        done: tuple[dict[str, Tensor], list[LayerReport]],
    ) -> None:
        if self.ctx.rank:
            return
        masks, reports = done
        tensors = {
            f"{layer.name}/{name}": parameter.data.cpu()
            for layer in layers
            for name, parameter in layer.linear.named_parameters()
        }
        tensors |= {f"{name}/mask": pack_mask(mask) for name, mask in masks.items()}
        metadata = {"reports": json.dumps([asdict(report) for report in reports])}
        self.ctx.storage.put_sealed(self._path(tower, index), save(tensors, metadata))

    def restore(
        self, tower: Tower, index: int, layers: Sequence[Layer]
    ) -> tuple[dict[str, Tensor], list[LayerReport]] | None:
        """Put the block's finished weights and biases into the model; None where there are none."""
        content = self.ctx.from_rank_0(self._read(tower, index) if self.ctx.rank == 0 else None)
        if content is None:
            return None
        tensors = load(content)
        header_length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_length])["__metadata__"]
        reports = [LayerReport(**report) for report in json.loads(metadata["reports"])]
        masks = {}
        for layer in layers:
            weight = layer.linear.weight
            for name, parameter in layer.linear.named_parameters():
                parameter.data = tensors[f"{layer.name}/{name}"].to(parameter)
            mask = unpack_mask(tensors[f"{layer.name}/mask"], tuple(weight.shape))
            masks[layer.name] = mask.to(weight.device)
        return masks, reports

    def _read(self, tower: Tower, index: int) -> bytes | None:
        return self.ctx.kept(self._path(tower, index), otherwise="the block is pruned again")

    def _path(self, tower: Tower, index: int) -> str:
        return f"{self.folder}/{tower}-{index:03d}.safetensors"


def pack_mask(keep_OI: Tensor) -> Tensor:
    """A mask at one bit a weight: uint8, (O, ceil(I / 8)), lowest bit first."""
    return torch.from_numpy(np.packbits(keep_OI.cpu().numpy(), axis=1, bitorder="little"))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_mask`: bool, (O, I)."""
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=shape[1], bitorder="little")
    return torch.from_numpy(bits).bool()


def save_report(masks: dict[str, Tensor], reports: Sequence[LayerReport], folder: Path) -> None:
    """Write `masks.safetensors` and `pruning.json` beside the model."""
    save_file({name: pack_mask(mask) for name, mask in masks.items()}, folder / MASKS_FILE)
    layers = [asdict(report) for report in reports]
    (folder / REPORT_FILE).write_text(json.dumps({"layers": layers}, indent=1))


def load_masks(folder: Path, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The masks of a pruned model folder by layer name; a layer that was left whole has none.

    Raises:
        CorruptError: the file is missing or damaged.
    """
    try:
        packed = load_file(folder / MASKS_FILE)
    except Exception as error:
        raise CorruptError(f"{folder / MASKS_FILE} cannot be read: {error}") from error
    return {
        layer.name: unpack_mask(packed[layer.name], tuple(layer.linear.weight.shape))
        for layer in layers
        if layer.name in packed
    }
