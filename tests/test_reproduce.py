"""A row is rebuilt from its own words, and what differs is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.errors import DataError, ModelError, SpecError
from jobs.result import JobResult, Score
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.reproduce import compare, find_row, job_of
from orchestrator.settle import job_columns
from tests.families import make_tiny
from tests.test_cli import Ran, prunefleet

SWEEP = """\
name: tiny
model: {folder}/model
calibration: {{dataset: easy-vqa, num_samples: 4}}
grid: {{method: wanda, pattern: "2:4"}}
repair: {{method: sparse_lora, rank: 2, num_steps: 2, batch_size: 2}}
evaluate:
  dataset: {{format: vqa, path: {folder}/data.json}}
  num_items: 2
  max_new_tokens: 2
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a dataset, and the results of a sweep over them in `runs`."""
    folder = tmp_path_factory.mktemp("study")
    make_tiny("llava-clip", folder / "model")
    records = [{"question": f"is it {color}?", "answer": "yes"} for color in ("red", "blue")]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "tiny.yaml").write_text(SWEEP.format(folder=folder))
    ran = prunefleet("run", folder / "tiny.yaml", "--storage", folder / "runs", *INLINE)
    assert ran.code == 0, ran.err
    return folder


INLINE = ("--executor", "inline")


@pytest.fixture
def rows(study: Path) -> pd.DataFrame:
    return find_row(Storage(str(study / "runs")), key_of(study))


def key_of(study: Path) -> str:
    frame = leaderboard.load(str(study / "runs"), "repair == 'sparse_lora'")
    return str(frame["job_key"].iloc[0])


def reproduce(study: Path, *options: object, storage: str = "runs") -> Ran:
    return prunefleet("reproduce", key_of(study)[:8], "--storage", study / storage, *options)


def test_a_repaired_model_is_reproduced_to_the_bit(study: Path, tmp_path: Path):
    """Same spec, same seed, same machine: from an empty storage, the same hash of its weights."""
    ran = reproduce(study, "--into", tmp_path / "again")

    assert ran.code == 0, ran.out + ran.err
    assert "Reproduced." in ran.out
    assert "differs" not in ran.out
    [bits] = [line.split() for line in ran.out.splitlines() if line.startswith("weights_sha256")]
    assert bits[1] == bits[2]
    stages = json.loads(leaderboard.load(str(tmp_path / "again"))["stages"].iloc[0])
    assert not [stage for stage in stages if stage["cached"]]


def test_a_row_that_says_something_else_is_told_and_ends_with_1(study: Path, rows: pd.DataFrame):
    """Here the row was doctored; in life, a library or the hardware changed under it."""
    doctored = Storage(str(study / "doctored"))
    spec = job_of(rows)
    scores = tuple(
        Score(row["weights"], row["benchmark"], row["metric"], 0.25, None, None, 2)
        for row in rows.to_dict("records")
    )
    facts = {"weights_sha256": "0" * 16, "version_torch": "1.0", "sparsity_total": 0.5}
    leaderboard.publish(
        doctored, job_columns(spec), JobResult(spec.key, "complete", scores, facts=facts)
    )

    ran = reproduce(study, storage="doctored")

    assert ran.code == 1
    told = {line.split()[0] for line in ran.out.splitlines() if line.endswith("differs")}
    assert {"data/exact_match/pruned", "weights_sha256", "version_torch"} <= told
    assert "sparsity_total" not in told
    assert "version_torch" in ran.out.splitlines()[-1]
    assert reproduce(study, "--into", study / "runs").code == 2


def test_a_model_that_changed_or_went_is_an_error(study: Path, rows: pd.DataFrame):
    config = study / "model" / "config.json"
    before = config.read_text()

    config.write_text(before + "\n")
    with pytest.raises(ModelError, match="is not what it was: its fingerprint was"):
        job_of(rows)
    config.write_text(before)
    shutil.move(study / "model", study / "moved")
    with pytest.raises(ModelError, match="no such folder"):
        job_of(rows)
    shutil.move(study / "moved", study / "model")
    assert job_of(rows)


def test_data_that_changed_is_an_error(study: Path, rows: pd.DataFrame):
    data = study / "data.json"
    before = data.read_text()

    data.write_text(before.replace("red", "green"))
    with pytest.raises(DataError, match=r"dataset data .* is not what it was"):
        job_of(rows)
    data.unlink()
    with pytest.raises(DataError, match=r"data\.json"):
        job_of(rows)
    data.write_text(before)
    assert job_of(rows)


def test_a_row_does_not_decide_whether_code_is_run(rows: pd.DataFrame):
    """Whoever can write to the storage can write a row with trust_remote_code in it."""
    job = json.loads(rows["job"].iloc[0])
    job["model"]["trust_remote_code"] = True
    poisoned = rows.assign(job=json.dumps(job))

    with pytest.raises(SpecError, match="--trust-remote-code"):
        job_of(poisoned)
    assert job_of(poisoned, trust_remote_code=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sweep": 1}', "[" * 100_000])
def test_a_row_whose_job_makes_no_sense_is_an_error(rows: pd.DataFrame, text: str):
    with pytest.raises(SpecError, match="does not understand its settings"):
        job_of(rows.assign(job=text))


def test_only_one_complete_job_can_be_reproduced(study: Path):
    storage = Storage(str(study / "runs"))
    failed = JobResult("f" * 16, "failed", error="disk full", error_kind="storage")
    leaderboard.publish(storage, {}, failed)

    for key, expected in [("", "3 jobs"), ("nosuch", "0 jobs"), ("ffff", "failed: disk full")]:
        with pytest.raises(SpecError, match=expected):
            find_row(storage, key)


def row(score: float, **facts: Any) -> pd.DataFrame:
    storage = Storage("memory://reproduce-" + str(hash((score, *facts.items()))))
    scores = (Score("pruned", "docs", "perplexity", score, None, None, 10),)
    leaderboard.publish(storage, {}, JobResult("a" * 16, "complete", scores, facts=facts))
    return leaderboard.load(storage)


@pytest.mark.parametrize(
    ("then", "now", "tolerance", "agrees"),
    [
        (0.5, 0.5, 0, True),
        (0.5, 0.5000001, 0, False),
        (0.5, 0.51, 0.02, True),
        (0.5, 0.53, 0.02, False),
        (16.0, 16.25, 0.02, True),
        (16.0, 16.5, 0.02, False),
    ],
)
def test_tolerance_is_absolute_and_beyond_1_a_fraction(
    then: float, now: float, tolerance: float, agrees: bool
):
    """A hundredth of accuracy is much, a hundredth of a perplexity of 16 nothing."""
    [score] = [
        one for one in compare(row(then), row(now), tolerance=tolerance) if "docs" in one.name
    ]

    assert score.agrees is agrees
    assert score.counts


def test_with_a_tolerance_the_bits_are_told_and_do_not_decide():
    then, now = row(0.5, weights_sha256="a"), row(0.5, weights_sha256="b")

    [exact] = [one for one in compare(then, now) if one.name == "weights_sha256"]
    [close] = [one for one in compare(then, now, tolerance=0.1) if one.name == "weights_sha256"]

    assert (exact.agrees, exact.counts) == (False, True)
    assert (close.agrees, close.counts) == (False, False)


def test_a_number_on_one_side_only_is_a_difference():
    compared = compare(row(0.5, sparsity_total=0.5), row(0.5))

    assert [one.name for one in compared if not one.agrees] == ["sparsity_total"]
