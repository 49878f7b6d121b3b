"""Stages are content-keyed and computed once: by whoever comes first, for every job of every grid.

A stage's output is a folder in the storage, `stages/NAME/KEY`, published whole. Of several
processes that want the same stage one works and the others wait for it (`_Claim`). That only saves
time: publishing is exclusive, so two workers at once would do no harm.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.crash import crash_point
from jobs.errors import CorruptError, StorageError
from jobs.storage import Storage
from workers.context import Context
from workers.keys import stage_path

BEAT_EVERY_S = 3.0
CLAIM_IS_DEAD_AFTER_S = 30.0
"""Without a beat. Judged by the waiter's own clock, so that clocks need not agree."""


@dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    key: str
    folder: Path
    """Its output, on this machine. Not to be written to."""
    info: dict[str, Any]
    """What `build` returned."""
    seconds: dict[str, float]
    """What building it took, now or when it was built: "total", and parts such as "load"."""
    cached: bool
    """It was there already, or another job built it while this one waited."""
    path: str
    """Its output, in the storage."""


def run_stage(ctx: Context, name: str, key: str, build: Callable[[Path], dict[str, Any]]) -> Stage:
    """Give back a stage's output, building it if nobody has.

    Args:
        build: writes the output into the folder it is given and returns facts about it (a JSON
            mapping). Called on every rank, each with a folder of its own; rank 0's is published.
    """
    path = stage_path(name, key)
    claim = _Claim(ctx.storage, f"claims/{name}-{key}.json")
    is_ours = ctx.from_rank_0(_claim_or_wait(ctx, claim, path) if ctx.rank == 0 else None)
    with contextlib.ExitStack() as cleanup:
        if is_ours:
            if ctx.rank == 0:
                cleanup.enter_context(claim.held())
            _build_and_publish(ctx, name, key, path, build)
        ctx.barrier()
    marker = ctx.storage.read_marker(path)
    if marker is None:
        raise StorageError(f"{path} was published and is gone. Is something else deleting files?")
    return Stage(
        name=name,
        key=key,
        folder=ctx.storage.fetch_folder(path, ctx.scratch / "fetched"),
        info=marker["info"],
        seconds=marker["seconds"],
        cached=not is_ours,
        path=path,
    )


def _claim_or_wait(ctx: Context, claim: "_Claim", path: str) -> bool:
    """True when we have claimed the stage, False once its output is there."""
    while True:
        if _is_sound(ctx, path):
            return False
        if claim.acquire():
            return True
        ctx.progress(f"waiting for {path}", 0, 1)
        time.sleep(0.5)


def _is_sound(ctx: Context, path: str) -> bool:
    if not ctx.storage.is_published(path):
        return False
    try:
        ctx.storage.fetch_folder(path, ctx.scratch / "fetched", verify=True)
    except CorruptError as error:
        ctx.warn(f"{error.message}; it is computed again")
        ctx.storage.remove_folder(path)
        return False
    return True


def _build_and_publish(
    ctx: Context, name: str, key: str, path: str, build: Callable[[Path], dict[str, Any]]
) -> None:
    folder = ctx.scratch / f"{name}-{key}-{ctx.rank}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ctx.seconds = {}
    with ctx.timed("total"):
        info = build(folder)
    crash_point(f"after building {name}")
    if ctx.rank == 0:
        ctx.storage.publish_folder(
            folder, path, {"stage": name, "key": key, "seconds": ctx.seconds, "info": info}
        )
        crash_point(f"after publishing {name}")
    ctx.forget_checkpoints(key)
    shutil.rmtree(folder, ignore_errors=True)


class _Claim:
    """A file that says who is building a stage, rewritten every few seconds while it does."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path
        self._seen: tuple[Any, float] = (None, 0.0)

    def acquire(self) -> bool:
        """Try to become the one; takes over a claim whose owner has died."""
        if self.storage.put_if_absent(self.path, self._content()):
            return True
        try:
            theirs = self.storage.read_json(self.path)
        except (StorageError, FileNotFoundError):
            theirs = None
        beat = theirs.get("beat") if isinstance(theirs, dict) else None
        if beat != self._seen[0]:
            self._seen = (beat, time.monotonic())
        silent_s = time.monotonic() - self._seen[1]
        if _owner_is_gone(theirs) or silent_s > CLAIM_IS_DEAD_AFTER_S:
            self.storage.delete(self.path)
        return False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Beat while the block runs, then give the claim up."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_EVERY_S):
                with contextlib.suppress(StorageError):
                    self.storage.put(self.path, self._content())

        thread = threading.Thread(target=beat, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.storage.delete(self.path)

    def _content(self) -> bytes:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "beat": uuid.uuid4().hex}
        return json.dumps(owner).encode()


def _owner_is_gone(owner: Any) -> bool:
    """Whether the claim's owner ran on this host and runs no more."""
    if not isinstance(owner, dict) or owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, PermissionError):
        return False
    return False
