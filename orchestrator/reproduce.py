"""Run a row's job anew, every stage of it, and compare what comes out with what the row says."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pydantic import ValidationError

from jobs.errors import DataError, ModelError, SpecError
from jobs.result import JobResult
from jobs.spec import DatasetSpec, JobSpec
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.executors import Executor
from workers.data import fingerprint_dataset
from workers.locate import fingerprint_model, locate

NUMBERS = (
    "sparsity_vision",
    "sparsity_language",
    "sparsity_total",
    "sparsity_all_params",
    "layer_error_mean",
    "damping_max",
)
CIRCUMSTANCES = (
    "git_commit",
    "image_digest",
    "version_prunefleet",
    "version_torch",
    "version_transformers",
    "version_deepspeed",
    "version_peft",
    "device",
    "cpu",
    "num_workers",
)
"""What may explain a difference. The same here means the same bits are promised."""


@dataclass(frozen=True)
class Comparison:
    """One thing, as the row has it and as it came out now."""

    name: str
    then: Any
    now: Any
    agrees: bool
    counts: bool = True
    """False: it explains and does not decide."""


def find_row(storage: Storage, job: str) -> pd.DataFrame:
    """The rows of the one complete job whose key starts with `job`.

    Raises:
        SpecError: no such job, several, or one that failed and has no result to reproduce.
    """
    rows = leaderboard.load(storage)
    rows = rows[rows["job_key"].str.startswith(job)]
    keys = rows["job_key"].unique()
    if len(keys) != 1:
        raise SpecError(f"{len(keys)} jobs have a key that starts with {job!r}")
    if (rows["status"] != "complete").any():
        reason = rows["error"].iloc[0]
        raise SpecError(f"job {keys[0]} has no result to reproduce, it failed: {reason}")
    return rows


def job_of(rows: pd.DataFrame, *, trust_remote_code: bool = False) -> JobSpec:
    """The job as it was resolved then, after checking that its model and its data are the same.

    Args:
        trust_remote_code: run code that comes with the model, if the row says it was run then.
            Not because the row says so: whoever can write to the storage can write a row.

    Raises:
        SpecError: a row without its job, or one that this version does not understand.
        ModelError, DataError: gone, or other than they were.
    """
    key, text = rows["job_key"].iloc[0], rows["job"].iloc[0]
    if pd.isna(text):
        raise SpecError(f"job {key} is of a version that did not keep the job's settings")
    try:
        job = JobSpec.model_validate_json(text)
    except ValidationError as error:
        raise SpecError(
            f"job {key}: this version does not understand its settings: {error}"
        ) from error
    if job.model.trust_remote_code and not trust_remote_code:
        raise SpecError(
            f"job {key} runs code that comes with {job.model.name}. Read it, and then say "
            "--trust-remote-code"
        )
    _check_model(job)
    datasets = [job.calibration.dataset, *(spec.dataset for spec in job.evaluate)]
    if job.repair is not None and job.repair.dataset is not None:
        datasets.append(job.repair.dataset)
    for dataset in dict.fromkeys(datasets):
        _check_dataset(dataset)
    return job


def _check_model(job: JobSpec) -> None:
    then = job.model.fingerprint
    now = fingerprint_model(locate(job.model))
    if then != now:
        raise ModelError(
            f"model {job.model.name} is not what it was: its fingerprint was {then} and is {now}. "
            "Put the weights and the config of then back"
        )


def _check_dataset(spec: DatasetSpec) -> None:
    now = fingerprint_dataset(spec.model_copy(update={"fingerprint": None}))
    if spec.fingerprint != now:
        raise DataError(
            f"dataset {spec.label} ({spec.path or spec.format}) is not what it was: its "
            f"fingerprint was {spec.fingerprint} and is {now}. Put the files of then back"
        )


def run_anew(job: JobSpec, scratch: Storage, executor: Executor) -> pd.DataFrame:
    """The rows of a job that is computed from nothing.

    Raises:
        SpecError: the storage is not empty: what is in it would not be computed again.
    """
    if scratch.list():
        raise SpecError(f"{scratch.url} is not empty; name a folder that is, or none")
    results: list[JobResult] = []
    executor.run([job], scratch, lambda _, result: results.append(result))
    return leaderboard.load(scratch)


def compare(then: pd.DataFrame, now: pd.DataFrame, *, tolerance: float = 0.0) -> list[Comparison]:
    """What the row says, beside what came out now.

    Args:
        tolerance: how far a number may be off: absolutely, or as a fraction of a number beyond 1.
            At 0 the weights' hashes must be equal, too.
    """
    return [
        *_scores(then, now, tolerance),
        *(
            _number(name, then[name].iloc[0], now[name].iloc[0], tolerance)
            for name in NUMBERS
            if name in then
        ),
        *_bits(then, now, decides=tolerance == 0),
        *_circumstances(then, now),
    ]


def _scores(then: pd.DataFrame, now: pd.DataFrame, tolerance: float) -> Iterator[Comparison]:
    keys = ["benchmark", "metric", "weights"]
    before = then.set_index(keys)
    after = now.set_index(keys)
    for key in before.index.union(after.index, sort=False):
        pair = [frame["score"].get(key) for frame in (before, after)]
        yield _number("/".join(map(str, key)), pair[0], pair[1], tolerance)


def _number(name: str, then: Any, now: Any, tolerance: float) -> Comparison:
    if pd.isna(then) or pd.isna(now):
        return Comparison(name, then, now, bool(pd.isna(then) and pd.isna(now)))
    allowed = tolerance * max(1.0, abs(then))
    return Comparison(name, then, now, bool(abs(then - now) <= allowed))


def _bits(then: pd.DataFrame, now: pd.DataFrame, *, decides: bool) -> Iterator[Comparison]:
    """Rows of before this column, and the dense model, have none: nothing to compare."""
    before, after = then["weights_sha256"].iloc[0], now["weights_sha256"].iloc[0]
    if not pd.isna(before):
        yield Comparison("weights_sha256", before, after, before == after, decides)


def _circumstances(then: pd.DataFrame, now: pd.DataFrame) -> Iterator[Comparison]:
    for name in CIRCUMSTANCES:
        before, after = then[name].iloc[0], now[name].iloc[0]
        same = bool((pd.isna(before) and pd.isna(after)) or before == after)
        yield Comparison(name, before, after, same, counts=False)
