"""CPU seconds of calibrating and pruning a model, by part, beside the reference scheme.

    python -m tests.benchmarks.calibrate [MODEL] [--samples N] [--length N] [--threads N]
        [--method NAME] [--sparsity S] [--dtype float32|bfloat16] [--repeats N]

MODEL is a folder, or `demo`. The reference sums one Gram matrix per linear, runs each block twice
(true-sequentially: once for every tap, and once more to move on) and walks SparseGPT's columns one
by one, as the published code does; here it gets our batches. Sides alternate in one run; the
medians are shown. `solve` includes keeping each finished block for a resume.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from pydantic import TypeAdapter
from torch import Tensor

from jobs.methods import MethodSpec
from jobs.spec import CalibrationSpec, DatasetSpec, ModelSpec, PruneSpec
from jobs.storage import Storage
from tests.reference import sparsegpt_loop
from workers.calibrate import TowerWalk, calibration_batches
from workers.context import Context
from workers.locate import locate
from workers.models import Layer, VisionLanguageModel, load_model
from workers.prune import (
    collect_dense_statistics,
    prune_from_statistics,
    prune_sequentially,
)

PARTS = ("forward", "gram", "solve", "total")


class Clock(Context):
    """On a CPU it counts this process's CPU time, so that neighbours do not show."""

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[activity] = self.seconds.get(activity, 0.0) + self.now() - started

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Study:
    """What every side is given anew: the dense model and its calibration data."""

    folder: Path
    dtype: torch.dtype
    samples: int
    length: int
    scratch: Path

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.runs = 0

    def start(self) -> tuple[VisionLanguageModel, list[dict[str, Tensor]], Clock]:
        """A model, its batches, and a context with an empty storage."""
        self.runs += 1
        place = self.scratch / str(self.runs)
        ctx = Clock(Storage(str(place / "storage")), "benchmark", place, self.device)
        model = load_model(self.folder, device=self.device, dtype=self.dtype)
        return model, calibration_batches(model, self.calibration(model), 0, ctx), ctx

    def calibration(self, model: VisionLanguageModel, propagate: str = "pruned") -> CalibrationSpec:
        dataset = DatasetSpec(format="easy-vqa" if "vision" in model.towers else "python-docs")
        return CalibrationSpec.model_validate(
            {
                "dataset": dataset,
                "num_samples": self.samples,
                "sequence_length": self.length,
                "propagate": propagate,
            }
        )


def prune_spec(model: VisionLanguageModel, method: str, sparsity: float) -> PruneSpec:
    options = TypeAdapter(MethodSpec).validate_python({"name": method})
    return PruneSpec(method=options, sparsity=dict.fromkeys(model.towers, sparsity))


def ours(study: Study, propagate: str, method: str, sparsity: float) -> dict[str, float]:
    model, batches, ctx = study.start()
    calibration = study.calibration(model, propagate)
    spec = prune_spec(model, method, sparsity)
    ctx.seconds = {}
    with ctx.timed("total"):
        if propagate == "dense":
            folder = study.scratch / f"statistics-{study.runs}"
            folder.mkdir()
            collect_dense_statistics(model, calibration, batches, ctx, folder)
            prune_from_statistics(model, spec, calibration, folder, ctx)
        else:
            prune_sequentially(model, spec, calibration, batches, ctx, key="k")
    return split(ctx.seconds)


def reference(study: Study, propagate: str, method: str, sparsity: float) -> dict[str, float]:
    """The published scheme for SparseGPT, unstructured."""
    model, batches, ctx = study.start()
    calibration = study.calibration(model)
    ctx.seconds = {}
    with ctx.timed("total"):
        for tower in model.towers:
            walk = TowerWalk(model, tower, batches, calibration, ctx)
            for _ in walk.blocks:
                groups = [tuple(walk.layers)]
                if propagate == "true_sequential":
                    groups = walk._order_of_taps()
                for names in groups:
                    with ctx.timed("calibrate"):
                        grams = gram_per_linear(walk, [walk.layers[name] for name in names], ctx)
                    for name, gram_II in grams.items():
                        linear = walk.layers[name].linear
                        weight_OI = linear.weight.data.float()
                        pruned_OI, *_ = sparsegpt_loop(weight_OI, gram_II, study.samples, sparsity)
                        linear.weight.data = pruned_OI.to(linear.weight)
                walk.advance()
    return split(ctx.seconds)


@torch.no_grad()
def gram_per_linear(walk: TowerWalk, layers: list[Layer], ctx: Context) -> dict[str, Tensor]:
    """Run the block; a Gram for each linear, whether or not another reads the same input."""
    grams: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        with ctx.timed("gram"):
            x = tensor.reshape(-1, tensor.shape[-1]).float()
            grams[name] = grams.get(name, 0) + x.T @ x

    handles = [
        layer.linear.register_forward_pre_hook(lambda _, args, name=layer.name: add(name, args[0]))
        for layer in layers
    ]
    for batch in walk.batches:
        walk._run(batch)
    for handle in handles:
        handle.remove()
    return grams


def split(seconds: dict[str, float]) -> dict[str, float]:
    return {
        "forward": seconds["calibrate"] - seconds["gram"],
        "gram": seconds["gram"],
        "solve": seconds["total"] - seconds["calibrate"],
        "total": seconds["total"],
    }


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="of a window of text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


@contextmanager
def study_of(arguments: argparse.Namespace) -> Iterator[Study]:
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        yield Study(
            folder=locate(ModelSpec(name=arguments.model)),
            dtype=getattr(torch, arguments.dtype),
            samples=arguments.samples,
            length=arguments.length,
            scratch=Path(scratch),
        )


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    sides: dict[str, tuple[Callable[..., dict[str, float]], str]] = {
        "ours, pruned": (ours, "pruned"),
        "ours, true_sequential": (ours, "true_sequential"),
        "ours, dense": (ours, "dense"),
    }
    if arguments.method == "sparsegpt":
        sides["reference, pruned"] = (reference, "pruned")
        sides["reference, true_sequential"] = (reference, "true_sequential")
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with study_of(arguments) as study:
        for _ in range(arguments.repeats):
            for name, (side, propagate) in sides.items():
                seconds = side(study, propagate, arguments.method, arguments.sparsity)
                taken[name].append(seconds)
    print(f"{'CPU seconds':28}" + "".join(f"{part:>10}" for part in PARTS))
    for name, runs in taken.items():
        cells = (f"{median(run[part] for run in runs):10.2f}" for part in PARTS)
        print(f"{name:28}" + "".join(cells))


if __name__ == "__main__":
    main()
