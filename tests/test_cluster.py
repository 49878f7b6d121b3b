"""A cluster as it is in the world: a head, two nodes, a token, the Jobs API; and a node that dies.

The nodes are processes of this machine on loopback, started as a person would start them.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tests.families import make_tiny

SWEEP = """
name: cluster
model: {model}
calibration: {{dataset: easy-vqa, num_samples: 8}}
grid: {{method: [magnitude, wanda], pattern: "2:4"}}
evaluate: {{dataset: easy-vqa, num_items: 64, max_new_tokens: 2}}
"""
FAMILY = "llava-clip"
KEYS_OF_A_SCORE = ["job_key", "weights", "benchmark", "metric"]


class Nodes:
    """A head without CPUs, and nodes of one CPU each. All of it ends with `stop`."""

    def __init__(self) -> None:
        self.temp_dir = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp"))  # sockets: short paths
        self.port, self.dashboard = _free_port(), _free_port()
        inherited = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.getcwd(),
            "HOME": str(self.temp_dir),
            "RAY_TMPDIR": str(self.temp_dir),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_worker_niceness": "0",  # a busy machine: get on, and wait for long
            "RAY_raylet_start_wait_time_s": "400",
        }
        self.started: list[psutil.Popen] = []
        self.left_behind: list[psutil.Process] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start_head(self) -> None:
        head = self._start(
            *("--head", "--num-cpus=0", f"--port={self.port}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"),
            f"--ray-client-server-port={_free_port()}",
        )
        self._wait_until_up(head)

    def add_node(self) -> psutil.Popen:
        """One at a time: two that start together on one machine take the same names of sockets."""
        node = self._start("--num-cpus=1", f"--address=127.0.0.1:{self.port}")
        self._wait_until_up(node)
        return node

    def _start(self, *arguments: str) -> psutil.Popen:
        command = ["ray", "start", "--block", "--node-ip-address=127.0.0.1", *arguments]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={_free_port()}"]
        with self._log(len(self.started)).open("w") as log:
            process = psutil.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def _log(self, number: int) -> Path:
        return self.temp_dir / f"start-{number}.log"

    def _wait_until_up(self, node: psutil.Popen) -> None:
        log = self._log(self.started.index(node))

        def is_up() -> bool:
            assert node.poll() is None, log.read_text()
            return "block forever" in log.read_text()

        wait_for("a node to start", is_up, limit_s=400)

    def kill_node(self, node: psutil.Popen) -> None:
        """Kill -9 of its raylet. What ran on it is on its own, and is to end by itself."""
        self.left_behind = node.children(recursive=True)
        raylet = next(process for process in self.left_behind if process.name() == "raylet")
        raylet.send_signal(signal.SIGKILL)

    def prunefleet(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def answer(self, *arguments: object) -> tuple[int, str]:
        """Exit code and what was said."""
        process = self.prunefleet(*arguments)
        said, _ = process.communicate(timeout=600)
        return process.returncode, said

    def stop(self) -> None:
        ours = [process for process in self.left_behind if process.is_running()]
        for node in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                ours += [*node.children(recursive=True), node]
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ours, timeout=20)
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def wait_for(what: str, happened: Callable[[], Any], limit_s: float) -> Any:
    deadline = time.monotonic() + limit_s
    while not (seen := happened()):
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.2)
    return seen


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.stop()


def has_a_train_worker(node: psutil.Popen) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("RayTrainWorker" in " ".join(p.cmdline()) for p in node.children(recursive=True))
    return False


@pytest.mark.ray
def test_a_submitted_sweep_survives_the_loss_of_a_node(nodes: Nodes, tmp_path: Path) -> None:
    """Each result is there once; a second submit finds it done; and the doctor sees one node less.

    The node that dies runs a job, which starts again on the other one.
    """
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(model=make_tiny(FAMILY, tmp_path / "tiny")))
    runs = tmp_path / "runs"
    submit = ("submit", tmp_path / "sweep.yaml", "--address", nodes.address, "--storage", runs)
    workers = [nodes.add_node(), nodes.add_node()]

    submitting = nodes.prunefleet(*submit)
    wait_for("a first sign of life", lambda: list(runs.glob("progress/*")), limit_s=600)
    victim = next(node for node in workers if has_a_train_worker(node))
    nodes.kill_node(victim)
    said, _ = submitting.communicate(timeout=900)
    again = nodes.answer(*submit)
    doctor = nodes.answer("doctor", "--address", nodes.address, "--storage", runs, "--json")

    assert submitting.returncode == 0, said
    table = pd.read_parquet(runs / "leaderboard/rows")
    assert not table.duplicated(KEYS_OF_A_SCORE).any()
    assert sorted(table["status"]) == ["complete"] * 5  # dense; two pruned, each beside dense
    assert again[0] == 0, again[1]
    assert "3 jobs, all complete: nothing to submit" in again[1]
    assert not any(process.is_running() for process in nodes.left_behind)
    token = nodes.environment["RAY_AUTH_TOKEN"]
    assert token not in said
    assert not [f for f in runs.rglob("*") if f.is_file() and token.encode() in f.read_bytes()]
    findings = {finding["check"]: finding for finding in json.loads(doctor[1])}
    assert findings["nodes"]["what"] == "2 alive, all answer"
    checks = ("nodes", "token", "versions", "shared storage", "storage", "placement groups")
    assert {name: findings[name]["level"] for name in checks} == dict.fromkeys(checks, "ok")
