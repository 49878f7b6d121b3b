"""Notice that a worker stands still, say where, and end it: a hang would hold its node for ever.

What counts is progress (a sample, a block, a step finished), not being alive: a process that waits
in a collective for a neighbour that will never come is alive.
"""

import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.errors import StalledError

log = logging.getLogger("prunefleet")

FRAMES_TOLD = 5
POLLS = 20
"""How often one looks within the time that is allowed."""


class Watchdog:
    """Watches the thread that calls `watching`. Without that, beats go unheard."""

    def __init__(self) -> None:
        self._beat = ("", 0)

    def beat(self, what: str) -> None:
        """Note that there was progress."""
        self._beat = (what, self._beat[1] + 1)

    @contextmanager
    def watching(self, limit_s: float, end: Callable[[str], None]) -> Iterator[None]:
        """While the block runs, call `end` with a diagnosis once no beat came for `limit_s`.

        Before the first beat nothing is due: fetching a model may take hours.

        Args:
            end: called once, from another thread. It must see to it that the block ends.
        """
        over = threading.Event()
        watched = threading.get_ident()
        thread = threading.Thread(
            target=self._watch, args=(limit_s, end, over, watched), name="watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(
        self, limit_s: float, end: Callable[[str], None], over: threading.Event, watched: int
    ) -> None:
        poll_s = limit_s / POLLS
        seen, silent_s = ("", 0), 0.0
        looked = time.monotonic()
        while not over.wait(poll_s):
            now = time.monotonic()
            silent_s += min(now - looked, 2 * poll_s)  # a process that was paused is not at fault
            looked = now
            if self._beat != seen or self._beat[1] == 0:
                seen, silent_s = self._beat, 0.0
            elif silent_s >= limit_s:
                end(
                    f"no progress for {silent_s / 60:.3g} min since {seen[0]}. "
                    f"The worker stood at {_stack(watched)}. If it only needs longer, raise "
                    "resources.stalled_after_minutes"
                )
                return


def _stack(thread: int) -> str:
    """Where a thread is, innermost call first."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame)[-FRAMES_TOLD:] if frame else []
    return " < ".join(f"{f.name} ({f.filename}:{f.lineno})" for f in reversed(frames))


@contextmanager
def raised_here() -> Iterator[Callable[[str], None]]:
    """An `end` for `watching` that raises StalledError in this thread.

    Only in the main one: elsewhere Python handles no signals, and a hang is only logged. A signal
    gets it out of system calls and Python loops. A call into C that neither returns nor heeds
    signals stays: such a hang only the death of the process ends.
    """
    told: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        raise StalledError(told[0])

    def end(diagnosis: str) -> None:
        told.append(diagnosis)
        signal.pthread_kill(main, signal.SIGALRM)

    if threading.current_thread() is not threading.main_thread():
        yield log.error
        return
    main = threading.get_ident()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield end
    finally:
        signal.signal(signal.SIGALRM, before)
