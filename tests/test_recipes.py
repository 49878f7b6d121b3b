"""The ways to repair, on a tiny LLaVA: what each trains, merges to, and is held against."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.spec import RepairSpec
from tests.reference import ressa_loss
from tests.test_repair import (
    PROJECTOR,
    SPEC,
    Worker,
    assert_same_weights,
    masks_of,
    pruned,
    samples,
    teach,
    tiny_llava,
)
from workers import repair as repair_module
from workers.context import threads
from workers.distill import BlockOutput, HiddenStates, LiveTeacher, hidden_error, is_masked
from workers.encode import collate
from workers.models import VisionLanguageModel
from workers.recipes import add_trainable
from workers.repair import RepairReport, learning_rate, repair
from workers.spp import SPPLinear
from workers.teacher import all_logits, answer_logits

METHODS = ("sparse_lora", "lora", "spp", "norms", "full")
CPU = torch.device("cpu")


def spec_of(**changes: Any) -> RepairSpec:
    settings = SPEC.model_dump() | changes
    if settings["method"] in ("norms", "full"):
        settings["rank"] = 8
    return RepairSpec.model_validate(settings)


def logits_of(module: nn.Module) -> Tensor:
    """Of the first two samples, which have an image, and their padding."""
    return all_logits(module, collate(samples()[:2], 0), CPU)[0].detach()


def trained(spec: RepairSpec, folder: Path, ctx: Worker | None = None) -> tuple[Any, RepairReport]:
    """A pruned model after its repair; its own teacher where the spec wants a live one."""
    is_own = spec.has_live_teacher and spec.method == "sparse_lora"
    model = tiny_llava() if is_own else pruned(tiny_llava())[0]
    ctx = ctx or Worker(folder)
    report = repair(
        model,
        masks_of(model),
        samples(),
        spec,
        ctx,
        stage="key",
        seed=0,
        pad_id=0,
        targets=teach(ctx) if spec.has_cached_teacher else None,
        teacher=LiveTeacher(model, None if is_own else tiny_llava())
        if spec.has_live_teacher
        else None,
        micro_batch=2,
    )
    return model, report


@pytest.fixture(scope="module", autouse=True)
def scattered() -> Iterator[None]:
    """ZeRO-3 would leave parameters as tiny as these whole on every worker."""
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(repair_module, "PERSISTENT_BELOW", 0)
        yield


@torch.no_grad()
def disturb(model: VisionLanguageModel) -> None:
    """What training would do, in one step: move all that a gradient would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            moved = 0.1 * torch.randn(parameter.shape, generator=generator)
            is_masked = 0 < parameter.count_nonzero() < parameter.numel()
            parameter += moved * (parameter != 0) if is_masked else moved


@pytest.mark.parametrize("projector", ["full", "lora", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_changes_no_output(method: str, projector: str):
    model, masks = pruned(tiny_llava())
    layers = {name: type(layer) for name, layer in model.module.named_modules()}
    start = logits_of(model.module)
    merge = add_trainable(model, masks, spec_of(method=method, projector=projector), seed=0)
    assert torch.equal(logits_of(model.module), start)
    disturb(model)
    before = logits_of(model.module)

    merge()

    assert (before - start).abs().max() > 0.01
    torch.testing.assert_close(logits_of(model.module), before, rtol=1e-5, atol=1e-5)
    assert {name: type(layer) for name, layer in model.module.named_modules()} == layers
    zeros_kept = [
        torch.equal(model.module.get_submodule(name).weight != 0, mask_OI)
        for name, mask_OI in masks.items()
    ]
    assert all(zeros_kept) if method != "lora" else not any(zeros_kept)


def test_each_method_trains_what_it_says():
    """Counted by kind, the projector left alone."""
    found = {}
    for method in METHODS:
        model, masks = pruned(tiny_llava())
        add_trainable(model, masks, spec_of(method=method, projector="frozen"), seed=0)
        names = [name for name, p in model.module.named_parameters() if p.requires_grad]
        assert not any(name.startswith(PROJECTOR) for name in names)
        found[method] = {
            "adapters": sum("lora_" in name or "A_RI" in name for name in names),
            "columns": sum("column" in name for name in names),
            "norms": sum("norm" in name for name in names),
            "biases": sum(name.endswith("bias") and "norm" not in name for name in names),
            "weights": sum(name.endswith("weight") for name in names),
        }
        found[method]["weights"] -= sum("lora_" in n or "norm" in n for n in names if "weight" in n)

    num_layers = 2 * 6 + 7
    vision_norms, language_norms = 2 * (2 + 2 * 2), 3  # weight and bias; pre, post and two a block
    none = {"adapters": 0, "columns": 0, "norms": 0, "biases": 0, "weights": 0}
    norms = none | {"norms": vision_norms + language_norms, "biases": 2 * 6}
    assert (
        found["sparse_lora"] == found["lora"] == none | {"adapters": 2 * num_layers, "weights": 0}
    )
    assert found["spp"] == none | {"adapters": num_layers, "columns": num_layers}
    assert found["norms"] == norms
    assert found["full"] == norms | {"weights": num_layers}


def test_a_rank_each_reaches_the_towers_and_the_projector():
    """RESSA's: 4, 8, and 2 with plain LoRA. The scale is alpha / rank."""
    model, masks = pruned(tiny_llava())
    rank = {"vision": 4, "language": 8, "projector": 2}

    add_trainable(model, masks, spec_of(rank=rank, alpha=16, projector="lora"), seed=0)

    found: dict[str, set[Any]] = {}
    for name, module in model.module.named_modules():
        if hasattr(module, "lora_A"):
            part = "projector" if "projector" in name else name.split(".")[1]
            adapter = module.lora_A["default"].weight
            described = (len(adapter), module.scaling["default"], module.packed_mask is None)
            found.setdefault(part, set()).add(described)
    assert found == {
        "vision_tower": {(4, 4.0, False)},
        "language_model": {(8, 2.0, False)},
        "projector": {(2, 8.0, True)},
    }


@pytest.mark.parametrize("num_outputs", [6, 7])
def test_gradients_of_spp_equal_autograd(num_outputs: int):
    """Rank 3: rows 0 and 1 share a row of A; of 7 rows the first three do."""
    torch.manual_seed(0)
    linear = nn.Linear(5, num_outputs).double().requires_grad_(False)
    layer = SPPLinear(linear, rank=3, alpha=6.0)
    nn.init.normal_(layer.column_O1)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, num_outputs, dtype=torch.float64)
    group = [0, 0, 1, 1, 2, 2] if num_outputs == 6 else [0, 0, 0, 1, 1, 2, 2]

    factor_OI = 1 + 2.0 * layer.A_RI[group] * layer.column_O1
    expected = x @ (linear.weight * factor_OI).T + linear.bias

    wanted = [x, layer.A_RI, layer.column_O1]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
    )


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("method", ["spp", "full", "norms", "lora"])
def test_training_lowers_the_loss_and_keeps_the_zeros(method: str, zero_stage: int, tmp_path: Path):
    """Weight decay and AdamW's moments must not stir a masked weight; plain LoRA does."""
    spec = spec_of(method=method, zero_stage=zero_stage, weight_decay=0.1)

    model, report = trained(spec, tmp_path)

    assert report.task_losses[-1] < report.task_losses[0]
    zeros_kept = [
        torch.equal(model.module.get_submodule(name).weight != 0, mask_OI)
        for name, mask_OI in masks_of(model).items()
        if "vision_tower.encoder.layers.1" not in name  # LLaVA reads the block before it
    ]
    assert all(zeros_kept) if method != "lora" else not any(zeros_kept)


@pytest.mark.parametrize("projector", ["full", "lora"])
def test_the_model_without_mask_and_adapters_is_the_dense_one_bit_for_bit(projector: str):
    """However far it was trained, its projector included."""
    model = tiny_llava()
    dense = logits_of(model.module)
    teacher = LiveTeacher(model, None)
    add_trainable(model, masks_of(model), spec_of(projector=projector), seed=0)
    disturb(model)

    taught = teacher.run(logits_of)

    assert torch.equal(taught, dense)
    assert (logits_of(model.module) - dense).abs().max() > 0.01


def test_whether_a_weight_was_updated_is_read_off_the_weights():
    """SparseGPT's are, Wanda's are not; a tuned projector counts as well."""
    dense, (model, masks) = tiny_llava().module, pruned(tiny_llava())
    assert is_masked(dense, masks, model.module)

    model.module.get_submodule(PROJECTOR).linear_1.bias += 0.1

    assert not is_masked(dense, masks, model.module)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_live_and_cached_teachers_teach_the_same(zero_stage: int, tmp_path: Path):
    """With 50 tokens the 64 likeliest are all there are, so the cache is exact."""
    results = [
        trained(spec_of(teacher=teacher, zero_stage=zero_stage), tmp_path / teacher)
        for teacher in ("live", "cached")
    ]

    (live, live_report), (cached, cached_report) = results
    torch.testing.assert_close(
        torch.tensor(live_report.distill_losses), torch.tensor(cached_report.distill_losses)
    )
    torch.testing.assert_close(
        dict(live.module.state_dict()), dict(cached.module.state_dict()), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("method", ["sparse_lora", "full"])
def test_distilling_hidden_states_brings_them_nearer(method: str, tmp_path: Path):
    """Alone, without task loss. `full` has a second model beside it, as after SparseGPT."""
    spec = spec_of(method=method, distill=1.0, distill_hidden=10.0, num_steps=8)

    _, report = trained(spec, tmp_path)

    assert report.hidden_losses[-1] < 0.8 * report.hidden_losses[0]
    assert len(report.hidden_losses) == 8


def gradients_of_first_step(spec: RepairSpec) -> dict[str, Tensor]:
    """By autograd, of all samples as one batch; of what is trained."""
    batch = collate(samples(), 0)
    model, dense = pruned(tiny_llava())[0], tiny_llava()
    add_trainable(model, masks_of(model), spec, seed=0)
    noted = [HiddenStates(each, each.towers) for each in (model, dense)]
    dense_NV, _ = answer_logits(dense.module, batch, CPU)
    student_NV, labels_N = answer_logits(model.module, batch, CPU)
    p_NV, q_NV = (each.div(spec.temperature).softmax(1) for each in (dense_NV, student_NV))
    divergence_N = (p_NV * (p_NV.log() - q_NV.log())).sum(dim=1)
    num_images = len(batch["pixel_values"])
    hidden = hidden_error(*(each.take() for each in noted), batch["attention_mask"], num_images)
    loss = 0.7 * nn.functional.cross_entropy(student_NV, labels_N)
    loss = loss + 0.3 * spec.temperature**2 * divergence_N.mean()
    loss = loss + spec.distill_hidden * hidden / (7 * noted[0].num_blocks)
    wanted = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("distill_hidden", [0.0, 2.0])
@pytest.mark.parametrize("max_gradient_norm", [0.0, 0.05])
def test_a_step_follows_the_gradient_of_the_weighted_loss(
    distill_hidden: float, max_gradient_norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """0.7 cross-entropy + 0.3 KL + 2 error of the hidden states, and no longer than it may be.

    Plain gradient descent at a rate of 1: AdamW's first step is of one length, whatever the loss.
    """
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    spec = spec_of(
        method="norms",
        distill=0.3,
        distill_hidden=distill_hidden,
        max_gradient_norm=max_gradient_norm,
        learning_rate=1.0,
        warmup_fraction=0.0,
        num_steps=1,
        batch_size=7,
        zero_stage=0,
    )
    expected = gradients_of_first_step(spec)
    length = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    start = pruned(tiny_llava())[0].module.state_dict()

    model, _ = trained(spec, tmp_path)

    assert length > 2 * max_gradient_norm
    factor = max_gradient_norm / length if max_gradient_norm else 1.0
    for name, after in model.module.state_dict().items():
        step = start[name] - after
        wanted = factor * expected.get(name, torch.zeros_like(step))
        torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-6)


def test_the_error_of_hidden_states_is_relative_to_each_token_and_padding_has_none():
    """Sample 0: 25 of 25 and 1 of 100, on average 0.505; its third token is padding. Sample 1: 4 of
    1, 0 of 4 and 8 of 4, on average 2. Sample 2 fills the batch up, as the second image does. The
    first has patches of 1 of 1 and 100 of 100.
    """
    language = [
        BlockOutput("language", torch.tensor(each))
        for each in (
            [[[3.0, -1], [0, 9], [5, 5]], [[-1, 0], [0, 2], [4, 2]], [[9, 9], [9, 9], [9, 9]]],
            [[[3.0, 4], [0, 10], [1, 0]], [[1, 0], [0, 2], [2, 0]], [[1, 0], [1, 0], [1, 0]]],
        )
    ]
    vision = [
        BlockOutput("vision", torch.tensor(each))
        for each in (
            [[[1.0, 1], [0, 0]], [[9, 9], [9, 9]]],
            [[[1.0, 0], [0, 10]], [[1, 0], [1, 0]]],
        )
    ]
    is_token_BT = torch.tensor([[1, 1, 0], [1, 1, 1]])

    error = hidden_error([vision[0], language[0]], [vision[1], language[1]], is_token_BT, 1)

    assert float(error) == pytest.approx(1.0 + 0.505 + 2.0)


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_ressa_compat_has_the_loss_of_a_slow_loop(micro_batch: int, tmp_path: Path):
    """Three samples of different length: padding counts, however they are split; no tau squared."""
    spec = spec_of(ressa_compat=True, distill=0.3, num_steps=1, batch_size=3)
    three = samples()[:3]
    batch = collate([three[i] for i in repair_module.batch_indices(0, 3, 3, seed=0)], 0)
    dense = all_logits(tiny_llava().module, batch, CPU)[0]
    student = all_logits(pruned(tiny_llava())[0].module, batch, CPU)[0]
    _, task, divergence = ressa_loss(student, dense, batch["labels"], 0.3, SPEC.temperature)

    model = tiny_llava()
    report = repair(
        model,
        masks_of(model),
        three,
        spec,
        Worker(tmp_path),
        stage="key",
        seed=0,
        pad_id=0,
        teacher=LiveTeacher(model, None),
        micro_batch=micro_batch,
    )

    assert report.task_losses == pytest.approx([task], rel=1e-4)
    assert report.distill_losses == pytest.approx([divergence], rel=1e-4)


def test_ressa_compat_warms_up_for_one_step_and_then_stays():
    spec = spec_of(ressa_compat=True, learning_rate=1e-4)

    assert [learning_rate(step, spec) for step in range(4)] == [1e-6, 1e-4, 1e-4, 1e-4]


def test_a_killed_full_repair_with_hidden_states_goes_on_bit_by_bit(tmp_path: Path):
    class Killed(BaseException):
        pass

    class Doomed(Worker):
        def progress(self, stage: str, done: int, total: int) -> None:
            if (stage, done) == ("repair", 5):
                raise Killed

    spec = spec_of(method="full", distill_hidden=1.0)
    undisturbed, report = trained(spec, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        trained(spec, tmp_path, Doomed(tmp_path / "killed"))

    resumed, again = trained(spec, tmp_path, Worker(tmp_path / "killed"))

    assert again.resumed_at == 4
    assert again.hidden_losses == report.hidden_losses
    assert_same_weights(dict(resumed.module.state_dict()), dict(undisturbed.module.state_dict()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "cached", "ressa_compat": True}, "no answers for ressa_compat"),
        ({"teacher": "cached", "distill_hidden": 1}, "no answers for distill_hidden"),
        ({"method": "full", "rank": 4}, "rank has no effect on method full"),
        ({"projector": "lora", "rank": {"language": 4}}, "projector: lora needs a rank"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RepairSpec.model_validate(settings)
