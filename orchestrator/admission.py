"""Which job may start now: a queue over what the nodes have. Knows no Ray, decides as a table.

A job starts when all its workers fit at once, each on one node, so no job waits for another while
it holds something, and jobs of every shape mix without deadlock. A job that does not fit lets
smaller ones pass, but not for ever: see MAX_OVERTAKEN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import SpecError
from jobs.spec import JobSpec

MAX_OVERTAKEN = 16
"""How many later jobs may start before one that waits for room. Then the room is kept for it."""

TRIAL_MEMORY = 2**28
"""Bytes for the process that waits for a job's workers."""

Amounts = Mapping[str, float]
"""CPU and GPU in pieces, memory in bytes."""


@dataclass(frozen=True)
class Node:
    name: str
    has: Amounts


def need_of(job: JobSpec) -> dict[str, float]:
    """What one worker of a job reserves."""
    need: dict[str, float] = {"CPU": job.resources.cpus_per_worker}
    if job.resources.gpus_per_worker:
        need["GPU"] = job.resources.gpus_per_worker
    if job.resources.memory_gib_per_worker:
        need["memory"] = job.resources.memory_gib_per_worker * 2**30
    return need


def check_feasible(jobs: Sequence[JobSpec], nodes: Sequence[Node]) -> None:
    """Refuse a job that would wait for ever, even with the cluster to itself.

    Raises:
        SpecError: it names the job, what a worker needs, and the largest node.
    """
    for job in jobs:
        need = need_of(job)
        if _place(job, {node.name: dict(node.has) for node in nodes}) is not None:
            continue
        per_node = [_how_many(need, node.has) for node in nodes]
        largest = max(nodes, key=lambda node: [node.has.get(name, 0) for name in ("GPU", "CPU")])
        if max(per_node, default=0) == 0:
            why = "No node holds one of them"
        else:
            why = f"The nodes together hold {sum(per_node)}"
        raise SpecError(
            f"resources: job {job.key} needs {job.num_workers} workers of {tell(need)} each. "
            f"{why}; the largest of {len(nodes)} has {tell(largest.has)}"
        )


def tell(amounts: Amounts) -> str:
    """`2 CPUs, 1 GPU, 16.0 GiB`."""
    words = [f"{amounts.get(name, 0):g} {name}s" for name in ("CPU", "GPU") if amounts.get(name)]
    if amounts.get("memory"):
        words.append(f"{amounts['memory'] / 2**30:.1f} GiB of memory")
    return ", ".join(words) or "nothing"


class Queue:
    """Jobs in the order to run them, those that run, and what has become of the rest."""

    def __init__(
        self, jobs: Sequence[JobSpec], *, max_share: float = 1.0, stop_after: int | None = None
    ) -> None:
        """
        Args:
            max_share: of all CPUs, GPUs and memory, what these jobs may hold together. One job may
                always run.
            stop_after: start nothing more once so many jobs have failed.
        """
        self.waiting = list(jobs)
        self.max_share = max_share
        self.stop_after = stop_after
        self.num_failed = 0
        self._placed: dict[str, list[str]] = {}
        """Of each running job by key, the node of each worker."""
        self._running: dict[str, JobSpec] = {}
        self._overtaken: dict[str, int] = {}

    @property
    def is_over(self) -> bool:
        """Whether no further job will start."""
        return not self.waiting or self.is_stopped

    @property
    def is_stopped(self) -> bool:
        return self.stop_after is not None and self.num_failed >= self.stop_after

    def next(self, nodes: Sequence[Node], unused: Sequence[Node] | None = None) -> JobSpec | None:
        """Take the first job that may start now, and reserve its workers' places.

        Args:
            nodes: as the cluster is now. What our own running jobs hold is counted here.
            unused: what nobody holds, as far as is known. It may lag behind: a job that just
                started does not show in it, one that just ended still may. Default: not looked at.
        """
        if self.is_stopped:
            return None
        free = self._free(nodes)
        really = free if unused is None else {node.name: dict(node.has) for node in unused}
        for job in self.waiting:
            places = _place(job, free) if self._is_within_share(job, nodes) else None
            if places is not None and _place(job, really) is not None:
                self._start(job, places)
                return job
            if self._overtaken.get(job.key, 0) >= MAX_OVERTAKEN:
                return None
        return None

    def ended(self, job: JobSpec, *, failed: bool) -> None:
        """Free a job's places."""
        del self._running[job.key], self._placed[job.key]
        self.num_failed += failed

    @property
    def is_idle(self) -> bool:
        """Whether none of our jobs runs."""
        return not self._running

    def _start(self, job: JobSpec, places: list[str]) -> None:
        for passed in self.waiting[: self.waiting.index(job)]:
            self._overtaken[passed.key] = self._overtaken.get(passed.key, 0) + 1
        self.waiting.remove(job)
        self._running[job.key] = job
        self._placed[job.key] = places

    def _free(self, nodes: Sequence[Node]) -> dict[str, dict[str, float]]:
        free = {node.name: dict(node.has) for node in nodes}
        for key, places in self._placed.items():
            for name in places:
                if name in free:  # a node that is gone holds nothing
                    _take(need_of(self._running[key]), free[name])
        return free

    def _is_within_share(self, job: JobSpec, nodes: Sequence[Node]) -> bool:
        if self.max_share == 1 or self.is_idle:
            return True
        for name in ("CPU", "GPU", "memory"):
            total = sum(node.has.get(name, 0) for node in nodes)
            held = sum(
                need_of(other).get(name, 0) * other.num_workers
                for other in [*self._running.values(), job]
            )
            if held > self.max_share * total:
                return False
        return True


def _place(job: JobSpec, free: dict[str, dict[str, float]]) -> list[str] | None:
    """A node for each worker, or None if they do not fit all at once. `free` stays as it is.

    Workers of a job are alike, so filling one node after the other misses no way to place them.
    """
    need, places = need_of(job), list[str]()
    for name, has in free.items():
        places += [name] * min(_how_many(need, has), job.num_workers - len(places))
    return places if len(places) == job.num_workers else None


def _how_many(need: Amounts, has: Amounts) -> int:
    # A GPU shared by halves is 0.5 + 0.5: leave room for how floats add up
    return min(int(has.get(name, 0) / amount + 1e-6) for name, amount in need.items())


def _take(need: Amounts, has: dict[str, float]) -> None:
    for name, amount in need.items():
        has[name] = has.get(name, 0) - amount
