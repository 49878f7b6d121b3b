"""Repair on tiny models with random weights: the contract, not the quality.

DeepSpeed costs seconds to import, so one process trains alone with every ZeRO stage (this one) and
one pair trains together.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from jobs.errors import DataError, NumericError
from jobs.spec import RepairSpec
from jobs.storage import Storage
from workers import repair as repair_module
from workers.context import Context, threads
from workers.families import FAMILIES
from workers.models import VisionLanguageModel
from workers.repair import RepairReport, batch_indices, repair, schedule
from workers.teacher import Targets, dense_targets

STAGES = (0, 1, 2, 3)
PAIR_RESUMES = (2, 3)
VOCABULARY, IMAGE_TOKEN = 50, 49
SPEC = RepairSpec(
    rank=4,
    num_steps=6,
    batch_size=5,  # two workers get 3 and 2: in every step's last micro batch one runs dry
    learning_rate=1e-2,
    distill=0.5,
    temperature=2.0,
    checkpoint_every=2,
)
PROJECTOR = "model.multi_modal_projector"

Masks = dict[str, Tensor]


def tiny_llava(dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    """Two vision blocks, of which LLaVA reads the last but one, and one language block."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        ),
        text_config=llama_config(),
        image_token_index=IMAGE_TOKEN,
    )
    return as_model(LlavaForConditionalGeneration(config).to(dtype), "llava")


def as_model(module: nn.Module, family: str) -> VisionLanguageModel:
    """As `load_model` would give it, without a processor."""
    return VisionLanguageModel(
        module=module.eval().requires_grad_(False),
        processor=None,
        family=FAMILIES[family],
        config=module.config.to_dict(),
        folder=Path("tiny"),
    )


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )


def pruned(model: VisionLanguageModel) -> tuple[VisionLanguageModel, Masks]:
    """Half of the weights of the blocks' linear layers set to zero, in all towers."""
    masks = masks_of(model)
    for name, mask_OI in masks.items():
        model.module.get_submodule(name).weight *= mask_OI
    return model, masks


def masks_of(model: VisionLanguageModel) -> Masks:
    generator = torch.Generator().manual_seed(1)
    return {
        layer.name: torch.rand(layer.linear.weight.shape, generator=generator) < 0.5
        for layer in model.layers()
    }


@cache
def samples() -> list[dict[str, Tensor]]:
    """Seven with 2 to 4 answer tokens each, five of them with an image."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for index in range(7):
        ids = torch.randint(0, IMAGE_TOKEN, (10 + index % 3,), generator=generator)
        ids[1:5] = IMAGE_TOKEN
        labels = ids.clone()
        labels[:8] = -100
        single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if index % 3 == 2:
            ids[1:5] = 0
        else:
            single["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
        made.append(single)
    return made


class Worker(Context):
    """A context that is one of several, as Ray Train's would be."""

    def __init__(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        scratch = folder / f"scratch-{rank}"
        scratch.mkdir(parents=True, exist_ok=True)
        super().__init__(Storage(str(folder / "store")), "job", scratch, torch.device("cpu"))
        self.rank, self.world = rank, world


@dataclass
class Outcome:
    weights: dict[str, Tensor]
    report: RepairReport
    model: nn.Module
    masks: Masks


def train(ctx: Context, spec: RepairSpec, targets: Targets | None, key: str) -> Outcome:
    model, masks = pruned(tiny_llava())
    report = repair(
        model,
        masks,
        samples(),
        spec,
        ctx,
        stage=key,
        seed=0,
        pad_id=0,
        targets=targets,
        micro_batch=2 if ctx.world == 1 else 1,
    )
    return Outcome(dict(model.module.state_dict()), report, model.module, masks)


def teach(ctx: Context) -> Targets:
    return dense_targets(
        tiny_llava().module, samples(), pad_id=0, temperature=2.0, batch_size=3, ctx=ctx
    )


def with_stage(zero_stage: int) -> RepairSpec:
    return SPEC.model_copy(update={"zero_stage": zero_stage})


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that compiled ops would go to. Parameters as tiny as ours are scattered too."""
    folder = tmp_path_factory.mktemp("repair") / "compiled"
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(repair_module, "PERSISTENT_BELOW", 0)
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    """By ZeRO stage: one worker, undisturbed."""
    ctx = Worker(tmp_path_factory.mktemp("alone"))
    targets = teach(ctx)
    return {stage: train(ctx, with_stage(stage), targets, f"zero-{stage}") for stage in STAGES}


def train_as_pair(rank: int, folder: Path, port: int) -> None:
    """What each of two workers does: every ZeRO stage, some once more from the checkpoint."""
    os.environ["PATH"] = ""  # nothing to compile with
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    repair_module.PERSISTENT_BELOW = 0
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    ctx = Worker(folder, rank, world=2)
    targets = teach(ctx)
    results = {}
    for stage in STAGES:
        outcome = train(ctx, with_stage(stage), targets, f"zero-{stage}")
        results[stage] = {"weights": outcome.weights, "losses": outcome.report.task_losses}
        if stage in PAIR_RESUMES:
            again = train(ctx, with_stage(stage), targets, f"zero-{stage}")
            results[stage]["resumed_at"] = again.report.resumed_at
            results[stage]["weights_again"] = again.weights
    if rank == 0:
        torch.save(results, folder / "results.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train_as_pair, args=(folder, port), nprocs=2)
    return torch.load(folder / "results.pt")


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@pytest.mark.parametrize("zero_stage", STAGES)
def test_every_zero_stage_trains_the_same_model(alone: dict[int, Outcome], zero_stage: int):
    """ZeRO is about where the memory is, not about the mathematics."""
    torch.testing.assert_close(alone[zero_stage].weights, alone[0].weights, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled(alone: dict[int, Outcome], compiled: Path):
    """DeepSpeed would build an all-reduce where it finds g++: half a minute in every new image."""
    assert len(alone) == len(STAGES)
    assert not compiled.exists()


@pytest.mark.parametrize("zero_stage", STAGES)
def test_every_zero_survives_and_the_model_is_plain_again(
    alone: dict[int, Outcome], zero_stage: int
):
    outcome = alone[zero_stage]

    for name, mask_OI in outcome.masks.items():
        layer = outcome.model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight != 0, mask_OI)
    for module in outcome.model.modules():
        assert type(module._parameters) is dict
        assert not any(name.startswith("ds_") for name in vars(module))
        assert not module._forward_pre_hooks
    storages = [p.untyped_storage().data_ptr() for p in outcome.model.parameters()]
    assert len(set(storages)) == len(storages)  # safetensors refuses tensors that share memory


def test_both_losses_fall_and_only_what_should_has_changed(alone: dict[int, Outcome]):
    before, masks = pruned(tiny_llava())
    outcome = alone[2]

    report = outcome.report
    assert report.task_losses[-1] < 0.8 * report.task_losses[0]
    assert report.distill_losses[-1] < report.distill_losses[0]
    assert report.resumed_at is None
    changed = {
        name.rpartition(".")[0]
        for name, value in before.module.state_dict().items()
        if not torch.equal(value, outcome.weights[name])
    }
    trained = {name for name in masks if "vision_tower.encoder.layers.1" not in name}  # unread
    assert changed == trained | {f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"}


@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_workers_train_what_one_trains(
    alone: dict[int, Outcome], pair: dict[int, dict], zero_stage: int
):
    """Up to rounding, although their slices of a batch are of different sizes."""
    torch.testing.assert_close(
        torch.tensor(pair[zero_stage]["losses"]),
        torch.tensor(alone[zero_stage].report.task_losses),
        rtol=1e-4,
        atol=0,
    )
    torch.testing.assert_close(
        pair[zero_stage]["weights"], alone[zero_stage].weights, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("zero_stage", PAIR_RESUMES)
def test_two_workers_go_on_from_their_checkpoint_bit_by_bit(pair: dict[int, dict], zero_stage: int):
    assert pair[zero_stage]["resumed_at"] == 4
    assert_same_weights(pair[zero_stage]["weights_again"], pair[zero_stage]["weights"])


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_killed_repair_ends_with_the_weights_of_an_undisturbed_one(
    alone: dict[int, Outcome], zero_stage: int, tmp_path: Path
):
    class Killed(BaseException):
        pass

    class Doomed(Worker):
        def progress(self, stage: str, done: int, total: int) -> None:
            if (stage, done) == ("repair", 5):
                raise Killed

    targets = teach(Worker(tmp_path))
    with pytest.raises(Killed):
        train(Doomed(tmp_path), with_stage(zero_stage), targets, "key")

    resumed = train(Worker(tmp_path), with_stage(zero_stage), targets, "key")

    assert resumed.report == replace(alone[zero_stage].report, resumed_at=4)
    assert_same_weights(resumed.weights, alone[zero_stage].weights)


def test_bfloat16_trains_the_same_in_every_stage(tmp_path: Path):
    """AdamW on fp32 masters. Left alone, ZeRO 0 begins at step 1: half the first update."""
    spec = SPEC.model_copy(update={"distill": 0.0, "num_steps": 2})
    weights = []
    for stage in (0, 2):
        model, masks = pruned(tiny_llava(torch.bfloat16))
        settings = spec.model_copy(update={"zero_stage": stage})
        repair(model, masks, samples(), settings, Worker(tmp_path), stage="k", seed=0, pad_id=0)
        weights.append(dict(model.module.state_dict()))

    assert weights[0]["lm_head.weight"].dtype == torch.bfloat16
    assert_same_weights(weights[0], weights[1])


def test_a_damaged_checkpoint_costs_one_interval_not_the_job(
    alone: dict[int, Outcome], tmp_path: Path
):
    ctx = Worker(tmp_path)
    targets = teach(ctx)
    train(ctx, SPEC, targets, "key")
    kept = sorted((tmp_path / "store").rglob("*.safetensors"))
    newest = [path for path in kept if "4" in path.parent.name]
    for path in newest:
        path.write_bytes(path.read_bytes()[:100])

    resumed = train(ctx, SPEC, targets, "key")

    assert len(newest) == 2
    assert resumed.report.resumed_at == 2
    assert "step 4 is damaged" in ctx.warnings[0]
    assert_same_weights(resumed.weights, alone[SPEC.zero_stage].weights)


def test_a_text_model_without_teacher_or_projector_is_repaired_too(tmp_path: Path):
    torch.manual_seed(0)
    model, masks = pruned(as_model(LlamaForCausalLM(llama_config()), "llama"))
    text_only = [s for s in samples() if "pixel_values" not in s]
    spec = SPEC.model_copy(update={"distill": 0.0})

    report = repair(model, masks, text_only, spec, Worker(tmp_path), stage="key", seed=0, pad_id=0)

    assert report.task_losses[-1] < report.task_losses[0]
    assert report.distill_losses == ()


def test_a_loss_that_is_nan_ends_the_job(tmp_path: Path):
    """It would poison every weight; a checkpoint of it must not exist either."""
    spec = SPEC.model_copy(update={"distill": 0.0})
    model, masks = pruned(tiny_llava())
    model.module.lm_head.weight[0, 0] = torch.nan

    with pytest.raises(NumericError, match=r"at step 0 the task loss is nan.*learning_rate"):
        repair(model, masks, samples(), spec, Worker(tmp_path), stage="key", seed=0, pad_id=0)


def test_samples_without_answers_are_refused(tmp_path: Path):
    silent = [s | {"labels": torch.full_like(s["labels"], -100)} for s in samples()]
    spec = SPEC.model_copy(update={"distill": 0.0})
    model, masks = pruned(tiny_llava())

    with pytest.raises(DataError, match="no answer tokens"):
        repair(model, masks, silent, spec, Worker(tmp_path), stage="key", seed=0, pad_id=0)


def test_batches_run_through_every_sample_before_any_comes_again():
    """7 samples in batches of 5: the second batch ends one epoch and begins the next."""
    order = [index for step in range(7) for index in batch_indices(step, 7, 5, seed=0)]

    epochs = [order[start : start + 7] for start in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order[:5] != batch_indices(0, 7, 5, seed=1)
    assert len(batch_indices(0, 2, 5, seed=0)) == 5


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    rates = [schedule(step, 10, warmup_fraction=0.2) for step in range(10)]

    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert schedule(0, 10, warmup_fraction=0.0) == 1.0
