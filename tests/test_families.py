"""One contract for every model family: it loads, its towers are found, it prunes, it saves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.errors import ModelError
from jobs.methods import SparseGPTSpec, WandaSpec
from jobs.spec import CalibrationSpec, DatasetSpec, ModelSpec, PruneSpec
from jobs.storage import Storage
from orchestrator.plan import model_facts
from tests.families import FAMILIES, make_tiny
from workers.calibrate import TowerWalk, calibration_batches
from workers.context import Context
from workers.locate import config_of
from workers.models import count_sparsity, load_model, save_model
from workers.prune import check_shapes, prune_sequentially

CPU = torch.device("cpu")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(Storage(str(tmp_path / "storage")), "job", tmp_path / "scratch", CPU)


def calibration(family: str, num_samples: int = 4) -> CalibrationSpec:
    dataset = DatasetSpec(format="easy-vqa" if family.startswith("llava") else "python-docs")
    return CalibrationSpec(dataset=dataset, num_samples=num_samples, sequence_length=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_prunes_and_saves_a_folder_that_stock_transformers_loads(
    family: str, tmp_path: Path, ctx: Context
) -> None:
    """Counted from the saved file: 2:4 in every prunable layer of every tower, nowhere else."""
    model = load_model(make_tiny(family, tmp_path / family), device=CPU)
    layers = list(model.layers())
    spec = PruneSpec(method=WandaSpec(), pattern="2:4", sparsity=dict.fromkeys(model.towers, 0.5))
    batches = calibration_batches(model, calibration(family), 0, ctx)
    before = {name: p.clone() for name, p in model.module.named_parameters()}

    masks, reports = prune_sequentially(model, spec, calibration(family), batches, ctx, key="k")
    save_model(model, tmp_path / "saved")

    assert {layer.name for layer in layers} == set(masks) == {report.name for report in reports}
    loaded = load_model(tmp_path / "saved", device=CPU)
    counted = count_sparsity(loaded)
    assert counted["sparsity_total"] == 0.5
    assert [counted[f"sparsity_{tower}"] for tower in model.towers] == [0.5] * len(model.towers)
    after = dict(loaded.module.named_parameters())
    untouched = before.keys() - {f"{name}.weight" for name in masks}
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def test_tied_weights_are_written_once_also_in_another_dtype(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    model = load_model(folder, device=CPU, dtype=torch.bfloat16)

    save_model(model, tmp_path / "saved")

    written, saved = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "saved"))
    assert saved.keys() == written.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_shares_statistics_by_the_tensor_that_layers_read(
    family: str, tmp_path: Path, ctx: Context
) -> None:
    """q, k and v are one tap, o another; a Gram per layer would cost a third more."""
    model = load_model(make_tiny(family, tmp_path / family), device=CPU)
    batches = calibration_batches(model, calibration(family), 0, ctx)

    taps = TowerWalk(model, "language", batches, calibration(family), ctx).statistics()

    names = [sorted(layer.name.rsplit(".", 1)[1] for layer in tap.layers) for tap in taps]
    assert sorted(names) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_finds_the_same_layers_in_the_file_as_the_worker_in_the_model(
    family: str, tmp_path: Path
) -> None:
    """The plan reads tensor names only; a layer it overlooks would fail late."""
    folder = make_tiny(family, tmp_path / family)

    planned = model_facts(ModelSpec(name=str(folder))).prunable

    model = load_model(folder, device=CPU)
    shapes = [(layer.tower, *layer.linear.weight.shape) for layer in model.layers()]
    assert sorted(planned.values()) == sorted(shapes)


def test_text_and_visual_tokens_are_counted_apart_and_padding_not_at_all(
    tmp_path: Path, ctx: Context
) -> None:
    """16 patches an image; the prompts have different lengths, so one batch is padded."""
    model = load_model(make_tiny("llava-clip", tmp_path / "m"), device=CPU)
    batches = calibration_batches(model, calibration("llava-clip", 24), 0, ctx)

    tap = TowerWalk(model, "language", batches, CalibrationSpec(), ctx).statistics()[0]

    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert tap.statistics["visual"].num_tokens == 24 * 16
    assert tap.statistics["text"].num_tokens == num_tokens - 24 * 16


def test_calibration_sees_the_pruned_blocks_before_it(tmp_path: Path, ctx: Context) -> None:
    """With dense activations instead, the second block's Hessian and so its weights differ."""
    folder = make_tiny("llama", tmp_path / "m")
    spec = PruneSpec(method=SparseGPTSpec(), pattern="2:4", sparsity={"language": 0.5})
    settings = calibration("llama", 8)
    model = load_model(folder, device=CPU)
    batches = calibration_batches(model, settings, 0, ctx)

    prune_sequentially(model, spec, settings, batches, ctx, key="whole")

    by_hand = load_model(folder, device=CPU)
    first, second = by_hand.blocks("language")
    first.load_state_dict(model.blocks("language")[0].state_dict())
    walk = TowerWalk(by_hand, "language", batches, settings, ctx)
    walk.advance()
    from workers.prune import prune_taps, uniform_sparsity

    sparsity = uniform_sparsity(by_hand, spec)
    prune_taps(walk.statistics(), spec, settings, ctx, sparsity=sparsity)
    for name, weight in second.state_dict().items():
        assert torch.equal(weight, model.blocks("language")[1].state_dict()[name])


def test_a_pattern_that_does_not_fit_names_the_layer(tmp_path: Path) -> None:
    """A language tower of width 36 cannot have groups of 8."""
    folder = make_tiny("llama", tmp_path / "m", intermediate_size=68)
    spec = PruneSpec(method=WandaSpec(), pattern="4:8", sparsity={"language": 0.5})

    with pytest.raises(ModelError, match=r"down_proj.*4:8.*68"):
        check_shapes(load_model(folder, device=CPU), spec)


def test_an_unknown_family_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "m")
    config = (folder / "config.json").read_text().replace('"llama"', '"mamba"')
    (folder / "config.json").write_text(config)

    with pytest.raises(ModelError, match=r"'mamba' is not supported yet\. Known: .*llava"):
        load_model(folder, device=CPU)


def test_a_weight_missing_from_the_file_is_an_error_not_a_random_weight(tmp_path: Path) -> None:
    """Stock `from_pretrained` would fill it at random and warn."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match="up_proj"):
        load_model(folder, device=CPU)
    assert config_of(folder)["model_type"] == "llama"
