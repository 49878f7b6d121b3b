"""Kill -9 inside of a real Ray run: the run itself goes on, and leaves nothing behind."""

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
