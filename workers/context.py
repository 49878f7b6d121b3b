"""What a stage may ask of its surroundings: who am I, where is the storage, keep this checkpoint.

A stage runs the same inline (this module's `Context`) and on Ray Train (`workers/entry.py`
subclasses it); torch.distributed is initialised whenever `world` is more than 1.
"""

import hashlib
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

from jobs.crash import crash_point
from jobs.errors import CorruptError
from jobs.storage import Storage, sha256_of
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

    def kept(self, path: str, *, otherwise: str) -> bytes | None:
        """What an earlier attempt left with `put_sealed`; None if it left nothing that is sound.

        Args:
            otherwise: what happens if it is damaged, for the warning: "the block is pruned again".
        """
        try:
            return self.storage.read_sealed(path)
        except FileNotFoundError:
            return None
        except CorruptError as error:
            self.warn(f"{error.message}; {otherwise}")
            return None

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
        files = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
        where = self._store_checkpoint(stage, step, folder)
        by_rank = self.gather(files)  # also a barrier: by now every part is there
        if self.rank == 0:
            everything = {name: sha for part in by_rank for name, sha in part.items()}
            newest = {"step": step, "path": where, "files": everything}
            pointers = [*self._pointers(stage), newest]
            self._point_to(stage, pointers[-CHECKPOINTS_KEPT:])
            crash_point("after checkpoint")
            for outdated in pointers[:-CHECKPOINTS_KEPT]:
                self.storage.remove_folder(outdated["path"])
        self.barrier()

    def latest_checkpoint(self, stage: str) -> tuple[int, Path] | None:
        """The newest sound checkpoint of a stage, as a local folder with every rank's files.

        A damaged one is dropped for the one before it. Every rank gets the same answer.
        """
        while pointers := self.from_rank_0(self._pointers(stage) if self.rank == 0 else None):
            newest = pointers[-1]
            folder = self.scratch / f"checkpoint-{stage}-{newest['step']}-{self.rank}"
            problems = [text for text in self.gather(self._fetch(newest, folder)) if text]
            if not problems:
                return int(newest["step"]), folder
            self.warn(
                f"the checkpoint of step {newest['step']} is damaged, going back: {problems[0]}"
            )
            self.drop_checkpoint(stage, newest["step"])
        return None

    def _fetch(self, pointer: dict[str, Any], folder: Path) -> str:
        """Copy a checkpoint's files to a local folder. Returns what is wrong with them, or ""."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, sha in pointer["files"].items():
            try:
                data = self.storage.read_bytes(f"{pointer['path']}/{name}")
            except FileNotFoundError:
                return f"{name} is missing"
            if hashlib.sha256(data).hexdigest() != sha:
                return f"{name} has other bytes than were written (SHA-256 differs)"
            (folder / name).write_bytes(data)
        return ""

    def drop_checkpoint(self, stage: str, step: int) -> None:
        """Forget a damaged checkpoint, so that `latest_checkpoint` gives the one before it."""
        self.barrier()
        if self.rank == 0:
            kept = [pointer for pointer in self._pointers(stage) if pointer["step"] != step]
            self._point_to(stage, kept)
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
        kept = self.kept(_pointer_path(stage), otherwise="the stage starts over")
        return [] if kept is None else list(json.loads(kept))

    def _point_to(self, stage: str, pointers: list[dict[str, Any]]) -> None:
        self.storage.put_sealed(_pointer_path(stage), json.dumps(pointers).encode())


def progress_path(job_key: str) -> str:
    return f"progress/{job_key}.json"


def _pointer_path(stage: str) -> str:
    return f"work/{stage}/LAST"


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Let torch use this many CPU threads: two processes with two each on two cores crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
