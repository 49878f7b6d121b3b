"""Run calibration samples through a tower, block by block, and sum up what its layers read.

A `TowerWalk` holds every batch's activations in front of one block. `statistics()` runs the block
once and adds up the inputs of its layers; `advance()` runs it again, by then pruned, and moves on.
Layers that read one tensor (q, k and v) form a tap and share their statistics: taps are found by
the identity of the input tensor, not by name.

Shape letters: B samples in a batch, T tokens, D model width, I input features.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.errors import DataError, NumericError
from jobs.spec import CalibrationSpec, Tower
from workers.context import Context
from workers.encode import Encoded, Encoder, collate
from workers.models import Layer, VisionLanguageModel
from workers.statistics import Statistics, mix

TOKENS_PER_BATCH = 8192
"""Enough for a Gram product to be bound by arithmetic, few enough to hold a block's inputs."""

MIN_BATCHES = 8
"""So that as many workers have something to do."""

MODALITIES = ("text", "visual")
Modality = str
TapStatistics = dict[Modality, Statistics]


@dataclass(frozen=True)
class Tap:
    """An input tensor and the layers of one block that read it."""

    layers: tuple[Layer, ...]
    statistics: TapStatistics
    """By modality, "text" and "visual". Empty for methods that need none."""

    def mixed(self, visual_weight: float) -> Statistics | None:
        """One statistic of both modalities, a visual token counted `visual_weight` times.

        Raises:
            NumericError: NaN or infinity, or no token of any weight reached this input.
        """
        if not self.statistics:
            return None
        weights = {"text": 1.0, "visual": visual_weight}
        present = {
            name: part
            for name, part in self.statistics.items()
            if part.num_tokens and weights[name]
        }
        if not present:
            raise NumericError(f"{self.layers[0].name}: no calibration token reached this input")
        total = mix(present, {name: weights[name] for name in present})
        total.check_finite(self.layers[0].name)
        return total


def calibration_batches(
    model: VisionLanguageModel, spec: CalibrationSpec, seed: int, ctx: Context
) -> list[dict[str, Tensor]]:
    """This rank's share of the calibration samples, encoded, in batches of similar length.

    Raises:
        DataError: fewer samples than asked for.
    """
    encoder = Encoder(model)
    chosen = Encoded(
        encoder, spec.dataset, count=spec.num_samples, length=spec.sequence_length, seed=seed
    )
    encoded = sorted(chosen, key=lambda one: len(one["input_ids"]))
    tokens = ctx.smaller(TOKENS_PER_BATCH)
    most = ctx.smaller(math.ceil(len(encoded) / MIN_BATCHES))
    return _batches(encoded, encoder.pad_id, most, tokens)[ctx.rank :: ctx.world]


def _batches(
    encoded: list[dict[str, Tensor]], pad_id: int, most: int, tokens: int
) -> list[dict[str, Tensor]]:
    """The same batches for any number of workers, so that they differ in no bit of a product.

    Args:
        most: samples in a batch.
        tokens: in a batch, unless a single sample has more.
    """
    batches: list[list[dict[str, Tensor]]] = []
    for one in encoded:  # sorted by length: the newest is the longest of its batch
        with_image = "pixel_values" in one
        size = len(batches[-1]) + 1 if batches else math.inf
        full = size > most or size * len(one["input_ids"]) > tokens
        if full or with_image != ("pixel_values" in batches[-1][0]):
            batches.append([])
        batches[-1].append(one)
    return [collate(batch, pad_id) for batch in batches]


class TowerWalk:
    """The activations of all calibration batches in front of one block of a tower."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tower: Tower,
        batches: Sequence[dict[str, Tensor]],
        ctx: Context,
    ) -> None:
        """Run the model up to the tower's first block.

        Raises:
            DataError: no batch reaches the tower: a vision tower and samples without images.
        """
        self.ctx = ctx
        self.blocks = model.blocks(tower)
        self.layers_by_block: list[list[Layer]] = [[] for _ in self.blocks]
        for layer in model.layers(tower):
            self.layers_by_block[layer.block].append(layer)
        self.index = 0
        self.hidden: list[Tensor] = []
        self._arguments: list[dict[str, Any]] = []
        self._is_visual: list[Tensor | None] = []
        self._is_token: list[Tensor | None] = []
        for batch in batches:
            self._capture(model, tower, batch)
        if sum(ctx.gather(len(self.hidden))) == 0:
            raise DataError(
                f"no calibration sample reaches the {tower} tower: calibrate it on samples with "
                "images, or leave it out of `towers`"
            )

    @torch.no_grad()
    def _capture(self, model: VisionLanguageModel, tower: Tower, batch: dict[str, Tensor]) -> None:
        inputs = {name: value.to(self.ctx.device) for name, value in batch.items()}
        inputs.pop("labels")
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        elif tower == "vision":
            return

        def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = inspect.signature(block.forward).bind_partial(*args, **kwargs)
            raise _ReachedBlock(_flatten(named))

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model.module(**inputs, use_cache=False)
        except _ReachedBlock as reached:
            self.hidden.append(reached.arguments.pop("hidden_states"))
            self._arguments.append(reached.arguments)
        finally:
            handle.remove()
        is_language = tower == "language"
        self._is_token.append(inputs["attention_mask"].bool() if is_language else None)
        self._is_visual.append(
            inputs["input_ids"] == (-1 if model.image_token_id is None else model.image_token_id)
            if is_language
            else None
        )

    @torch.no_grad()
    def statistics(self, *, advance: bool = False) -> list[Tap]:
        """Run the current block on every batch and sum up its layers' inputs over all workers.

        Args:
            advance: also keep the block's outputs and move on to the next block, for statistics
                of the dense model: each block then runs once.
        """
        layers = {layer.name: layer for layer in self.layers_by_block[self.index]}
        taps: dict[tuple[str, ...], TapStatistics] = {}
        for number, hidden in enumerate(self.hidden):
            inputs, output = self._run_watched(layers, number, hidden)
            for names, tensor in _group_by_identity(inputs).items():
                parts = taps.setdefault(names, _empty(tensor))
                self._add(parts, tensor, number)
            if advance:
                self.hidden[number] = output
        self.index += int(advance)
        found = self.ctx.gather({names: _width(parts) for names, parts in taps.items()})
        for names, width in {k: v for each in found for k, v in each.items()}.items():
            if names not in taps:  # this worker had no batch
                taps[names] = _empty(torch.empty(0, width, device=self.ctx.device))
        merged = {names: _sum_over_workers(taps[names], self.ctx) for names in sorted(taps)}
        return [
            Tap(tuple(layers[name] for name in names), parts) for names, parts in merged.items()
        ]

    @torch.no_grad()
    def advance(self) -> None:
        """Run the current block, as it now is, and stand in front of the next."""
        for number, hidden in enumerate(self.hidden):
            self.hidden[number] = self._run(number, hidden)
        self.index += 1

    def _run(self, number: int, hidden: Tensor) -> Tensor:
        output: Tensor | tuple[Tensor, ...] = self.blocks[self.index](
            hidden, **self._arguments[number]
        )
        return output[0] if isinstance(output, tuple) else output

    def _run_watched(
        self, layers: dict[str, Layer], number: int, hidden: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        inputs: dict[str, Tensor] = {}
        handles = [
            layer.linear.register_forward_pre_hook(
                lambda module, args, name=name: inputs.__setitem__(name, args[0])
            )
            for name, layer in layers.items()
        ]
        try:
            return inputs, self._run(number, hidden)
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, parts: TapStatistics, tensor: Tensor, number: int) -> None:
        x_TI = tensor.reshape(-1, tensor.shape[-1])
        num_sequences = len(self.hidden[number])
        is_token, is_visual = self._is_token[number], self._is_visual[number]
        if is_token is None or is_visual is None:
            _accumulate(parts["visual"], x_TI, num_sequences)
            return
        for name, chosen in (("text", is_token & ~is_visual), ("visual", is_token & is_visual)):
            if chosen.any():
                _accumulate(parts[name], x_TI[chosen.reshape(-1)], num_sequences)


class _ReachedBlock(Exception):  # noqa: N818 - no error: it ends a forward pass early
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _flatten(named: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, those of `**kwargs` among the others."""
    arguments = dict(named.arguments)
    for name, parameter in named.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _group_by_identity(inputs: dict[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    groups: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), []).append(name)
    return {tuple(names): inputs[names[0]] for names in groups.values()}


def _empty(tensor: Tensor) -> TapStatistics:
    """Nothing seen yet. The Gram is in float64 until all is summed, see `_accumulate`."""
    parts = {name: Statistics.empty(tensor.shape[-1], tensor.device) for name in MODALITIES}
    for part in parts.values():
        part.gram_II = part.gram_II.double()
    return parts


def _accumulate(total: Statistics, x_TI: Tensor, num_sequences: int) -> None:
    """Add a batch, its products in float32, their sum in float64: then no order of adding shows.

    SparseGPT carries a rounding error from column to column and from block to block: with sums in
    float32, one and two workers agreed in 98% of the demo model's mask at 2:4 only.
    """
    batch = Statistics.empty(x_TI.shape[1], x_TI.device)
    batch.update(x_TI, num_sequences)
    total.gram_II += batch.gram_II
    total.sum_I += batch.sum_I
    total.num_tokens += batch.num_tokens
    total.num_sequences += batch.num_sequences


def _width(parts: TapStatistics) -> int:
    return len(parts["text"].sum_I)


def _sum_over_workers(parts: TapStatistics, ctx: Context) -> TapStatistics:
    for part in parts.values():
        if ctx.world > 1:
            dist.all_reduce(part.gram_II)
            dist.all_reduce(part.sum_I)
            counts = torch.tensor(
                [part.num_tokens, part.num_sequences], dtype=torch.float64, device=ctx.device
            )
            dist.all_reduce(counts)
            part.num_tokens, part.num_sequences = counts.tolist()
        part.gram_II = part.gram_II.float()
    return parts
