"""Local reconstruction: train a pruned block's kept weights until it answers as the dense one did.

The block (or its attention and its MLP, one by one) reads activations that passed the pruned blocks
before it; what the dense one makes of them is the target. Adam steps float32 copies of the kept
weights; the model computes in its own type.

Shape letters: B samples, T tokens, D model width, O output features, I input features.

Source: EBFT (arXiv:2402.12419) block by block, "A free lunch in LLM compression" (arXiv:2510.14444)
also submodule by submodule.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from jobs.errors import NumericError
from jobs.spec import RefineSpec
from workers.calibrate import BlockCall, TowerWalk
from workers.context import Context
from workers.models import Layer

log = logging.getLogger("prunefleet")

BATCHES_PER_STEP = 4
"""Of all workers together, so that as many workers have something to do."""


@dataclass(frozen=True)
class Fit:
    """Squared error of a unit's outputs, as a share of the dense outputs' energy."""

    before: float
    after: float


@dataclass(frozen=True)
class _Example:
    """A batch as a unit reads it, and what the dense unit answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target_BTD: Tensor
    is_token_BT: Tensor | None
    number: int
    """Of its batch among this worker's."""

    def squared_error(self, output_BTD: Tensor) -> Tensor:
        return self._sum((output_BTD.float() - self.target_BTD.float()).square())

    def energy(self) -> Tensor:
        return self._sum(self.target_BTD.float().square())

    def _sum(self, square_BTD: Tensor) -> Tensor:
        square_BT = square_BTD.sum(dim=-1)
        return square_BT.sum() if self.is_token_BT is None else square_BT[self.is_token_BT].sum()


class Refinement:
    """Of the walk's current block. To be made before the block is pruned."""

    def __init__(self, walk: TowerWalk, spec: RefineSpec, ctx: Context) -> None:
        self.block = walk.blocks[walk.index]
        self.dense = copy.deepcopy(self.block)
        self.walk = walk
        self.calls = walk.calls()
        self.spec = spec
        self.ctx = ctx

    def run(self, layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> list[Fit]:
        """Train the block's kept weights in place, and let the walk pass through it again.

        Every worker ends with the same weights.

        Args:
            masks: layer name to bool (O, I), True is kept.

        Raises:
            NumericError: the error became NaN or infinite.
        """
        keep = {id(layer.linear): masks[layer.name] for layer in layers}
        fits = []
        for name in self._units(keep):
            unit, dense = (block.get_submodule(name) for block in (self.block, self.dense))
            kept = {
                f"{path}.weight": keep[id(module)].to(self.ctx.device)
                for path, module in unit.named_modules()
                if id(module) in keep
            }
            examples = [_example(self.block, unit, dense, call) for call in self.calls]
            where = f"{layers[0].name.rsplit('.', 2)[0]} {name}".strip()
            fits.append(_train(unit, kept, examples, self.spec, self.ctx, where))
        self.walk.advance_again(self.calls)
        return fits

    def _units(self, keep: Mapping[int, Tensor]) -> list[str]:
        """Names inside the block, in the order they stand there; the block's own is empty."""
        if self.spec.unit == "block":
            return [""]
        return [
            name
            for name, child in self.block.named_children()
            if any(id(module) in keep for module in child.modules())
        ]


@torch.no_grad()
def _example(block: nn.Module, unit: nn.Module, dense: nn.Module, call: BlockCall) -> _Example:
    """Run the block as it is now, up to the unit, and the dense unit on what this one reads."""
    read: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = unit.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args, dict(kwargs))), with_kwargs=True
    )
    try:
        block(call.hidden_BTD, **call.arguments)
    finally:
        handle.remove()
    ((args, kwargs),) = read
    return _Example(args, kwargs, _first(dense(*args, **kwargs)), call.is_token_BT, call.number)


def _train(
    unit: nn.Module,
    keep: Mapping[str, Tensor],
    examples: Sequence[_Example],
    spec: RefineSpec,
    ctx: Context,
    where: str,
) -> Fit:
    """Train the unit's weights where `keep` is True, in place."""
    weights = {name: unit.get_parameter(name) for name in keep}
    masters = {name: w.detach().float().clone().requires_grad_() for name, w in weights.items()}

    def error(example: _Example) -> Tensor:
        current = {name: (m * keep[name]).to(weights[name].dtype) for name, m in masters.items()}
        output = functional_call(unit, current, example.args, example.kwargs)
        return example.squared_error(_first(output))

    # A batch's place among all workers' batches, the same however many workers share them, and
    # into how many parts each is divided for lack of memory.
    numbers = ctx.gather([example.number for example in examples])
    order = sorted({(number, rank) for rank, its in enumerate(numbers) for number in its})
    energies = ctx.gather([float(example.energy()) for example in examples])
    before = _mean_error(error, examples, energies, ctx)
    optimizer = torch.optim.Adam(masters.values(), lr=spec.learning_rate)
    with torch.enable_grad():
        for step in range(spec.num_steps):
            start = step * BATCHES_PER_STEP
            window = [order[(start + i) % len(order)] for i in range(BATCHES_PER_STEP)]
            chosen = [
                (index, rank)
                for number, rank in window
                for index, its in enumerate(numbers[rank])
                if its == number
            ]
            scale = 1 / sum(energies[rank][index] for index, rank in chosen)
            optimizer.zero_grad(set_to_none=False)
            for index, rank in chosen:
                if rank == ctx.rank:
                    (scale * error(examples[index])).backward()
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * (1 - step / spec.num_steps)
            _sum_gradients(masters.values(), ctx)
            optimizer.step()
    after = _mean_error(error, examples, energies, ctx)
    if not after < float("inf"):
        raise NumericError(
            f"refine: {where}: the relative error is {after} after {spec.num_steps} steps, "
            f"{before:.3g} before. Lower refine.learning_rate ({spec.learning_rate})"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(masters[name] * keep[name])
            if ctx.world > 1:
                dist.broadcast(weight.data, src=0)
    log.info("refined %s: relative error %.4f before, %.4f after", where, before, after)
    return Fit(before, after)


@torch.no_grad()
def _mean_error(
    error: Any, examples: Sequence[_Example], energies: Sequence[Sequence[float]], ctx: Context
) -> float:
    errors = ctx.gather([float(error(example)) for example in examples])
    total = sum(sum(its) for its in errors)
    return total / sum(sum(its) for its in energies)


def _sum_gradients(parameters: Any, ctx: Context) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if ctx.world > 1:
            dist.all_reduce(parameter.grad)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
