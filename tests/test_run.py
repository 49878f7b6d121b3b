"""A job from start to end in one process: what it shares, what a kill costs, what its rows say."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.crash import CRASH_EXIT_CODE
from jobs.errors import NumericError
from jobs.spec import JobSpec
from jobs.storage import Storage
from jobs.sweep import parse_sweep
from orchestrator.plan import make_plan
from tests.families import make_tiny
from workers.context import Context
from workers.keys import StageKeys, stage_path
from workers.run import run_job

SWEEP = """
name: tiny
model: {model}
calibration: {{dataset: easy-vqa, num_samples: 6}}
grid: {{method: {method}, pattern: "2:4"}}
repair: [none, {{method: sparse_lora, rank: 2, num_steps: 4, batch_size: 4, checkpoint_every: 2}}]
evaluate: {{dataset: easy-vqa, num_items: 8, max_new_tokens: 2}}
"""


@dataclass
class Place:
    """A tiny model, a storage, and the jobs of a sweep over it."""

    folder: Path
    model: Path

    def jobs(self, method: str = "sparsegpt", **changes: str) -> list[JobSpec]:
        text = SWEEP.format(model=self.model, method=method)
        for old, new in changes.items():
            text = text.replace(old, new)
        return make_plan(parse_sweep(text, "tiny.yaml", base=self.folder))

    def context(self, job: JobSpec, storage: str = "storage") -> Context:
        place = Storage(str(self.folder / storage))
        return Context(place, job.key, self.folder / "scratch", torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    return Place(tmp_path, tiny_model)


def stages_of(facts: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(stage["stage"], stage["cached"]) for stage in json.loads(facts["stages"])]


def weights_of(place: Place, job: JobSpec, storage: str) -> dict[str, torch.Tensor]:
    keys = StageKeys.of(job)
    name, key = ("repair", keys.repair) if keys.repair else ("prune", keys.prune)
    assert key is not None
    return load_file(place.folder / storage / stage_path(name, key) / "model.safetensors")


def run_in_a_process_that_dies_at(point: str, job: JobSpec, place: Place, storage: str) -> None:
    """Run the job in a child that ends at a crash point, as from kill -9."""
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from jobs.spec import JobSpec\n"
        "from jobs.storage import Storage\n"
        "from workers.context import Context\n"
        "from workers.run import run_job\n"
        "job = JobSpec.model_validate_json(sys.argv[1])\n"
        "context = Context(Storage(sys.argv[2]), job.key, Path(sys.argv[3]), torch.device('cpu'))\n"
        "run_job(job, context)\n"
    )
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            job.model_dump_json(),
            str(place.folder / storage),
            str(place.folder / "child"),
        ],
        env={**os.environ, "PRUNEFLEET_CRASH_AT": point},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == CRASH_EXIT_CODE, child.stderr[-2000:]


def test_jobs_share_what_they_have_in_common(place: Place) -> None:
    """The repaired job finds the dense scores and the pruned model of the jobs before it."""
    dense, pruned, repaired = place.jobs()

    results = [run_job(job, place.context(job)) for job in (dense, pruned, repaired)]

    assert [stages_of(result.facts) for result in results] == [
        [("evaluate", False)],
        [("evaluate", True), ("prune", False), ("evaluate", False)],
        [
            ("evaluate", True),
            ("prune", True),
            ("evaluate", True),
            ("teacher", False),
            ("repair", False),
            ("evaluate", False),
        ],
    ]


def test_repair_keeps_every_zero_and_changes_other_weights(place: Place) -> None:
    """Sparsity counted from the repaired file is the pattern's, exactly."""
    _, pruned, repaired = place.jobs()

    result = run_job(repaired, place.context(repaired))

    before, after = (weights_of(place, job, "storage") for job in (pruned, repaired))
    masks = [name for name in before if (before[name] == 0).float().mean() == 0.5]
    assert result.facts["sparsity_total"] == 0.5
    assert len(masks) == 2 * 6 + 2 * 7  # the linears of two vision and two language blocks
    for name in masks:
        assert not after[name][before[name] == 0].any()
        assert not torch.equal(before[name], after[name])


def test_the_same_job_twice_gives_the_same_bits(place: Place) -> None:
    """From two empty storages, repair included: what `same spec, same seed` promises."""
    _, _, job = place.jobs()

    results = [run_job(job, place.context(job, storage)) for storage in ("one", "two")]

    one, two = (weights_of(place, job, storage) for storage in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert results[0].scores == results[1].scores


def test_a_kill_in_the_middle_of_pruning_costs_one_block(place: Place) -> None:
    """Killed after the first language block: the next attempt ends with the undisturbed bits."""
    _, job, _ = place.jobs()
    run_job(job, place.context(job, "undisturbed"))

    run_in_a_process_that_dies_at("prune-language-0", job, place, "killed")
    kept = sorted((place.folder / "killed" / "work").rglob("*.safetensors"))
    run_job(job, place.context(job, "killed"))

    assert [file.stem for file in kept] == ["language-000", "vision-000", "vision-001"]
    undisturbed, resumed = (weights_of(place, job, name) for name in ("undisturbed", "killed"))
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert not list((place.folder / "killed" / "work").rglob("*.safetensors"))


@pytest.mark.parametrize("point", ["after building repair", "before publish"])
def test_a_kill_before_a_stage_is_published_loses_no_other_stage(point: str, place: Place) -> None:
    """Publishing is one rename: half a stage is never seen, and never used."""
    _, _, job = place.jobs()
    run_job(job, place.context(job, "undisturbed"))

    run_in_a_process_that_dies_at(point, job, place, "killed")
    result = run_job(job, place.context(job, "killed"))

    undisturbed, resumed = (weights_of(place, job, name) for name in ("undisturbed", "killed"))
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    if point == "after building repair":
        assert [cached for _, cached in stages_of(result.facts)] == [True] * 4 + [False] * 2


def test_a_damaged_stage_is_computed_again_and_said_so(place: Place) -> None:
    """A truncated weights file under a sound marker: sizes are checked on every use."""
    _, job, _ = place.jobs()
    run_job(job, place.context(job))
    prune_key = StageKeys.of(job).prune
    assert prune_key is not None
    file = place.folder / "storage" / stage_path("prune", prune_key) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    result = run_job(job, place.context(job))

    assert ("prune", False) in stages_of(result.facts)
    assert "computed again" in result.facts["warnings"]


def test_scores_are_measured_once_and_told_per_layer_with_what_was_reached(place: Place) -> None:
    """Two sparsities, one measurement; `pruning.json` lies beside the exported model."""
    changes = {'pattern: "2:4"': "sparsity: [0.5, 0.6], allocation: module_drop"}
    jobs = [job for job in place.jobs("magnitude", **changes) if job.prune and not job.repair]

    results = [run_job(job, place.context(job)) for job in jobs]

    assert [stages_of(result.facts)[1:4] for result in results] == [
        [("score", False), ("allocate", False), ("prune", False)],
        [("score", True), ("allocate", False), ("prune", False)],
    ]
    assert results[0].facts["seconds_allocate"] > 0
    assert results[1].facts["sparsity_language"] == pytest.approx(0.6, abs=1e-3)
    key = StageKeys.of(jobs[1]).prune
    assert key is not None
    report = place.folder / "storage" / stage_path("prune", key) / "pruning.json"
    layers = json.loads(report.read_text())["layers"]
    assert len({layer["asked"] for layer in layers}) > 2
    assert all(layer["sparsity"] == pytest.approx(layer["asked"], abs=1e-3) for layer in layers)


def test_dense_statistics_are_computed_once_for_a_grid(place: Place) -> None:
    """Wanda and SparseGPT solve from one file; neither runs a calibration pass of its own."""
    changes = {"num_samples: 6": "num_samples: 6, propagate: dense"}
    jobs = [job for job in place.jobs("[wanda, sparsegpt]", **changes) if not job.repair][1:]

    results = [run_job(job, place.context(job)) for job in jobs]

    assert [stages_of(result.facts)[1] for result in results] == [
        ("statistics", False),
        ("statistics", True),
    ]
    assert results[0].facts["layer_error_mean"] > results[1].facts["layer_error_mean"] > 0


def test_a_gram_matrix_without_full_rank_is_told(place: Place) -> None:
    """One question has fewer tokens than 64 inputs. SparseGPT solves with it; Wanda does not."""
    changes = {"num_samples: 6": "num_samples: 1, tokens: text"}
    jobs = [job for job in place.jobs("[wanda, sparsegpt]", **changes) if not job.repair][1:]

    wanda, sparsegpt = (run_job(job, place.context(job)).facts for job in jobs)

    assert wanda["tokens_per_input_min"] == sparsegpt["tokens_per_input_min"] < 1
    assert "on fewer tokens than they have inputs" in sparsegpt["warnings"]
    assert wanda["warnings"] is None


def test_sparsegpt_disturbs_the_outputs_least(place: Place) -> None:
    """On equal inputs at 2:4: SparseGPT below Wanda. Magnitude sees no data, so null, never 0."""
    jobs = [job for job in place.jobs("[magnitude, wanda, sparsegpt]") if not job.repair][1:]

    errors = [run_job(job, place.context(job)).facts["layer_error_mean"] for job in jobs]

    assert errors[0] is None
    assert errors[2] < errors[1]


def test_a_nan_in_the_model_fails_the_job_rather_than_scoring_0(tmp_path: Path) -> None:
    """Stock `generate` answers from NaN logits as if nothing were wrong."""
    from safetensors.torch import save_file

    folder = make_tiny("llava-clip", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    place = Place(tmp_path, folder)
    _, job, _ = place.jobs("magnitude")

    with pytest.raises(NumericError, match="logits are NaN"):
        run_job(job, place.context(job))
