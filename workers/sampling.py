"""Choose samples by seed, the same ones on every machine and for any number of workers."""

import random
from collections.abc import Sequence
from typing import TypeVar

from jobs.errors import DataError

T = TypeVar("T")


def choose(samples: Sequence[T], count: int, seed: int, where: str) -> list[T]:
    """`count` different samples.

    Raises:
        DataError: there are fewer.
    """
    if count > len(samples):
        raise DataError(f"{where} has {len(samples)} samples, {count} were asked for")
    return random.Random(seed).sample(list(samples), count)
