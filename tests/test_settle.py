"""What goes wrong, how often it is tried again, and what the leaderboard says in the end."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from jobs import errors
from jobs.errors import (
    DataError,
    LostError,
    ModelError,
    NumericError,
    PrunefleetError,
    SpecError,
    StorageError,
)
from jobs.methods import WandaSpec
from jobs.result import JobResult, Score
from jobs.spec import (
    BenchmarkSpec,
    CalibrationSpec,
    DatasetSpec,
    JobSpec,
    ModelSpec,
    PruneSpec,
    RepairSpec,
)
from jobs.storage import Storage
from jobs.sweep import SweepError
from orchestrator import leaderboard
from orchestrator.retry import BUDGETS, Attempt
from orchestrator.settle import job_columns, provenance, settle

EASY = DatasetSpec(format="easy-vqa", fingerprint="d")
DENSE = JobSpec(
    sweep="s",
    model=ModelSpec(name="m", fingerprint="f"),
    calibration=CalibrationSpec(dataset=EASY),
    evaluate=(BenchmarkSpec(dataset=EASY),),
    seed=3,
)
PRUNE = PruneSpec(method=WandaSpec(), pattern="2:4", sparsity={"vision": 0.5, "language": 0.5})
JOB = DENSE.model_copy(update={"prune": PRUNE})
SCORE = Score("dense", "easy-vqa", "exact_match", 0.5, 0.25, 0.75, 8)
COMPLETE = JobResult(JOB.key, "complete", (SCORE,), facts={"seconds_computing": 0.0})


class Attempts:
    """Attempts that end in the given order: an error is raised, a result is returned."""

    def __init__(self, *outcomes: Exception | JobResult) -> None:
        self.outcomes = list(outcomes)
        self.numbers: list[int] = []

    def __call__(self, attempt: Attempt) -> JobResult:
        self.numbers.append(attempt.number)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return replace(outcome, facts=dict(outcome.facts))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.settle.jittered", lambda pause_s: 0.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


FAILURES: list[tuple[Exception, int, str, str]] = [
    (SpecError("no such thing"), 1, "spec", "no such thing"),
    (DataError("no such image"), 1, "data", "no such image"),
    (ModelError("no such tower"), 1, "model", "no such tower"),
    (NumericError("a NaN"), 1, "numeric", "a NaN"),
    (PrunefleetError("hm"), 1, "unknown", "hm"),
    (StorageError("disk gone"), 1 + BUDGETS["storage"].retries, "storage", "disk gone"),
    (LostError("killed"), 1 + BUDGETS["lost"].retries, "lost", "killed"),
    (KeyError("a mistake of ours"), 1, "unknown", "KeyError: 'a mistake of ours'"),
]


@pytest.mark.parametrize(
    ("error", "attempts", "kind", "message"), FAILURES, ids=lambda value: str(value)[:20]
)
def test_an_error_is_tried_again_only_where_that_can_help(
    error: Exception, attempts: int, kind: str, message: str, storage: Storage
) -> None:
    """A wrong spec is wrong three times; a killed worker is not. Either way it ends as one row."""
    run = Attempts(*[error] * attempts)

    result = settle(JOB, storage, run)

    assert run.numbers == list(range(1, attempts + 1))
    assert (result.status, result.error_kind, result.error) == ("failed", kind, message)
    [row] = leaderboard.load(storage).to_dict("records")
    assert (row["status"], row["error_kind"], row["error"]) == ("failed", kind, message)
    assert row["attempt"] == attempts
    assert row["method"] == "wanda"
    assert math.isnan(row["score"])


@pytest.mark.parametrize("lost", [StorageError("disk gone"), LostError("killed")])
def test_a_job_that_succeeds_when_tried_again_is_complete(
    lost: Exception, storage: Storage
) -> None:
    """And the row says that it took two attempts, and nothing of the first one's end."""
    result = settle(JOB, storage, Attempts(lost, COMPLETE))

    assert result.status == "complete"
    [row] = leaderboard.load(storage).to_dict("records")
    assert (row["status"], row["attempt"], row["score"]) == ("complete", 2, 0.5)
    assert pd.isna(row["error"])


def test_another_kind_of_error_ends_the_attempts(storage: Storage) -> None:
    """The storage came back, and then the numbers were bad: what counts is the last reason."""
    run = Attempts(StorageError("disk gone"), NumericError("a NaN"))

    result = settle(JOB, storage, run)

    assert (result.error_kind, result.facts["attempt"]) == ("numeric", 2)


def test_a_person_who_interrupts_is_obeyed(storage: Storage) -> None:
    """Ctrl-C is no failure of the job: no row, no second attempt."""

    def interrupted(attempt: Attempt) -> JobResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle(JOB, storage, interrupted)

    assert leaderboard.published_keys(storage) == {}


def test_a_score_that_is_nan_is_a_failed_row(storage: Storage) -> None:
    """A NaN on the leaderboard would sort, average and plot like a number."""
    bad = replace(COMPLETE, scores=(replace(SCORE, score=math.nan),))

    result = settle(JOB, storage, Attempts(bad))

    assert (result.status, result.error_kind) == ("failed", "numeric")
    [row] = leaderboard.load(storage).to_dict("records")
    assert row["status"] == "failed"
    assert "score is nan" in row["error"]
    assert row["attempt"] == 1


def test_a_result_replaces_the_failure_of_an_earlier_run(storage: Storage) -> None:
    settle(JOB, storage, Attempts(DataError("no such image")))

    settle(JOB, storage, Attempts(COMPLETE))

    assert leaderboard.load(storage)["status"].tolist() == ["complete"]


def test_time_not_spent_on_computing_is_orchestration(storage: Storage) -> None:
    """What the fleet costs on top of the work, in the row of every job."""
    result = settle(JOB, storage, Attempts(replace(COMPLETE, facts={"seconds_computing": 0.25})))

    facts = result.facts
    assert facts["seconds_orchestration"] == pytest.approx(facts["seconds_total"] - 0.25)
    assert "seconds_computing" not in facts


def test_columns_say_what_was_asked_and_null_where_it_means_nothing() -> None:
    """Magnitude looks at no data, so how calibration propagates is no property of its row."""
    magnitude = {"method": {"name": "magnitude"}, "pattern": "unstructured"}
    each = PruneSpec.model_validate(magnitude | {"sparsity": {"vision": 0.4, "language": 0.6}})
    repaired = JOB.model_copy(update={"prune": each, "repair": RepairSpec()})

    dense, pruned, other = (job_columns(job) for job in (DENSE, JOB, repaired))

    assert (dense["method"], dense["repair"], dense["seed"]) == ("dense", "none", 3)
    assert "sparsity" not in dense
    assert (pruned["pattern"], pruned["sparsity"], pruned["towers"]) == (
        "2:4",
        0.5,
        "vision+language",
    )
    assert (pruned["propagate"], other["propagate"]) == ("pruned", None)
    assert (other["sparsity"], other["sparsity_vision_asked"]) == (None, 0.4)
    assert other["repair"] == "sparse_lora"


def test_a_sparsity_of_0_is_asked_and_not_unknown() -> None:
    """The plan names no tower then; on the leaderboard it is the first point of a curve."""
    nothing = PRUNE.model_copy(update={"pattern": "unstructured", "sparsity": {}})

    columns = job_columns(JOB.model_copy(update={"prune": nothing}))

    assert (columns["sparsity"], columns["towers"]) == (0.0, None)


def test_a_row_holds_the_job_that_made_it() -> None:
    """To the last setting: reading it back gives a job of the same key."""
    assert JobSpec.model_validate_json(job_columns(JOB)["job"]) == JOB


def test_provenance_has_a_column_for_all_it_knows() -> None:
    facts = provenance()

    assert facts["version_torch"]
    assert facts["hostname"]
    assert set(facts) <= set(leaderboard.SCHEMA.names)


ERRORS = [
    value
    for value in [*vars(errors).values(), SweepError]
    if isinstance(value, type) and issubclass(value, PrunefleetError)
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_crosses_processes(error: type[PrunefleetError]) -> None:
    """Ray pickles what a worker raises. An exception that takes two arguments would not come back.

    What it says is read on the other side, and its kind decides whether to try again.
    """
    sent = error("language.block.7: 3 NaNs")

    came = pickle.loads(pickle.dumps(sent))

    assert type(came) is error
    assert (came.message, str(came)) == (sent.message, "language.block.7: 3 NaNs")
    assert came.kind == error.kind
