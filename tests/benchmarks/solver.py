"""Seconds of our SparseGPT beside the published loop's, alternating in one run; of every method.

    python -m tests.benchmarks.solver [--threads N] [--repeats N] [--json FILE]
    python -m tests.benchmarks.solver --compare BEFORE.json AFTER.json

Ratios hold on a busy machine better than seconds: both sides meet the same neighbours.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from jobs.methods import (
    ADMMSpec,
    DSnoTSpec,
    MethodOptions,
    SparseGPTSpec,
    SparseSwapsSpec,
    WandaSpec,
)
from jobs.pattern import Pattern, Target
from tests.reference import sparsegpt_loop
from workers.methods import prune, prune_shared
from workers.statistics import Statistics

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
METHOD_SHAPES = ((576, 576), (1536, 576))
METHODS: dict[str, MethodOptions] = {
    "wanda": WandaSpec(),
    "wanda, pcg": WandaSpec(reconstruct="pcg"),
    "sparsegpt": SparseGPTSpec(),
    "sparsegpt, pcg": SparseGPTSpec(reconstruct="pcg"),
    "admm": ADMMSpec(),
    "admm, pcg": ADMMSpec(reconstruct="pcg"),
    "dsnot": DSnoTSpec(),
    "sparseswaps": SparseSwapsSpec(),
}
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


def against_published(repeats: int) -> dict[str, dict[str, float]]:
    results = {}
    print(f"{'layer':24}{'published s':>12}{'ours s':>10}{'ratio':>9}  middle half")
    for num_outputs, num_inputs in SHAPES:
        weight_OI, statistics = a_layer(num_outputs, num_inputs)
        for kept_of in PATTERNS:
            pattern = Pattern(*kept_of) if kept_of else Pattern()
            sides = {
                "published": partial(
                    sparsegpt_loop, weight_OI, statistics.gram_II, 4, 0.5, kept_of=kept_of
                ),
                "ours": partial(
                    prune, weight_OI, statistics, Target(0.5, pattern), SparseGPTSpec()
                ),
            }
            sides["ours"]()  # compiles, or reads what was compiled
            seconds = alternate(sides, repeats)
            ratios = [a / b for a, b in zip(seconds["published"], seconds["ours"], strict=True)]
            row = {side: median(times) for side, times in seconds.items()}
            row["ratio"] = row["published"] / row["ours"]
            row["low"], _, row["high"] = quantiles(ratios, n=4)
            results[f"{num_outputs}x{num_inputs} {pattern}"] = row
            print(
                f"{f'{num_outputs}x{num_inputs} {pattern}':24}{row['published']:12.3f}"
                f"{row['ours']:10.4f}{row['ratio']:8.1f}x  {row['low']:.1f} to {row['high']:.1f}",
                flush=True,
            )
    return results


def by_method(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every method for a layer, statistics given."""
    results = {}
    columns = [f"{o}x{i} {p}" for o, i in METHOD_SHAPES for p in (Pattern(), Pattern(2, 4))]
    print(f"\n{'ms':20}" + "".join(f"{column:>22}" for column in columns))
    layers = {shape: a_layer(*shape) for shape in METHOD_SHAPES}
    for name, options in METHODS.items():
        row = {}
        for shape, layer in layers.items():
            for pattern in (Pattern(), Pattern(2, 4)):
                run = partial(prune, *layer, Target(0.5, pattern), options)
                seconds = alternate({name: run}, repeats)[name]
                row[f"{shape[0]}x{shape[1]} {pattern}"] = 1000 * median(seconds)
        results[name] = row
        print(f"{name:20}" + "".join(f"{ms:22.1f}" for ms in row.values()), flush=True)
    return results


def sharing(repeats: int) -> dict[str, float]:
    """Nine ratios of one layer from one Hessian, beside pruning it nine times."""
    weight_OI, statistics = a_layer(*METHOD_SHAPES[0])
    targets = [Target(n / 10) for n in range(1, 10)]
    results = {}
    print()
    for name in ("sparsegpt", "admm"):
        sides: dict[str, Callable[[], object]] = {
            "shared": partial(prune_shared, [weight_OI] * 9, statistics, targets, METHODS[name]),
            "alone": partial(
                lambda options: [prune(weight_OI, statistics, t, options) for t in targets],
                METHODS[name],
            ),
        }
        seconds = {side: median(times) for side, times in alternate(sides, repeats).items()}
        results[name] = seconds["alone"] / seconds["shared"]
        print(
            f"{name}, 576x576 at nine ratios: {seconds['alone']:.3f} s one by one, "
            f"{seconds['shared']:.3f} s together, {results[name]:.1f}x"
        )
    return results


def compare(before: Path, after: Path) -> None:
    """Two runs by their ratios to the published loop, so that the machine drops out."""
    rows = [json.loads(path.read_text())["against published"] for path in (before, after)]
    for name in rows[0].keys() & rows[1].keys():
        first, second = (row[name]["ratio"] for row in rows)
        print(f"{name:24}{first:8.1f}x{second:8.1f}x  {second / first - 1:+.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args()
    if arguments.compare:
        compare(*arguments.compare)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {
        "against published": against_published(arguments.repeats),
        "by method, ms": by_method(max(arguments.repeats // 3, 1)),
        "sharing": sharing(max(arguments.repeats // 3, 1)),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
