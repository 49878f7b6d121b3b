"""What can go wrong, by whose fault it is. The kind decides whether a retry makes sense: see
`orchestrator/retry.py`.

Every error takes its message as the one positional argument, so that it survives pickling on its
way out of a worker process.
"""

import errno
import re
from typing import ClassVar


class PrunefleetError(Exception):
    """An error whose message alone tells a person what to do."""

    kind: ClassVar[str] = "unknown"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SpecError(PrunefleetError):
    """The sweep asks for something that does not exist or cannot be."""

    kind = "spec"


class DataError(PrunefleetError):
    """A dataset is missing, empty or broken."""

    kind = "data"


class ModelError(PrunefleetError):
    """A model folder is missing, broken, or of a family that we do not know."""

    kind = "model"


class NumericError(PrunefleetError):
    """Numbers that cannot be continued with: NaN, infinity, a Hessian that no damping mends."""

    kind = "numeric"


class StarvedError(PrunefleetError):
    """The cluster has not given what a job needs for too long."""

    kind = "starved"


class OutOfMemoryError(PrunefleetError):
    """A GPU's memory, or the host's, was not enough. Smaller batches may be."""

    kind = "memory"


class LostError(PrunefleetError):
    """A process of ours died, and nobody says why."""

    kind = "lost"


class PreemptedError(PrunefleetError):
    """A node was taken away, with the processes on it."""

    kind = "preempted"


class StalledError(PrunefleetError):
    """No progress for too long."""

    kind = "stalled"


class StorageError(PrunefleetError):
    """The storage failed. The next attempt may see it well again."""

    kind = "storage"


class CorruptError(StorageError):
    """State that a finished or an earlier attempt left is damaged. The next one makes it anew."""

    kind = "corrupt"


_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: can't allocate|Cannot allocate memory|std::bad_alloc"
)
_DISK_IS_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_DISK_FAILS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS}


def known(error: Exception) -> PrunefleetError | None:
    """What libraries raise for a lack of memory or of disk, as an error of ours; else None.

    By name and text, since libraries share no class: torch has its own for a GPU and a bare
    RuntimeError for a CPU; safetensors wraps what the disk said.
    """
    text = f"{type(error).__name__}: {error}"
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or _OUT_OF_MEMORY.search(text):
        return OutOfMemoryError(text)
    if getattr(error, "errno", None) in _DISK_FAILS or _DISK_IS_FULL.search(text):
        return StorageError(text)
    return None
