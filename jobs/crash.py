"""Named places where a test can kill the process, to show that nothing half-done is visible."""

import os

CRASH_EXIT_CODE = 86


def crash_point(name: str) -> None:
    """End the process here and now if PRUNEFLEET_CRASH_AT names this place: no cleanup runs."""
    if os.environ.get("PRUNEFLEET_CRASH_AT") == name:
        os._exit(CRASH_EXIT_CODE)
