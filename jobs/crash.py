"""Named places where a test can kill the process, to show that nothing half-done is visible."""

import os
from collections import Counter

CRASH_EXIT_CODE = 86
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """End the process here and now if PRUNEFLEET_CRASH_AT names this place: no cleanup runs.

    `before publish#3` names the third time that it is passed.
    """
    wanted, _, nth = os.environ.get("PRUNEFLEET_CRASH_AT", "").partition("#")
    if name != wanted:
        return
    _passed[name] += 1
    if _passed[name] == int(nth or 1):
        os._exit(CRASH_EXIT_CODE)
