"""A bank: every layer pruned at every ratio of a grid, once, so that a search only picks.

One safetensors file per block, with a tensor `LAYER@RATIO` for each, in the model's dtype. A bank
stays on disk and is read through the page cache: 9 ratios of a 7B model take 9 times its size.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from jobs.crash import crash_point
from jobs.methods import MethodOptions
from jobs.pattern import Target
from jobs.spec import CalibrationSpec, Tower
from workers.calibrate import Tap
from workers.context import Context
from workers.methods import prune_shared
from workers.models import Layer, VisionLanguageModel
from workers.prune import load_taps, statistics_file


def build_bank(
    model: VisionLanguageModel,
    method: MethodOptions,
    grids: Mapping[Tower, Sequence[float]],
    statistics: Path,
    calibration: CalibrationSpec,
    ctx: Context,
    folder: Path,
    *,
    key: str,
) -> None:
    """Prune every layer of the towers at every ratio of their grids, unstructured.

    All ratios of the layers that read one input are one call of the method: SparseGPT factors their
    Hessian once. Workers share the blocks; each is kept under the stage's `key` as soon as it is
    solved, so that a killed attempt does not solve it again.

    Args:
        statistics: the folder of the dense model's.
        folder: where rank 0 leaves the bank.

    Raises:
        CorruptError: a block's file was damaged since it was written.
    """
    blocks = [(tower, index) for tower in grids for index in range(len(model.blocks(tower)))]
    for number, (tower, index) in enumerate(blocks):
        if number % ctx.world == ctx.rank and not _is_kept(ctx, key, tower, index):
            layers = {layer.name: layer for layer in model.layers(tower) if layer.block == index}
            taps = (
                load_taps(statistics_file(statistics, tower, index), layers, ctx)
                if method.needs_statistics
                else [Tap((layer,), {}) for layer in layers.values()]
            )
            solved = _prune_block(taps, method, grids[tower], calibration)
            ctx.storage.put_sealed(_kept(key, tower, index), solved)
            crash_point(f"bank-{tower}-{index}")
        ctx.progress("bank", number + 1, len(blocks))
    ctx.barrier()
    if ctx.rank == 0:
        for tower, index in blocks:
            content = ctx.storage.read_sealed(_kept(key, tower, index))
            bank_file(folder, tower, index).write_bytes(content)


def bank_file(folder: Path, tower: Tower, index: int) -> Path:
    """Where a block's layers lie in a bank."""
    return folder / f"{tower}-{index:03d}.safetensors"


def _kept(key: str, tower: Tower, index: int) -> str:
    return f"work/{key}/{tower}-{index:03d}.safetensors"


def _is_kept(ctx: Context, key: str, tower: Tower, index: int) -> bool:
    path = _kept(key, tower, index)
    return ctx.kept(path, otherwise="the block is pruned again") is not None


def _prune_block(
    taps: Sequence[Tap], method: MethodOptions, grid: Sequence[float], calibration: CalibrationSpec
) -> bytes:
    """A block's file."""
    tensors: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    for tap in taps:
        statistics = tap.mixed(calibration)
        for layer in tap.layers:
            weight_OI = layer.linear.weight.data
            norms[layer.name] = _norm(weight_OI)
        variants = [(layer, ratio) for layer in tap.layers for ratio in grid]
        pruned = prune_shared(
            [layer.linear.weight.data for layer, _ in variants],
            statistics,
            [Target(ratio) for _, ratio in variants],
            method.of_layer(tap.layers[0].name),
            where=tap.layers[0].name,
        )
        for (layer, ratio), one in zip(variants, pruned, strict=True):
            name = _entry(layer.name, ratio)
            tensors[name] = one.weight_OI.to(weight_OI.dtype).cpu().contiguous()
            norms[name] = _norm(one.weight_OI)
    content: bytes = save(tensors, {"norms": json.dumps(norms)})
    return content


def _norm(weight_OI: Tensor) -> float:
    return float(weight_OI.float().norm())


def _entry(layer: str, ratio: float) -> str:
    return f"{layer}@{ratio:.6f}"


class Bank:
    """A bank's layers, to be put into a loaded model one by one."""

    def __init__(self, folder: Path, layers: Sequence[Layer]) -> None:
        """Open a bank for `layers`, which all have to be in it."""
        self.layers = {layer.name: layer for layer in layers}
        self._installed: dict[str, float] = {}
        blocks = dict.fromkeys((layer.tower, layer.block) for layer in layers)
        self._files: dict[tuple[Tower, int], Any] = {
            block: safe_open(bank_file(folder, *block), framework="pt") for block in blocks
        }
        self._norms: dict[str, float] = {}
        for file in self._files.values():
            self._norms |= json.loads(file.metadata()["norms"])

    @torch.no_grad()
    def install(self, sparsity: Mapping[str, float]) -> None:
        """Let the model have these ratios. Copies what differs from what it has, in place."""
        for name, ratio in sparsity.items():
            if self._installed.get(name) != ratio:
                layer = self.layers[name]
                file = self._files[layer.tower, layer.block]
                layer.linear.weight.copy_(file.get_tensor(_entry(name, ratio)))
                self._installed[name] = ratio

    def relative_norm(self, sparsity: Mapping[str, float]) -> float:
        """Sum of the pruned layers' Frobenius norms over the sum of the dense layers'."""
        pruned = sum(self._norms[_entry(name, ratio)] for name, ratio in sparsity.items())
        return pruned / sum(self._norms[name] for name in sparsity)
