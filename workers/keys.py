"""The keys of a job's stages: what they depend on, in one place. Free of torch, for the plan.

A stage's key hashes its own settings, the keys of its inputs and its code epoch, and nothing else:
two jobs whose keys agree share the output.
"""

from dataclasses import dataclass
from typing import Any

from jobs.allocation import SlimLLaVASpec, UniformSpec
from jobs.result import Weights
from jobs.spec import JobSpec, content_key, settings_of

CODE_EPOCHS = {
    "statistics": 2,
    "bank": 3,
    "score": 1,
    "allocate": 1,
    "prune": 4,
    "teacher": 1,
    "repair": 1,
    "evaluate": 1,
}
"""Raise a stage's number by hand when its results change: old outputs are then not reused."""

STAGES = tuple(CODE_EPOCHS)

TRAIN_FOLDER = "ray/train"
"""In the storage: where Ray Train keeps the checkpoints of running jobs."""


@dataclass(frozen=True)
class StageKeys:
    """None where a job has no such stage."""

    statistics: str | None
    """Of the dense model, shared by every method, sparsity, pattern and mix of modalities; another
    choice among the visual tokens (atv) has its own."""
    bank: str | None
    """Every layer at every ratio, shared by all searches among them."""
    score: str | None
    """What each layer is worth. None for allocations that do not go by scores."""
    allocate: str | None
    """How sparse each layer is to be. None where all of a tower get the tower's sparsity."""
    prune: str | None
    teacher: str | None
    """The dense model's answers on the repair data, shared by every pruned model."""
    repair: str | None
    evaluate: dict[tuple[Weights, str], str]
    """By weights and benchmark. The dense model's are shared by all jobs."""

    @classmethod
    def of(cls, job: JobSpec) -> "StageKeys":
        """Raises AssertionError for a job that the plan has not given its fingerprints."""
        assert job.model.fingerprint is not None
        dense = content_key([job.model.fingerprint, job.model.dtype])
        statistics = _statistics_key(job, dense)
        bank = _bank_key(job, dense, statistics)
        read = statistics if job.prune and job.prune.allocation.needs_statistics else None
        score = _score_key(job, dense, read)
        allocate = _allocate_key(job, dense, read, bank, score)
        prune = _prune_key(job, dense, statistics, allocate)
        teacher = _teacher_key(job, dense)
        repair = None
        if job.repair is not None and prune is not None:
            settings = {"repair": settings_of(job.repair), "seed": job.seed}
            repair = _key("repair", settings, prune, teacher)
        inputs: dict[Weights, str | None] = {"dense": dense, "pruned": prune, "repaired": repair}
        evaluate = {
            (weights, spec.label): _key("evaluate", settings_of(spec), key)
            for weights, key in inputs.items()
            if key is not None
            for spec in job.evaluate
        }
        return cls(statistics, bank, score, allocate, prune, teacher, repair, evaluate)

    def all(self) -> list[tuple[str, str]]:
        """(stage, key) of every stage of the job, in the order they run."""
        names = ("statistics", "bank", "score", "allocate", "prune", "teacher", "repair")
        single = [(name, getattr(self, name)) for name in names]
        return [pair for pair in single if pair[1]] + [
            ("evaluate", key) for key in self.evaluate.values()
        ]


def stage_path(name: str, key: str) -> str:
    """Where a stage's output lies in the storage."""
    return f"stages/{name}/{key}"


def stalled_path(job_key: str) -> str:
    """What a worker that ended itself for standing still has left for its driver."""
    return f"progress/{job_key}.stalled"


def _statistics_key(job: JobSpec, dense: str) -> str | None:
    if job.prune is None:
        return None
    if not (job.solves_from_statistics or job.prune.allocation.needs_statistics):
        return None
    settings = settings_of(job.calibration.unmixed())
    return _key("statistics", {"calibration": settings, "seed": job.seed}, dense)


def _bank_key(job: JobSpec, dense: str, statistics: str | None) -> str | None:
    if job.prune is None or not isinstance(job.prune.allocation, SlimLLaVASpec):
        return None
    prune = settings_of(job.prune)
    asked = {name: prune[name] for name in ("method", "sparsity")}
    grid = {name: prune["allocation"][name] for name in ("step", "reach")}
    return _key("bank", asked | grid | _looked_at(job), dense, statistics)


def _score_key(job: JobSpec, dense: str, statistics: str | None) -> str | None:
    """Free of the sparsities, so that all share the scores; not of which towers are pruned."""
    if job.prune is None or job.prune.allocation.measure_options is None:
        return None
    measured_by = {"name"} | job.prune.allocation.measure_options
    options = job.prune.allocation.model_dump(mode="json", include=measured_by)
    settings = {"allocation": options, "towers": sorted(job.prune.sparsity)}
    return _key("score", settings | _looked_at(job), dense, statistics)


def _allocate_key(job: JobSpec, dense: str, *inputs: str | None) -> str | None:
    """Free of the method, so that all methods share an allocation; but what is searched is not."""
    if job.prune is None or isinstance(job.prune.allocation, UniformSpec):
        return None
    asked = {name: settings_of(job.prune)[name] for name in ("allocation", "sparsity")}
    return _key("allocate", asked | _looked_at(job), dense, *inputs)


def _looked_at(job: JobSpec) -> dict[str, Any]:
    """What of the calibration counts where only the dense model is looked at."""
    calibration = job.calibration.model_copy(update={"propagate": "dense"})
    return {"calibration": settings_of(calibration), "seed": job.seed}


def _prune_key(
    job: JobSpec, dense: str, statistics: str | None, allocate: str | None
) -> str | None:
    if job.prune is None:
        return None
    settings: dict[str, Any] = {"prune": settings_of(job.prune)}
    del settings["prune"]["allocation"]  # it acts through its stage
    if job.is_calibrated:
        settings |= {"calibration": settings_of(job.calibration), "seed": job.seed}
    return _key("prune", settings, dense, statistics, allocate)


def _teacher_key(job: JobSpec, dense: str) -> str | None:
    """Which samples are asked follows from dataset, number of steps, batch size and seed."""
    if job.repair is None or not job.repair.has_cached_teacher:
        return None
    draws = {"dataset", "sequence_length", "num_steps", "batch_size", "temperature"}
    settings = {name: value for name, value in settings_of(job.repair).items() if name in draws}
    return _key("teacher", settings | {"seed": job.seed}, dense)


def _key(stage: str, settings: Any, *inputs: str | None) -> str:
    return content_key([stage, CODE_EPOCHS[stage], settings, inputs])
