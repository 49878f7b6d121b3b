"""How long 5,000 results take: `python -m tests.benchmarks.leaderboard [RESULTS]`."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pandas as pd

from jobs.result import JobResult, Score
from jobs.storage import Storage
from orchestrator import leaderboard

JOB = json.dumps({"model": {"name": "demo"}, "settings": ["wanda", 0.5] * 80})
STAGES = json.dumps([{"key": "0123456789abcdef", "seconds": 1.5, "cached": False}] * 8)


def result(i: int) -> JobResult:
    """A repaired job on two benchmarks: six rows."""
    scores = tuple(
        Score(weights, benchmark, "exact_match", i % 100 / 100, None, None, 1000)
        for weights in ("dense", "pruned", "repaired")
        for benchmark in ("easy-vqa", "python-docs")
    )
    return JobResult(f"{i * 2654435761 % 2**64:016x}", "complete", scores)


def publish_all(storage: Storage, num_results: int) -> None:
    for i in range(num_results):
        facts = {"sweep": "grid", "model": "demo", "seed": i, "job": JOB, "stages": STAGES}
        leaderboard.publish(storage, facts, result(i))


def timed(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    outcome = function(*arguments)
    print(f"{what:32} {time.perf_counter() - started:8.2f} s")
    return outcome


def main(num_results: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        timed(f"publish {num_results} results", publish_all, storage, num_results)
        timed("published_keys", leaderboard.published_keys, storage)
        plain = timed("plain pandas", pd.read_parquet, f"{folder}/{leaderboard.ROWS}")
        timed("load, not compacted", leaderboard.load, storage)
        timed("compact", leaderboard.compact, storage)
        frame = timed("load, compacted", leaderboard.load, storage)
        timed("wide", leaderboard.wide, frame)
        assert len(frame) == len(plain) == 6 * num_results


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
