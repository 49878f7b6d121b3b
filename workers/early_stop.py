"""Stop a job whose early signals are poor, before it costs what a good one may cost.

Successive halving, asynchronously (ASHA, arXiv:1810.05934, section 3): jobs of one model, sparsity,
pattern and repair compete. At each signal a job goes on if it is among the best 1/reduction of
those that have come so far; the first to come always does, so nobody waits for anybody.

Signals lie in the storage, so that every job of the sweep sees them, on any node and inline.
"""

import json
from collections.abc import Sequence
from typing import Any

from jobs.errors import CorruptError
from jobs.spec import EarlyStop, JobSpec, content_key
from workers.context import Context

SIGNALS = "signals"


def goes_on(loss: float, others: Sequence[float], reduction: int) -> bool:
    """Whether a job is among the best `ceil(n / reduction)` of the n seen so far, itself included.

    Args:
        loss: smaller is better.
        others: of the competitors that came before. Equals do not beat it.
    """
    num_better = sum(other < loss for other in others)
    return num_better < -(-(len(others) + 1) // reduction)


def reason_to_stop(
    job: JobSpec, rule: EarlyStop, signal: str, loss: float | None, ctx: Context
) -> str | None:
    """Record a job's signal and say why it is to end here; None if it goes on.

    A verdict is given once: an attempt that comes again gets the same. Every rank calls it, and
    gets the same answer.

    Args:
        signal: its name. Competitors are compared by the same one.
        loss: smaller is better; null where it was not measured, and then the job goes on.
    """
    if loss is None:
        return None
    verdict = _verdict(job, rule, signal, loss, ctx) if ctx.rank == 0 else None
    reason: str | None = ctx.from_rank_0(verdict)
    return reason


def _verdict(job: JobSpec, rule: EarlyStop, signal: str, loss: float, ctx: Context) -> str | None:
    folder = f"{SIGNALS}/{rule.key}/{_bracket(job)}/{signal}"
    mine = f"{folder}/{job.key}"
    given = _read(mine, ctx)
    if given is None:
        paths = [path for path in ctx.storage.list(folder) if path != mine]
        seen = [one["loss"] for one in (_read(path, ctx) for path in paths) if one is not None]
        reason = None
        if not goes_on(loss, seen, rule.reduction):
            rank = 1 + sum(other < loss for other in seen)
            reason = (
                f"{signal} {loss:.4g} is number {rank} of the {len(seen) + 1} comparable jobs so "
                f"far (best {min(seen):.4g}); one in {rule.reduction} goes on"
            )
        given = {"loss": loss, "reason": reason}
        ctx.storage.put_sealed(mine, json.dumps(given).encode())
    return None if given["reason"] is None else str(given["reason"])


def _read(path: str, ctx: Context) -> dict[str, Any] | None:
    """None for what is not there, or damaged: as if that job had not come yet."""
    try:
        return dict(json.loads(ctx.storage.read_sealed(path)))
    except (FileNotFoundError, CorruptError):
        return None


def _bracket(job: JobSpec) -> str:
    """Jobs that compete: they differ in what is done, not in how much."""
    assert job.prune is not None
    return content_key(
        [
            job.model.fingerprint,
            job.model.dtype,
            job.prune.sparsity,
            job.prune.pattern,
            job.repair.model_dump(mode="json") if job.repair else None,
            job.seed,
        ]
    )
