"""Run calibration samples through a tower, block by block, and sum up what its layers read.

A `TowerWalk` holds every batch's activations in front of one block. Either it runs the block twice,
to add up the inputs of all its layers and, once they are pruned, to move on; or true-sequentially,
once, and stops in front of every layer until it is pruned (`workers/staged.py`). Layers that read
one tensor (q, k and v) form a tap and share their statistics: taps are found by the identity of the
input tensor, not by name.

Shape letters: B samples in a batch, T tokens, D model width, I input features.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.errors import DataError, ModelError, NumericError
from jobs.spec import CalibrationSpec, Tower
from workers.atv import Drift, share_of_text
from workers.context import Context
from workers.encode import Encoded, Encoder, collate, in_parts
from workers.models import Layer, VisionLanguageModel
from workers.staged import StoppedPass, stops
from workers.statistics import Statistics, mix

TOKENS_PER_BATCH = 8192
"""Enough for a Gram product to be bound by arithmetic, few enough to hold a block's inputs."""

MIN_BATCHES = 8
"""So that as many workers have something to do."""

MODALITIES = ("text", "visual")
Modality = str
TapStatistics = dict[Modality, Statistics]
Tokens = Mapping[Modality, Tensor | None]
"""Which tokens of a batch count, by modality: bool, (B, T). None: all."""


@dataclass(frozen=True)
class Tap:
    """An input tensor and the layers of one block that read it."""

    layers: tuple[Layer, ...]
    statistics: TapStatistics
    """By modality, "text" and "visual". Empty for methods that need none."""

    def mixed(self, calibration: CalibrationSpec) -> Statistics | None:
        """One statistic of both modalities: each token with its weight, in a vision tower with 1.

        Raises:
            NumericError: NaN or infinity, or no token of any weight reached this input.
        """
        if not self.statistics:
            return None
        weights = self._weights(calibration)
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

    def num_tokens(self, calibration: CalibrationSpec) -> dict[Modality, int] | None:
        """The tokens that `mixed` counts, by modality. None without statistics."""
        weights = self._weights(calibration)
        return {
            name: int(part.num_tokens) if weights[name] else 0
            for name, part in self.statistics.items()
        } or None

    def _weights(self, calibration: CalibrationSpec) -> dict[Modality, float]:
        is_vision = self.layers[0].tower == "vision"
        return dict.fromkeys(MODALITIES, 1.0) if is_vision else calibration.weights


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
    most = math.ceil(len(encoded) / MIN_BATCHES)
    return _batches(encoded, encoder.pad_id, most, TOKENS_PER_BATCH)[ctx.rank :: ctx.world]


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


@dataclass(frozen=True)
class BlockCall:
    """One batch in front of a block: what the block is called with."""

    hidden_BTD: Tensor
    arguments: dict[str, Any]
    is_token_BT: Tensor | None
    """Which are tokens rather than padding; None: all."""
    number: int
    """Of the batch among this worker's; the parts of one that was divided share it."""


@dataclass
class _Batch:
    """One batch in front of a block."""

    hidden: Tensor
    """What the block reads, (B, T, D)."""
    arguments: dict[str, Any]
    """The block's other arguments, the same for every block."""
    tokens: Tokens
    number: int

    def without_visual(self) -> "_Batch":
        return replace(self, tokens={"text": self.tokens["text"]})


@dataclass(frozen=True)
class _Held:
    """What ATV keeps of a batch until it knows how many visual tokens it wants."""

    drift: Drift
    inputs: dict[tuple[str, ...], Tensor]
    """By tap, the inputs of the `drift.most()`: at most one visual token per text token."""

    @classmethod
    def of(cls, drift: Drift, taps: Mapping[tuple[str, ...], Tensor]) -> "_Held":
        most = drift.most().reshape(-1)
        return cls(drift, {names: x.reshape(-1, x.shape[-1])[most] for names, x in taps.items()})


def _is_token(tokens: Tokens) -> Tensor | None:
    masks = [mask for mask in tokens.values() if mask is not None]
    return torch.stack(masks).any(dim=0) if masks else None


def _drift(batch: _Batch, output: Tensor) -> Drift:
    is_text_BT, is_visual_BT = batch.tokens["text"], batch.tokens["visual"]
    assert is_text_BT is not None
    assert is_visual_BT is not None
    return Drift.of(batch.hidden, output, is_text_BT, is_visual_BT)


class TowerWalk:
    """The activations of all calibration batches in front of one block of a tower.

    `stages` gives the block's taps as they are to be pruned, and moves on. `statistics` and
    `advance` are for whoever wants one without the other.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tower: Tower,
        batches: Sequence[dict[str, Tensor]],
        calibration: CalibrationSpec,
        ctx: Context,
    ) -> None:
        """Run the model up to the tower's first block.

        Raises:
            DataError: no batch reaches the tower: a vision tower and samples without images.
        """
        self.ctx = ctx
        self.tower = tower
        self.calibration = calibration
        self.blocks = model.blocks(tower)
        self.layers_by_block: list[dict[str, Layer]] = [{} for _ in self.blocks]
        for layer in model.layers(tower):
            self.layers_by_block[layer.block][layer.name] = layer
        self.index = 0
        self.batches: list[_Batch] = []
        self._orders: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        """By the names of a block's layers: its taps in the order they run, as positions."""
        with ctx.timed("calibrate"):
            for number, batch in enumerate(batches):
                for part in in_parts(batch, ctx.smaller(len(batch["labels"]))):
                    self._capture(model, part, number)
        if sum(ctx.gather(len(self.batches))) == 0:
            raise DataError(
                f"no calibration sample reaches the {tower} tower: calibrate it on samples with "
                "images, or leave it out of `towers`"
            )

    @torch.no_grad()
    def _capture(self, model: VisionLanguageModel, batch: dict[str, Tensor], number: int) -> None:
        inputs = {name: value.to(self.ctx.device) for name, value in batch.items()}
        inputs.pop("labels")
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        elif self.tower == "vision":
            return

        def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = inspect.signature(block.forward).bind_partial(*args, **kwargs)
            raise _ReachedBlock(_flatten(named))

        tokens: Tokens = {"visual": None}
        if self.tower == "language":
            is_token_BT = inputs["attention_mask"].bool()
            image = -1 if model.image_token_id is None else model.image_token_id
            is_visual_BT = inputs["input_ids"] == image
            tokens = {"text": is_token_BT & ~is_visual_BT, "visual": is_token_BT & is_visual_BT}
        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model.module(**inputs, use_cache=False)
        except _ReachedBlock as reached:
            hidden = reached.arguments.pop("hidden_states")
            self.batches.append(_Batch(hidden, reached.arguments, tokens, number))
        finally:
            handle.remove()

    @property
    def layers(self) -> dict[str, Layer]:
        """Of the current block, by name."""
        return self.layers_by_block[self.index]

    def stages(self) -> Iterator[list[Tap]]:
        """The current block's taps, those to prune at a time; afterwards, the next block.

        Whoever iterates prunes what it was given before asking for more: all taps of the block at
        once, or, true-sequentially, tap by tap in the order they run.
        """
        if self.calibration.propagate == "true_sequential":
            yield from self._tap_by_tap()
        else:
            yield self.statistics()
            self.advance()

    @torch.no_grad()
    def statistics(self, *, advance: bool = False) -> list[Tap]:
        """Run the current block on every batch and sum up its layers' inputs over all workers.

        Args:
            advance: also keep the block's outputs and move on to the next block, for statistics
                of the dense model: each block then runs once.

        Raises:
            ModelError: a layer of the block that the forward pass leaves out.
        """
        sums: dict[tuple[str, ...], TapStatistics] = {}
        held: list[_Held] = []
        with self.ctx.timed("calibrate"):
            for batch in self.batches:
                inputs, output = self._run_watched(batch)
                taps = _group_by_identity(inputs)
                for names, tensor in taps.items():
                    if names not in sums:
                        sums[names] = self._no_sums(names)
                    counted = batch.without_visual() if self._is_atv else batch
                    self._add(sums[names], tensor, counted)
                if self._is_atv:
                    held.append(_Held.of(_drift(batch, output), taps))
                if advance:
                    batch.hidden = output
            self._add_held(sums, held)
            everyones = self.ctx.gather(list(sums))
            found = sorted({names for each in everyones for names in each})
            self._check_all_ran(found)
            merged = [self._tap(names, sums.get(names)) for names in found]
        self.index += int(advance)
        return merged

    @torch.no_grad()
    def advance(self) -> None:
        """Run the current block, as it now is, and stand in front of the next, if there is one."""
        with self.ctx.timed("calibrate"):
            if self.index + 1 < len(self.blocks):
                for batch in self.batches:
                    batch.hidden = self._run(batch)
        self.index += 1

    @torch.no_grad()
    def _tap_by_tap(self) -> Iterator[list[Tap]]:
        """One forward pass of every batch through the block, stopped in front of each tap.

        Until they go on, the passes hold what the block keeps at that point, for all samples of
        this worker: its residual, the tap's input, and in attention q, k and v.

        Raises:
            ModelError: a layer of the block that the forward pass leaves out, or one that runs at
                another point for one batch than for another.
        """
        with self.ctx.timed("calibrate"):
            order = self._order_of_taps()
            chosen = self._choose_ahead()
            passes = [StoppedPass(partial(self._run, batch)) for batch in self.batches]
        linears = {name: layer.linear for name, layer in self.layers.items()}
        with stops(linears, {name: names for names in order for name in names}) as pruned:
            for names in order:
                with self.ctx.timed("calibrate"):
                    sums = self._no_sums(names)
                    for each, batch in zip(passes, chosen, strict=True):
                        self._add(sums, each.run_to(names), batch)
                    tap = self._tap(names, sums)
                yield [tap]
                pruned.update(names)
            if self.index + 1 < len(self.blocks):
                with self.ctx.timed("calibrate"):
                    for batch, each in zip(self.batches, passes, strict=True):
                        batch.hidden = each.run_to_end()
        self.index += 1

    def _order_of_taps(self) -> list[tuple[str, ...]]:
        """The block's taps in the order they run.

        Found by running one batch through the first block whose layers have these names.
        """
        names = list(self.layers)
        alike = tuple(name.replace(f".{self.index}.", ".", 1) for name in names)
        if alike not in self._orders:
            mine = None
            if self.batches:
                inputs, _ = self._run_watched(self.batches[0])
                mine = list(_group_by_identity(inputs))
            found: list[tuple[str, ...]] = next(each for each in self.ctx.gather(mine) if each)
            self._check_all_ran(found)
            self._orders[alike] = [tuple(map(names.index, tap)) for tap in found]
        return [tuple(names[i] for i in tap) for tap in self._orders[alike]]

    def _check_all_ran(self, taps: Sequence[tuple[str, ...]]) -> None:
        missing = self.layers.keys() - {name for names in taps for name in names}
        if missing:
            raise ModelError(
                f"{min(missing)}: the block's forward pass leaves this layer out, so it cannot be "
                f"calibrated ({len(missing)} such layers)"
            )

    def _choose_ahead(self) -> list["_Batch"]:
        """The batches with the tokens that count; ATV runs the unpruned block to find out."""
        if not self._is_atv:
            return self.batches
        drifts = [_drift(batch, self._run(batch)) for batch in self.batches]
        share = self._share_of_text(drifts)
        return [
            replace(batch, tokens={**batch.tokens, "visual": drift.most(share)})
            for batch, drift in zip(self.batches, drifts, strict=True)
        ]

    @property
    def _is_atv(self) -> bool:
        return self.calibration.tokens == "atv" and self.tower == "language"

    def _share_of_text(self, drifts: Sequence[Drift]) -> float:
        totals = [each for its in self.ctx.gather([d.total() for d in drifts]) for each in its]
        total, count = math.fsum(total for total, _ in totals), sum(n for _, n in totals)
        return share_of_text(total, count, self.calibration.atv_alpha)

    def _add_held(
        self, sums: dict[tuple[str, ...], TapStatistics], held: Sequence["_Held"]
    ) -> None:
        """Of the held visual tokens add those that ATV wants, now that all batches have passed."""
        if not self._is_atv:
            return
        share = self._share_of_text([each.drift for each in held])
        for each in held:
            chosen = each.drift.most(share)[each.drift.most()]
            if self.calibration.weights["visual"] and chosen.any():
                for names, x_TI in each.inputs.items():
                    self._sum(sums[names]["visual"], x_TI[chosen], len(each.drift.num_text_B))

    def calls(self) -> list[BlockCall]:
        """This worker's batches, as the current block is about to read them."""
        return [
            BlockCall(batch.hidden, batch.arguments, _is_token(batch.tokens), batch.number)
            for batch in self.batches
        ]

    def advance_again(self, calls: Sequence[BlockCall]) -> None:
        """Pass through the last block once more: it has changed since."""
        self.index -= 1
        for batch, call in zip(self.batches, calls, strict=True):
            batch.hidden = call.hidden_BTD
        self.advance()

    def _run(self, batch: _Batch) -> Tensor:
        output: Tensor | tuple[Tensor, ...] = self.blocks[self.index](
            batch.hidden, **batch.arguments
        )
        return output[0] if isinstance(output, tuple) else output

    def _run_watched(self, batch: _Batch) -> tuple[dict[str, Tensor], Tensor]:
        inputs: dict[str, Tensor] = {}
        handles = [
            layer.linear.register_forward_pre_hook(
                lambda module, args, name=name: inputs.__setitem__(name, args[0])
            )
            for name, layer in self.layers.items()
        ]
        try:
            return inputs, self._run(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _no_sums(self, names: tuple[str, ...]) -> TapStatistics:
        """Nothing seen yet. The batches' products are in float32, their sum is in float64: then no
        order of adding shows.

        SparseGPT carries a rounding error from column to column and from block to block: with sums
        in float32, one and two workers agreed in 98% of the demo model's mask at 2:4 only.
        """
        num_inputs = self.layers[names[0]].linear.in_features
        return {
            name: Statistics.empty(num_inputs, self.ctx.device, torch.float64)
            for name in MODALITIES
        }

    def _add(self, parts: TapStatistics, tensor: Tensor, batch: "_Batch") -> None:
        """Add a batch's tokens to the sums of their modality, less those of weight 0."""
        x_TI = tensor.reshape(-1, tensor.shape[-1])
        for name, chosen_BT in batch.tokens.items():
            if chosen_BT is None:
                self._sum(parts[name], x_TI, len(batch.hidden))
            elif self.calibration.weights[name] and chosen_BT.any():
                self._sum(parts[name], x_TI[chosen_BT.reshape(-1)], len(batch.hidden))

    def _sum(self, total: Statistics, x_TI: Tensor, num_sequences: int) -> None:
        with self.ctx.timed("gram"):
            total.update(x_TI, num_sequences)

    def _tap(self, names: tuple[str, ...], parts: TapStatistics | None) -> Tap:
        """The tap's sums over all workers; `parts` is None on one that had no batch."""
        layers = tuple(self.layers[name] for name in names)
        return Tap(layers, _sum_over_workers(parts or self._no_sums(names), self.ctx))


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
