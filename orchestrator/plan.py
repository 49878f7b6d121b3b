"""From a sweep to its jobs: expand, check against models and data, key, drop doubles, put in order.

Everything that can be known to be wrong is said here, before a process is started: a pattern that
does not fit a layer, a dataset with too few samples, a tower that a model does not have. Free of
torch: a plan takes a second.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jobs.allocation import AllocationSpec, ATPSpec, SlimLLaVASpec, UniformSpec, steepest
from jobs.errors import DataError, ModelError, SpecError
from jobs.methods import DenseSpec, MethodSpec
from jobs.pattern import Pattern
from jobs.spec import (
    TOWERS,
    BenchmarkSpec,
    CalibrationSpec,
    DatasetSpec,
    JobSpec,
    ModelSpec,
    PruneSpec,
    RefineSpec,
    RepairSpec,
    RunPolicy,
    Tower,
)
from jobs.sweep import ExcludeSpec, GridSpec, SweepSpec, Towers
from workers.data import Split, fingerprint_dataset, load_dataset
from workers.families import blocks_path, family_of
from workers.keys import StageKeys
from workers.locate import config_of, fingerprint_model, locate, tensor_shapes

IN_A_BLOCK = re.compile(r"^(?P<block>.*\.(layers|layer|blocks)\.\d+)\..*weight$")
"""A tensor of a checkpoint that belongs to a block, under old and new names alike."""


@dataclass(frozen=True)
class ModelFacts:
    """What the plan knows of a model without loading it."""

    spec: ModelSpec
    folder: Path
    towers: tuple[Tower, ...]
    num_params: int
    num_bytes: int
    """Of its safetensors files."""
    prunable: dict[str, tuple[Tower, int, int]]
    """Tensor name to tower, number of outputs and of inputs."""

    def num_blocks(self, tower: Tower) -> int:
        """How many blocks a tower has."""
        names = (name for name, (its, *_) in self.prunable.items() if its == tower)
        return len({match["block"] for match in map(IN_A_BLOCK.match, names) if match})


def make_plan(sweep: SweepSpec) -> list[JobSpec]:
    """The jobs of a sweep, each once, in the order to run them.

    The dense model comes first, then a job for each different pruned model, then those that
    repair them, so that whoever needs another's stage finds it finished.

    Raises:
        SpecError, ModelError, DataError: a job that cannot run, and why.
    """
    jobs: dict[str, JobSpec] = {}
    for job in _expand(sweep):
        jobs.setdefault(job.key, job)
    for job in jobs.values():
        _check_job(job)
    order = {key: number for number, key in enumerate(jobs)}
    return sorted(
        jobs.values(),
        key=lambda job: (job.prune is not None, job.repair is not None, order[job.key]),
    )


def _expand(sweep: SweepSpec) -> Iterator[JobSpec]:
    used_excludes: set[int] = set()
    for model, calibration, seed in itertools.product(sweep.model, sweep.calibration, sweep.seed):
        facts = model_facts(model)
        dense = JobSpec(
            sweep=sweep.name,
            model=facts.spec,
            calibration=calibration.model_copy(
                update={"dataset": _fingerprinted(calibration.dataset)}
            ),
            evaluate=tuple(_fingerprinted_benchmark(spec) for spec in sweep.evaluate),
            seed=seed,
            resources=sweep.resources,
            policy=RunPolicy(**{name: getattr(sweep, name) for name in RunPolicy.model_fields}),
        )
        yield dense
        for grid, repair in itertools.product(sweep.grid, sweep.repair):
            for prune in _prune_specs(grid, sweep.exclude, repair, facts, used_excludes):
                resolved = _resolved(repair, calibration)
                yield dense.model_copy(update={"prune": prune, "repair": resolved})
    for number in range(len(sweep.exclude)):
        if number not in used_excludes:
            raise SpecError(f"exclude[{number}] matches no point of the grid")


def _prune_specs(
    grid: GridSpec,
    excludes: list[ExcludeSpec],
    repair: RepairSpec | None,
    facts: ModelFacts,
    used_excludes: set[int],
) -> Iterator[PruneSpec]:
    for method, pattern, towers, allocation, refine in itertools.product(
        grid.method, grid.pattern, grid.towers, grid.allocation, grid.refine
    ):
        if isinstance(method, DenseSpec):
            continue  # there already: the dense model is a job of every sweep
        for sparsity in _sparsities(grid, pattern, towers):
            matching = {
                number
                for number, exclude in enumerate(excludes)
                if _matches(exclude, method, pattern, towers, allocation, refine, sparsity, repair)
            }
            used_excludes |= matching
            if not matching:
                by_tower = _by_tower(pattern, towers, sparsity, facts)
                yield PruneSpec(
                    method=method,
                    pattern=pattern,
                    sparsity=by_tower,
                    allocation=_checked(allocation, pattern) if by_tower else UniformSpec(),
                    refine=refine if by_tower else None,
                )


def _sparsities(grid: GridSpec, pattern: str, towers: Towers) -> list[float | None]:
    """The sparsities to multiply with, or just None where pattern or towers say it already."""
    if Pattern.parse(pattern).sparsity is not None or isinstance(towers, dict):
        return [None]
    if not grid.sparsity:
        raise SpecError("grid: `sparsity` is missing, and pattern unstructured needs one")
    return list(grid.sparsity)


def _by_tower(
    pattern: str, towers: Towers, sparsity: float | None, facts: ModelFacts
) -> dict[Tower, float]:
    fixed = Pattern.parse(pattern).sparsity
    if isinstance(towers, dict):
        if fixed is not None:
            raise SpecError(
                f"grid: pattern {pattern} with towers {towers}: the pattern fixes the sparsity at "
                f"{fixed:g}. Name towers instead (all, vision, language), put them in a grid of "
                "their own, or exclude the pair"
            )
        asked = dict(towers)
    else:
        value = fixed if fixed is not None else sparsity
        assert value is not None
        names = facts.towers if towers == "all" else (towers,)
        asked = dict.fromkeys(names, value)
    for tower in asked:
        if tower not in facts.towers:
            raise SpecError(
                f"grid: towers: model {facts.spec.name} has no {tower} tower. "
                f"It has: {', '.join(facts.towers)}"
            )
    return {tower: asked[tower] for tower in TOWERS if asked.get(tower)}


def _checked(allocation: AllocationSpec, pattern: str) -> AllocationSpec:
    if Pattern.parse(pattern).sparsity is None or isinstance(allocation, UniformSpec):
        return allocation
    raise SpecError(
        f"grid: pattern {pattern} with allocation {allocation.name}: the pattern gives every layer "
        "the same sparsity. Put the pattern in a grid of its own, or exclude the pair: "
        f"{{pattern: '{pattern}', allocation: {allocation.name}}}"
    )


def _matches(
    exclude: ExcludeSpec,
    method: MethodSpec,
    pattern: str,
    towers: Towers,
    allocation: AllocationSpec,
    refine: RefineSpec | None,
    sparsity: float | None,
    repair: RepairSpec | None,
) -> bool:
    point = {
        "method": method.name,
        "pattern": pattern,
        "towers": towers,
        "allocation": allocation.name,
        "refine": refine.unit if refine else "none",
        "sparsity": sparsity,
        "repair": repair.method if repair else "none",
    }
    return all(
        point[name] == value for name, value in exclude.model_dump(exclude_unset=True).items()
    )


def _resolved(repair: RepairSpec | None, calibration: CalibrationSpec) -> RepairSpec | None:
    if repair is None:
        return None
    dataset = _fingerprinted(repair.dataset or calibration.dataset)
    return repair.model_copy(update={"dataset": dataset})


def _fingerprinted_benchmark(spec: BenchmarkSpec) -> BenchmarkSpec:
    return spec.model_copy(update={"dataset": _fingerprinted(spec.dataset)})


@cache
def _fingerprinted(spec: DatasetSpec) -> DatasetSpec:
    return spec.model_copy(update={"fingerprint": fingerprint_dataset(spec)})


@cache
def model_facts(spec: ModelSpec) -> ModelFacts:
    """Read a model folder's config and the headers of its weights.

    Raises:
        ModelError: no such model, a broken folder, a family that is not supported.
    """
    folder = locate(spec)
    config = config_of(folder)
    family = family_of(config, str(folder))
    for tower in family.towers:
        blocks_path(config, tower, str(folder))
    shapes = tensor_shapes(folder)
    prunable = {
        name: (_tower_of(name), shape[0], shape[1])
        for name, shape in shapes.items()
        if IN_A_BLOCK.search(name) and len(shape) == 2
    }
    return ModelFacts(
        spec=spec.model_copy(update={"fingerprint": fingerprint_model(folder)}),
        folder=folder,
        towers=tuple(family.towers),
        num_params=sum(math.prod(shape) for shape in shapes.values()),
        num_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        prunable=prunable,
    )


def _tower_of(tensor_name: str) -> Tower:
    return "vision" if "vision" in tensor_name else "language"


@cache
def _num_samples(spec: DatasetSpec, split: Split) -> int:
    return len(load_dataset(spec, split))


@cache
def _has_images(spec: DatasetSpec) -> bool:
    return load_dataset(spec, "test")[0].image is not None


def _check_job(job: JobSpec) -> None:
    facts = model_facts(job.model.model_copy(update={"fingerprint": None}))
    _check_benchmarks(job, facts)
    if job.prune is not None:
        _check_pattern(job.prune, facts)
        if isinstance(job.prune.allocation, SlimLLaVASpec):
            _check_search(job.prune.allocation, job.calibration, facts)
        if isinstance(job.prune.allocation, ATPSpec):
            _check_slope(job.prune.allocation, job.prune.sparsity, facts)
    if job.is_calibrated:
        _check_calibration(job)
    if job.repair is not None:
        if job.prune is not None and not job.prune.sparsity:
            raise SpecError(
                "repair: at sparsity 0 no layer is pruned, and there is nothing to repair. "
                "Leave it out with exclude: {sparsity: 0, repair: " + job.repair.method + "}"
            )
        _check_repair(job.repair, facts)
        for tower in job.prune.sparsity if job.prune else ():
            if job.repair.rank_of(tower) is None:
                raise SpecError(f"repair.rank: the {tower} tower is pruned, and has no rank")


def _check_pattern(prune: PruneSpec, facts: ModelFacts) -> None:
    pattern = Pattern.parse(prune.pattern)
    for name, (tower, _, num_inputs) in facts.prunable.items():
        if tower in prune.sparsity:
            try:
                pattern.check_inputs(num_inputs, f"{facts.spec.name}: {name}")
            except ValueError as error:
                raise ModelError(str(error)) from None


def _check_calibration(job: JobSpec) -> None:
    assert job.prune is not None
    spec = job.calibration
    if job.prune.refine is not None and spec.propagate == "dense":
        raise SpecError(
            f"grid.refine: {job.prune.refine.unit} trains a block on activations that passed the "
            "pruned ones before it; with calibration.propagate: dense there are none. Set it to "
            "pruned or true_sequential"
        )
    if spec.dataset.is_text:
        _num_samples(spec.dataset, "train")  # reads it; how many windows only the tokenizer knows
        if "vision" in job.prune.sparsity:
            raise SpecError(
                f"calibration.dataset: {spec.dataset.label} has no images, and the vision tower is "
                "to be pruned. Calibrate on images, or set `towers: language`"
            )
        return
    available = _num_samples(spec.dataset, "train")
    if spec.num_samples > available:
        raise DataError(
            f"calibration.num_samples is {spec.num_samples}, and {spec.dataset.label} has "
            f"{available} samples"
        )


def _check_search(spec: SlimLLaVASpec, calibration: CalibrationSpec, facts: ModelFacts) -> None:
    dataset = calibration.dataset
    if spec.projector_every and not ("vision" in facts.towers and _has_images(dataset)):
        lacking = "images" if "vision" in facts.towers else "projector"
        where = dataset.label if lacking == "images" else facts.spec.name
        raise SpecError(
            f"grid.allocation: slimllava tunes the projector, and {where} has no {lacking}: set "
            "projector_every: 0"
        )
    available = _num_samples(dataset, "train")
    seen = calibration.num_samples if spec.judged_on == "unseen" else 0
    if seen + spec.num_samples > available and not dataset.is_text:
        beside = f" beside calibration's {seen}" if seen else ""
        raise DataError(
            f"grid.allocation: slimllava: num_samples is {spec.num_samples}{beside}, and "
            f"{dataset.label} has {available} samples"
        )


def _check_slope(spec: ATPSpec, sparsity: Mapping[Tower, float], facts: ModelFacts) -> None:
    """A given one must neither empty a block nor take more than there is of one."""
    for tower, asked in sparsity.items():
        num_blocks = facts.num_blocks(tower)
        limit = steepest(asked, num_blocks)
        if spec.slope != "search" and abs(spec.slope) > limit:
            raise SpecError(
                f"grid.allocation: atp: slope {spec.slope:g} takes the {tower} tower's "
                f"{num_blocks} blocks out of [0, 1] at sparsity {asked:g}; at most {limit:g} does "
                "not"
            )


def _check_repair(spec: RepairSpec, facts: ModelFacts) -> None:
    assert spec.dataset is not None
    if spec.dataset.is_text and "vision" in facts.towers:
        raise SpecError(
            f"repair.dataset: {spec.dataset.label} is plain text; repairing a vision-language "
            "model needs questions and answers"
        )
    if spec.batch_size % spec.num_workers:
        raise SpecError(
            f"repair.batch_size is {spec.batch_size} and does not divide evenly among "
            f"{spec.num_workers} workers"
        )
    _num_samples(spec.dataset, "train")


def _check_benchmarks(job: JobSpec, facts: ModelFacts) -> None:
    for spec in job.evaluate:
        available = _num_samples(spec.dataset, "test")
        if spec.dataset.is_text:
            continue
        if spec.num_items is not None and spec.num_items > available:
            raise DataError(
                f"evaluate: num_items is {spec.num_items}, and {spec.label} has {available} items"
            )
        if "vision" not in facts.towers and _has_images(spec.dataset):
            raise SpecError(
                f"evaluate: {spec.label} asks about images, and {facts.spec.name} has no vision "
                "tower. Evaluate it on text (format text or python-docs)"
            )


def shared_stages(jobs: Iterable[JobSpec]) -> dict[tuple[str, str], int]:
    """How many of the jobs need each stage, by (stage, key)."""
    counts: dict[tuple[str, str], int] = {}
    for job in jobs:
        for stage in StageKeys.of(job).all():
            counts[stage] = counts.get(stage, 0) + 1
    return counts
