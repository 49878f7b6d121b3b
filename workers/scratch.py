"""A node-local folder for one attempt, which is cleared away also after a kill."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "prunefleet-job-"
"""Of nothing else: what bears it and is not locked counts as left by a kill."""
YOUNG_S = 60.0
"""A folder this young may not be locked yet."""


@contextmanager
def scratch_folder(job_key: str) -> Iterator[Path]:
    """An empty folder that is gone afterwards. Whoever is killed first leaves it to the next."""
    _clear_orphans()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{job_key}-") as folder:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(lock)


def _clear_orphans() -> None:
    """Delete the folders that no living process has locked. Pruned models lie there, gigabytes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, locked, or gone by now
            if time.time() - folder.stat().st_mtime < YOUNG_S:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
