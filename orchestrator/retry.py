"""What is tried again, how often, and how soon: one table, by whose fault it was.

Each kind of failure has a budget of its own, so that a job that was preempted ten times has not
used up the patience for a storage that hiccups. Every budget is finite.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

MAX_PAUSE_S = 60.0


@dataclass(frozen=True)
class Budget:
    """Of one kind of failure, for one job of one run."""

    retries: int
    pause_s: float = 0.0
    """Before the first retry. Doubles with each, up to MAX_PAUSE_S."""


BUDGETS = {
    # An error of the job's own making: the same settings would fail the same way.
    "spec": Budget(0),
    "data": Budget(0),
    "model": Budget(0),
    "numeric": Budget(0),
    "unknown": Budget(0),
    # One step down the ladder of `Context.smaller` each: half the samples at a time, same numbers.
    "memory": Budget(5, pause_s=1),
    # Nobody's fault. The next attempt goes on from the last block or checkpoint.
    "lost": Budget(5, pause_s=1),
    "preempted": Budget(20, pause_s=5),
    "corrupt": Budget(3),
    "stalled": Budget(1),
    # Somebody else's fault, which may pass.
    "storage": Budget(6, pause_s=1),
    "starved": Budget(2, pause_s=30),
}
"""By `PrunefleetError.kind`."""


@dataclass(frozen=True)
class Attempt:
    """One try of a job."""

    number: int = 1
    memory_rung: int = 0
    """How often the samples handled at a time are halved."""
    pause_s: float = 0.0
    """To wait before it."""


def next_attempt(failures: Sequence[str]) -> Attempt | None:
    """The attempt to make after those that ended in `failures` (kinds, oldest first), if any."""
    spent = failures.count(failures[-1])
    budget = BUDGETS[failures[-1]]
    if spent > budget.retries:
        return None
    return Attempt(
        number=len(failures) + 1,
        memory_rung=failures.count("memory"),
        pause_s=min(budget.pause_s * 2 ** (spent - 1), MAX_PAUSE_S),
    )


def jittered(pause_s: float) -> float:
    """Between half the pause and all of it: jobs that failed together do not return together."""
    return pause_s * random.uniform(0.5, 1.0)
