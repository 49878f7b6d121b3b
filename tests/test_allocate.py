"""Who loses how much: scores, wishes and the budget by hand, then one contract for all of them."""

import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from jobs.allocation import (
    AllocationOptions,
    ATPSpec,
    ECoFLaPSpec,
    ModuleDropSpec,
    OWLSpec,
    UniformSpec,
    steepest,
)
from jobs.errors import NumericError
from jobs.methods import MagnitudeSpec
from jobs.spec import CalibrationSpec, DatasetSpec, PruneSpec
from jobs.storage import Storage
from tests.families import FAMILIES, make_tiny
from tests.test_repair import as_model, llama_config, samples
from workers.allocate import (
    ALLOCATION_FILE,
    PROJECTOR_FILE,
    allocate,
    in_proportion,
    load_allocation,
    progression,
    project,
    stretched,
)
from workers.calibrate import calibration_batches
from workers.context import Context
from workers.encode import Encoded, Encoder, collate
from workers.losses import Replay, answer_losses, pieces
from workers.models import Layer, load_model
from workers.prune import collect_dense_statistics, prune_sequentially
from workers.scores import Question, by_module, measure, noise_changes, outlier_share

CPU = torch.device("cpu")

# ---- the budget ----


def test_a_large_layer_counts_for_more() -> None:
    """Wishes of 0.2 and 0.4 for 1 and 3 weights are 0.35 on average; a plain mean would say 0.3."""
    assert project([0.2, 0.4], [1, 3], 0.5, low=0) == pytest.approx([0.35, 0.55])


def test_what_a_full_layer_cannot_take_the_others_share() -> None:
    """Shifted by 0.2 the first would keep 1.1; the shift that meets the budget then is 0.25."""
    assert project([0.9, 0.1, 0.2], [1, 1, 1], 0.6, low=0) == pytest.approx([1.0, 0.35, 0.45])


def test_no_layer_keeps_less_than_its_lower_bound() -> None:
    """Shifted to 0.4, the first would keep 0; held at 0.2, the others give up 0.1 each."""
    keep = project([0.0, 0.6, 0.6], [1, 1, 1], 0.4, low=[0.2, 0, 0])

    assert keep == pytest.approx([0.2, 0.5, 0.5])


@pytest.mark.parametrize(
    ("wishes", "budget", "low", "high", "told"),
    [
        ([0.5, 0.5], 0.1, 0.2, 1.0, "allow keeping 0.2000 to 1.0000"),
        ([0.5, 0.5], 0.9, 0.2, 0.8, "allow keeping 0.2000 to 0.8000"),
        ([0.5, 0.5], 0.5, 0.6, 0.4, "allow keeping"),
        ([0.5, float("nan")], 0.5, 0.0, 1.0, "NaN"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    wishes: list[float], budget: float, low: float, high: float, told: str
) -> None:
    """Met only nearly, its row would stand under a sparsity that it has not."""
    with pytest.raises(NumericError, match=told):
        project(wishes, [1, 1], budget, low=low, high=high)


LAYERS = st.lists(
    st.tuples(
        st.floats(-5, 5),  # wish
        st.integers(1, 10**9),  # size
        st.floats(0, 0.4),  # low
        st.floats(0.6, 1),  # high
    ),
    min_size=1,
    max_size=30,
)


@given(LAYERS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_projection_meets_the_budget_within_bounds_and_in_the_order_of_the_wishes(
    layers: list[tuple[float, int, float, float]], where: float
) -> None:
    """Any budget between the two extremes, layers of a weight and of a billion side by side."""
    wishes, sizes, low, high = (list(column) for column in zip(*layers, strict=True))
    total = sum(sizes)
    least, most = (sum(n * b for n, b in zip(sizes, bound, strict=True)) for bound in (low, high))
    budget = (least + where * (most - least)) / total

    keep = project(wishes, sizes, budget, low=low, high=high)

    assert sum(n * k for n, k in zip(sizes, keep, strict=True)) / total == pytest.approx(budget)
    assert all(lo <= k <= hi for lo, k, hi in zip(low, keep, high, strict=True))
    free = [
        (wish, k) for wish, k, lo, hi in zip(wishes, keep, low, high, strict=True) if lo < k < hi
    ]
    shifts = [k - wish for wish, k in free]
    assert shifts == pytest.approx(shifts[:1] * len(shifts), abs=1e-6)


# ---- scores and wishes, by hand ----


def test_outliers_are_counted_against_the_mean_of_the_whole_block() -> None:
    """The mean of 1, 1, 1, 1, 1, 1, 1, 33 is 5: one of eight is above 5 times that, two layers as
    one. In a layer of its own, 33 is no outlier of 1 and 33, whose mean is 17.
    """
    products = [torch.ones(2, 3), torch.tensor([[1.0, 33.0]])]

    assert outlier_share(products, 5.0) == 1 / 8
    assert outlier_share(products[1:], 5.0) == 0


def test_scores_are_stretched_to_twice_lambda() -> None:
    assert stretched([2.0, 4.0, 3.0], 0.16) == pytest.approx([0, 0.16, 0.08])
    assert stretched([3.0, 3.0], 0.16) == [0, 0]


def test_a_progression_has_its_mean_and_its_step() -> None:
    """0.7 in 4 blocks: 1.5 steps of 0.1 to either side. Twice that would pass 1."""
    assert progression(0.7, 0.1, 4) == pytest.approx([0.55, 0.65, 0.75, 0.85])
    assert steepest(0.7, 4) == pytest.approx(0.2)
    assert steepest(0.2, 3) == pytest.approx(0.2)
    assert steepest(0.5, 1) == 0


def layers_of(*sizes: int) -> list[Layer]:
    """Layers of so many weights, each in a block of its own."""
    return [
        Layer(f"x.{block}.fc", "language", block, torch.nn.Linear(size, 1, bias=False))
        for block, size in enumerate(sizes)
    ]


def test_a_score_buys_a_number_of_weights() -> None:
    """Of 16 weights 8 stay, 1.6 by the lower bound of 0.1; the other 6.4 go 3 to 1 by score: 4.8
    to the first 12 (0.4 of them), 1.6 to the last 4 (0.4 too). By fraction it would be 3 to 1.
    """
    layers = layers_of(12, 4)
    scores = {"x.0.fc": 3.0, "x.1.fc": 1.0}

    wishes = in_proportion(layers, scores, 0.5, low=0.1, granularity="layer")

    assert wishes == pytest.approx([0.5, 0.5])
    twice = in_proportion(layers, scores | {"x.1.fc": 3.0}, 0.5, low=0.1, granularity="layer")
    assert twice == pytest.approx([0.1 + 3.2 / 12, 0.1 + 3.2 / 4])


def test_the_layers_of_a_block_add_up_their_scores() -> None:
    """Scores of 3 and 1 in one block: both layers keep alike."""
    layers = [replace(layer, block=0) for layer in layers_of(8, 8)]

    wishes = in_proportion(
        layers, {"x.0.fc": 3.0, "x.1.fc": 1.0}, 0.5, low=0.1, granularity="block"
    )

    assert wishes == pytest.approx([0.5, 0.5])


def by_given_scores(
    folder: Path, allocation: AllocationOptions, sparsity: float, favourite: str
) -> dict[str, float]:
    """By module, attention or mlp, of a single block: scores of 1 for one of them and 0 else."""
    model = as_model(LlamaForCausalLM(llama_config()), "llama")
    question = Question(
        model=model,
        spec=PruneSpec(
            method=MagnitudeSpec(), sparsity={"language": sparsity}, allocation=allocation
        ),
        calibration=CalibrationSpec(),
        statistics=None,
        bank=None,
        seed=0,
        ctx=Context(Storage(str(folder)), "job", folder, CPU),
        key="k",
        folder=folder,
    )
    scores = {layer.name: float(favourite in layer.name) for layer in model.layers()}
    found = allocate(question, scores).sparsity
    assert mean_sparsity(list(model.layers()), found) == pytest.approx(sparsity)
    return {
        module: found[layers[0].name] for module, layers in by_module(list(model.layers())).items()
    }


def test_ecoflap_leaves_no_layer_sparser_than_the_average_by_more_than_its_cap(
    tmp_path: Path,
) -> None:
    """Without a cap attention, of no score, would be at 0.96. The MLP has 9/17 of the weights."""
    spec = ECoFLaPSpec(cap=0.1, granularity="layer")

    attention, mlp = by_given_scores(tmp_path, spec, 0.6, "mlp").values()

    assert attention == pytest.approx(0.7)
    assert mlp == pytest.approx(0.6 - 0.1 * 8 / 9)


def test_a_layer_that_nobody_wants_still_keeps_a_tenth_of_its_share(tmp_path: Path) -> None:
    """At 0.9 the MLP is to keep 0.98 less than attention does. Empty, it would cut the model."""
    attention, mlp = by_given_scores(
        tmp_path, ModuleDropSpec(spread=0.49), 0.9, "self_attn"
    ).values()

    assert mlp == pytest.approx(1 - 0.1 * 0.1)
    assert attention == pytest.approx(0.9 - 0.09 * 9 / 8)


def test_noise_measures_the_gradient_along_itself() -> None:
    """|L(W + εz) - L(W - εz)| / 2ε is |<dL/dW, z>| for a small ε; of each sample its own."""
    model = as_model(LlamaForCausalLM(llama_config()), "llama")
    batch = collate(samples()[2::3], 0)  # two of text
    replay = Replay(model, batch, CPU)
    for layer in model.layers():
        weight = layer.linear.weight.requires_grad_()
        z_OI = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        expected = []
        for sample in (samples()[2], samples()[5]):
            loss = model.module(**collate([sample], 0)).loss
            expected.append(abs(float((torch.autograd.grad(loss, weight)[0] * z_OI).sum())))

        found = noise_changes(model, replay, layer, 1e-3, seed=5)

        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


# ---- on models ----

ASKED = {"vision": 0.6, "language": 0.7}
ALLOCATIONS: dict[str, AllocationOptions] = {
    "owl": OWLSpec(),
    "owl-model": OWLSpec(budget="model"),
    "atp": ATPSpec(num_slopes=2),
    "atp-0.1": ATPSpec(slope=0.1),
    "ecoflap": ECoFLaPSpec(num_samples=2),
    "ecoflap-layer": ECoFLaPSpec(num_samples=1, granularity="layer", budget="model"),
    "module_drop": ModuleDropSpec(),
}


def question_of(
    folder: Path,
    model_folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    num_samples: int = 3,
    rung: int = 0,
) -> Question:
    """A tiny model with its dense statistics. Three samples are three batches."""
    ctx = Context(Storage(str(folder / "storage")), "job", folder / "scratch", CPU)
    ctx.rank, ctx.world, ctx.memory_rung = rank, world, rung
    model = load_model(model_folder, device=CPU)
    dataset = DatasetSpec(format="easy-vqa" if "vision" in model.towers else "python-docs")
    calibration = CalibrationSpec(dataset=dataset, num_samples=num_samples, sequence_length=32)
    statistics = folder / "statistics"
    statistics.mkdir(exist_ok=True)
    batches = calibration_batches(model, calibration, 0, ctx)
    collect_dense_statistics(model, calibration, batches, ctx, statistics)
    ctx.barrier()
    asked = {tower: ASKED[tower] for tower in model.towers}
    spec = PruneSpec(method=MagnitudeSpec(), sparsity=asked)
    return Question(
        model=model,
        spec=spec,
        calibration=calibration,
        statistics=statistics,
        bank=None,
        seed=0,
        ctx=ctx,
        key="k",
        folder=folder,
    )


def answer_to(question: Question, allocation: AllocationOptions) -> dict[str, float]:
    spec = question.spec.model_copy(update={"allocation": allocation})
    asked = replace(question, spec=spec)
    scores = measure(asked) if allocation.measure_options is not None else None
    return allocate(asked, scores).sparsity


def mean_sparsity(layers: Sequence[Layer], sparsity: dict[str, float]) -> float:
    sizes = [layer.linear.weight.numel() for layer in layers]
    zeros = sum(n * sparsity[layer.name] for n, layer in zip(sizes, layers, strict=True))
    return zeros / sum(sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_allocation_meets_the_budget_repeats_itself_and_leaves_the_model_alone(
    family: str, tmp_path: Path
) -> None:
    """Each tower its own budget, or all one; and no bit of a weight and no hook stays behind."""
    question = question_of(tmp_path, make_tiny(family, tmp_path / "m"))
    model, layers = question.model, question.layers
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}

    answer_losses(model.module, question.batches()[0], CPU)  # transformers hooks its own blocks
    num_hooks = sum(len(module._forward_hooks) for module in model.module.modules())

    answers = {name: answer_to(question, spec) for name, spec in ALLOCATIONS.items()}

    assert answer_to(question, ALLOCATIONS["ecoflap"]) == answers["ecoflap"]
    after = model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(len(module._forward_hooks) for module in model.module.modules()) == num_hooks
    assert not any("forward" in vars(module) for module in model.module.modules())
    uniform = {layer.name: question.spec.sparsity[layer.tower] for layer in layers}
    for name, answer in answers.items():
        assert list(answer) == [layer.name for layer in layers]
        assert all(0 <= value < 1 for value in answer.values())
        assert mean_sparsity(layers, answer) == pytest.approx(mean_sparsity(layers, uniform))
        if getattr(ALLOCATIONS[name], "budget", "tower") == "tower":
            for tower in model.towers:
                own = list(model.layers(tower))
                assert mean_sparsity(own, answer) == pytest.approx(ASKED[tower])
        if name != "atp":  # which may find that uniform is best
            assert any(answer[layer] != pytest.approx(uniform[layer]) for layer in answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_taken_up_half_way_is_the_whole_run_bit_for_bit(family: str, tmp_path: Path) -> None:
    """For a change in any block, though the blocks before it are not run again."""
    question = question_of(tmp_path, make_tiny(family, tmp_path / "m"))
    model = question.model
    batch = next(iter(question.batches()))
    replay = Replay(model, batch, CPU)

    assert replay.dense == answer_losses(model.module, batch, CPU)
    for layer in model.layers():
        dense = layer.linear.weight.data
        layer.linear.weight.data = dense * 1.5
        taken_up = replay.losses(model.blocks(layer.tower)[layer.block])
        assert taken_up == answer_losses(model.module, batch, CPU)
        layer.linear.weight.data = dense
        assert taken_up != replay.dense


def test_a_loss_is_the_mean_over_a_samples_answer_tokens(tmp_path: Path) -> None:
    """Against the model's own loss, sample by sample: a mean over all tokens would weigh long
    answers more.
    """
    question = question_of(tmp_path, make_tiny("llava-clip", tmp_path / "m"))
    encoder = Encoder(question.model)
    samples = Encoded(encoder, question.calibration.dataset, count=5, length=32, seed=0)
    batch = collate(list(samples), encoder.pad_id)

    losses = answer_losses(question.model.module, batch, CPU)

    for index, loss in enumerate(losses):
        single = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        assert loss == pytest.approx(float(question.model.module(**single).loss), rel=1e-5)


@pytest.mark.parametrize("allocation", [ECoFLaPSpec(), ModuleDropSpec()], ids=["noise", "drop"])
def test_a_lack_of_memory_changes_no_score(
    allocation: AllocationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise of a batch is that of its parts. Three batches of up to 3 samples, and of one."""
    monkeypatch.setattr("workers.calibrate.MIN_BATCHES", 3)
    folder = make_tiny("llava-clip", tmp_path / "tiny")

    whole, parts = (
        measure(replace(question, spec=question.spec.model_copy(update={"allocation": allocation})))
        for question in (question_of(tmp_path, folder, num_samples=8, rung=rung) for rung in (0, 2))
    )

    assert parts == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_long_answers_are_split_so_that_logits_fit_into_memory(tmp_path: Path) -> None:
    """Three windows of 1500 tokens of text: each alone; short answers stay together."""
    text = {"labels": torch.ones(3, 1500, dtype=torch.int64)}
    short = {"labels": torch.tensor([[-100, 5]] * 3)}

    ctx = Context(Storage(str(tmp_path)), "job", tmp_path, CPU)

    assert [len(piece["labels"]) for piece in pieces([text, short], ctx)] == [1, 1, 1, 3]


def test_removing_what_adds_nothing_costs_nothing(tmp_path: Path) -> None:
    """The last MLP is silenced by hand: its score is 0, and that of every other module is not."""
    question = question_of(tmp_path, make_tiny("llama", tmp_path / "m"))
    module = by_module(question.layers)["model.layers.1.mlp"]
    next(x for x in module if x.name.endswith("down_proj")).linear.weight.data.zero_()
    spec = question.spec.model_copy(update={"allocation": ModuleDropSpec()})

    scores = measure(replace(question, spec=spec))

    assert {name for name, score in scores.items() if score == 0} == {x.name for x in module}
    assert len(set(scores.values())) == 4  # attention and MLP of two blocks


def test_what_costs_most_to_remove_stays_densest(tmp_path: Path) -> None:
    """Removed by hand: without the weights that it writes with, a module adds nothing."""
    question = question_of(tmp_path, make_tiny("llama", tmp_path / "m"), num_samples=1)
    (batch,) = question.batches()
    rises = {}
    for module, layers in by_module(question.layers).items():
        writes = next(x for x in layers if x.name.endswith(("o_proj", "down_proj"))).linear.weight
        dense_OI = writes.data
        writes.data = torch.zeros_like(dense_OI)
        rises[module] = answer_losses(question.model.module, batch, CPU)[0]
        writes.data = dense_OI

    sparsity = answer_to(question, ModuleDropSpec())

    by_rise = sorted(rises, key=lambda module: rises[module])
    found = [{sparsity[x.name] for x in by_module(question.layers)[module]} for module in by_rise]
    assert [len(each) for each in found] == [1, 1, 1, 1]
    values = [each.pop() for each in found]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] == pytest.approx(2 * ModuleDropSpec().spread)


def test_a_layer_that_the_loss_does_not_feel_has_no_noise_score(tmp_path: Path) -> None:
    """With o_proj silenced nothing behind it is felt: noise in q, k and v changes no loss."""
    question = question_of(tmp_path, make_tiny("llama", tmp_path / "m"))
    named = {layer.name: layer for layer in question.layers}
    named["model.layers.0.self_attn.o_proj"].linear.weight.data.zero_()
    spec = question.spec.model_copy(update={"allocation": ECoFLaPSpec(num_samples=2)})

    scores = measure(replace(question, spec=spec))

    silent = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert {name for name, score in scores.items() if score == 0} == silent


def test_the_slope_with_the_least_loss_is_taken(tmp_path: Path) -> None:
    """And what was tried is told."""
    question = question_of(tmp_path, make_tiny("llava-clip", tmp_path / "m"))
    spec = question.spec.model_copy(update={"allocation": ATPSpec(num_slopes=4)})

    answer = allocate(replace(question, spec=spec), None)

    for tower, asked in ASKED.items():
        losses = answer.details[tower]["loss_by_slope"]
        slope = answer.details[tower]["slope"]
        assert list(losses) == pytest.approx([steepest(asked, 2) * i / 4 for i in range(4)])
        assert losses[slope] == min(losses.values())
        first, second = (
            next(answer.sparsity[x.name] for x in question.model.layers(tower) if x.block == block)
            for block in (0, 1)
        )
        assert second - first == pytest.approx(slope)


def test_layers_lose_what_they_were_asked_to_lose(tmp_path: Path) -> None:
    """Asked and reached stand in the report; with each layer ranked as a whole they agree to a
    weight.
    """
    question = question_of(tmp_path, make_tiny("llama", tmp_path / "m"))
    sparsity = answer_to(question, OWLSpec())
    zeros = {x.name: round(sparsity[x.name] * x.linear.weight.numel()) for x in question.layers}

    _, reports = prune_sequentially(
        question.model, question.spec, question.calibration, [], question.ctx, key="k",
        sparsity=sparsity,
    )  # fmt: skip

    assert {report.name: report.asked for report in reports} == sparsity
    for layer in question.layers:
        assert int((layer.linear.weight == 0).sum()) == zeros[layer.name]


def test_a_tuned_projector_is_put_into_the_model(tmp_path: Path) -> None:
    """A search that tunes it leaves it beside the allocation."""
    model = load_model(make_tiny("llava-clip", tmp_path / "m"), device=CPU)
    name = next(n for n, _ in model.module.named_parameters() if "projector" in n)
    tuned = torch.full_like(model.module.get_parameter(name), 0.25)
    save_file({name: tuned}, tmp_path / PROJECTOR_FILE)
    (tmp_path / ALLOCATION_FILE).write_text(json.dumps({"sparsity": {"x": 0.5}}))

    sparsity = load_allocation(tmp_path, model)

    assert sparsity == {"x": 0.5}
    assert torch.equal(model.module.get_parameter(name), tuned)


def answers_of_worker(folder: Path, model: Path, rank: int, world: int) -> None:
    """Answer as one of `world` workers; every one writes what it got."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    place = folder / f"of-{world}"
    place.mkdir(exist_ok=True)
    question = question_of(place, model, rank=rank, world=world)
    answers = {name: answer_to(question, spec) for name, spec in ALLOCATIONS.items()}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(answers))
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_workers_allocate_as_one_does(tmp_path: Path) -> None:
    """They share the samples out, and agree with one another and with one alone to the last bit."""
    model = make_tiny("llava-clip", tmp_path / "m")
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=answers_of_worker, args=(tmp_path, model, rank, 2))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()

    answers_of_worker(tmp_path, model, 0, 1)
    for worker in workers:
        worker.join(timeout=300)

    assert [worker.exitcode for worker in workers] == [0, 0]
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first == second == one


def test_uniform_measures_nothing() -> None:
    """The common job reads no statistics and no data for it."""
    spec = UniformSpec()

    assert (spec.needs_data, spec.needs_statistics, spec.measure_options) == (False, False, None)
