"""A real Ray cluster of this test's own, whose processes can be killed by what they are.

The cluster belongs to a process beside us, so that it outlives the commands that use it, and can
say afterwards what is left in it.
"""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.world import World

HOST = """
import json, sys
import ray
from ray.util import placement_group_table

context = ray.init(num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1",
                   _node_ip_address="127.0.0.1", logging_level="ERROR", log_to_driver=False)
print(json.dumps(context.address_info["gcs_address"]), flush=True)
for line in sys.stdin:
    groups = [group["state"] for group in placement_group_table().values()]
    print(json.dumps([state for state in groups if state != "REMOVED"]), flush=True)
"""
TITLES = {
    "train worker": "ray::RayTrainWorker",
    "trial actor": "ray::ImplicitFunc",
    "train controller": "ray::TrainController",
}
"""How Ray names its processes."""
PATIENCE = {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}
"""For a machine that has more to do than us."""
ENDED_WITHIN_S = 180.0
"""Ray's own processes when a driver that had started them is killed: they look now and then."""
FREED_WITHIN_S = 60.0
"""A placement group whose owner was killed: a process of Ray's polls for that."""


class Cluster:
    """Two CPUs of this machine."""

    def __init__(self) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**os.environ, **token, **PATIENCE, "PYTHONPATH": os.getcwd()}
        self.host = subprocess.Popen(
            [sys.executable, "-c", HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self.address = str(self._told())

    def _told(self) -> Any:
        assert self.host.stdout
        return json.loads(self.host.stdout.readline())

    def placement_groups(self) -> list[str]:
        """States of those that still hold something."""
        assert self.host.stdin
        self.host.stdin.write("\n")
        self.host.stdin.flush()
        return list(self._told())

    def processes(self, what: str) -> list[psutil.Process]:
        """Those of a kind in `TITLES`, or of the name of a program."""
        found = []
        for process in psutil.Process(self.host.pid).children(recursive=True):
            try:
                words = " ".join(process.cmdline()) or process.name()
            except psutil.Error:
                continue
            if TITLES.get(what, what) in words:
                found.append(process)
        return found

    def kill(
        self, what: str, *, while_alive: "subprocess.Popen[bytes]", within_s: float = 600.0
    ) -> bool:
        """Wait for a process of this kind, as long as the command runs, and kill -9 it."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and while_alive.poll() is None:
            for process in self.processes(what):
                process.send_signal(signal.SIGKILL)
                return True
            time.sleep(0.05)
        return False

    def wait_until_free(self) -> list[str]:
        """The placement groups that are still held after a while: none, if all is well."""
        deadline = time.monotonic() + FREED_WITHIN_S
        while (held := self.placement_groups()) and time.monotonic() < deadline:
            time.sleep(1)
        return held


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is gone afterwards, to the last process."""
    one = Cluster()
    everything = psutil.Process(one.host.pid).children(recursive=True)
    try:
        yield one
    finally:
        everything += psutil.Process(one.host.pid).children(recursive=True)
        assert one.host.stdin
        one.host.stdin.close()
        one.host.wait(timeout=60)
        for process in psutil.wait_procs(everything, timeout=20)[1]:
            process.kill()


def command(world: World, storage: str, on: Cluster | None = None) -> subprocess.Popen[bytes]:
    """`prunefleet run` in a process of its own: on a cluster, or with one of its own."""
    where = ["--address", on.address] if on else []
    sweep, place = str(world.folder / "sweep.yaml"), str(world.folder / storage)
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", sweep, "--storage", place, *where],
        stdout=world.log.open("ab"),
        stderr=subprocess.STDOUT,
        env=on.environment if on else {**os.environ, "PYTHONPATH": os.getcwd()},
    )


def soak_ray(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Ten kills in two rounds: of every kind of process of a run, then of drivers and a raylet."""
    world = World.make(folder / "ray")
    injected, survived = Counter[str](), Counter[str]()
    for number, play in enumerate((_kill_inside, _kill_outside)):
        storage = f"round-{number}"
        found = play(world, storage, random.Random(number))
        with cluster() as one:
            code = command(world, storage, one).wait(timeout=1800)
            held = one.wait_until_free()
        problems = [f"the run in peace ended with {code}"] if code else []
        problems += [f"placement groups still held: {held}"] if held else []
        problems += world.differences(storage)
        for problem in problems:
            print(f"round {number}: {problem}\n{world.log.read_text()[-3000:]}", flush=True)
        injected += found
        survived += Counter() if problems else found
        print(f"{injected.total()} faults, {survived.total()} survived", flush=True)
    return injected, survived


def _kill_inside(world: World, storage: str, dice: random.Random) -> Counter[str]:
    """A run on a cluster loses a worker, a trial actor, a controller, and again, and goes on."""
    found = Counter[str]()
    with cluster() as one:
        run = command(world, storage, one)
        for what in [*TITLES, *TITLES]:
            time.sleep(dice.uniform(0, 5))
            if one.kill(what, while_alive=run, within_s=120):
                found[f"kill {what}"] += 1
        run.wait(timeout=1800)
    return found


def _kill_outside(world: World, storage: str, dice: random.Random) -> Counter[str]:
    """Drivers with a Ray of their own die, then the raylet under a run on a cluster."""
    found = Counter[str]()
    for _ in range(3):
        run = command(world, storage)
        time.sleep(dice.uniform(20, 60))
        family = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        run.wait()
        found["kill driver"] += 1
        left = psutil.wait_procs(family, timeout=ENDED_WITHIN_S)[1]
        assert not left, f"a killed driver left processes behind: {left}"
    with cluster() as one:
        run = command(world, storage, one)
        time.sleep(dice.uniform(20, 40))
        found["kill raylet"] += one.kill("raylet/raylet", while_alive=run, within_s=10)
        run.wait(timeout=300)
    return found
