"""What can go wrong, by whose fault it is. The class decides whether a retry makes sense.

Every error takes its message as the one positional argument, so that it survives pickling on its
way out of a worker process.
"""

from typing import ClassVar


class PrunefleetError(Exception):
    """An error whose message alone tells a person what to do."""

    kind: ClassVar[str] = "unknown"
    retryable: ClassVar[bool] = False

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


class LostError(PrunefleetError):
    """A process of ours died: killed, out of memory, or with its node."""

    kind = "lost"
    retryable = True


class StorageError(PrunefleetError):
    """The storage failed or holds something damaged. The next attempt may see it well again."""

    kind = "storage"
    retryable = True
