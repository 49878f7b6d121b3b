"""What a person sees while jobs run: a live table in a terminal, plain lines when piped.

Workers write how far they are to the storage, `progress/JOB.json`; this reads it. So it works the
same for a cluster, for this process, and for somebody who looks from another terminal.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from jobs.errors import StorageError
from jobs.result import JobResult
from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator.terminal import setting, visible

REFRESH_S = 1.0
STALE_S = 600.0


class Progress:
    """Watches the jobs of one run."""

    def __init__(self, jobs: Sequence[JobSpec], storage: Storage, console: Console) -> None:
        self.jobs = {job.key: job for job in jobs}
        self.words = described(jobs)
        self.storage = storage
        self.console = console
        self.started = time.time()
        self.results: dict[str, JobResult] = {}
        self._told: dict[str, str] = {}
        self._over = threading.Event()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress while the block runs."""
        live = Live(console=self.console, get_renderable=self._table, auto_refresh=False)
        shows_live = self.console.is_terminal and bool(self.jobs)
        thread = threading.Thread(
            target=self._watch, args=(live if shows_live else None,), daemon=True
        )
        if shows_live:
            live.start()
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            if shows_live:
                live.update(self._table(), refresh=True)
                live.stop()

    def settled(self, job: JobSpec, result: JobResult) -> None:
        """Note that a job has ended, and say so."""
        self.results[job.key] = result
        with suppress(StorageError):
            self.storage.delete(f"progress/{job.key}.json")
        if result.status == "failed":
            outcome = f"failed ({result.error_kind}): {result.error}"
        elif result.status == "stopped":
            outcome = f"stopped early: {result.error}"
        else:
            scores = {(s.weights, s.benchmark): s for s in result.scores}
            last = list(scores.values())[-1]
            outcome = f"{last.benchmark} {last.metric} {last.score:.4g} ({last.weights})"
        seconds = result.facts.get("seconds_total", 0.0)
        count = f"{len(self.results)}/{len(self.jobs)}"
        self._print_line(
            f"[{count}] {self.words[job.key]}: {outcome}, {seconds:.0f} s",
            style="red" if result.status == "failed" else "",
        )

    def _print_line(self, line: str, *, style: str = "") -> None:
        """As it stands: brackets in a path are no markup, and a pipe has no width to wrap at."""
        line = visible(line)
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def _watch(self, live: Live | None) -> None:
        while not self._over.wait(REFRESH_S):
            if live is not None:
                live.update(self._table(), refresh=True)
                continue
            for key, beat in self._beats():
                stage = beat["stage"]
                if self._told.get(key) != stage:
                    self._told[key] = stage
                    job = self.words[key]
                    self._print_line(f"      {job}: {stage} {_share(beat)}")

    def _table(self) -> Table:
        elapsed = time.time() - self.started
        title = f"{len(self.results)} of {len(self.jobs)} jobs done, {elapsed:.0f} s"
        table = Table("job", "stage", "progress", title=title, title_justify="left", box=None)
        for key, beat in self._beats():
            words = (self.words[key], beat["stage"], _share(beat))
            table.add_row(*map(escape, map(visible, words)))
        return table

    def _beats(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for key in self.jobs:
            if key in self.results:
                continue
            beat = read_beat(self.storage, key)
            if beat is not None and beat["time"] > self.started - STALE_S:
                yield key, beat


def read_beat(storage: Storage, job_key: str) -> dict[str, Any] | None:
    """What a job's workers said last: `stage`, `done` of `total`, and when, `time`.

    None where they said nothing yet, or what cannot be read. A job that was killed leaves its
    last word behind: look at `time`.
    """
    try:
        beat = storage.read_json(f"progress/{job_key}.json")
        return {
            "stage": str(beat["stage"]),
            "done": int(beat["done"]),
            "total": int(beat["total"]),
            "time": float(beat["time"]),
        }
    except (StorageError, FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def describe(job: JobSpec) -> str:
    """A job in a few words: `wanda 2:4 vision+language 0.5 + sparse_lora`."""
    if job.prune is None:
        return f"{job.model.label} dense"
    sparsity = job.prune.sparsity
    amounts = {f"{value:g}" for value in sparsity.values()} or {"0"}
    where = (
        f"{'+'.join(sparsity)} {amounts.pop()}".strip()
        if len(amounts) == 1
        else " ".join(f"{tower} {value:g}" for tower, value in sparsity.items())
    )
    repair = f" + {job.repair.method}" if job.repair else ""
    allocation = "" if job.prune.allocation.name == "uniform" else f" {job.prune.allocation.name}"
    return f"{job.prune.method.name} {job.prune.pattern} {where}{allocation}{repair}"


def described(jobs: Sequence[JobSpec]) -> dict[str, str]:
    """Each job in a few words, by its key: of those that would read alike also what differs.

    A setting that most of them share goes unsaid: `wanda 1:4 vision 0.75 + spp num_steps 80`.
    """
    alike: dict[str, list[JobSpec]] = {}
    for job in jobs:
        alike.setdefault(describe(job), []).append(job)
    words: dict[str, str] = {}
    for text, group in alike.items():
        settings = [dict(_settings(job)) for job in group]
        names = {name: None for each in settings for name in each}
        counts = {name: Counter(each.get(name) for each in settings) for name in names}
        for job, its in zip(group, settings, strict=True):
            variants = [
                its[name]
                for name, count in counts.items()
                if name in its and len(count) > 1 and 2 * count[its[name]] <= len(group)
            ]
            words[job.key] = " ".join([text, *variants])
    return words


def _settings(job: JobSpec) -> Iterator[tuple[str, str]]:
    """Each setting by its path, as text."""
    sections = job.model_dump(mode="json", exclude={"policy"})
    prune = sections.pop("prune") or {}
    sections |= {name: prune.pop(name, None) for name in ("method", "allocation")}
    for section, options in {**sections, "prune": prune}.items():
        if not isinstance(options, dict):
            options = {section: options}
        for name, value in options.items():
            yield f"{section}.{name}", setting(name, value)


def _share(beat: dict[str, Any]) -> str:
    return f"{beat['done']}/{beat['total']}"
