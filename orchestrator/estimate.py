"""How much memory, time and disk jobs will need, before they are paid for. Orders of magnitude.

From the shapes in the model's files alone: matrix products counted, divided by a rate that these
machines reach. A stage that is there already costs nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jobs.allocation import (
    AllocationOptions,
    ATPSpec,
    ECoFLaPSpec,
    ModuleDropSpec,
    SlimLLaVASpec,
)
from jobs.spec import JobSpec
from orchestrator.plan import ModelFacts, model_facts
from workers.keys import StageKeys
from workers.locate import config_of

CPU_FLOPS = 6e10
"""Of one core, fp32, in products as small as ours."""
GPU_FLOPS = 2e14
START_S = 20.0
"""A Train run with its processes, torch and transformers imported."""
PROCESS_GIB = 0.6
TEXT_TOKENS = 32
"""Of a question with its answer."""


@dataclass(frozen=True)
class Estimate:
    """Of one job. Memory is that of one worker."""

    memory_gib: float
    seconds: float


def estimate(job: JobSpec, done: set[tuple[str, str]]) -> Estimate:
    """What a job needs, the stages in `done` being there already."""
    facts = model_facts(job.model.model_copy(update={"fingerprint": None}))
    on_gpu = job.resources.gpus_per_worker > 0
    rate = GPU_FLOPS if on_gpu else CPU_FLOPS * job.resources.cpus_per_worker
    flops = sum(
        _flops(name, job, facts) for name, key in StageKeys.of(job).all() if (name, key) not in done
    )
    return Estimate(
        memory_gib=_memory_gib(job, facts, bytes_per_param=2 if on_gpu else 4),
        seconds=START_S + flops / rate / job.num_workers,
    )


def stored_gib(jobs: Iterable[JobSpec], done: set[tuple[str, str]]) -> float:
    """What the stages that are not done will leave in the storage, each of them once."""
    stages = {stage: job for job in jobs for stage in StageKeys.of(job).all() if stage not in done}
    return sum(_stored_bytes(name, job) for (name, _), job in stages.items()) / 2**30


def _stored_bytes(stage: str, job: JobSpec) -> float:
    facts = model_facts(job.model.model_copy(update={"fingerprint": None}))
    if stage == "repair":
        return facts.num_bytes
    if job.prune is None:
        return 0.0
    towers = {tower for tower, sparsity in job.prune.sparsity.items() if sparsity}
    layers = [(o, i) for tower, o, i in facts.prunable.values() if tower in towers]
    if stage == "prune":
        return facts.num_bytes + sum(outputs * inputs for outputs, inputs in layers) / 8
    if stage == "statistics":  # text and visual tokens apart, 4 inputs for the 7 layers of a block
        return sum(2 * 4 / 7 * 4 * inputs**2 for _, _, inputs in facts.prunable.values())
    if stage == "bank" and isinstance(job.prune.allocation, SlimLLaVASpec):
        bytes_per_weight = 4 if job.model.dtype == "float32" else 2
        return _num_ratios(job.prune.allocation) * bytes_per_weight * sum(o * i for o, i in layers)
    return 0.0


def _num_ratios(search: SlimLLaVASpec) -> int:
    return 2 * int(search.reach / search.step) + 1


def _flops(stage: str, job: JobSpec, facts: ModelFacts) -> float:
    weights = sum(outputs * inputs for _, outputs, inputs in facts.prunable.values())
    forward = 2.0 * weights
    if stage == "evaluate":
        return sum(
            (spec.num_items or 10_000)
            * forward
            * _tokens(facts, spec.sequence_length, spec.dataset.is_text)
            for spec in job.evaluate
        ) / len(job.evaluate)
    calibration = job.calibration
    tokens = _tokens(facts, calibration.sequence_length, calibration.dataset.is_text)
    if stage in ("statistics", "prune") and job.is_calibrated:
        grams = sum(2.0 * inputs * inputs for _, _, inputs in facts.prunable.values())
        solve = sum(4.0 * outputs * inputs**2 for _, outputs, inputs in facts.prunable.values())
        passes = 2.0 if calibration.propagate == "pruned" else 1.0
        if job.prune is not None and job.prune.refine is not None:
            passes += 1.5 * job.prune.refine.num_steps  # forward, backward; of half the samples
        return calibration.num_samples * tokens * (passes * forward + grams) + solve
    if job.prune is not None and isinstance(job.prune.allocation, SlimLLaVASpec):
        search = job.prune.allocation
        if stage == "bank":
            solve = sum(4.0 * outputs * inputs**2 for _, outputs, inputs in facts.prunable.values())
            return _num_ratios(search) * solve
    if job.prune is not None and stage == _costly_stage(job.prune.allocation):
        return _samples_of_allocation(job.prune.allocation, job, facts) * tokens * forward
    if job.repair is not None and stage in ("teacher", "repair"):
        samples = job.repair.num_steps * job.repair.batch_size
        training = 5 if job.repair.has_live_teacher else 4
        return samples * tokens * forward * (1 if stage == "teacher" else training)
    return 0.0


def _costly_stage(allocation: AllocationOptions) -> str:
    """Where an allocation runs the model: to score layers, or to try candidates."""
    return "allocate" if allocation.measure_options is None else "score"


def _samples_of_allocation(allocation: AllocationOptions, job: JobSpec, facts: ModelFacts) -> float:
    """Samples run forward to score layers or to try candidates; half a run for a replayed one."""
    all_samples = job.calibration.num_samples
    if isinstance(allocation, SlimLLaVASpec):
        return _samples_of_search(allocation)
    if isinstance(allocation, ATPSpec) and allocation.slope == "search":
        return allocation.num_slopes * len(facts.towers) * all_samples
    if isinstance(allocation, ECoFLaPSpec):
        return min(allocation.num_samples, all_samples) * len(facts.prunable)  # 2 halves a layer
    if isinstance(allocation, ModuleDropSpec):
        return all_samples * len(facts.prunable) / 6  # 2 halves a block of 6 or 7 layers
    return 0.0


def _samples_of_search(search: SlimLLaVASpec) -> float:
    """Samples run forward, half of the candidates all, the others the first only."""
    candidates = search.population + search.generations * (search.population - search.survivors)
    each = (search.num_samples + (search.early_samples or search.num_samples)) / 2
    tunings = search.generations // search.projector_every if search.projector_every else 0
    steps = 2 * search.projector_steps * search.batch_size  # backward, without weight gradients
    return candidates * each + tunings * search.survivors * (steps + search.num_samples)


def _memory_gib(job: JobSpec, facts: ModelFacts, *, bytes_per_param: int) -> float:
    widest = max(inputs for _, _, inputs in facts.prunable.values())
    tokens = _tokens(facts, job.calibration.sequence_length, job.calibration.dataset.is_text)
    needed = facts.num_params * bytes_per_param * 1.5  # the model, and half of it while saving
    if job.is_calibrated:
        width = min(inputs for _, _, inputs in facts.prunable.values())
        if job.calibration.propagate == "true_sequential":
            width += widest  # the inputs of the layer in work
        needed += 6 * widest**2 * 4 + job.calibration.num_samples * tokens * width * bytes_per_param
    if job.repair is not None:
        per_sample = tokens * widest * bytes_per_param * len(facts.prunable)
        needed += job.repair.batch_size / job.num_workers * per_sample
        if job.repair.has_live_teacher:
            needed += facts.num_params * bytes_per_param
    return PROCESS_GIB + needed / 2**30


def _tokens(facts: ModelFacts, sequence_length: int, is_text: bool) -> float:
    if is_text:
        return sequence_length
    config = config_of(facts.folder)
    vision = config.get("vision_config", {})
    side: int = vision.get("image_size", 0) // vision.get("patch_size", 1)
    # what an image is resized to may be less than what the tower was made for
    image_tokens: int = config.get("image_seq_length") or side**2
    return image_tokens + TEXT_TOKENS
