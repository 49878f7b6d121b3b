"""How a sweep stands, from the storage alone: what is done, what runs, what has gone silent.

Works the same for a cluster and for `prunefleet run` in another terminal: both leave results on
the leaderboard and signs of life in `progress/`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.progress import STALE_S, described, read_beat

State = Literal["complete", "stopped", "failed", "running", "silent", "waiting"]


@dataclass(frozen=True)
class JobStatus:
    """How far one job is."""

    job_key: str
    what: str
    state: State
    """silent: it was running, and has given no sign of life for `STALE_S`, or since its run
    ended."""
    stage: str | None = None
    done: int | None = None
    total: int | None = None
    age_s: float | None = None
    """Since its last sign of life."""


def sweep_status(
    jobs: list[JobSpec], storage: Storage, *, now: float, ended: float | None = None
) -> list[JobStatus]:
    """How every job of a sweep stands.

    Args:
        now: Unix time.
        ended: when the last run of the sweep ended, if it is known to have: what gave a sign of
            life before then, and has no result, was cut off with it.
    """
    settled = leaderboard.published_keys(storage)
    begun = {path.rpartition("/")[2].removesuffix(".json") for path in storage.list("progress")}
    words = described(jobs)
    states = []
    for job in jobs:
        row = settled.get(job.key)
        beat = read_beat(storage, job.key) if row != "complete" and job.key in begun else None
        state = state_of(row, beat["time"] if beat else None, now=now, ended=ended)
        if beat is None or state in ("failed", "stopped"):
            states.append(JobStatus(job.key, words[job.key], state))
            continue
        age_s = max(0.0, now - beat["time"])  # of another machine's clock, which may be ahead
        states.append(
            JobStatus(
                job.key, words[job.key], state, beat["stage"], beat["done"], beat["total"], age_s
            )
        )
    return states


def state_of(
    row: leaderboard.Status | None, beat: float | None, *, now: float, ended: float | None
) -> State:
    """From a job's row on the leaderboard, and the Unix time of its last sign of life.

    A failed job with a fresh sign of life is being tried again.
    """
    if row == "complete":
        return "complete"
    if row == "stopped":
        return "stopped"
    if beat is not None and now - beat <= STALE_S and (ended is None or beat > ended):
        return "running"
    if row == "failed":
        return "failed"
    return "waiting" if beat is None else "silent"


def summary(states: list[JobStatus]) -> str:
    """`16 jobs: 12 complete, 2 running, 2 waiting`."""
    counts = Counter(job.state for job in states)
    order: tuple[State, ...] = ("complete", "stopped", "failed", "running", "silent", "waiting")
    parts = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    return f"{len(states)} jobs: {parts}"


def exit_code(keys: set[str], settled: Mapping[str, Any]) -> int:
    """Of a sweep that has ended, as `run` would end: 0 if no job failed or is missing, else 3."""
    return 0 if all(settled.get(key) in ("complete", "stopped") for key in keys) else 3


def ago(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h`, `2 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
