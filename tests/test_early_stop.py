"""Successive halving: who goes on, that a stopped job stays stopped, what makes it run again."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from jobs.spec import EarlyStop, JobSpec
from jobs.storage import Storage
from jobs.sweep import parse_sweep
from orchestrator import leaderboard
from orchestrator.executors import InlineExecutor
from orchestrator.leaderboard import still_to_run
from orchestrator.plan import make_plan
from tests.families import make_tiny
from workers.context import Context
from workers.early_stop import goes_on, reason_to_stop

VERDICTS = [
    # own loss, those that came before, one in so many; goes on
    (0.9, [], 3, True),  # nobody to compare with, and nobody is waited for
    (0.5, [0.4], 3, False),
    (0.3, [0.4], 3, True),
    (0.4, [0.4], 3, True),  # equals do not beat each other
    (0.5, [0.4, 0.6], 3, False),  # second of three
    (0.5, [0.4, 0.6, 0.7], 3, True),  # second of four: ceil(4 / 3) = 2 go on
    (0.65, [0.4, 0.6, 0.7], 3, False),
    (0.65, [0.4, 0.6, 0.7], 2, False),  # third of four, two go on
    (-0.9, [-0.8, -0.7], 2, True),  # scores come negated
]


@pytest.mark.parametrize(("loss", "others", "reduction", "expected"), VERDICTS)
def test_one_in_so_many_goes_on(
    loss: float, others: list[float], reduction: int, expected: bool
) -> None:
    assert goes_on(loss, others, reduction) is expected


SWEEP = """
name: halving
model: {model}
calibration: {{dataset: easy-vqa, num_samples: 6}}
grid: {{method: [sparsegpt, wanda, magnitude], pattern: "2:4"}}
evaluate: {{dataset: easy-vqa, num_items: 8, max_new_tokens: 2}}
early_stop: {{reduction: {reduction}, num_items: 4}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


def plan(model: Path, reduction: int = 3) -> list[JobSpec]:
    text = SWEEP.format(model=model, reduction=reduction)
    return make_plan(parse_sweep(text, "s.yaml", base=model))


def test_a_job_that_is_stopped_ends_there_and_is_not_run_again(tmp_path: Path, model: Path) -> None:
    """Wanda's layers are worse than SparseGPT's. Magnitude sees no data, so only its score counts:
    on random weights all score 0, and equals go on."""
    storage, jobs = Storage(str(tmp_path)), plan(model)

    InlineExecutor().run(jobs, storage, lambda job, result: None)

    rows = leaderboard.load(storage).drop_duplicates("job_key").set_index("method")
    assert rows["status"].to_dict() == {
        "dense": "complete",
        "sparsegpt": "complete",
        "wanda": "stopped",
        "magnitude": "complete",
    }
    stopped = rows.loc["wanda"]
    assert stopped["error"].startswith("layer error ")
    assert "is number 2 of the 2 comparable jobs" in stopped["error"]
    assert pd.isna(stopped["score"])
    assert stopped["layer_error_mean"] > rows.loc["sparsegpt"]["layer_error_mean"]
    assert still_to_run(jobs, storage) == []
    again = still_to_run(plan(model, reduction=2), storage)
    assert [job.prune.method.name for job in again if job.prune] == ["wanda"]


def test_a_verdict_is_given_once(tmp_path: Path, model: Path) -> None:
    """A job that went on, was killed, and comes again has better competitors by then. To stop it
    now would throw away what it did since, and make the outcome a matter of when it was killed."""
    first, second = plan(model)[1:3]
    rule = EarlyStop()

    def verdict(job: JobSpec, loss: float) -> str | None:
        ctx = Context(Storage(str(tmp_path)), job.key, tmp_path / "s", torch.device("cpu"))
        return reason_to_stop(job, rule, "layer error", loss, ctx)

    assert verdict(first, 0.9) is None
    assert verdict(second, 0.1) is None
    assert verdict(first, 0.9) is None


def test_early_stopping_changes_no_key(model: Path) -> None:
    """The same job, with and without competitors, has the same numbers."""
    assert [job.key for job in plan(model, 2)] == [job.key for job in plan(model, 3)]
