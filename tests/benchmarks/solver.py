"""Seconds of our SparseGPT beside the published loop's, alternating in one run.

    python -m tests.benchmarks.solver [--threads N] [--repeats N] [--json FILE]
    python -m tests.benchmarks.solver --compare BEFORE.json AFTER.json

Ratios hold on a busy machine, seconds do not: both sides meet the same neighbours.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from jobs.methods import SparseGPTSpec
from jobs.pattern import Pattern, Target
from tests.reference import sparsegpt_loop
from workers.methods import prune
from workers.statistics import Statistics

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
PATTERNS: tuple[tuple[int, int] | None, ...] = (None, (2, 4))


def a_layer(num_outputs: int, num_inputs: int) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(0)
    blend_II = (
        torch.eye(num_inputs)
        + torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    )
    statistics = Statistics.empty(num_inputs)
    statistics.update(torch.randn(2 * num_inputs, num_inputs, generator=generator) @ blend_II, 4)
    return torch.randn(num_outputs, num_inputs, generator=generator), statistics


def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(repeats: int) -> dict[str, dict[str, float]]:
    results = {}
    print(f"{'layer':24}{'published s':>12}{'ours s':>10}{'median':>9}{'fastest':>9}")
    for num_outputs, num_inputs in SHAPES:
        weight_OI, statistics = a_layer(num_outputs, num_inputs)
        for kept_of in PATTERNS:
            pattern = Pattern(*kept_of) if kept_of else Pattern()
            sides = {
                "published": lambda w=weight_OI, s=statistics, k=kept_of: sparsegpt_loop(
                    w, s.gram_II, 4, 0.5, kept_of=k
                ),
                "ours": lambda w=weight_OI, s=statistics, p=pattern: prune(
                    w, s, Target(0.5, p), SparseGPTSpec()
                ),
            }
            seconds = alternate(sides, repeats)
            name = f"{num_outputs}x{num_inputs} {pattern}"
            row = {side: median(times) for side, times in seconds.items()}
            row["ratio"] = row["published"] / row["ours"]
            row["ratio of fastest"] = min(seconds["published"]) / min(seconds["ours"])
            results[name] = row
            print(
                f"{name:24}{row['published']:12.3f}{row['ours']:10.3f}{row['ratio']:8.1f}x"
                f"{row['ratio of fastest']:8.1f}x",
                flush=True,
            )
    return results


def compare(before: Path, after: Path) -> None:
    """Two runs by their ratios to the published loop, so that the machine drops out."""
    rows = [json.loads(path.read_text()) for path in (before, after)]
    for name in rows[0].keys() & rows[1].keys():
        first, second = (row[name]["ratio"] for row in rows)
        print(f"{name:24}{first:8.1f}x{second:8.1f}x  {second / first - 1:+.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args()
    if arguments.compare:
        compare(*arguments.compare)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = measure(arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
