"""Bring one job to its end: try, classify what went wrong, try again where that can help, publish.

The same for both executors. The row is the commit point: whatever dies before it is published is
run again, and finds its finished stages.
"""

import importlib.metadata
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jobs.errors import NumericError, PrunefleetError, StorageError
from jobs.result import JobResult
from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.retry import Attempt, jittered, next_attempt

log = logging.getLogger("prunefleet")

PUBLISH_AGAIN_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""A storage that fails while the row is published, the work all done, gets more patience."""

PACKAGES = ("prunefleet", "torch", "transformers", "ray", "deepspeed", "peft")


def settle(job: JobSpec, storage: Storage, run: Callable[[Attempt], JobResult]) -> JobResult:
    """Run a job until it has ended, and publish its rows. `retry.py` says what is tried again.

    Args:
        run: one attempt. Raises what went wrong.
    """
    started = time.monotonic()
    failures: list[str] = []
    again: Attempt | None = Attempt()
    while again is not None:
        attempt = again
        time.sleep(jittered(attempt.pause_s))
        try:
            result, again = run(attempt), None
        except Exception as error:
            result = _failed(job, *_told(job, attempt, error))
            failures.append(str(result.error_kind))
            again = next_attempt(failures)
    total = time.monotonic() - started
    computing = result.facts.pop("seconds_computing", 0.0)
    ours = {
        "attempt": attempt.number,
        "memory_rung": attempt.memory_rung,
        "seconds_total": total,
        "seconds_orchestration": total - computing,
    }
    result.facts.update(ours)
    return _published(job, storage, result, ours)


def _told(job: JobSpec, attempt: Attempt, error: Exception) -> tuple[str, str]:
    """Kind and message of what ended an attempt."""
    if isinstance(error, PrunefleetError):
        log.warning("job %s, attempt %d: %s", job.key, attempt.number, error.message)
        return error.kind, error.message
    log.exception("job %s, attempt %d", job.key, attempt.number)  # a mistake of ours
    return "unknown", f"{type(error).__name__}: {error}"


def fail(job: JobSpec, storage: Storage, kind: str, message: str) -> JobResult:
    """Publish that a job failed of what happened around it."""
    return _published(job, storage, _failed(job, kind, message), {})


def _published(
    job: JobSpec, storage: Storage, result: JobResult, ours: dict[str, Any]
) -> JobResult:
    """Publish a result; one that may not stand on the leaderboard (a NaN) becomes a failure."""
    columns = job_columns(job) | provenance()
    try:
        _publish_patiently(storage, columns, result)
    except (NumericError, ValueError) as error:
        result = _failed(job, "numeric", f"the result cannot be published: {error}")
        result.facts.update(ours)
        _publish_patiently(storage, columns, result)
    return result


def _publish_patiently(storage: Storage, columns: dict[str, Any], result: JobResult) -> None:
    for pause_s in PUBLISH_AGAIN_AFTER_S:
        try:
            leaderboard.publish(storage, columns, result)
            return
        except StorageError as error:
            log.warning("publishing %s: %s; again in %g s", result.job_key, error, pause_s)
            time.sleep(jittered(pause_s))
    leaderboard.publish(storage, columns, result)


def _failed(job: JobSpec, kind: str, message: str) -> JobResult:
    return JobResult(job.key, "failed", error=message, error_kind=kind)


def job_columns(job: JobSpec) -> dict[str, Any]:
    """The leaderboard columns that follow from a job's settings. Null where they have no effect."""
    columns: dict[str, Any] = {
        "sweep": job.sweep,
        "model": job.model.label,
        "method": "dense",
        "repair": job.repair.method if job.repair else "none",
        "seed": job.seed,
        "job": job.model_dump_json(),
    }
    if job.prune is None:
        return columns
    asked = job.prune.sparsity
    values = set(asked.values()) or {0.0}
    return columns | {
        "method": job.prune.method.name,
        "pattern": job.prune.pattern,
        "sparsity": values.pop() if len(values) == 1 else None,
        "sparsity_vision_asked": asked.get("vision"),
        "sparsity_language_asked": asked.get("language"),
        "towers": "+".join(asked) or None,
        "allocation": job.prune.allocation.name,
        "refine": job.prune.refine.unit if job.prune.refine else "none",
        "propagate": job.calibration.propagate if job.prune.needs_activations else None,
        "samples": job.calibration.num_samples if job.is_calibrated else None,
        "tokens": job.calibration.tokens_label if job.is_calibrated else None,
    }


@cache
def _fixed_provenance() -> dict[str, Any]:
    versions = {f"version_{name}": _version(name) for name in PACKAGES}
    return versions | {
        "git_commit": os.environ.get("PRUNEFLEET_COMMIT") or _git_commit(),
        "image_digest": os.environ.get("PRUNEFLEET_IMAGE_DIGEST"),
        "hostname": socket.gethostname(),
    }


def provenance() -> dict[str, Any]:
    """Where these numbers come from: versions, commit, image, host."""
    return dict(_fixed_provenance())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Of the checkout that this runs from, `-dirty` if it was changed; None outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if not git("ls-files", "settle.py"):
            return None  # installed somewhere inside another project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
