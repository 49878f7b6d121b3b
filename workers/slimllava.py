"""The SlimLLaVA search on a model: candidates come out of a bank, samples judge them.

The policy, and where it is our reading of arXiv:2503.15369, is in `workers/search.py`.

Shape letters: N answer tokens of a batch, V vocabulary, P weights of the projector.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from jobs.allocation import OWLSpec, SlimLLaVASpec
from jobs.crash import crash_point
from jobs.errors import DataError, ModelError, NumericError
from jobs.spec import Tower
from workers.allocate import PROJECTOR_FILE, Answer, allocate
from workers.bank import Bank
from workers.context import Context
from workers.encode import IGNORED_LABEL, Encoded, Encoder, collate, in_parts
from workers.models import Layer, VisionLanguageModel
from workers.scores import Question, measure
from workers.search import Gene, Genome, Part, SearchSpace, State, ratio_grid, search
from workers.teacher import answer_logits

HISTORY_FILE = "history.json"

Batch = dict[str, Tensor]


def slimllava(question: Question) -> Answer:
    """Search for the sparsity of each block (or layer). Leaves `history.json` in the folder.

    After a kill it goes on behind the last finished generation, and ends with the same bits.

    Raises:
        ModelError: the projector is to be tuned, and the model has none.
        DataError: fewer samples than asked for, or no answer among them.
        NumericError: a candidate's loss is NaN or infinite.
    """
    spec = question.spec.allocation
    assert isinstance(spec, SlimLLaVASpec)
    assert question.bank is not None
    if not _exports_what_it_judges(question):
        question.ctx.warn(
            "slimllava judged weights pruned from the dense model's statistics; those exported "
            "differ, by propagate, refine or bias: compensate"
        )
    space = search_space(question.layers, question.spec.sparsity, spec)
    bank = Bank(question.bank, question.layers)
    judge = ModelJudge(question.model, bank, space, spec, _samples(question, spec), question.ctx)
    kept = _KeptState(question.ctx, question.key, judge, spec)
    last = search(
        space,
        spec,
        judge,
        seed=question.seed,
        starts=[_by_gene(space, _owl(question, spec))],
        state=kept.restore(),
        finished=kept.keep,
    )
    if question.ctx.rank == 0:
        _write_history(space, spec, last, question.folder)
        if judge.projector:
            save_file(judge.projector, question.folder / PROJECTOR_FILE)
    return Answer(space.sparsity(last.best[0].genome))


def _exports_what_it_judges(question: Question) -> bool:
    """Whether the model that the job ends with has the bank's weights."""
    prune = question.spec
    return (
        question.calibration.propagate == "dense"
        and prune.refine is None
        and prune.method.bias == "keep"
    )


def search_space(
    layers: Sequence[Layer], asked: Mapping[Tower, float], spec: SlimLLaVASpec
) -> SearchSpace:
    """The genes of the layers to prune, in the order they run."""
    last_block = {layer.tower: layer.block for layer in layers}
    genes: dict[str, list[Layer]] = {}
    for layer in layers:
        block = f"{layer.tower}.{layer.block}"
        genes.setdefault(block if spec.genes == "block" else layer.name, []).append(layer)
    return SearchSpace(
        tuple(
            Gene(
                name=name,
                layers=tuple(layer.name for layer in members),
                size=sum(layer.linear.weight.numel() for layer in members),
                ratios=ratio_grid(asked[members[0].tower], spec.step, spec.reach),
                asked=asked[members[0].tower],
                tower=members[0].tower,
                group=members[0].tower if spec.budget == "tower" else "model",
                depth=members[0].block / max(last_block[members[0].tower], 1),
            )
            for name, members in genes.items()
        )
    )


def _owl(question: Question, spec: SlimLLaVASpec) -> dict[str, float]:
    """What OWL would answer."""
    as_owl = question.spec.model_copy(update={"allocation": OWLSpec(budget=spec.budget)})
    asked = replace(question, spec=as_owl)
    return allocate(asked, measure(asked)).sparsity


def _by_gene(space: SearchSpace, sparsity: dict[str, float]) -> list[float]:
    """An allocation's mean over each gene's layers."""
    return [sum(sparsity[name] for name in gene.layers) / len(gene.layers) for gene in space.genes]


def _samples(question: Question, spec: SlimLLaVASpec) -> dict[Part, list[Batch]]:
    """The search's samples in batches, the same on every worker."""
    encoder = Encoder(question.model)
    calibration = question.calibration
    chosen = Encoded(
        encoder,
        calibration.dataset,
        count=spec.num_samples,
        length=calibration.sequence_length,
        seed=question.seed,
        unlike=calibration.num_samples if spec.judged_on == "unseen" else 0,
    )
    samples = list(chosen)
    first = spec.early_samples or len(samples)
    return {
        "first": _batches(samples[:first], spec.batch_size, encoder.pad_id),
        "rest": _batches(samples[first:], spec.batch_size, encoder.pad_id),
    }


def _batches(samples: Sequence[Batch], size: int, pad_id: int) -> list[Batch]:
    """Of similar length; with images or without, never mixed."""
    batches: list[list[Batch]] = []
    for one in sorted(samples, key=lambda one: ("pixel_values" in one, len(one["input_ids"]))):
        mixed = batches and ("pixel_values" in one) != ("pixel_values" in batches[-1][0])
        if not batches or len(batches[-1]) == size or mixed:
            batches.append([])
        batches[-1].append(one)
    return [collate(batch, pad_id) for batch in batches]


class ModelJudge:
    """Judges candidates by putting them into the model. Workers share them."""

    def __init__(
        self,
        model: VisionLanguageModel,
        bank: Bank,
        space: SearchSpace,
        spec: SlimLLaVASpec,
        batches: dict[Part, list[Batch]],
        ctx: Context,
    ) -> None:
        self.model = model
        self.bank = bank
        self.space = space
        self.spec = spec
        self.batches = batches
        self.ctx = ctx
        self.num_tokens = {part: _count_answers(of_part) for part, of_part in batches.items()}
        if not self.num_tokens["first"]:
            raise DataError("the first samples of the search have no answer tokens to judge by")
        self._parameters = _projector_of(model) if spec.projector_every else {}
        self.projector = {name: p.detach().float() for name, p in self._parameters.items()}
        """Float32, by name in the model. Empty if it is never tuned."""
        self._before_tuning = self.projector

    def losses(self, genomes: Sequence[Genome], part: Part) -> list[float]:
        """Of each candidate, in nats, summed over the part's answer tokens."""
        mine = {}
        for index in range(self.ctx.rank, len(genomes), self.ctx.world):
            mine[index] = self._loss(genomes[index], part)
            self.ctx.progress(f"search, {part} samples", index + 1, len(genomes))
        everyone = {index: loss for share in self.ctx.gather(mine) for index, loss in share.items()}
        return [everyone[index] for index in range(len(genomes))]

    @torch.no_grad()
    def _loss(self, genome: Genome, part: Part) -> float:
        self.bank.install(self.space.sparsity(genome))
        total = 0.0
        for batch in self.batches[part]:
            for some in self._as_memory_allows(batch):
                total += float(_cross_entropy(self.model.module, some, self.ctx.device))
        if not math.isfinite(total):
            raise NumericError(
                f"search: the loss of a candidate is {total}: {self.space.wanted(genome)}. Compute "
                "in bfloat16 or float32, or lower `reach`"
            )
        return total

    def norm(self, genome: Genome) -> float:
        """Of the pruned weights, over the dense ones'."""
        return self.bank.relative_norm(self.space.sparsity(genome))

    def tune(self, genomes: Sequence[Genome]) -> None:
        """Adam on the mean loss of the candidates, a batch a step, in float32.

        A candidate's gradient is one worker's, and they are added up in the candidates' order: the
        same bits for any number of workers.
        """
        self._before_tuning = self.projector
        weights = {name: tensor.clone() for name, tensor in self.projector.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=self.spec.projector_learning_rate)
        batches = [b for of_part in self.batches.values() for b in of_part if "pixel_values" in b]
        if not batches:
            raise DataError("no sample of the search has an image to train the projector with")
        for step in range(self.spec.projector_steps):
            gradient_P = self._mean_gradient(genomes, batches[step % len(batches)])
            parts = torch.split(gradient_P, [tensor.numel() for tensor in weights.values()])
            for weight, part in zip(weights.values(), parts, strict=True):
                weight.grad = part.view_as(weight)
            optimizer.step()
            self.use_projector(weights)
            self.ctx.progress("search, projector", step + 1, self.spec.projector_steps)

    def untune(self) -> None:
        """Back to the projector before the last `tune`."""
        self.use_projector(self._before_tuning)

    @torch.no_grad()
    def use_projector(self, weights: dict[str, Tensor]) -> None:
        """Let the model have this projector."""
        self.projector = weights
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def _mean_gradient(self, genomes: Sequence[Genome], batch: Batch) -> Tensor:
        """Of the loss per answer token, over the candidates. Float32, (P,)."""
        mine = {
            index: self._gradient(genomes[index], batch)
            for index in range(self.ctx.rank, len(genomes), self.ctx.world)
        }
        num_weights = sum(parameter.numel() for parameter in self._parameters.values())
        total_P = torch.zeros(num_weights, device=self.ctx.device)
        for index in range(len(genomes)):
            gradient_P = mine.get(index, torch.empty_like(total_P))
            if self.ctx.world > 1:
                dist.broadcast(gradient_P, src=index % self.ctx.world)
            total_P += gradient_P
        return total_P / len(genomes)

    def _gradient(self, genome: Genome, batch: Batch) -> Tensor:
        self.bank.install(self.space.sparsity(genome))
        parameters = list(self._parameters.values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        num_answers = max(_count_answers([batch]), 1)
        gradient_P = torch.zeros(sum(p.numel() for p in parameters), device=self.ctx.device)
        for some in self._as_memory_allows(batch):
            loss = _cross_entropy(self.model.module, some, self.ctx.device)
            gradients = torch.autograd.grad(loss / num_answers, parameters)
            gradient_P += torch.cat([gradient.float().flatten() for gradient in gradients])
        for parameter in parameters:
            parameter.requires_grad_(False)
        return gradient_P

    def _as_memory_allows(self, batch: Batch) -> Iterator[Batch]:
        return in_parts(batch, self.ctx.smaller(len(batch["labels"])))


def _cross_entropy(module: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Summed over the batch's answer tokens, nats."""
    logits_NV, answers_N = answer_logits(module, batch, device)
    return nn.functional.cross_entropy(logits_NV, answers_N, reduction="sum")


def _count_answers(batches: Sequence[Batch]) -> int:
    return sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches)


def _projector_of(model: VisionLanguageModel) -> dict[str, nn.Parameter]:
    """Its parameters by their names in the model."""
    path = model.family.projector
    if path is None:
        raise ModelError(
            "allocation slimllava tunes the projector, and this model has none: set "
            "projector_every: 0"
        )
    projector = model.module.get_submodule(path)
    return {f"{path}.{name}": parameter for name, parameter in projector.named_parameters()}


class _KeptState:
    """The last finished generation in the storage, with the projector it left."""

    def __init__(self, ctx: Context, key: str, judge: ModelJudge, spec: SlimLLaVASpec) -> None:
        self.ctx = ctx
        self.judge = judge
        self.spec = spec
        self.path = f"work/{key}/search.safetensors"

    def keep(self, state: State) -> None:
        if self.ctx.rank == 0:
            tensors = {name: tensor.cpu() for name, tensor in self.judge.projector.items()}
            content = save(tensors, {"state": json.dumps(state.to_json())})
            self.ctx.storage.put_sealed(self.path, content)
        crash_point(f"search-{state.generation}")
        self.ctx.progress("search", state.generation, self.spec.generations)

    def restore(self) -> State | None:
        """Where an earlier attempt got to, its projector in the model; None at the start."""
        content = self.ctx.from_rank_0(self._read() if self.ctx.rank == 0 else None)
        if content is None:
            return None
        metadata, tensors = content
        if tensors:
            self.judge.use_projector({n: t.to(self.ctx.device) for n, t in tensors.items()})
        return State.from_json(json.loads(metadata["state"]))

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        content = self.ctx.kept(self.path, otherwise="the search starts over")
        if content is None:
            return None
        header_length = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + header_length])["__metadata__"], load(content)


def _write_history(space: SearchSpace, spec: SlimLLaVASpec, state: State, folder: Path) -> None:
    """Write `history.json`: how the search went, and what it found."""
    best = state.best[0]
    found = {
        gene.name: {"tower": gene.tower, "depth": gene.depth, "asked": gene.asked, "found": ratio}
        for gene, ratio in zip(space.genes, space.wanted(best.genome), strict=True)
    }
    history = {
        "settings": spec.model_dump(mode="json"),
        "eta": state.eta,
        "genes": found,
        "generations": state.history,
    }
    (folder / HISTORY_FILE).write_text(json.dumps(history, indent=1))
