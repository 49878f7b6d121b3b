"""What a repaired model is held against while it trains: the dense model, live or cached.

The live one runs beside every step. It is the student itself without mask and adapters where that
is the dense model, or a second model.

Shape letters: B samples, T tokens (or image patches), D model width, V vocabulary, N answer tokens.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jobs.spec import Tower
from workers.lora import as_dense
from workers.models import VisionLanguageModel

T = TypeVar("T")


@dataclass(frozen=True)
class BlockOutput:
    """What one block computed: float, (B, T, D). Of the vision tower B counts images."""

    tower: Tower
    hidden_BTD: Tensor


class HiddenStates:
    """Hooks that note the outputs of a model's blocks, forward by forward."""

    def __init__(self, model: VisionLanguageModel, towers: Sequence[Tower]) -> None:
        self.seen: list[BlockOutput] = []
        self._handles = [
            block.register_forward_hook(self._noting(tower))
            for tower in towers
            for block in model.blocks(tower)
        ]
        self.num_blocks = len(self._handles)

    def take(self) -> list[BlockOutput]:
        """The outputs since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _noting(self, tower: Tower) -> Callable[[nn.Module, Any, Any], None]:
        def note(block: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.seen.append(BlockOutput(tower, hidden))

        return note


class LiveTeacher:
    """The dense model: the student's own weights without mask and adapters, or a second model."""

    def __init__(self, student: VisionLanguageModel, dense: VisionLanguageModel | None) -> None:
        """Before anything is added to the student.

        Args:
            dense: None if the student's weights are the dense ones, to be masked on the fly.
        """
        self.model = student if dense is None else dense
        self._is_student = dense is None
        path = student.family.projector
        self._projector = student.module.get_submodule(path) if path and dense is None else None
        self._own_projector = copy.deepcopy(self._projector)  # the student's will be trained

    @torch.no_grad()
    def run(self, forward: Callable[[nn.Module], T]) -> T:
        """What `forward` makes of the dense model."""
        with self._dense():
            return forward(self.model.module)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._is_student:
                stack.enter_context(as_dense(self.model.module))
            if self._projector is not None and self._own_projector is not None:
                own = self._own_projector
                # not swapped as a module, nor its weights: ZeRO-3 watches both
                handle = self._projector.register_forward_hook(
                    lambda module, inputs, named, output: own(*inputs, **named),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            yield


def is_masked(dense: nn.Module, masks: Mapping[str, Tensor], pruned: nn.Module) -> bool:
    """Whether the masks alone make the pruned model of the dense one: no weight was updated."""
    weights = dict(pruned.named_parameters())
    return all(
        torch.equal(weights[name], parameter * _mask_of(name, masks, parameter))
        for name, parameter in dense.named_parameters()
    )


def _mask_of(parameter_name: str, masks: Mapping[str, Tensor], parameter: Tensor) -> Tensor:
    mask_OI = masks.get(parameter_name.removesuffix(".weight"))
    return parameter.new_ones(()) if mask_OI is None else mask_OI.to(parameter.device)


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) at this temperature, summed over all rows. Not times τ²."""
    return nn.functional.kl_div(
        (student_NV / temperature).log_softmax(-1),
        (teacher_NV / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )


def hidden_error(
    student: Sequence[BlockOutput], teacher: Sequence[BlockOutput], mask_BT: Tensor, num_images: int
) -> Tensor:
    """|h - h'|² / |h'|² per token, averaged over a sample's tokens, summed over samples and blocks.

    Relative per token, because a few tokens of a language model have outputs a thousand times as
    long as the others'.

    Args:
        mask_BT: which tokens count, of the samples that count. Samples after these are left out.
        num_images: how many images count, from the first.
    """
    total = mask_BT.new_zeros((), dtype=torch.float32)
    mean_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True)
    for ours, theirs in zip(student, teacher, strict=True):
        count = len(mask_BT) if ours.tower == "language" else num_images
        ours_BTD, theirs_BTD = (each.hidden_BTD[:count].float() for each in (ours, theirs))
        error_BT = (ours_BTD - theirs_BTD).square().sum(-1)
        error_BT = error_BT / theirs_BTD.square().sum(-1).clamp_min(1e-20)
        is_language = ours.tower == "language"
        total = total + ((error_BT * mean_BT) if is_language else error_BT.mean(dim=1)).sum()
    return total
