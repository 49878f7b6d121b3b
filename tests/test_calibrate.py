"""Calibration: which tokens count, and which activations a layer is calibrated on."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from jobs.errors import ModelError
from jobs.methods import MagnitudeSpec, SparseGPTSpec, WandaSpec
from jobs.spec import CalibrationSpec, DatasetSpec, JobSpec, ModelSpec, PruneSpec
from jobs.storage import Storage
from tests.families import make_tiny
from workers.atv import Drift, share_of_text
from workers.calibrate import TowerWalk, calibration_batches
from workers.context import Context
from workers.keys import StageKeys
from workers.models import VisionLanguageModel, load_model
from workers.prune import (
    collect_dense_statistics,
    load_taps,
    prune_from_statistics,
    prune_sequentially,
    prune_taps,
    uniform_sparsity,
)
from workers.staged import StoppedPass, stops

CPU = torch.device("cpu")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(Storage(str(tmp_path / "storage")), "job", tmp_path / "scratch", CPU)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, base / family) for family in ("llava-clip", "qwen2")}


def spec(family: str, num_samples: int = 10, **changes: object) -> CalibrationSpec:
    dataset = DatasetSpec(format="easy-vqa" if family.startswith("llava") else "python-docs")
    settings = {"dataset": dataset, "num_samples": num_samples, "sequence_length": 32}
    return CalibrationSpec(**(settings | changes))


def half(model: VisionLanguageModel, method: object = None) -> PruneSpec:
    sparsity = dict.fromkeys(model.towers, 0.5)
    return PruneSpec(method=method or SparseGPTSpec(), pattern="2:4", sparsity=sparsity)


def uniform(model: VisionLanguageModel) -> dict[str, float]:
    return uniform_sparsity(model, half(model))


def prune(
    folder: Path, calibration: CalibrationSpec, ctx: Context, method: object = None, key: str = "k"
) -> tuple[VisionLanguageModel, list]:
    model = load_model(folder, device=CPU)
    batches = calibration_batches(model, calibration, 0, ctx)
    _, reports = prune_sequentially(model, half(model, method), calibration, batches, ctx, key=key)
    return model, reports


def same_bits(one: VisionLanguageModel, two: VisionLanguageModel) -> bool:
    other = two.module.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.module.state_dict().items())


@torch.no_grad()
def inputs_of(
    model: VisionLanguageModel, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What each prunable layer reads of a batch, (B, T, I)."""
    read: dict[str, torch.Tensor] = {}
    handles = [
        layer.linear.register_forward_pre_hook(
            lambda _, args, name=layer.name: read.__setitem__(name, args[0])
        )
        for layer in model.layers()
    ]
    model.module(**batch)
    for handle in handles:
        handle.remove()
    return read


def test_a_tap_holds_what_each_of_its_layers_reads(folders: dict[str, Path], ctx: Context) -> None:
    """Against whole forward passes, every layer watched for itself. Padding is left out."""
    calibration = spec("llava-clip")
    model = load_model(folders["llava-clip"], device=CPU)
    batches = calibration_batches(model, calibration, 0, ctx)
    assert not all(batch["attention_mask"].all() for batch in batches)
    rows: dict[tuple[str, str], list[torch.Tensor]] = {}
    for batch in batches:
        is_visual = batch["input_ids"] == model.image_token_id
        is_text = batch["attention_mask"].bool() & ~is_visual
        for name, x in inputs_of(model, batch).items():
            if "vision_tower" in name:
                rows.setdefault((name, "visual"), []).append(x.flatten(0, 1))
            else:
                rows.setdefault((name, "visual"), []).append(x[is_visual])
                rows.setdefault((name, "text"), []).append(x[is_text])

    taps = []
    for tower in model.towers:
        walk = TowerWalk(model, tower, batches, calibration, ctx)
        taps += [tap for _ in walk.blocks for tap in walk.statistics(advance=True)]

    assert sorted(len(tap.layers) for tap in taps) == sorted([3, 1, 1, 1] * 2 + [3, 1, 2, 1] * 2)
    pairs = [(layer, tap.statistics) for tap in taps for layer in tap.layers]
    assert {layer.name for layer, _ in pairs} == {layer.name for layer in model.layers()}
    for layer, by_modality in pairs:
        for modality, part in by_modality.items():
            x_TI = torch.cat(rows.get((layer.name, modality), [torch.zeros(0, len(part.sum_I))]))
            x_TI = x_TI.double()
            assert part.num_tokens == len(x_TI)
            gram_II = part.gram_II.double()
            torch.testing.assert_close(gram_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(part.sum_I, x_TI.sum(dim=0), rtol=1e-4, atol=1e-4)


def test_drift_and_the_number_of_tokens_done_by_hand():
    """Turned by 90°, by 0°, and about: drifts of 1, 0 and 2, a mean of 1; padding has none."""
    before = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [1, 0], [1, 0]]])
    after = torch.tensor([[[0.0, 3], [5, 0], [-2, 0], [0, 1], [0, 1]]])
    is_visual = torch.tensor([[True, True, True, False, False]])
    is_text = torch.tensor([[False, False, False, True, False]])

    drift = Drift.of(before, after, is_text, is_visual)

    assert drift.drift_BT[0, :3].tolist() == [1, 0, 2]
    assert drift.total() == (3, 3)
    assert drift.most().tolist() == [[False, False, True, False, False]]  # one text token
    assert not drift.most(0.4).any()


@pytest.mark.parametrize(
    ("total", "count", "alpha", "share"),
    [(3.0, 6, 1.0, 0.5), (3.0, 6, 0.5, 0.25), (3.0, 6, 4.0, 1.0), (0.0, 0, 1.0, 0.0)],
)
def test_the_share_of_visual_tokens_follows_the_mean_drift(total, count, alpha, share):
    """Never more visual tokens than text tokens, and none where there are none."""
    assert share_of_text(total, count, alpha) == share


def test_each_sample_adds_its_own_number_of_tokens_and_equals_go_left_first():
    """At 0.5 four text tokens add two visual ones, one adds round(0.5) = 0."""
    drift = Drift(torch.tensor([[0.2, 0.2, 0.2, 0.1], [0.9, 0.9, 0.9, 0.9]]), torch.tensor([4, 1]))

    assert drift.most(0.5).tolist() == [[True, True, False, False], [False] * 4]


@pytest.mark.parametrize("propagate", ["pruned", "true_sequential", "dense"])
def test_atv_counts_what_two_passes_by_hand_count(
    propagate: str, folders: dict[str, Path], ctx: Context
) -> None:
    """Ours decides before the last batch has passed, and holds few inputs; by hand it is simple."""
    calibration = spec("llava-clip", 20, tokens="atv", propagate=propagate)
    model = load_model(folders["llava-clip"], device=CPU)
    batches = calibration_batches(model, calibration, 0, ctx)

    if propagate == "true_sequential":
        tap = next(TowerWalk(model, "language", batches, calibration, ctx).stages())[0]
    else:
        taps = TowerWalk(model, "language", batches, calibration, ctx).statistics()
        tap = next(tap for tap in taps if tap.layers[0].name.endswith("q_proj"))

    walk = TowerWalk(model, "language", batches, calibration, ctx)
    block = walk.blocks[0]
    passed = []
    for batch in walk.batches:
        after = block(batch.hidden, **batch.arguments)
        cosine = torch.cosine_similarity(batch.hidden, after, dim=-1)
        passed.append((block.input_layernorm(batch.hidden), 1 - cosine, batch.tokens))
    mean = torch.cat([drift[tokens["visual"]] for _, drift, tokens in passed]).mean().item()
    rows = []
    for inputs, drift, tokens in passed:
        for sample in range(len(inputs)):
            visual = tokens["visual"][sample].nonzero()[:, 0]
            count = round(mean * int(tokens["text"][sample].sum()))
            chosen = visual[drift[sample, visual].topk(min(count, len(visual))).indices]
            rows.append(inputs[sample, chosen])
    x = torch.cat(rows)
    num_text = sum(int(tokens["text"].sum()) for _, _, tokens in passed)
    assert 0.1 < mean < 0.9
    assert tap.statistics["visual"].num_tokens == len(x) > 20
    assert tap.statistics["text"].num_tokens == num_text
    torch.testing.assert_close(tap.statistics["visual"].gram_II, x.T @ x, rtol=1e-4, atol=1e-4)


def test_text_tokens_alone_are_what_a_mix_without_visual_ones_gives(
    folders: dict[str, Path], ctx: Context
) -> None:
    """And the vision tower, which has no text, uses all its tokens whatever is asked."""
    by_name, reports = prune(folders["llava-clip"], spec("llava-clip", tokens="text"), ctx)
    weightless, _ = prune(folders["llava-clip"], spec("llava-clip", visual_weight=0), ctx, key="m")

    assert same_bits(by_name, weightless)
    counted = {report.tower: report.tokens for report in reports}
    assert counted["language"]["visual"] == counted["vision"]["text"] == 0
    assert counted["vision"]["visual"] == 10 * 17  # 16 patches and the class token
    assert counted["language"]["text"] > 10


def test_calibration_on_visual_tokens_alone_leaves_the_vision_tower_as_it_was(
    folders: dict[str, Path], ctx: Context
) -> None:
    """Its tokens are no text and no choice: a weight for language must not reach them."""
    both, _ = prune(folders["llava-clip"], spec("llava-clip"), ctx)
    visual, reports = prune(folders["llava-clip"], spec("llava-clip", text_weight=0), ctx, key="v")

    towers = [
        model.module.get_submodule("model.vision_tower").state_dict() for model in (both, visual)
    ]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])
    assert not same_bits(both, visual)
    assert {report.tokens["text"] for report in reports} == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_weight": 0, "visual_weight": 0}, "no token to count"),
        ({"tokens": "text", "text_weight": 0}, "no token to count"),
        ({"tokens": "text", "visual_weight": 0.5}, "visual_weight has no say"),
        ({"tokens": "text", "atv_alpha": 2}, "atv_alpha is for `tokens: atv`"),
        ({"dataset": "python-docs", "text_weight": 0}, "only text tokens"),
    ],
)
def test_tokens_and_weights_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        CalibrationSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "all"),
        ({"tokens": "text"}, "text"),
        ({"visual_weight": 0}, "text"),
        ({"text_weight": 0}, "visual"),
        ({"visual_weight": 0.05}, "all 1:0.05"),
        ({"tokens": "atv", "atv_alpha": 2}, "atv alpha 2"),
    ],
)
def test_the_leaderboard_tells_token_choices_apart(settings, label):
    assert CalibrationSpec(**settings).tokens_label == label


def test_one_stage_of_dense_statistics_serves_every_mix_and_atv_has_its_own():
    """Atv leaves visual tokens out for good; text alone is a weight of 0."""

    def statistics_key(**changes: object) -> str | None:
        job = JobSpec(
            sweep="s",
            model=ModelSpec(name="m", fingerprint="f"),
            calibration=CalibrationSpec(propagate="dense", **changes),
            prune=PruneSpec(method=WandaSpec(), sparsity={"language": 0.5}),
            evaluate=(),
        )
        return StageKeys.of(job).statistics

    plain = statistics_key()
    assert plain == statistics_key(tokens="text") == statistics_key(text_weight=0)
    assert plain == statistics_key(visual_weight=0.05)
    assert (
        len({plain, statistics_key(tokens="atv"), statistics_key(tokens="atv", atv_alpha=2)}) == 3
    )


def test_a_job_reads_text_alone_from_the_statistics_of_all_tokens(
    folders: dict[str, Path], ctx: Context, tmp_path: Path
) -> None:
    """Whoever asks for text first must not leave a stage behind that has no visual tokens."""
    calibration = spec("llava-clip", propagate="dense", tokens="text")
    model = load_model(folders["llava-clip"], device=CPU)
    batches = calibration_batches(model, calibration, 0, ctx)

    collect_dense_statistics(model, calibration, batches, ctx, tmp_path)
    _, reports = prune_from_statistics(model, half(model), calibration, tmp_path, ctx)

    layers = {layer.name: layer for layer in model.layers("language") if layer.block == 1}
    stored = load_taps(tmp_path / "language-001.safetensors", layers, ctx)
    assert stored[0].statistics["visual"].num_tokens == 10 * 16
    assert {report.tokens["visual"] for report in reports if report.tower == "language"} == {0}


@pytest.mark.parametrize("family", ["llava-siglip", "llava-dinov2", "qwen2"])
def test_true_sequential_gives_what_a_pass_per_tap_gives(
    family: str, ctx: Context, tmp_path: Path
) -> None:
    """The published scheme: run the block, prune a tap, run it again for the next, five times."""
    folder = make_tiny(family, tmp_path / family)
    calibration = spec(family, propagate="true_sequential")

    ours, _ = prune(folder, calibration, ctx)

    model = load_model(folder, device=CPU)
    batches = calibration_batches(model, calibration, 0, ctx)
    for tower in model.towers:
        walk = TowerWalk(model, tower, batches, calibration, ctx)
        for _ in walk.blocks:
            for names in walk._order_of_taps():
                taps = [tap for tap in walk.statistics() if tap.layers[0].name in names]
                prune_taps(taps, half(model), calibration, ctx, sparsity=uniform(model))
            walk.advance()
    assert same_bits(ours, model)


def test_true_sequential_runs_every_layer_once(folders: dict[str, Path], ctx: Context) -> None:
    """Beside one batch that finds the taps of the first block; block by block it would be twice."""
    calibration = spec("qwen2", 16, propagate="true_sequential")
    model = load_model(folders["qwen2"], device=CPU)
    batches = calibration_batches(model, calibration, 0, ctx)
    runs = dict.fromkeys((layer.name for layer in model.layers()), 0)
    for layer in model.layers():
        layer.linear.register_forward_hook(
            lambda *_, name=layer.name: runs.__setitem__(name, runs[name] + 1)
        )

    prune_sequentially(model, half(model), calibration, batches, ctx, key="k")

    first = {runs[name] for name in runs if ".0." in name}
    last = {runs[name] for name in runs if ".1." in name}
    assert first == {len(batches) + 1}
    assert max(last) == len(batches)  # and of the last layer not even that


@pytest.mark.parametrize("propagate", ["pruned", "true_sequential"])
def test_a_finished_block_is_taken_up_with_its_bias(
    propagate: str, folders: dict[str, Path], ctx: Context
) -> None:
    """Resumed in front of the last block: weights, masks and compensated biases, bit for bit."""
    calibration = spec("llava-clip", propagate=propagate)
    method = SparseGPTSpec(bias="compensate")
    whole, reports = prune(folders["llava-clip"], calibration, ctx, method)

    ctx.storage.delete("work/k/language-001.safetensors")
    again, reports_again = prune(folders["llava-clip"], calibration, ctx, method)

    assert same_bits(whole, again)
    assert reports == reports_again


class Fickle(nn.Module):
    """Runs its layers in an order that depends on what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) if x.sum() > 0 else self.one(self.two(x))


def test_a_block_that_runs_its_layers_in_another_order_is_refused():
    """Its second batch would be summed up for the wrong layer."""
    block = Fickle()

    with stops({"one": block.one, "two": block.two}, {"one": 0, "two": 1}):
        assert StoppedPass(lambda: block(torch.ones(1, 2))).run_to(("one",)).tolist() == [[1, 1]]
        with pytest.raises(ModelError, match="one was to run next, and the pass came to two"):
            StoppedPass(lambda: block(-torch.ones(1, 2))).run_to(("one",))


def test_layers_that_share_an_input_in_one_block_and_not_in_another_are_refused():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(2 * x)

    block = Split()
    with stops({"q": block.q, "k": block.k}, {"q": 0, "k": 0}) as opened:
        one = StoppedPass(lambda: block(torch.ones(1, 2)))
        one.run_to(("q", "k"))
        opened.update(("q", "k"))
        with pytest.raises(ModelError, match="k and q read one tensor elsewhere, and here two"):
            one.run_to_end()


def test_an_error_inside_of_a_stopped_pass_comes_out_of_it():
    block = nn.Linear(2, 2)

    with stops({"one": block}, {"one": 0}) as opened:
        one = StoppedPass(lambda: block(torch.ones(1, 3)))
        one.run_to(("one",))
        opened.add("one")
        with pytest.raises(RuntimeError, match="shapes"):
            one.run_to_end()


@pytest.mark.parametrize("method", [MagnitudeSpec, WandaSpec, SparseGPTSpec])
def test_a_compensated_bias_keeps_the_mean_output_of_every_layer(
    method: type, folders: dict[str, Path], ctx: Context
) -> None:
    """On the calibration tokens, as each layer saw them; without it the means move."""
    calibration = spec("qwen2", propagate="dense")
    dense = load_model(folders["qwen2"], device=CPU)
    for layer in dense.layers():
        if layer.linear.bias is not None:
            layer.linear.bias.data.normal_()
    biases = {n: p.clone() for n, p in dense.module.state_dict().items() if n.endswith("bias")}
    weights = {n: p.clone() for n, p in dense.module.state_dict().items() if n.endswith("weight")}
    batches = calibration_batches(dense, calibration, 0, ctx)
    taps = TowerWalk(dense, "language", batches, calibration, ctx).statistics()

    prune_spec = half(dense, method(bias="compensate"))
    _, reports = prune_taps(taps, prune_spec, calibration, ctx, sparsity=uniform(dense))

    state = {report.name: report.bias for report in reports}
    with_bias = [layer for tap in taps for layer in tap.layers if layer.linear.bias is not None]
    assert len(with_bias) == 3  # q, k and v
    for tap in taps:
        mean = tap.mixed(calibration).mean_I
        for layer in tap.layers:
            if layer not in with_bias:
                assert state[layer.name] is None
                continue
            before = weights[f"{layer.name}.weight"].double() @ mean + biases[f"{layer.name}.bias"]
            after = layer.linear.weight.double() @ mean + layer.linear.bias
            moved = layer.linear.weight.double() @ mean + biases[f"{layer.name}.bias"]
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(moved, before, rtol=1e-3)
            assert state[layer.name] == "compensated"


def test_compensation_lowers_the_layer_error_and_where_nothing_is_pruned_changes_no_bit(
    folders: dict[str, Path], ctx: Context
) -> None:
    """What is left of the error is its spread around the mean."""
    calibration = spec("qwen2")
    errors = {}
    for bias in ("keep", "compensate"):
        _, reports = prune(folders["qwen2"], calibration, ctx, WandaSpec(bias=bias), key=bias)
        errors[bias] = {r.name: r.layer_error for r in reports if ".0." in r.name and r.bias}
    assert all(errors["compensate"][name] < errors["keep"][name] for name in errors["keep"])

    model = load_model(folders["qwen2"], device=CPU)
    nothing = PruneSpec(method=WandaSpec(bias="compensate"), sparsity={"language": 0.0001})
    batches = calibration_batches(model, calibration, 0, ctx)
    prune_sequentially(model, nothing, calibration, batches, ctx, key="nothing")
    assert same_bits(model, load_model(folders["qwen2"], device=CPU))
