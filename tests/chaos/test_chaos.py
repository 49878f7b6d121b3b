"""Faults of every kind, a few of each; `tests/chaos/soak.py` has hundreds.

After each: the sweep run once more in peace has one result per job, equal to the last bit to the
undisturbed run's, and no finished stage was computed twice on the way.
"""

import random
import shutil
import subprocess
import sys

import pytest

from tests.chaos.child import Trouble
from tests.chaos.soak import Round
from tests.chaos.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world") / "pruned")


def test_a_kill_at_every_crash_point_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each run gets past where the one before it died, and dies a little later."""
    world = World.make(tmp_path_factory.mktemp("world") / "repaired", repairs=True)
    one = Round(world, "killed", random.Random(0))
    points = [
        "after temporary write#2",
        "before publish",
        "after publishing evaluate",
        "between failure and result",
        "prune-vision-0",
        "after building prune",
        "prune-language-0",
        "after checkpoint",
        "after checkpoint",
        "after building repair",
        "after publishing repair",
    ]

    codes = []
    for point in points:
        codes.append(world.run("killed", Trouble(crash_at=point)))
        one.look_for_recomputed_stages(point)
    one.finish()

    assert codes == [86] * len(points)
    assert one.problems == []


@pytest.mark.parametrize(
    "fault",
    [Round.failing_storage, Round.commands_at_once, Round.clock_jumps, Round.kill_any_moment],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_costs_no_result_and_doubles_none(fault, world: World) -> None:  # type: ignore[no-untyped-def]
    one = Round(world, fault.__name__, random.Random(4))

    was_injected = fault(one)
    one.finish()

    assert was_injected
    assert one.problems == []


def test_damaged_files_are_noticed_wherever_they_are(world: World) -> None:
    """Truncated, emptied, garbage or one bit flipped; rows too, which are then measured again."""
    one = Round(world, "damaged", random.Random(7))
    assert world.run("damaged") == 0

    for _ in range(3):
        one.damaged_files()
    one.kill_while_compacting()
    one.finish()

    assert one.problems == []


def test_a_full_disk_ends_the_run_and_costs_nothing_that_was_done(world: World) -> None:
    """A real one, of 600 kB: the first stage fits. The reason is said; with room the rest runs."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare(1) to mount a small disk with")
    program = [sys.executable, "-m", "tests.chaos.full_disk", str(world.folder)]
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
    if probe.returncode:
        pytest.skip("this machine lets nobody mount a small disk")

    ran = subprocess.run(["unshare", "-rm", *program], capture_output=True, text=True, check=False)

    assert ran.stdout.splitlines()[-1:] == ["3 True 0 []"], ran.stderr[-2000:]
