"""Repair of a pruned model: train what the method trains under DeepSpeed, then merge it.

One step, whatever the number of workers: a global batch is chosen by seed and step alone, every
rank takes its slice, and the loss is divided by the answer tokens of the whole batch. So one
worker and four differ by rounding only.

Shape letters: B samples, T tokens, N answer tokens, V vocabulary.
"""

import atexit
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from jobs.errors import DataError, NumericError
from jobs.spec import RepairSpec
from workers.context import Context
from workers.distill import HiddenStates, LiveTeacher, divergence, hidden_error
from workers.encode import IGNORED_LABEL, collate
from workers.lora import SparseLoraLinear
from workers.models import VisionLanguageModel
from workers.recipes import add_trainable
from workers.teacher import (
    Targets,
    all_logits,
    answer_logits,
    check_finite,
    kl_to_teacher,
    rows_of,
)

Samples = Sequence[dict[str, Tensor]]

PERSISTENT_BELOW = 10_000
"""ZeRO-3 leaves parameters with fewer elements (norms, biases) whole on every worker."""


RESSA_FIRST_RATE = 1e-6
"""The learning rate of the only step that RESSA warms up for, as its code runs."""


@dataclass(frozen=True)
class RepairReport:
    """How the training went. One entry per step, those before an interruption included."""

    task_losses: tuple[float, ...]
    """Cross-entropy per answer token, in nats."""
    distill_losses: tuple[float, ...]
    """τ² KL per answer token (under `ressa_compat`, KL per sample); empty without distillation."""
    hidden_losses: tuple[float, ...]
    """Relative squared error of the blocks' outputs; empty unless they are distilled."""
    resumed_at: int | None
    """The step of the checkpoint that this attempt went on from."""


def repair(
    model: VisionLanguageModel,
    masks: Mapping[str, Tensor],
    samples: Samples,
    spec: RepairSpec,
    ctx: Context,
    *,
    stage: str,
    seed: int,
    pad_id: int,
    targets: Targets | None = None,
    teacher: LiveTeacher | None = None,
    micro_batch: int = 8,
) -> RepairReport:
    """Train and merge, in place: afterwards `model` is plain again and has the zeros it had.

    Plain LoRA (`lora`) is the exception: it fills them.

    Args:
        model: pruned, float32 on a CPU or bfloat16 on a GPU, on `ctx.device`. If it is its own
            teacher: dense, and pruned by the masks in the end.
        masks: layer name to bool (O, I), True is kept.
        samples: inputs of one sample each, on the CPU: input_ids, attention_mask, labels (T,), and
            pixel_values (C, H, W) of those with an image. Indexed several times.
        stage: key under which checkpoints are kept; a killed repair goes on from the newest sound
            one and ends with the same weights.
        targets: of `dense_targets` over the same samples; needed if `spec.has_cached_teacher`.
        teacher: needed if `spec.has_live_teacher`.
        micro_batch: samples per forward. Changes memory, and the result by rounding.

    Raises:
        DataError: no sample has an answer to learn.
        NumericError: the loss is NaN or infinite.
    """
    if spec.has_cached_teacher and targets is None:
        raise ValueError("repair: a cached teacher needs the dense model's targets")
    if spec.has_live_teacher and teacher is None:
        raise ValueError("repair: a live teacher is needed")
    with _quiet():
        loss = _Loss(model, masks, spec, ctx, targets, teacher)
        merge = add_trainable(model, masks, spec, seed=seed)
        model.module.eval()  # no dropout: the same step again gives the same weights
        training = _Training(
            model.module, samples, spec, ctx, stage, seed, pad_id, loss, micro_batch
        )
        report = training.run()
        merge()
    return report


@dataclass(frozen=True)
class _MicroBatch:
    """What one forward pass takes."""

    indices: Sequence[int]
    """Of its samples; a filler may follow them."""
    num_images: int
    """Of these samples."""
    inputs: dict[str, Tensor]


class _Training:
    """The loop and what it holds: the engine, the optimizer, the losses so far."""

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        spec: RepairSpec,
        ctx: Context,
        stage: str,
        seed: int,
        pad_id: int,
        loss: "_Loss",
        micro_batch: int,
    ) -> None:
        self.model = model
        self.samples = samples
        self.spec = spec
        self.ctx = ctx
        self.stage = stage
        self.seed = seed
        self.pad_id = pad_id
        self.loss = loss
        self.rank_batch = math.ceil(spec.batch_size / ctx.world)
        self.num_micro = math.ceil(self.rank_batch / micro_batch)
        self.filler: dict[str, Tensor] | None = None
        self.losses: list[list[float]] = []
        """Of every step so far: task, distillation, hidden states."""

    def run(self) -> RepairReport:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        checkpoint = _newest_checkpoint(self.ctx, self.stage)
        if checkpoint is not None:
            _load_weights(trained, checkpoint)
            self.losses = checkpoint.state["losses"].tolist()
        attributes = {module: set(vars(module)) for module in self.model.modules()}
        engine, optimizer = self._initialize(list(trained.values()))
        if checkpoint is not None:
            _load_optimizer(engine, optimizer, checkpoint)
        start = len(self.losses)
        for step in range(start, self.spec.num_steps):
            self._step(engine, optimizer, step)
            self.ctx.progress("repair", step + 1, self.spec.num_steps)
            is_last = step + 1 == self.spec.num_steps
            if (step + 1) % self.spec.checkpoint_every == 0 and not is_last:
                self._save_checkpoint(engine, optimizer, trained, step + 1)
        _leave_deepspeed(engine, attributes)
        self.loss.remove_hooks()
        task, distill, hidden = zip(*self.losses, strict=True)
        return RepairReport(
            task_losses=task,
            distill_losses=distill if self.spec.distill > 0 else (),
            hidden_losses=hidden if self.spec.distill_hidden > 0 else (),
            resumed_at=None if checkpoint is None else start,
        )

    def _initialize(self, trained: list[nn.Parameter]) -> tuple[Any, torch.optim.Optimizer]:
        deepspeed = _import_deepspeed(self.ctx)
        optimizer = torch.optim.AdamW(
            trained, lr=self.spec.learning_rate, weight_decay=self.spec.weight_decay
        )
        engine, *_ = deepspeed.initialize(
            model=_Root(self.model),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": math.ceil(self.rank_batch / self.num_micro),
                "gradient_accumulation_steps": self.num_micro,
                "gradient_clipping": self.spec.max_gradient_norm,
                "bf16": {"enabled": next(self.model.parameters()).dtype == torch.bfloat16},
                "zero_optimization": {
                    "stage": self.spec.zero_stage,
                    "stage3_param_persistence_threshold": PERSISTENT_BELOW,
                },
            },
        )
        optimizer.state.clear()  # ZeRO 0 in bfloat16 has counted a step of zero gradients
        if self.spec.zero_stage == 3:
            _announce_weights(deepspeed, self.model)
        return engine, optimizer

    def _step(self, engine: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
        batches = self._micro_batches(step)
        counts = [_num_answer_tokens(batch.inputs) for batch in batches]
        (num_tokens,) = self._sum_over_ranks([float(sum(counts))])
        if not num_tokens:
            raise DataError(f"repair: the samples of step {step} have no answer tokens to learn")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.spec)
        divisors = self.loss.divisors(num_tokens)
        weights = torch.tensor(self.loss.weights, device=self.ctx.device)
        scales = weights / torch.tensor(divisors, device=self.ctx.device)
        sums = torch.zeros(3, device=self.ctx.device)
        for batch in batches:
            losses = self.loss(engine, batch)
            # DeepSpeed averages over the ranks; ours is a sum over them
            engine.backward((losses * scales).sum() * self.ctx.world, scale_wrt_gas=False)
            engine.step()
            sums += losses.detach()
        totals = self._sum_over_ranks(sums.tolist())
        means = [total / divisor for total, divisor in zip(totals, divisors, strict=True)]
        if not all(math.isfinite(mean) for mean in means):
            raise NumericError(
                f"repair: at step {step} the task loss is {means[0]}, the distillation loss "
                f"{means[1]} and that of the hidden states {means[2]}. "
                f"Lower repair.learning_rate ({self.spec.learning_rate})"
            )
        self.losses.append(means)

    def _micro_batches(self, step: int) -> list[_MicroBatch]:
        """This rank's part of a step, always `num_micro` batches: the ranks move in lockstep.

        They also run the same modules, or ZeRO would wait for gradients that never come: a batch
        without any image or sample gets one more sample, without answers, so of zero gradient.
        """
        everyone = batch_indices(step, len(self.samples), self.spec.batch_size, self.seed)
        mine = everyone[self.ctx.rank :: self.ctx.world]
        size = math.ceil(self.rank_batch / self.num_micro)
        batches: list[_MicroBatch] = []
        for index in range(self.num_micro):
            indices = mine[index * size : (index + 1) * size]
            singles = [self.samples[i] for i in indices]
            num_images = sum("pixel_values" in single for single in singles)
            if not num_images:
                filler = self._filler()
                if not singles or "pixel_values" in filler:
                    singles.append(filler)
            batches.append(_MicroBatch(indices, num_images, collate(singles, self.pad_id)))
        return self._padded_alike(batches) if self.spec.ressa_compat else batches

    def _padded_alike(self, batches: list[_MicroBatch]) -> list[_MicroBatch]:
        """Padding is in RESSA's loss: how a step is split must not change how much there is."""
        own = max(batch.inputs["input_ids"].shape[1] for batch in batches)
        length = max(self.ctx.gather(own))
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        for batch in batches:
            for name, value in fill.items():
                ids_BT = batch.inputs[name]
                missing = length - ids_BT.shape[1]
                batch.inputs[name] = nn.functional.pad(ids_BT, (0, missing), value=value)
        return batches

    def _filler(self) -> dict[str, Tensor]:
        """A sample with nothing to learn; with an image, if any sample has one."""
        if self.filler is None:
            with_image = (single for single in self.samples if "pixel_values" in single)
            single = next(with_image, self.samples[0])
            self.filler = single | {"labels": torch.full_like(single["labels"], IGNORED_LABEL)}
        return self.filler

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self.ctx.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.ctx.device)
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def _save_checkpoint(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, nn.Parameter],
        step: int,
    ) -> None:
        """Every rank writes its share of the optimizer, rank 0 the trained weights too.

        Not DeepSpeed's own format: that is pickle, and nothing pickled is read from the storage.
        """
        state = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for index, master in enumerate(_masters(engine, optimizer)):
            state[f"{index}.master"] = master.detach()
            for name, value in optimizer.state[master].items():
                state[f"{index}.{name}"] = value
        with TemporaryDirectory(dir=self.ctx.scratch) as folder:
            _write(state, Path(folder) / _state_file(self.ctx))
            with _whole(engine, list(trained.values())):
                if self.ctx.rank == 0:
                    _write(trained, Path(folder) / WEIGHTS_FILE)
            self.ctx.save_checkpoint(self.stage, step, Path(folder))


class _Loss:
    """(1 - λ) cross-entropy + λ KL to the dense model + w error of the hidden states.

    Made before the trained parameters are added: it looks for the pruned layers.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        masks: Mapping[str, Tensor],
        spec: RepairSpec,
        ctx: Context,
        targets: Targets | None,
        teacher: LiveTeacher | None,
    ) -> None:
        self.spec = spec
        self.device = ctx.device
        self.targets = targets
        self.teacher = teacher if spec.has_live_teacher else None
        pruned = {layer.tower for layer in model.layers() if layer.name in masks}
        towers = [tower for tower in model.towers if tower in pruned and spec.distill_hidden > 0]
        self.states = HiddenStates(model, towers)
        self.dense_states = self.states
        if self.teacher is not None and self.teacher.model is not model:
            self.dense_states = HiddenStates(self.teacher.model, towers)
        self.weights = (1 - spec.distill, spec.distill, spec.distill_hidden)

    def divisors(self, num_tokens: float) -> tuple[float, float, float]:
        """What makes means of the sums over a whole step with that many answer tokens."""
        num_samples = self.spec.batch_size
        return (
            num_tokens,
            num_samples if self.spec.ressa_compat else num_tokens,
            num_samples * max(1, self.states.num_blocks),
        )

    def __call__(self, engine: nn.Module, batch: _MicroBatch) -> Tensor:
        """The three terms, summed over one micro batch. Float32, (3,)."""
        dense_KV, dense_states = None, []
        if self.teacher is not None:
            dense_KV, _, _ = self.teacher.run(lambda module: self._logits(module, batch))
            check_finite(dense_KV)
            dense_states = self.dense_states.take()
        compared_KV, answers_NV, labels_N = self._logits(engine, batch)
        task = nn.functional.cross_entropy(answers_NV, labels_N, reduction="sum")
        distill = hidden = torch.zeros_like(task)
        if self.spec.distill > 0 and dense_KV is not None:
            tau = self.spec.temperature
            distill = divergence(compared_KV, dense_KV, tau)
            distill = distill if self.spec.ressa_compat else tau**2 * distill
        elif self.spec.distill > 0 and self.targets is not None:
            rows = rows_of(self.targets, batch.indices)
            distill = kl_to_teacher(answers_NV, rows, self.spec.temperature)
        if self.spec.distill_hidden > 0:
            is_token_BT = batch.inputs["attention_mask"][: len(batch.indices)].to(self.device)
            hidden = hidden_error(self.states.take(), dense_states, is_token_BT, batch.num_images)
        return torch.stack([task, distill, hidden])

    def _logits(self, module: nn.Module, batch: _MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Those that the KL compares, (K, V); those of the answers, (N, V); the answers, (N,)."""
        if not self.spec.ressa_compat:
            answers_NV, labels_N = answer_logits(module, batch.inputs, self.device)
            return answers_NV, answers_NV, labels_N
        logits_BTV, answers_NV, labels_N = all_logits(module, batch.inputs, self.device)
        return logits_BTV[: len(batch.indices)].flatten(0, 1), answers_NV, labels_N

    def remove_hooks(self) -> None:
        for states in (self.states, self.dense_states):
            states.remove()


def batch_indices(step: int, num_samples: int, batch_size: int, seed: int) -> list[int]:
    """The samples of one step: every epoch is its own shuffle, and batches run across its end."""
    if not num_samples:
        raise DataError("repair: the dataset has no samples")
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), num_samples)
        shuffle = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(num_samples, generator=shuffle).tolist()
        indices += order[offset : offset + batch_size - len(indices)]
    return indices


def learning_rate(step: int, spec: RepairSpec) -> float:
    """Of one step, counted from 0."""
    if spec.ressa_compat:
        return RESSA_FIRST_RATE if step == 0 else spec.learning_rate
    return spec.learning_rate * schedule(step, spec.num_steps, spec.warmup_fraction)


def schedule(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Fraction of the peak learning rate: linear up over the warm-up, then a cosine to zero."""
    num_warmup = round(warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def _num_answer_tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


# --- checkpoints ---------------------------------------------------------------------------------

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class _Checkpoint:
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    """This rank's share of the optimizer, and the losses so far."""


def _state_file(ctx: Context) -> str:
    return f"optimizer-{ctx.rank}-of-{ctx.world}.safetensors"


def _newest_checkpoint(ctx: Context, stage: str) -> _Checkpoint | None:
    """The newest that this number of workers can go on from: each has written its share."""
    while (latest := ctx.latest_checkpoint(stage)) is not None:
        step, folder = latest
        if (folder / _state_file(ctx)).exists():
            return _Checkpoint(
                load_file(folder / WEIGHTS_FILE), load_file(folder / _state_file(ctx))
            )
        ctx.warn(f"repair: the checkpoint of step {step} is of another number of workers")
        ctx.drop_checkpoint(stage, step)
    return None


@torch.no_grad()
def _load_weights(trained: Mapping[str, nn.Parameter], checkpoint: _Checkpoint) -> None:
    for name, parameter in trained.items():
        parameter.copy_(checkpoint.weights[name])


@torch.no_grad()
def _load_optimizer(engine: Any, optimizer: torch.optim.Optimizer, checkpoint: _Checkpoint) -> None:
    for index, master in enumerate(_masters(engine, optimizer)):
        prefix = f"{index}."
        saved = {
            name.removeprefix(prefix): value
            for name, value in checkpoint.state.items()
            if name.startswith(prefix)
        }
        master.copy_(saved.pop("master"))
        optimizer.state[master] = {
            # AdamW counts its steps on the CPU
            name: value.clone() if name == "step" else value.to(master.device, copy=True)
            for name, value in saved.items()
        }


def _masters(engine: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What AdamW steps: the parameters, or ZeRO's flat fp32 shard of them."""
    shards = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hides them
    if shards is not None:
        return list(shards)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, path)


# --- DeepSpeed -----------------------------------------------------------------------------------


def _import_deepspeed(ctx: Context) -> ModuleType:
    """DeepSpeed such that it compiles nothing and finds a process group. Seconds to import."""
    os.environ.setdefault("DS_ACCELERATOR", ctx.device.type)  # else it probes for all it knows
    os.environ.setdefault("LOCAL_RANK", str(ctx.device.index or 0))
    import deepspeed
    import deepspeed.ops

    # What it takes for buildable on this machine; left to itself it asks the compiler, and on a
    # CPU builds a shared-memory all-reduce (half a minute of g++) that training never calls.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    if not dist.is_initialized():
        backend = "nccl" if ctx.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)  # no port
        atexit.register(dist.destroy_process_group)
    return deepspeed  # type: ignore[no-any-return]


def _announce_weights(deepspeed: ModuleType, model: nn.Module) -> None:
    """Tell ZeRO-3 that a SparseLoRA layer reads its children's weights itself."""
    for layer in model.modules():
        if isinstance(layer, SparseLoraLinear):
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)


class _Root(nn.Module):
    """DeepSpeed leaves hooks on the module it is given: on this one, not on the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@contextmanager
def _whole(engine: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters' full values on every rank, also where ZeRO-3 has scattered them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        parameters, enabled=engine.zero_optimization_stage() == 3
    ):
        yield


@torch.no_grad()
def _leave_deepspeed(engine: Any, attributes: Mapping[nn.Module, set[str]]) -> None:
    """Give the modules back as they came: whole parameters of their own, no attributes of ZeRO's.

    Args:
        attributes: what each module had before.
    """
    engine.destroy()
    own: dict[nn.Parameter, nn.Parameter] = {}
    for module, names in attributes.items():
        module._parameters = dict(module._parameters)
        for name, parameter in module._parameters.items():
            if parameter is None or not (parameter.requires_grad or hasattr(parameter, "ds_id")):
                continue
            if parameter not in own:  # tied weights stay tied
                with _whole(engine, [parameter]):  # a trained one is a view into a flat buffer
                    own[parameter] = nn.Parameter(parameter.clone(), requires_grad=False)
            module._parameters[name] = own[parameter]
        for name in vars(module).keys() - names:
            delattr(module, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed and PEFT call torch and transformers by deprecated names, at every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
