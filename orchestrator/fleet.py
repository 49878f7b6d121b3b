"""Runs that share a cluster and a storage, and who goes first: signs of life in `fleet/`.

Ray has no priorities. So a run starts no further job while another of a higher priority has jobs
that wait; what runs is left alone. Runs with different storages do not see each other.
"""

import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jobs.errors import StorageError
from jobs.spec import content_key
from jobs.storage import Storage

BEAT_EVERY_S = 5.0
GONE_AFTER_S = 30.0
"""Without a new beat, by the clock of the one who looks: clocks need not agree."""


class Fleet:
    """One run among the others on its cluster."""

    def __init__(
        self,
        storage: Storage,
        cluster: str,
        priority: int,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            cluster: any name that all its runs use, such as its address.
            now: seconds, from any start.
        """
        self.storage = storage
        self.priority = priority
        self.now = now
        self.folder = f"fleet/{content_key(cluster)}"
        self.path = f"{self.folder}/{uuid.uuid4().hex}.json"
        self._looked = -BEAT_EVERY_S
        self._gives_way = False
        self._seen: dict[str, tuple[str, float]] = {}

    def gives_way(self, num_waiting: int) -> bool:
        """Tell the others how many jobs of ours wait; whether one that goes first has some too."""
        if self.now() - self._looked >= BEAT_EVERY_S:
            self._looked = self.now()
            beat = {"priority": self.priority, "waiting": num_waiting, "beat": uuid.uuid4().hex}
            with suppress(StorageError):  # no reason to end a run
                self.storage.put(self.path, json.dumps(beat).encode())
                others = [path for path in self.storage.list(self.folder) if path != self.path]
                self._gives_way = any([self._goes_first(path) for path in others])
        return self._gives_way

    def leave(self) -> None:
        with suppress(StorageError):
            self.storage.delete(self.path)

    def _goes_first(self, path: str) -> bool:
        """Every other run is looked at every time: a beat is new or not since the last look."""
        try:
            other: Any = self.storage.read_json(path)
            beat, first = str(other["beat"]), other["waiting"] and other["priority"] > self.priority
        except (FileNotFoundError, StorageError, KeyError, TypeError):
            return False
        if self._seen.get(path, ("", 0.0))[0] != beat:
            self._seen[path] = (beat, self.now())
        is_alive = self.now() - self._seen[path][1] < GONE_AFTER_S
        return bool(is_alive and first)
