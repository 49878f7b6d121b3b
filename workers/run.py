"""One job: load, calibrate, allocate, prune, repair, evaluate, export. Read this file first.

Each stage's output lies in the storage under a key that hashes everything which can change it, so
a grid computes what its jobs share once, and a job that was killed goes on where it was.

    statistics   of the dense model's inputs; only where the method or the allocation reads them
    bank         every layer pruned at every ratio; only where an allocation searches among them
    score        what each layer is worth; only where the allocation goes by that
    allocate     how sparse each layer is to be; only where that differs within a tower
    prune        a model folder with zeros, masks, a report per layer: exported as it stands
    teacher      the dense model's answers on the repair data; only where the repair distils
    repair       a model folder again, with the same zeros
    evaluate     scores of the dense, the pruned and the repaired folder, one stage a benchmark
"""

import json
import platform
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from jobs.allocation import SlimLLaVASpec
from jobs.errors import PrunefleetError, known
from jobs.result import JobResult, Score, Weights
from jobs.spec import BenchmarkSpec, JobSpec, PruneSpec, RepairSpec, content_key
from jobs.storage import Storage
from workers.allocate import allocate, load_allocation, save_allocation
from workers.bank import build_bank
from workers.calibrate import calibration_batches
from workers.context import Context
from workers.early_stop import reason_to_stop
from workers.encode import Encoded, Encoder
from workers.evaluate import SCORE_FIELDS, SMALLER_IS_BETTER, evaluate
from workers.keys import STAGES, StageKeys
from workers.locate import locate
from workers.models import VisionLanguageModel, count_sparsity, load_model, save_model
from workers.prune import (
    check_shapes,
    collect_dense_statistics,
    load_masks,
    prune_from_statistics,
    prune_sequentially,
    save_report,
)
from workers.scores import Question, load_scores, measure, save_scores
from workers.search import ratio_grid
from workers.stages import Stage, run_stage
from workers.teacher import TARGETS_FILE, dense_targets, load_targets, save_targets

if TYPE_CHECKING:
    from workers.distill import LiveTeacher


def run_job(job: JobSpec, ctx: Context) -> JobResult:
    """Run every stage that a job needs and is not there yet.

    Every worker of the job calls it; all return the same result.

    Raises:
        PrunefleetError: with what went wrong and what to do. Finished stages stay.
    """
    try:
        return _Job(job, ctx).run()
    except PrunefleetError:
        raise
    except Exception as error:
        explained = known(error)
        if explained is None:
            raise
        raise explained from error


class _Job:
    """What the stages of one job have in common."""

    def __init__(self, job: JobSpec, ctx: Context) -> None:
        self.job = job
        self.ctx = ctx
        self.folder = locate(job.model)
        self.keys = StageKeys.of(job)
        self.stages: list[Stage] = []
        self.counted: dict[str, float] = {}
        """Sparsity of the weights evaluated last, counted from their file."""

    def run(self) -> JobResult:
        facts: dict[str, Any] = {}
        scores = self._evaluate("dense", self.folder)
        if self.job.prune is not None:
            final = self._prune(self.job.prune)
            facts |= _facts_of_pruning(final)
            self._warn_of_few_tokens(self.job.prune, final)
            reason = self._reason_to_stop(final, facts["layer_error_mean"])
            if reason is not None:
                return self._stopped(reason, facts)
            scores += self._evaluate("pruned", final.folder)
            if self.job.repair is not None:
                final = self._repair(self.job.repair, final)
                scores += self._evaluate("repaired", final.folder)
            facts["export"] = f"{self.ctx.storage.url}/{final.path}"
            facts["weights_sha256"] = _hash_of_weights(self.ctx.storage, final.path)
        facts |= self.counted | _costs(self.stages) | self._environment()
        return JobResult(self.job.key, "complete", tuple(scores), facts=facts)

    def _reason_to_stop(self, pruned: Stage, layer_error: float | None) -> str | None:
        """By what is known early: the layers' error, then an evaluation of a few items."""
        rule = self.job.policy.early_stop
        if rule is None:
            return None
        reason = reason_to_stop(self.job, rule, "layer error", layer_error, self.ctx)
        full = self.job.evaluate[0]
        if reason is not None or (full.num_items or rule.num_items + 1) <= rule.num_items:
            return reason
        small = full.model_copy(update={"num_items": rule.num_items})
        keys = StageKeys.of(self.job.model_copy(update={"evaluate": (small,)}))
        stage = self._benchmark(small, pruned.folder, keys.evaluate["pruned", small.label])
        metric, score = stage.info["metric"], stage.info["score"]
        loss = score if metric in SMALLER_IS_BETTER else -score
        return reason_to_stop(self.job, rule, f"{metric} on {small.label}", loss, self.ctx)

    def _stopped(self, reason: str, facts: dict[str, Any]) -> JobResult:
        rule = self.job.policy.early_stop
        assert rule is not None
        facts = facts | _costs(self.stages) | self._environment() | {"stopped_by": rule.key}
        return JobResult(self.job.key, "stopped", error=reason, error_kind="stopped", facts=facts)

    def _prune(self, spec: PruneSpec) -> Stage:
        calibration, key = self.job.calibration, _there(self.keys.prune)
        statistics = self._statistics() if self.keys.statistics else None
        allocated = self._allocate(spec, statistics) if self.keys.allocate else None

        def build(folder: Path) -> dict[str, Any]:
            model = self._load(self.folder)
            check_shapes(model, spec)
            sparsity = load_allocation(allocated.folder, model) if allocated else None
            if statistics is not None and self.job.solves_from_statistics:
                masks, reports = prune_from_statistics(
                    model, spec, calibration, statistics.folder, self.ctx, sparsity=sparsity
                )
            else:
                batches = self._batches(model) if spec.needs_activations else []
                masks, reports = prune_sequentially(
                    model, spec, calibration, batches, self.ctx, key=key, sparsity=sparsity
                )
            if self.ctx.rank == 0:
                with self.ctx.timed("export"):
                    save_model(model, folder)
                    save_report(masks, reports, folder)
            return {"layers": [asdict(report) for report in reports]}

        return self._run("prune", key, build)

    def _allocate(self, spec: PruneSpec, statistics: Stage | None) -> Stage:
        """Each layer's sparsity, by the dense model: one for all methods."""
        key = _there(self.keys.allocate)
        bank = self._bank(spec, statistics) if self.keys.bank and statistics else None
        scored = self._score(spec, statistics) if self.keys.score else None

        def build(folder: Path) -> dict[str, Any]:
            question = self._question(spec, statistics, key, folder, bank)
            scores = load_scores(scored.folder) if scored else None
            answer = allocate(question, scores)
            if self.ctx.rank == 0:
                save_allocation(answer, scores, spec, folder)
            return {}

        return self._run("allocate", key, build)

    def _score(self, spec: PruneSpec, statistics: Stage | None) -> Stage:
        """What each layer is worth: one for all sparsities and methods."""
        key = _there(self.keys.score)

        def build(folder: Path) -> dict[str, Any]:
            scores = measure(self._question(spec, statistics, key, folder))
            if self.ctx.rank == 0:
                save_scores(scores, folder)
            return {}

        return self._run("score", key, build)

    def _question(
        self,
        spec: PruneSpec,
        statistics: Stage | None,
        key: str,
        folder: Path,
        bank: Stage | None = None,
    ) -> Question:
        model = self._load(self.folder)
        check_shapes(model, spec)
        return Question(
            model=model,
            spec=spec,
            calibration=self.job.calibration,
            statistics=statistics.folder if statistics else None,
            bank=bank.folder if bank else None,
            seed=self.job.seed,
            ctx=self.ctx,
            key=key,
            folder=folder,
        )

    def _bank(self, spec: PruneSpec, statistics: Stage) -> Stage:
        """Every layer at every ratio: one for all searches among them."""
        key, calibration = _there(self.keys.bank), self.job.calibration
        assert isinstance(spec.allocation, SlimLLaVASpec)
        grids = {
            tower: ratio_grid(asked, spec.allocation.step, spec.allocation.reach)
            for tower, asked in spec.sparsity.items()
            if asked
        }

        def build(folder: Path) -> dict[str, Any]:
            build_bank(
                self._load(self.folder),
                spec.method,
                grids,
                statistics.folder,
                calibration,
                self.ctx,
                folder,
                key=key,
            )
            return {}

        return self._run("bank", key, build)

    def _warn_of_few_tokens(self, spec: PruneSpec, pruned: Stage) -> None:
        """Tell of Gram matrices without full rank, where a method solves for weights with them."""
        if not spec.method.solves_for_weights and spec.method.reconstruct == "none":
            return
        layers = pruned.info["layers"]
        few = [layer for layer in layers if (_tokens_per_input(layer) or 1) < 1]
        if few:
            worst = min(few, key=lambda layer: _tokens_per_input(layer) or 1)
            self.ctx.warn(
                f"{len(few)} of {len(layers)} layers were calibrated on fewer tokens than they "
                f"have inputs, {worst['name']} on {sum(worst['tokens'].values())} for "
                f"{worst['num_inputs']}: raise calibration.num_samples, or count more tokens"
            )

    def _statistics(self) -> Stage:
        """The dense model's statistics: one for all jobs, whatever modality mix they want."""

        def build(folder: Path) -> dict[str, Any]:
            model = self._load(self.folder)
            batches = self._batches(model)
            collect_dense_statistics(model, self.job.calibration, batches, self.ctx, folder)
            return {}

        return self._run("statistics", _there(self.keys.statistics), build)

    def _batches(self, model: VisionLanguageModel) -> list[dict[str, torch.Tensor]]:
        with self.ctx.timed("calibrate"):
            return calibration_batches(model, self.job.calibration, self.job.seed, self.ctx)

    def _repair(self, spec: RepairSpec, pruned: Stage) -> Stage:
        from workers.repair import repair  # PEFT takes seconds to import, and few jobs need it

        key = _there(self.keys.repair)
        teacher = self._teacher(spec) if self.keys.teacher else None

        def build(folder: Path) -> dict[str, Any]:
            model, live = self._student(spec, pruned)
            encoder, samples = self._repair_samples(model, spec)
            report = repair(
                model,
                load_masks(pruned.folder, list(model.layers())),
                samples,
                spec,
                self.ctx,
                stage=key,
                seed=self.job.seed,
                pad_id=encoder.pad_id,
                targets=load_targets(teacher.folder / TARGETS_FILE) if teacher else None,
                micro_batch=self.ctx.smaller(spec.micro_batch_size),
                teacher=live,
            )
            if self.ctx.rank == 0:
                with self.ctx.timed("export"):
                    save_model(model, folder)
            return asdict(report)

        return self._run("repair", key, build)

    def _student(
        self, spec: RepairSpec, pruned: Stage
    ) -> tuple[VisionLanguageModel, "LiveTeacher | None"]:
        """The model to repair, and the dense one if it is to run beside it."""
        from workers.distill import LiveTeacher, is_masked

        model = self._load(pruned.folder)
        if not spec.has_live_teacher:
            return model, None
        dense = self._load(self.folder)
        masks = load_masks(pruned.folder, list(model.layers()))
        if spec.method == "sparse_lora" and is_masked(dense.module, masks, model.module):
            return dense, LiveTeacher(dense, None)
        return model, LiveTeacher(model, dense)

    def _teacher(self, spec: RepairSpec) -> Stage:
        """The dense model's answers to the questions that the repair will learn from."""

        def build(folder: Path) -> dict[str, Any]:
            model = self._load(self.folder)
            encoder, samples = self._repair_samples(model, spec)
            targets = dense_targets(
                model.module,
                samples,
                pad_id=encoder.pad_id,
                temperature=spec.temperature,
                batch_size=self.ctx.smaller(spec.micro_batch_size),
                ctx=self.ctx,
            )
            if self.ctx.rank == 0:
                save_targets(targets, folder / TARGETS_FILE)
            return {}

        return self._run("teacher", _there(self.keys.teacher), build)

    def _repair_samples(
        self, model: VisionLanguageModel, spec: RepairSpec
    ) -> tuple[Encoder, Encoded]:
        """As many samples as the steps will see, or all there are if those are fewer."""
        assert spec.dataset is not None, "the plan fills it in"
        encoder = Encoder(model)
        return encoder, Encoded(
            encoder,
            spec.dataset,
            count=spec.num_steps * spec.batch_size,
            length=spec.sequence_length,
            seed=self.job.seed,
            or_all=True,
        )

    def _evaluate(self, weights: Weights, folder: Path) -> list[Score]:
        scores = []
        for spec in self.job.evaluate:
            stage = self._benchmark(spec, folder, self.keys.evaluate[weights, spec.label])
            for metric in [stage.info, *stage.info["also"]]:
                measured = {name: metric[name] for name in SCORE_FIELDS}
                scores.append(Score(weights=weights, benchmark=spec.label, **measured))
            self.counted = stage.info["counted"]
        return scores

    def _benchmark(self, spec: BenchmarkSpec, folder: Path, key: str) -> Stage:
        def build(output: Path) -> dict[str, Any]:
            model = self._load(folder)
            return evaluate(model, spec, self.ctx, output) | {"counted": count_sparsity(model)}

        return self._run("evaluate", key, build)

    def _run(self, name: str, key: str, build: Callable[[Path], dict[str, Any]]) -> Stage:
        stage = run_stage(self.ctx, name, key, build)
        self.stages.append(stage)
        return stage

    def _load(self, folder: Path) -> VisionLanguageModel:
        with self.ctx.timed("load"):
            dtype = self.job.model.dtype
            return load_model(
                folder,
                device=self.ctx.device,
                dtype=getattr(torch, dtype) if dtype else None,
                trust_remote_code=self.job.model.trust_remote_code,
            )

    def _environment(self) -> dict[str, Any]:
        peaks = self.ctx.gather(_peak_memory_gib(self.ctx.device))
        on_gpu = self.ctx.device.type == "cuda"
        return {
            "peak_memory_gib": max(peaks),
            "device": torch.cuda.get_device_name(self.ctx.device) if on_gpu else "cpu",
            "cpu": _cpu_name(),
            "num_workers": self.ctx.world,
            "warnings": "; ".join(self.ctx.warnings) or None,
        }


def _there(key: str | None) -> str:
    """The key of a stage that this job is known to have."""
    assert key is not None
    return key


def _facts_of_pruning(pruned: Stage) -> dict[str, Any]:
    layers = pruned.info["layers"]
    dampings = [layer["damping"] for layer in layers if layer["damping"] is not None]
    errors = [layer["layer_error"] for layer in layers if layer["layer_error"] is not None]
    ratios = [ratio for layer in layers if (ratio := _tokens_per_input(layer)) is not None]
    return {
        "tokens_per_input_min": min(ratios, default=None),
        "damping_max": max(dampings, default=None),
        "layer_error_mean": fmean(errors) if errors else None,
    }


def _tokens_per_input(layer: dict[str, Any]) -> float | None:
    """Of a layer's report; below 1 its Gram matrix has not full rank."""
    tokens = layer["tokens"]
    return sum(tokens.values()) / layer["num_inputs"] if tokens else None


def _hash_of_weights(storage: Storage, path: str) -> str:
    """Of a published model folder: equal where every weight is, bit for bit."""
    files = (storage.read_marker(path) or {})["files"]
    return content_key(
        {
            name: files[name]["sha256"]
            for name in files
            if name.startswith("model") and name.endswith(".safetensors")
        }
    )


def _costs(stages: list[Stage]) -> dict[str, Any]:
    """What each activity took when its stage was built, and what this attempt built itself."""
    parts = {"load": 0.0, "calibrate": 0.0, "export": 0.0}
    own = dict.fromkeys(STAGES, 0.0)
    for stage in stages:
        rest = stage.seconds["total"]
        for part in parts:
            parts[part] += stage.seconds.get(part, 0.0)
            rest -= stage.seconds.get(part, 0.0)
        own[stage.name] += rest
    seconds = parts | {name: own[name] for name in ("prune", "evaluate")}
    seconds["allocate"] = own["score"] + own["allocate"]
    seconds["repair"] = own["repair"] + own["teacher"]
    seconds["calibrate"] += own["statistics"]
    seconds["allocate"] += own["bank"]
    return {
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "seconds_computing": sum(s.seconds["total"] for s in stages if not s.cached),
        "stages": json.dumps(
            [
                {"stage": s.name, "key": s.key, "seconds": s.seconds["total"], "cached": s.cached}
                for s in stages
            ]
        ),
    }


def _cpu_name() -> str:
    """Rounding differs between kinds of CPU: equal bits are promised on one kind only."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory_gib(device: torch.device) -> float:
    """Of this process: GPU memory on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
