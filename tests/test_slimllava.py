"""The SlimLLaVA search on a model: its bank, its projector, kills, and two workers."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from jobs.allocation import SlimLLaVASpec
from jobs.crash import CRASH_EXIT_CODE
from jobs.errors import DataError, SpecError
from jobs.methods import MagnitudeSpec, SparseGPTSpec
from jobs.pattern import Target
from jobs.spec import CalibrationSpec, JobSpec
from jobs.storage import Storage
from jobs.sweep import parse_sweep
from orchestrator.cli import app
from orchestrator.estimate import estimate
from orchestrator.plan import make_plan
from orchestrator.settle import settle
from tests.families import make_tiny
from tests.test_repair import as_model, llama_config
from workers.bank import Bank, build_bank
from workers.context import Context
from workers.keys import StageKeys, stage_path
from workers.methods import prune
from workers.models import count_sparsity, load_model
from workers.prune import load_taps, statistics_file
from workers.run import run_job
from workers.search import State
from workers.slimllava import _KeptState

SWEEP = """
name: tiny
model: {model}
calibration: {{dataset: easy-vqa, num_samples: 6, propagate: dense}}
grid:
  method: sparsegpt
  sparsity: 0.5
  allocation:
    {{name: slimllava, step: 0.1, reach: 0.2, num_samples: 6, early_samples: 2, batch_size: 4,
    population: 5, survivors: 2, generations: 3, projector_every: 2, projector_steps: 2,
    projector_learning_rate: 0.01}}
evaluate: {{dataset: easy-vqa, num_items: 8, max_new_tokens: 2, answer_loss: true}}
"""
FOUND = ("allocation.json", "history.json", "projector.safetensors")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


def planned(model: Path, *changes: tuple[str, str]) -> JobSpec:
    text = SWEEP.format(model=model)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return make_plan(parse_sweep(text, "tiny.yaml", base=model.parent))[-1]


def run(job: JobSpec, storage: Path, *, rank: int = 0, world: int = 1, rung: int = 0) -> Any:
    context = Context(Storage(str(storage)), job.key, storage / f"scratch-{rank}", CPU)
    context.rank, context.world, context.memory_rung = rank, world, rung
    return run_job(job, context)


def stage(storage: Path, job: JobSpec, name: str) -> Path:
    return storage / stage_path(name, getattr(StageKeys.of(job), name))


def found(storage: Path, job: JobSpec) -> dict[str, bytes]:
    return {name: (stage(storage, job, "allocate") / name).read_bytes() for name in FOUND}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobSpec, Any]:
    """A run that nothing disturbed: its storage, job and result."""
    storage, job = tmp_path_factory.mktemp("whole"), planned(model)
    return storage, job, run(job, storage)


def test_the_bank_holds_what_pruning_alone_gives(whole: tuple[Path, JobSpec, Any]) -> None:
    """One factorization serves all ratios of q, k and v; each is as if it had been solved alone."""
    storage, job, _ = whole
    model = load_model(Path(job.model.name), device=CPU)
    layers = [layer for layer in model.layers("language") if layer.block == 1]
    bank = Bank(stage(storage, job, "bank"), layers)
    statistics = statistics_file(stage(storage, job, "statistics"), "language", 1)
    context = Context(Storage(str(storage)), "job", storage, CPU)
    taps = load_taps(statistics, {layer.name: layer for layer in layers}, context)
    tap = next(tap for tap in taps if len(tap.layers) == 3)
    alone = [
        prune(layer.linear.weight, tap.mixed(CalibrationSpec()), Target(0.6), SparseGPTSpec())
        for layer in tap.layers
    ]

    bank.install({layer.name: 0.6 for layer in tap.layers})

    for layer, one in zip(tap.layers, alone, strict=True):
        assert ((layer.linear.weight == 0) == ~one.keep_OI).all()
        torch.testing.assert_close(layer.linear.weight.data, one.weight_OI)


def test_the_relative_norm_is_of_the_sums_not_a_mean_of_ratios(tmp_path: Path) -> None:
    """Half of q are 3s and half 4s, of k 5s and 12s: norms of 5 and 13 dense, 4 and 12 at half."""
    model = as_model(LlamaForCausalLM(llama_config()), "llama")
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    for name, (small, large) in {q: (3.0, -4.0), k: (5.0, -12.0)}.items():
        weight_OI = model.module.get_submodule(name).weight
        weight_OI[::2], weight_OI[1::2] = small, large
    context = Context(Storage(str(tmp_path)), "job", tmp_path, CPU)
    grid = {"language": (0.0, 0.5)}
    build_bank(
        model, MagnitudeSpec(), grid, tmp_path, CalibrationSpec(), context, tmp_path, key="k"
    )

    bank = Bank(tmp_path, list(model.layers()))

    assert bank.relative_norm({q: 0.5, k: 0.5}) == pytest.approx(16 / 18)
    assert bank.relative_norm({q: 0.5, k: 0.0}) == pytest.approx(17 / 18)
    assert bank.relative_norm({k: 0.5}) == pytest.approx(12 / 13)


def test_swapping_there_and_back_leaves_no_trace(whole: tuple[Path, JobSpec, Any]) -> None:
    """What was installed before must not show, or a kill would change the results."""
    storage, job, _ = whole
    model = load_model(Path(job.model.name), device=CPU)
    layers = list(model.layers())
    bank = Bank(stage(storage, job, "bank"), layers)

    def weights(ratio: float) -> list[torch.Tensor]:
        bank.install({layer.name: ratio for layer in layers})
        return [layer.linear.weight.clone() for layer in layers]

    before, other, after = weights(0.5), weights(0.3), weights(0.5)

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, other, strict=True))
    sizes = sum(layer.linear.weight.numel() for layer in layers)
    zeros = sum(int((weight == 0).sum()) for weight in before)
    assert zeros / sizes == pytest.approx(0.5, abs=0.001)


def test_a_lack_of_memory_changes_the_search_by_rounding_alone(
    whole: tuple[Path, JobSpec, Any], tmp_path: Path
) -> None:
    storage, job, _ = whole

    run(job, tmp_path, rung=2)

    undisturbed, halved = (
        json.loads((stage(place, job, "allocate") / "history.json").read_text())
        for place in (storage, tmp_path)
    )
    assert halved["genes"] == undisturbed["genes"]
    for one, other in zip(halved["generations"], undisturbed["generations"], strict=True):
        assert one["best_objective"] == pytest.approx(other["best_objective"], rel=1e-4)


def test_a_winner_that_is_exported_otherwise_than_judged_says_so(
    model: Path, whole: tuple[Path, JobSpec, Any], tmp_path: Path
) -> None:
    _, _, as_judged = whole

    otherwise = run(planned(model, ("propagate: dense", "propagate: pruned")), tmp_path)

    assert "those exported differ" in otherwise.facts["warnings"]
    assert as_judged.facts["warnings"] is None


def test_text_calibrates_the_language_tower_of_a_model_with_images(
    model: Path, tmp_path: Path
) -> None:
    """Its vision tower has no statistics then, and nothing asks for them: not OWL, not a bank."""
    changes = (
        (
            "dataset: easy-vqa, num_samples: 6, propagate",
            "dataset: python-docs, sequence_length: 32, num_samples: 6, propagate",
        ),
        ("sparsity: 0.5", "sparsity: 0.5\n  towers: language"),
        ("projector_every: 2", "projector_every: 0"),
    )

    result = run(planned(model, *changes), tmp_path)

    assert result.facts["sparsity_language"] == pytest.approx(0.5, abs=0.001)
    assert result.facts["sparsity_vision"] == 0


def test_what_was_judged_is_what_is_exported(whole: tuple[Path, JobSpec, Any]) -> None:
    """Pruned from the same statistics: the winner's weights in the bank, and its projector."""
    storage, job, _ = whole
    sparsity = json.loads((stage(storage, job, "allocate") / "allocation.json").read_text())
    model = load_model(Path(job.model.name), device=CPU)
    bank = Bank(stage(storage, job, "bank"), list(model.layers()))
    projector = load_file(stage(storage, job, "allocate") / "projector.safetensors")

    bank.install(sparsity["sparsity"])

    exported = load_model(stage(storage, job, "prune"), device=CPU)
    for ours, theirs in zip(model.layers(), exported.layers(), strict=True):
        torch.testing.assert_close(ours.linear.weight, theirs.linear.weight)
    dense = dict(model.module.named_parameters())
    for name, parameter in exported.module.named_parameters():
        if name in projector:
            assert torch.equal(parameter, projector[name])
            assert not torch.equal(parameter, dense[name]), "it was tuned"


def test_the_found_allocation_meets_the_budget(whole: tuple[Path, JobSpec, Any]) -> None:
    """Counted in the file, per tower, and by the winner's excess over the budget."""
    storage, job, _ = whole

    counted = count_sparsity(load_model(stage(storage, job, "prune"), device=CPU))

    assert counted["sparsity_vision"] == pytest.approx(0.5, abs=0.001)
    assert counted["sparsity_language"] == pytest.approx(0.5, abs=0.001)
    history = json.loads((stage(storage, job, "allocate") / "history.json").read_text())
    assert [record["generation"] for record in history["generations"]] == [0, 1, 2, 3]
    assert all(record["best_excess"] < 0.001 for record in history["generations"])
    objectives = [record["best_objective"] for record in history["generations"]]
    assert objectives == sorted(objectives, reverse=True)


def test_searches_of_one_bank_share_it(
    whole: tuple[Path, JobSpec, Any], model: Path, tmp_path: Path
) -> None:
    """An ablation solves nothing again."""
    storage, job, _ = whole
    ablation = planned(model, ("name: slimllava", "name: slimllava, eta: 0"))

    result = run(ablation, storage)

    stages = {one["stage"]: one["cached"] for one in json.loads(result.facts["stages"])}
    assert (stages["bank"], stages["allocate"]) == (True, False)
    assert StageKeys.of(ablation).bank == StageKeys.of(job).bank


def test_a_kill_costs_a_block_or_a_generation_and_changes_no_bit(
    whole: tuple[Path, JobSpec, Any], model: Path, tmp_path: Path
) -> None:
    """Killed in the bank, then behind the projector's tuning, then run to its end.

    A block that the first attempt kept has a flipped bit, and is solved again.
    """
    undisturbed, job, _ = whole
    program = (
        "import sys; from pathlib import Path; from jobs.spec import JobSpec\n"
        "from tests.test_slimllava import run\n"
        "run(JobSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    for point in ("bank-language-0", "search-2"):
        child = subprocess.run(
            [sys.executable, "-c", program, job.model_dump_json(), str(tmp_path)],
            env={**os.environ, "PRUNEFLEET_CRASH_AT": point},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == CRASH_EXIT_CODE, child.stderr[-2000:]
        for kept in (tmp_path / "work" / str(StageKeys.of(job).bank)).glob("vision-000.*"):
            flip_a_bit(kept)
    assert "vision-000.safetensors is damaged" in child.stderr
    assert (tmp_path / "work" / str(StageKeys.of(job).allocate) / "search.safetensors").exists()

    run(job, tmp_path)

    assert found(tmp_path, job) == found(undisturbed, job)
    assert not list((tmp_path / "work").glob("*/*")), "finished stages leave nothing"


def test_a_damaged_state_makes_the_search_start_over(tmp_path: Path) -> None:
    """A flipped bit in it is still JSON, or numbers; and is noticed."""
    context = Context(Storage(str(tmp_path)), "job", tmp_path / "scratch", CPU)
    judge: Any = SimpleNamespace(projector={})
    kept = _KeptState(context, "key", judge, SlimLLaVASpec())
    state = State(1, 0.5, [], set(), [])
    kept.keep(state)
    assert kept.restore() == state

    flip_a_bit(tmp_path / kept.path)

    assert kept.restore() is None
    assert "search.safetensors is damaged" in context.warnings[0]


def flip_a_bit(file: Path) -> None:
    """In the middle of it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def work(job: str, storage: Path, rank: int) -> None:
    """One of two workers of a job."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(storage / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run(JobSpec.model_validate_json(job), storage, rank=rank, world=2)
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_workers_find_what_one_finds(whole: tuple[Path, JobSpec, Any], tmp_path: Path) -> None:
    """Bit for bit: a candidate is one worker's, and gradients are added up in one order."""
    undisturbed, job, _ = whole
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=work, args=(job.model_dump_json(), tmp_path, rank))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)

    assert [worker.exitcode for worker in workers] == [0, 0]
    assert found(tmp_path, job) == found(undisturbed, job)


def test_the_answer_loss_is_a_score_of_its_own(whole: tuple[Path, JobSpec, Any]) -> None:
    """A model of random weights guesses among its whole vocabulary: near log(vocabulary)."""
    scores = {(score.weights, score.metric): score for score in whole[2].scores}

    loss = scores["dense", "answer_loss"]

    vocabulary = load_model(Path(whole[1].model.name), device=CPU).config["text_config"]
    assert loss.score == pytest.approx(
        torch.tensor(float(vocabulary["vocab_size"])).log().item(), rel=0.3
    )
    assert loss.num_items == 8
    assert loss.score_low is not None
    assert loss.score_low < loss.score
    assert ("pruned", "exact_match") in scores


def test_a_model_without_a_projector_has_none_to_tune(tmp_path: Path) -> None:
    """A plain language model is searched too, once the projector is left out."""
    language = make_tiny("llama", tmp_path / "llama")
    text = (
        ("dataset: easy-vqa", "dataset: python-docs, sequence_length: 32"),
        (", max_new_tokens: 2, answer_loss: true", ""),
    )
    with pytest.raises(SpecError, match="projector_every: 0"):
        planned(language, *text)
    untuned = planned(language, *text, ("projector_every: 2", "projector_every: 0"))

    assert run(untuned, tmp_path / "storage").status == "complete"
    assert not (stage(tmp_path / "storage", untuned, "allocate") / FOUND[2]).exists()


def test_the_history_is_drawn(whole: tuple[Path, JobSpec, Any], tmp_path: Path) -> None:
    """What a search did can be looked at: `prunefleet history JOB --to FILE`."""
    storage, job, result = whole
    settle(job, Storage(str(storage)), lambda attempt: result)

    drawn = CliRunner().invoke(
        app, ["history", job.key[:8], "--to", str(tmp_path / "h.png"), "--storage", str(storage)]
    )

    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_without_a_search_has_no_history(tmp_path: Path) -> None:
    """And says so, rather than draw an empty picture."""
    drawn = CliRunner().invoke(app, ["history", "ab", "--to", "h.png", "--storage", str(tmp_path)])

    assert isinstance(drawn.exception, SpecError)
    assert "0 finished searches" in str(drawn.exception)


def test_a_search_that_cannot_be_is_refused_by_the_plan(model: Path) -> None:
    """Not after the statistics and the bank have been paid for."""
    with pytest.raises(DataError, match="num_samples is 99999"):
        planned(model, ("num_samples: 6, early", "num_samples: 99999, early"))
    with pytest.raises(DataError, match="38570 beside calibration's 6, and easy-vqa has 38575"):
        planned(model, ("num_samples: 6, early", "judged_on: unseen, num_samples: 38570, early"))
    text = (
        ("dataset: easy-vqa, num_samples: 6,", "dataset: python-docs, num_samples: 6,"),
        ("sparsity: 0.5", "sparsity: 0.5\n  towers: language"),
    )
    with pytest.raises(SpecError, match="python-docs has no images"):
        planned(model, *text)


def test_the_plan_knows_that_a_search_takes_longer_than_a_rule(model: Path) -> None:
    """Twice the generations, about twice the time."""
    seconds = [
        estimate(planned(model, ("generations: 3", f"generations: {number}")), set()).seconds
        for number in (100, 200)
    ]

    assert 1.5 < (seconds[1] - 20) / (seconds[0] - 20) < 2.1
