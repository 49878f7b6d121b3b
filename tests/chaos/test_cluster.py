"""Kill -9 inside of a real Ray run: the run itself goes on, and leaves nothing behind."""

import time
from pathlib import Path

import pytest

from tests.chaos.cluster import cluster, command
from tests.chaos.world import World


@pytest.mark.ray
def test_a_run_survives_the_loss_of_each_of_its_processes(tmp_path: Path) -> None:
    """Nobody runs the command again: the same run retries, and frees what the dead ones held."""
    world = World.make(tmp_path / "world")

    with cluster() as one:
        run = command(world, "killed", one)
        for what in ("train worker", "trial actor", "train controller"):
            assert one.kill(what, while_alive=run), world.log.read_text()[-3000:]
        code = run.wait(timeout=900)
        held = one.wait_until_free()

    assert code == 0, world.log.read_text()[-3000:]
    assert held == []
    assert world.differences("killed") == []


@pytest.mark.ray
def test_a_run_whose_node_dies_says_so_and_ends(tmp_path: Path) -> None:
    """Ray tells it nothing: it would wait for ever for room on a cluster that has no node."""
    world = World.make(tmp_path / "world")

    with cluster() as one:
        run = command(world, "killed", one)
        while not one.processes("trial actor"):
            assert run.poll() is None, world.log.read_text()[-3000:]
            time.sleep(0.1)
        assert one.kill("raylet/raylet", while_alive=run)
        code = run.wait(timeout=300)

    assert code == 3
    assert "connected to is dead" in world.log.read_text()
