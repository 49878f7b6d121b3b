"""The main job as a person runs it: real Ray, the real demo model, real data, and kill -9."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageTextToText

from orchestrator.leaderboard import wide

SWEEP = """
name: end-to-end
model: demo
calibration: {dataset: easy-vqa, num_samples: 32}
grid: {method: [magnitude, sparsegpt], pattern: "1:4"}
repair:
  - none
  - {method: sparse_lora, num_steps: 20, batch_size: 24, zero_stage: 2, num_workers: 2}
exclude: [{method: magnitude, repair: sparse_lora}]
evaluate: {dataset: easy-vqa, num_items: 200, max_new_tokens: 4}
"""
KEYS_OF_A_SCORE = ["job_key", "weights", "benchmark", "metric"]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator.cli", "run", "sweep.yaml", "--storage", "here"]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


def rows_of(folder: Path) -> pd.DataFrame:
    """As somebody without prunefleet would read them."""
    return pd.read_parquet(folder / "here/leaderboard/rows")


def wait_for(what: str, happened: object, run: subprocess.Popen[str], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():  # type: ignore[operator]
        assert run.poll() is None, f"ended before {what}: {run.stdout and run.stdout.read()}"
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.2)


@pytest.mark.ray
def test_a_sweep_that_is_killed_and_run_again_has_each_result_once(tmp_path: Path) -> None:
    """Kill -9 after the first row; the second command does the rest, the third does nothing."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    rows = tmp_path / "here/leaderboard/rows"
    killed = start(tmp_path)
    wait_for("the first row", lambda: list(rows.rglob("*.parquet")), killed, limit_s=300)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    survivors = {file: file.stat().st_mtime_ns for file in rows.rglob("*.parquet")}

    resumed = start(tmp_path)
    output, _ = resumed.communicate(timeout=900)
    started = time.monotonic()
    again = start(tmp_path)
    again_output, _ = again.communicate(timeout=120)

    assert resumed.returncode == 0, output
    assert (again.returncode, time.monotonic() - started < 60) == (0, True), again_output
    assert "4 jobs, 4 complete, 0 to run" in again_output
    assert all(file.stat().st_mtime_ns == then for file, then in survivors.items())
    table = rows_of(tmp_path)
    assert not table.duplicated(KEYS_OF_A_SCORE).any()
    assert sorted(table["status"]) == ["complete"] * len(table)
    assert len(table) == 1 + 2 + 2 + 3  # dense; two pruned, each beside dense; one repaired
    _check_results(tmp_path, wide(table))


def _check_results(folder: Path, jobs: pd.DataFrame) -> None:
    dense = jobs[jobs["method"] == "dense"].iloc[0]
    magnitude = jobs[jobs["method"] == "magnitude"].iloc[0]
    plain = jobs[(jobs["method"] == "sparsegpt") & (jobs["repair"] == "none")].iloc[0]
    repaired = jobs[jobs["repair"] == "sparse_lora"].iloc[0]
    score = "easy-vqa/exact_match"
    assert dense[f"{score}/dense"] > 0.9
    assert plain[f"{score}/pruned"] > magnitude[f"{score}/pruned"]
    assert repaired[f"{score}/repaired"] > plain[f"{score}/pruned"]
    assert repaired["num_workers"] == 2
    for job in (magnitude, plain, repaired):
        assert job["sparsity_total"] == 0.75
        model = AutoModelForImageTextToText.from_pretrained(job["export"])
        block = model.model.language_model.layers[0]
        groups = block.mlp.down_proj.weight.reshape(-1, 4)
        assert torch.equal((groups == 0).sum(dim=1) >= 3, torch.ones(len(groups)).bool())
