"""Local reconstruction on tiny models: the error falls, the zeros stay, a kill costs a block."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.errors import NumericError
from jobs.methods import MagnitudeSpec
from jobs.spec import CalibrationSpec, DatasetSpec, PruneSpec, RefineSpec
from jobs.storage import Storage
from tests.families import make_tiny
from workers import prune as prune_module
from workers.calibrate import calibration_batches
from workers.context import Context
from workers.models import VisionLanguageModel, load_model
from workers.prune import prune_sequentially
from workers.refine import Fit, Refinement

CALIBRATION = CalibrationSpec(dataset=DatasetSpec(format="easy-vqa"), num_samples=16)


def pruned(
    folder: Path,
    refine: RefineSpec | None,
    place: Path,
    *,
    rank: int = 0,
    world: int = 1,
    rung: int = 0,
) -> tuple[VisionLanguageModel, dict[str, Tensor]]:
    """The model in `folder` at 50%, by magnitude, as one of `world` workers, and the masks."""
    ctx = Context(Storage(str(place)), "job", place / f"scratch-{rank}", torch.device("cpu"))
    ctx.rank, ctx.world, ctx.memory_rung = rank, world, rung
    model = load_model(folder, device=ctx.device)
    sparsity = dict.fromkeys(model.towers, 0.5)
    spec = PruneSpec(method=MagnitudeSpec(), sparsity=sparsity, refine=refine)
    batches = calibration_batches(model, CALIBRATION, 0, ctx)
    masks, _ = prune_sequentially(model, spec, CALIBRATION, batches, ctx, key="k")
    return model, masks


def weights_of(model: VisionLanguageModel) -> dict[str, Tensor]:
    return dict(model.module.state_dict())


def watch_fits(patch: pytest.MonkeyPatch) -> list[list[Fit]]:
    """The fits of every block refined from now on."""
    fits: list[list[Fit]] = []
    run = Refinement.run
    patch.setattr(Refinement, "run", lambda *args: fits.append(run(*args)) or fits[-1])
    return fits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(("unit", "num_units"), [("block", 1), ("submodule", 2)])
def test_the_error_of_every_unit_falls_and_only_kept_weights_change(
    unit: Any, num_units: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Attention and MLP are found as the children that hold layers, in both towers."""
    fits = watch_fits(monkeypatch)
    plain, _ = pruned(tiny, None, tmp_path / "plain")

    model, masks = pruned(tiny, RefineSpec(unit=unit, num_steps=12), tmp_path / "refined")

    assert [len(its) for its in fits] == [num_units] * 4  # two blocks a tower
    assert all(fit.after < 0.8 * fit.before for its in fits for fit in its)
    before, after = weights_of(plain), weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in masks}
    assert all(torch.equal(after[f"{name}.weight"] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("family", ["llava-dinov2", "qwen2"])
def test_other_families_are_refined_by_submodule_too(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fits = watch_fits(monkeypatch)
    folder = make_tiny(family, tmp_path / "tiny")

    pruned(folder, RefineSpec(unit="submodule", num_steps=4), tmp_path / "place")

    assert {len(its) for its in fits} == {2}
    assert all(fit.after < fit.before for its in fits for fit in its)


def test_a_lack_of_memory_changes_no_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step goes over as many samples, halved twice or not: Adam would make much of others."""
    monkeypatch.setattr("workers.calibrate.MIN_BATCHES", 5)  # of 4 samples, where a step takes 4
    refine = RefineSpec(num_steps=6)
    whole, _ = pruned(tiny, refine, tmp_path / "whole")

    quarters, _ = pruned(tiny, refine, tmp_path / "quarters", rung=2)

    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(quarters)[name], weight, rtol=1e-3, atol=1e-5)


def test_a_kill_costs_a_block_and_no_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def die(point: str) -> None:
        if point == "prune-language-0":
            raise Killed

    refine = RefineSpec(num_steps=4)
    undisturbed, _ = pruned(tiny, refine, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(prune_module, "crash_point", die)
        with pytest.raises(Killed):
            pruned(tiny, refine, tmp_path / "killed")
    fits = watch_fits(monkeypatch)

    resumed, _ = pruned(tiny, refine, tmp_path / "killed")

    assert len(fits) == 1  # the last block; three were there
    before, after = weights_of(undisturbed), weights_of(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rate_that_blows_up_is_an_error(tiny: Path, tmp_path: Path):
    refine = RefineSpec(num_steps=3, learning_rate=1e30)

    with pytest.raises(NumericError, match=r"layers\.0.*Lower refine.learning_rate"):
        pruned(tiny, refine, tmp_path)


def refine_as_one_of_two(rank: int, folder: Path, place: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(place / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, _ = pruned(folder, RefineSpec(num_steps=4), place / "two", rank=rank, world=2)
    save_file(weights_of(model), place / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_workers_refine_as_one_does(tmp_path: Path):
    """Gradients are added up over all batches of a step, so only rounding may differ."""
    folder = make_tiny("qwen2", tmp_path / "tiny")
    spawn = multiprocessing.get_context("spawn")
    arguments = [(rank, folder, tmp_path) for rank in range(2)]
    workers = [spawn.Process(target=refine_as_one_of_two, args=args) for args in arguments]
    for worker in workers:
        worker.start()
    alone, _ = pruned(folder, RefineSpec(num_steps=4), tmp_path / "one")
    for worker in workers:
        worker.join(timeout=300)

    assert [worker.exitcode for worker in workers] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    expected = weights_of(alone)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(first[name], expected[name], atol=1e-5) for name in first)
