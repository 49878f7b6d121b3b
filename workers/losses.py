"""The model's loss on its calibration answers, and how to ask again for less after a change.

Shape letters: B samples in a batch, N answer tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import NumericError
from workers.context import Context
from workers.encode import IGNORED_LABEL, in_parts
from workers.models import VisionLanguageModel
from workers.teacher import answer_logits

ANSWERS_PER_PIECE = 2048
"""Answer tokens of one forward pass: their logits are a vocabulary wide, 1 GB at 128,000 words."""

Batch = dict[str, Tensor]


def pieces(batches: Iterable[Batch], ctx: Context) -> Iterator[Batch]:
    """The same samples, in batches whose logits fit into memory."""
    for batch in batches:
        most = max(1, int((batch["labels"] != IGNORED_LABEL).sum(dim=1).max()))
        size = min(len(batch["labels"]), max(1, ANSWERS_PER_PIECE // most))
        yield from in_parts(batch, ctx.smaller(size))


@torch.no_grad()
def answer_losses(model: nn.Module, batch: Batch, device: torch.device) -> list[float]:
    """Each sample's cross-entropy, averaged over its answer tokens (0 where it has none)."""
    logits_NV, answer_N = answer_logits(model, batch, device)
    loss_N = nn.functional.cross_entropy(logits_NV, answer_N, reduction="none").double()
    counts = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1).tolist()
    return [float(part.sum()) / max(1, len(part)) for part in torch.split(loss_N, counts)]


def mean_over_workers(values: Sequence[float], ctx: Context, where: str) -> float:
    """The mean of all workers' values: the same bits however they are shared out.

    Raises:
        NumericError: it is NaN or infinite.
    """
    everyone = [value for share in ctx.gather(list(values)) for value in share]
    mean = math.fsum(everyone) / len(everyone) if all(map(math.isfinite, everyone)) else math.nan
    if not math.isfinite(mean):
        raise NumericError(f"{where}: the calibration loss is NaN or infinite")
    return mean


class Replay:
    """One batch's run through a model, to be taken up again at a block that has changed since.

    What the blocks before it gave is remembered, so only the rest is computed: half, on average.
    The memory is every block's output for this one batch.
    """

    @torch.no_grad()
    def __init__(self, model: VisionLanguageModel, batch: Batch, device: torch.device) -> None:
        self.module = model.module
        self.batch = batch
        self.device = device
        self.blocks = [block for tower in model.towers for block in model.blocks(tower)]
        self._outputs: dict[nn.Module, Any] = {}
        handles = [block.register_forward_hook(self._remember) for block in self.blocks]
        try:
            self.dense = answer_losses(self.module, batch, device)
            """Each sample's loss in the run that is remembered."""
        finally:
            for handle in handles:
                handle.remove()

    def losses(self, block: nn.Module) -> list[float]:
        """Each sample's loss now that `block`, or a later one, has changed."""
        with self._replaying(self.blocks[: self.blocks.index(block)]):
            return answer_losses(self.module, self.batch, self.device)

    def reaches(self, block: nn.Module) -> bool:
        """Whether the batch goes through the block: one without images not through vision."""
        return block in self._outputs

    def _remember(self, block: nn.Module, _: Any, output: Any) -> None:
        self._outputs[block] = output

    @contextmanager
    def _replaying(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        for block in blocks:
            output = self._outputs.get(block)
            block.forward = lambda *_, output=output, **__: output
        try:
            yield
        finally:
            for block in blocks:
                del block.forward
