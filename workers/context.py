"""What a stage may ask of its surroundings: who am I, where is the storage, keep this checkpoint.

A stage runs the same inline (this module's `Context`) and on Ray Train (`workers/entry.py`
subclasses it); torch.distributed is initialised whenever `world` is more than 1.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.errors import StorageError
from jobs.storage import Storage
from workers.watchdog import Watchdog

log = logging.getLogger("prunefleet")

CHECKPOINTS_KEPT = 2
"""The newest and the one before it, should the newest turn out damaged."""

PROGRESS_EVERY_S = 1.0


class Context:
    """One process of a job: rank 0 of 1 unless a subclass says otherwise."""

    def __init__(self, storage: Storage, job_key: str, scratch: Path, device: torch.device) -> None:
        self.storage = storage
        self.job_key = job_key
        self.scratch = scratch
        """Node-local folder for what need not survive."""
        self.device = device
        self.rank = 0
        self.world = 1
        self.memory_rung = 0
        """How often this attempt halves what it handles at a time: the one before ran out."""
        self.watchdog = Watchdog()
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        """Of the current stage, by what was being done."""
        self._last_progress = ("", 0.0)

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Add the block's wall time to `seconds[activity]`."""
        self.watchdog.beat(activity)
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self.seconds[activity] = self.seconds.get(activity, 0.0) + passed

    def smaller(self, amount: int) -> int:
        """How many samples or tokens to handle at a time where memory for `amount` may be short.

        Halved for each rung. It must change results by rounding at most: no key depends on it.
        """
        return max(1, amount >> self.memory_rung)

    def warn(self, text: str) -> None:
        """Tell the log and the job's row that something was adjusted on the way."""
        log.warning("%s: %s", self.job_key, text)
        self.warnings.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is. Cheap: at most one small write a second."""
        self.watchdog.beat(f"{stage} {done} of {total}")
        last_stage, last_time = self._last_progress
        now = time.monotonic()
        if self.rank or (stage == last_stage and now - last_time < PROGRESS_EVERY_S):
            return
        self._last_progress = (stage, now)
        beat = {"stage": stage, "done": done, "total": total, "time": time.time()}
        self.storage.put(progress_path(self.job_key), json.dumps(beat).encode())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value on every rank. Small and plain, it travels pickled between our workers."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def save_checkpoint(self, stage: str, step: int, folder: Path) -> None:
        """Keep `folder` as this rank's part of the checkpoint. Durable when it returns.

        Args:
            stage: the key of the stage that is being checkpointed.
            step: how far it is. Higher is newer.
            folder: this rank's files; file names of different ranks must differ.
        """
        where = self._store_checkpoint(stage, step, folder)
        self.barrier()
        if self.rank == 0:
            pointers = [*self._pointers(stage), {"step": step, "path": where}]
            self.storage.put(
                _pointer_path(stage), json.dumps(pointers[-CHECKPOINTS_KEPT:]).encode()
            )
            for outdated in pointers[:-CHECKPOINTS_KEPT]:
                self.storage.remove_folder(outdated["path"])
        self.barrier()

    def latest_checkpoint(self, stage: str) -> tuple[int, Path] | None:
        """The newest checkpoint of a stage, as a local folder with every rank's files."""
        pointers = self._pointers(stage)
        if not pointers:
            return None
        newest = pointers[-1]
        target = self.scratch / f"checkpoint-{stage}-{newest['step']}-{self.rank}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        names = self.storage.list(newest["path"])
        for name in names:
            (target / name.rsplit("/", 1)[-1]).write_bytes(self.storage.read_bytes(name))
        return int(newest["step"]), target

    def drop_checkpoint(self, stage: str, step: int) -> None:
        """Forget a damaged checkpoint, so that `latest_checkpoint` gives the one before it."""
        self.barrier()
        if self.rank == 0:
            kept = [pointer for pointer in self._pointers(stage) if pointer["step"] != step]
            self.storage.put(_pointer_path(stage), json.dumps(kept).encode())
        self.barrier()

    def forget_checkpoints(self, stage: str) -> None:
        """Delete a finished stage's checkpoints."""
        if self.rank == 0:
            for pointer in self._pointers(stage):
                self.storage.remove_folder(pointer["path"])
            self.storage.remove_folder(f"work/{stage}")

    def _store_checkpoint(self, stage: str, step: int, folder: Path) -> str:
        where = f"work/{stage}/step-{step:08d}"
        for file in sorted(folder.iterdir()):
            self.storage.put(f"{where}/{file.name}", file.read_bytes())
        return where

    def _pointers(self, stage: str) -> list[dict[str, Any]]:
        path = _pointer_path(stage)
        try:
            return list(self.storage.read_json(path)) if self.storage.exists(path) else []
        except (StorageError, ValueError):
            self.warn(f"{path} is damaged; the stage starts over")
            return []


def progress_path(job_key: str) -> str:
    return f"progress/{job_key}.json"


def _pointer_path(stage: str) -> str:
    return f"work/{stage}/LAST.json"


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Let torch use this many CPU threads: two processes with two each on two cores crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
