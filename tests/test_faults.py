"""What a job does about a lack of memory, a hang, a failing neighbour: inline, without Ray."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.evaluate
import workers.run
from jobs.errors import DataError, PrunefleetError, StalledError
from jobs.result import JobResult
from jobs.spec import JobSpec
from jobs.storage import Storage
from jobs.sweep import parse_sweep
from orchestrator import executors, leaderboard
from orchestrator.executors import InlineExecutor, _cause, _stalled
from orchestrator.plan import make_plan
from tests.families import make_tiny
from tests.test_cli import prunefleet
from tests.test_settle import DENSE
from workers.context import Context
from workers.run import run_job
from workers.watchdog import Watchdog, raised_here

SWEEP = """
name: faults
model: {model}
calibration: {{dataset: easy-vqa, num_samples: 6}}
grid: {{method: sparsegpt, pattern: "2:4"}}
repair: [none, {{method: sparse_lora, rank: 2, num_steps: 3, batch_size: 4, micro_batch_size: 4}}]
evaluate: {{dataset: easy-vqa, num_items: 8, max_new_tokens: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


def plan(model: Path, more: str = "") -> list[JobSpec]:
    return make_plan(parse_sweep(SWEEP.format(model=model) + more, "s.yaml", base=model))


def settled(jobs: list[JobSpec], storage: Storage) -> list[JobResult]:
    results: list[JobResult] = []
    InlineExecutor().run(jobs, storage, lambda job, result: results.append(result))
    return results


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.settle.jittered", lambda pause_s: 0.0)


def test_a_job_that_runs_out_of_memory_climbs_down_and_says_so(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that holds two prompts at a time: 64, 32, 16, 8, 4, 2. Same key, same scores."""
    dense = plan(model)[0]
    [undisturbed] = settled([dense], Storage(str(tmp_path / "undisturbed")))
    generate = workers.evaluate.generate

    def on_a_small_gpu(model: Any, encoder: Any, samples: list[Any], *rest: Any) -> list[str]:
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(model, encoder, samples, *rest)

    monkeypatch.setattr(workers.evaluate, "generate", on_a_small_gpu)
    storage = Storage(str(tmp_path / "small"))
    [result] = settled([dense], storage)

    assert result.status == "complete"
    [row] = leaderboard.load(storage).to_dict("records")
    assert (row["memory_rung"], row["attempt"]) == (5, 6)
    assert result.scores == undisturbed.scores
    assert undisturbed.facts["memory_rung"] == 0


def test_every_rung_gives_the_same_result_up_to_rounding(tmp_path: Path, model: Path) -> None:
    """Calibration, teacher, repair and evaluation in an eighth of the samples at a time."""
    repaired = plan(model)[-1]

    def run(name: str, rung: int) -> JobResult:
        storage = Storage(str(tmp_path / name))
        ctx = Context(storage, repaired.key, tmp_path / "scratch" / name, torch.device("cpu"))
        ctx.memory_rung = rung
        return run_job(repaired, ctx)

    whole, eighths = run("whole", 0), run("eighths", 3)

    assert [score.score for score in whole.scores] == [score.score for score in eighths.scores]
    assert whole.facts["sparsity_total"] == eighths.facts["sparsity_total"]
    error = whole.facts["layer_error_mean"]
    assert eighths.facts["layer_error_mean"] == pytest.approx(error, rel=1e-3)


def test_a_hang_is_ended_with_where_it_was() -> None:
    """What a person needs who finds the row in the morning: since what, and in which call."""
    watchdog = Watchdog()

    def stand_still() -> None:
        watchdog.beat("prune 3 of 12")
        time.sleep(60)

    started = time.monotonic()
    with (
        pytest.raises(StalledError) as ended,
        raised_here() as end,
        watchdog.watching(0.4, end),
    ):
        stand_still()

    assert time.monotonic() - started < 10
    assert "since prune 3 of 12" in ended.value.message
    assert "stood at stand_still (" in ended.value.message


def test_progress_keeps_a_slow_worker_alive() -> None:
    """Measured from the last beat, not from the start; and before the first nothing is due."""
    watchdog, ended = Watchdog(), list[str]()

    with watchdog.watching(0.5, ended.append):
        time.sleep(0.8)
        for step in range(10):
            watchdog.beat(f"repair {step}")
            time.sleep(0.1)

    assert ended == []


def test_a_stalled_attempt_is_tried_once_more(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hangs as if in a collective; the second finds nothing of it left."""
    evaluate, calls = workers.run.evaluate, list[int]()

    def hangs_once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(600)
        return evaluate(*args)

    monkeypatch.setattr(workers.run, "evaluate", hangs_once)
    [dense, *_] = plan(model, "resources: {stalled_after_minutes: 0.15}")

    [result] = settled([dense], Storage(str(tmp_path)))

    assert (result.status, result.facts["attempt"]) == ("complete", 2)


def test_a_ray_worker_that_stalls_leaves_word_before_it_dies(tmp_path: Path) -> None:
    """It may hang in a collective, so it ends as a process; its driver finds the reason."""
    program = (
        "import sys\n"
        "from jobs.storage import Storage\n"
        "from workers.entry import _leave\n"
        "_leave(Storage(sys.argv[1]), sys.argv[2], 'no progress for 30 min since prune 3 of 12')\n"
        "print('still here')\n"
    )
    storage = Storage(str(tmp_path))

    dead = subprocess.run(
        [sys.executable, "-c", program, storage.url, DENSE.key], capture_output=True, text=True
    )

    assert (dead.returncode, dead.stdout) == (1, "")
    reason = _stalled(DENSE, storage)
    assert reason is not None
    assert reason.message == "no progress for 30 min since prune 3 of 12"


def test_a_sweep_ends_after_so_many_failures_and_the_rest_runs_next_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster where everything fails is not to be tried forty times. Exit code 3 both times."""
    (tmp_path / "s.yaml").write_text(SWEEP.format(model=model) + "on_failure: {stop_after: 2}\n")
    run = ["run", tmp_path / "s.yaml", "--storage", tmp_path / "runs", "--executor", "inline"]

    def fails(*_: Any) -> JobResult:
        raise DataError("no such image")

    with monkeypatch.context() as patch:
        patch.setattr(executors, "_here", fails)
        first = prunefleet(*run)
    second = prunefleet(*run)

    assert first.code == 3
    assert "not run: 1 jobs, since on_failure stops after 2 failures" in first.err
    assert "3 jobs, 0 complete, 3 to run" in second.out
    assert second.code == 0


def test_continue_is_the_default_and_a_word(model: Path) -> None:
    default, said = plan(model), plan(model, "on_failure: continue")

    assert default[0].policy.on_failure.stop_after is None
    assert default == said


class Gone(Exception):  # noqa: N818
    """As Ray Train's WorkerGroupError: what became of each rank."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = failures


GONE = [
    ("Worker exit type: SYSTEM_ERROR. Worker unexpectedly exits with code -9", "lost"),
    ("Task was killed due to the node running low on memory.", "memory"),
    ("The actor died because its node has died. Node Id: 1f", "preempted"),
    ("The actor's node was terminated expectedly: preempted", "preempted"),
]


@pytest.mark.parametrize(("told", "kind"), GONE)
def test_what_ray_says_of_a_lost_worker_decides_what_is_done(told: str, kind: str) -> None:
    error = _cause(Gone(rank_0=RuntimeError(told)), DENSE)

    assert isinstance(error, PrunefleetError)
    assert error.kind == kind
