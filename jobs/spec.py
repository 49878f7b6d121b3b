"""What a job is: one point of a sweep's grid, frozen, resolved, with a key.

Every setting stands here once, with its default and its meaning. A person writes some of them in
YAML (`jobs/sweep.py`); what runs is always a `JobSpec`. Values that cannot change a number (where
a file lies, how many CPUs) are left out of the key.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from jobs.allocation import AllocationSpec, UniformSpec
from jobs.methods import MethodSpec
from jobs.pattern import Pattern

Tower = Literal["vision", "language"]
TOWERS: tuple[Tower, ...] = ("vision", "language")


Part = Literal["vision", "language", "projector"]


class Spec(BaseModel):
    """Frozen; an unknown key is an error, and so is a NaN or an infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _shorthand(field: str) -> BeforeValidator:
    """Let a bare string stand for a mapping with only `field` set."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Rank = Annotated[int, Field(ge=1)]


class ModelSpec(Spec):
    name: str = Field(min_length=1)
    """`demo`, a folder in Hugging Face layout, or a hub name such as `org/model`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Off unless you have read it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What to compute in. Default: float32 on a CPU, bfloat16 on a GPU. Solvers use float32."""
    fingerprint: str | None = None
    """Hash of the weights and the config. Filled in by the plan."""

    @property
    def label(self) -> str:
        """Short name for tables: a folder's own name, a hub name as it is."""
        return self.name.rstrip("/").rsplit("/", 1)[-1] if self.name[0] in "/.~" else self.name


class DatasetSpec(Spec):
    format: Literal["easy-vqa", "easy-vqa-open", "python-docs", "llava", "vqa", "text"]
    """`easy-vqa` (its part `easy-vqa-open` asks for colours and shapes only, never yes or no) and
    `python-docs` need no download. `llava`: a JSON list of {image,
    conversations}. `vqa`: a JSON list (or JSON lines) of {image, question, answer}. `text`: a text
    file or a folder of them."""
    path: str | None = None
    """File (llava, vqa) or file or folder (text). Relative to the sweep file."""
    images: str | None = None
    """Folder that the image names are relative to; default: the folder of `path`."""
    fingerprint: str | None = None
    """Hash of the annotations. Filled in by the plan."""

    @property
    def label(self) -> str:
        """Short name for tables: the format, or the file's stem."""
        stem = self.path.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0] if self.path else ""
        return stem or self.format

    @property
    def is_text(self) -> bool:
        """Plain text without images or answers."""
        return self.format in ("text", "python-docs")


Dataset = Annotated[DatasetSpec, _shorthand("format")]


class CalibrationSpec(Spec):
    dataset: Dataset = DatasetSpec(format="easy-vqa")
    num_samples: int = Field(default=128, ge=1)
    """Image-text pairs (or text windows) run through the model. More steadies the Hessian."""
    sequence_length: int = Field(default=512, ge=8)
    """Tokens per window of plain text."""
    propagate: Literal["pruned", "true_sequential", "dense"] = "pruned"
    """Which activations a layer is calibrated on. `pruned`: those that passed through the pruned
    blocks before its own (the papers). `true_sequential`: also through the pruned layers before it
    in its own block; each block runs once rather than twice, holding the inputs of the layer in
    work for all samples. `dense`: the dense model's, computed once for the whole grid."""
    tokens: Literal["all", "text", "atv"] = "all"
    """Which tokens count in the language tower: `all`; `text`; or `atv`, the text and in each block
    the visual tokens that it changes most (arXiv:2603.16001). The vision tower uses all its own."""
    atv_alpha: float = Field(default=1.0, gt=0)
    """`atv`: a sample adds min(1, alpha * mean drift) visual tokens per text token."""
    text_weight: float = Field(default=1.0, ge=0)
    """Weight of a text token in the language tower's statistics; 0 leaves text out. Only its ratio
    to `visual_weight` matters, except to DSnoT, whose `stop_below` is absolute."""
    visual_weight: float = Field(default=1.0, ge=0)
    """Weight of a visual token in the language tower's statistics; 0 leaves them out."""

    @model_validator(mode="after")
    def _tokens_fit_together(self) -> "CalibrationSpec":
        if self.tokens == "text" and self.visual_weight != 1:
            raise ValueError("`tokens: text` leaves visual tokens out, so visual_weight has no say")
        if self.tokens != "atv" and self.atv_alpha != 1:
            raise ValueError(f"atv_alpha is for `tokens: atv`, and tokens is {self.tokens!r}")
        if not any(self.weights.values()):
            raise ValueError(f"tokens {self.tokens!r} with these weights leaves no token to count")
        if self.dataset.is_text and self.text_weight == 0:
            raise ValueError(f"{self.dataset.label} has only text tokens, and text_weight is 0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Of a token in the language tower's statistics, by modality."""
        visual_weight = 0.0 if self.tokens == "text" else self.visual_weight
        return {"text": self.text_weight, "visual": visual_weight}

    @property
    def tokens_label(self) -> str:
        """For tables: `all`, `text`, `visual`, `atv`; with weights as `all 1:0.05`, text first."""
        if self.text_weight == 0:
            return "visual" if self.tokens == "all" else f"{self.tokens} visual"
        text, visual = self.weights.values()
        ratio = "" if visual in (text, 0) else f" {text:g}:{visual:g}"
        alpha = f" alpha {self.atv_alpha:g}" if self.atv_alpha != 1 else ""
        name = "text" if visual == 0 else self.tokens
        return name + alpha + ratio

    def unmixed(self) -> "CalibrationSpec":
        """What the dense model's statistics depend on: not how text and visual ones are mixed."""
        tokens: Literal["all", "atv"] = "atv" if self.tokens == "atv" else "all"
        changes = {"propagate": "dense", "tokens": tokens, "text_weight": 1.0, "visual_weight": 1.0}
        return self.model_copy(update=changes)


class RefineSpec(Spec):
    """Local reconstruction: train a pruned block's kept weights until it answers as before."""

    unit: Literal["block", "submodule"] = "block"
    """Whose output is to match: the block's, or its attention's and its MLP's, one by one."""
    num_steps: int = Field(default=50, ge=1)
    """Optimizer steps per unit. A step sees up to 4 calibration batches."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam; falls linearly to zero."""


class PruneSpec(Spec):
    method: MethodSpec
    pattern: str = "unstructured"
    """`unstructured`, or `N:M`: N weights kept of every M consecutive inputs."""
    sparsity: dict[Tower, Fraction]
    """Fraction of zeros asked of each tower's layers. A tower not named keeps its weights."""
    allocation: AllocationSpec = UniformSpec()
    """How a tower's zeros are shared out among its layers."""

    refine: RefineSpec | None = None
    """Local reconstruction of each block, on the activations that passed the ones before it."""

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, value: str) -> str:
        return str(Pattern.parse(value))

    @property
    def needs_activations(self) -> bool:
        """Whether pruning, once it knows each layer's sparsity, runs calibration samples."""
        return self.method.needs_statistics or self.refine is not None


class RepairSpec(Spec):
    method: Literal["sparse_lora", "lora", "spp", "norms", "full"] = "sparse_lora"
    """`sparse_lora`: a low-rank update under the pruning mask, W_eff = (W + s BA) * M (RESSA,
    section 3). To compare with it: `spp`: scales what is left, W_eff = W * (1 + s A * c). `norms`:
    norms and biases only (PERP). `full`: every kept weight, and norms and biases. `lora`: a
    low-rank update without a mask, which fills the zeros again."""
    rank: Rank | dict[Part, Rank] = 8
    """Of the update; one for all, or one each: `{vision: 4, language: 8, projector: 2}`."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    projector: Literal["full", "lora", "frozen"] = "full"
    """How to train the projector, which is not pruned: its weights, a plain low-rank update of
    them (RESSA, for its Q-Former), or not at all."""
    num_steps: int = Field(default=200, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Samples per forward pass of one worker: bounds its memory."""
    sequence_length: int = Field(default=512, ge=8)
    """Tokens per window of plain text."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak; cosine to zero after the warm-up."""
    warmup_fraction: Fraction = 0.05
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, ge=0)
    """Longer gradients (over all trained weights) are scaled down to this length; 0: never."""
    distill: float = Field(default=0.1, ge=0, le=1)
    """Weight of the KL term to the dense model's answers; 1 - distill is the task loss's."""
    temperature: float = Field(default=1.0, gt=0)
    distill_hidden: float = Field(default=0.0, ge=0)
    """Weight of the relative squared error of the blocks' outputs to the dense model's, added to
    the rest."""
    teacher: Literal["auto", "cached", "live"] = "auto"
    """Where the dense model's answers come from. `cached`: computed once for the grid, the 64
    likeliest tokens and the mass of the rest; cheaper from the second job or epoch on, and without
    the dense weights in memory. `live`: run beside every step, exact over the whole vocabulary; it
    is the model itself without mask and adapters where `sparse_lora` repairs trained weights (no
    memory, a forward more a step), and a second model otherwise. `auto`: cached, unless
    `distill_hidden` or `ressa_compat` needs the live one."""
    ressa_compat: bool = False
    """The loss and the learning rate that RESSA's code has in fact: KL over all positions, prompt
    and padding included, divided by the batch size only and not times temperature squared; one
    step at 1e-6, then a constant rate. Not reproduced: fp16 with loss scaling (float32 or bfloat16
    here), and cross-entropy averaged by worker (over the whole batch here). Its other settings are
    `{rank: {vision: 4, language: 8, projector: 2}, projector: lora, learning_rate: 0.0001,
    max_gradient_norm: 0}` and 25,000 samples in one epoch."""
    dataset: Dataset | None = None
    """Default: the calibration's dataset."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    num_workers: int = Field(default=1, ge=1)
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints: what a kill costs at most."""

    @model_validator(mode="after")
    def _settings_agree(self) -> "RepairSpec":
        if self.teacher == "cached" and self.needs_live_teacher:
            what = "ressa_compat" if self.ressa_compat else "distill_hidden"
            raise ValueError(f"teacher: cached has no answers for {what}; use live, or auto")
        if self.method in ("norms", "full") and self.rank != 8:
            raise ValueError(f"rank has no effect on method {self.method}: leave it out")
        if self.projector == "lora" and self.rank_of("projector") is None:
            raise ValueError(
                "projector: lora needs a rank, as in rank: {language: 8, projector: 2}"
            )
        return self

    def rank_of(self, part: Part) -> int | None:
        """None where `rank` names ranks, but not this part's."""
        return self.rank.get(part) if isinstance(self.rank, dict) else self.rank

    @property
    def needs_live_teacher(self) -> bool:
        """Cached answers hold no hidden states, and nothing before the answer."""
        return self.distill_hidden > 0 or self.ressa_compat

    @property
    def has_live_teacher(self) -> bool:
        distils = self.distill > 0 or self.distill_hidden > 0
        return distils and (self.teacher == "live" or self.needs_live_teacher)

    @property
    def has_cached_teacher(self) -> bool:
        return self.distill > 0 and not self.has_live_teacher


class BenchmarkSpec(Spec):
    dataset: Dataset
    num_items: int | None = Field(default=None, ge=1)
    """Evenly spaced items of the test split; default: all."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Answers are cut here. Image benchmarks only."""
    sequence_length: int = Field(default=512, ge=8)
    """Tokens per window of plain text."""
    batch_size: int = Field(default=64, ge=1)
    answer_loss: bool = False
    """Also measure the cross-entropy of the right answers, nats per token: it tells models apart
    whose answers are all right or all wrong. Image benchmarks only."""

    @property
    def label(self) -> str:
        return self.dataset.label


class Resources(Spec):
    """What one Train worker gets. Changes no number, so it is not part of a job's key."""

    num_workers: int = Field(default=1, ge=1)
    """Train workers of a job without repair: calibration and evaluation are split over them."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """Also the number of threads torch uses in each worker."""
    gpus_per_worker: float = Field(default=0, ge=0)
    memory_gib_per_worker: float | None = Field(default=None, gt=0)
    stalled_after_minutes: float = Field(default=30, gt=0)
    """A worker without progress for so long (no sample, block or step finished) is ended, its
    stack told, and tried once more."""


class OnFailure(Spec):
    """What the failure of one job means for the others."""

    stop_after: int | None = Field(default=None, ge=1)
    """Start nothing more once so many jobs have failed. What runs is finished, and what was not
    started is run the next time. Default: never stop."""


def _on_failure(value: Any) -> Any:
    """`continue` is the default: run every job, whatever becomes of the others."""
    return {} if value == "continue" else value


class EarlyStop(Spec):
    """Asynchronous successive halving among jobs of one model, sparsity, pattern and repair.

    A pruned model is judged by its layers' error, then by an evaluation of a few items, before the
    full one and before any repair. A job that is stopped ends as a row of status `stopped`.
    """

    reduction: int = Field(default=3, ge=2)
    """At each signal one in so many goes on: the best of those that have come so far."""
    num_items: int = Field(default=64, ge=1)
    """Of the first benchmark, in the small evaluation. Left out where the full one is no larger."""

    @property
    def key(self) -> str:
        """A stopped job is run again under another rule."""
        return content_key(self.model_dump(mode="json"))


class RunPolicy(Spec):
    """How a sweep is run. Changes no number, so it is in no job's key."""

    on_failure: Annotated[OnFailure, BeforeValidator(_on_failure)] = OnFailure()
    """`continue`, or `{stop_after: 3}`."""
    max_share: float = Field(default=1.0, gt=0, le=1)
    """The most of the cluster's CPUs, GPUs and memory that this sweep takes at a time. One job may
    always run."""
    priority: int = 0
    """A run starts no further job while another of a higher priority, on the same cluster and with
    the same storage, has jobs that wait. What runs is left alone."""
    early_stop: EarlyStop | None = None
    """Default: every job runs to its end."""


class JobSpec(Spec):
    """One grid point. `prune` is None for the dense model, which is a job of its own."""

    sweep: str
    model: ModelSpec
    calibration: CalibrationSpec
    prune: PruneSpec | None = None
    repair: RepairSpec | None = None
    evaluate: tuple[BenchmarkSpec, ...]
    seed: int = 0
    resources: Resources = Resources()
    policy: RunPolicy = RunPolicy()

    @property
    def key(self) -> str:
        """Content hash, the same on every machine: 16 hex digits."""
        settings = self.model_dump(mode="json")
        without_effect = {"sweep", "resources", "policy"}
        if not self.is_calibrated:
            without_effect |= {"calibration"}
            if self.repair is None:
                without_effect |= {"seed"}
        kept = {name: value for name, value in settings.items() if name not in without_effect}
        return content_key(_without_locations(kept))

    @property
    def is_calibrated(self) -> bool:
        """Whether pruning looks at data at all: the dense model and uniform magnitude do not."""
        return self.prune is not None and (
            self.prune.needs_activations or self.prune.allocation.needs_data
        )

    @property
    def solves_from_statistics(self) -> bool:
        """Whether the method prunes by the dense model's statistics, computed once for the grid."""
        return (
            self.prune is not None
            and self.prune.method.needs_statistics
            and self.calibration.propagate == "dense"
        )

    @property
    def num_workers(self) -> int:
        return self.repair.num_workers if self.repair else self.resources.num_workers


def content_key(value: Any) -> str:
    """Hash of a JSON value: 16 hex digits of SHA-256 over its canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def settings_of(spec: Spec) -> Any:
    """The settings of a part of a job that can change its numbers, as a JSON value."""
    return _without_locations(spec.model_dump(mode="json"))


def _without_locations(value: Any) -> Any:
    """Replace what says where a model or dataset lies by what it contains (its fingerprint)."""
    if isinstance(value, dict):
        if value.get("fingerprint"):
            kept = {"fingerprint", "trust_remote_code", "dtype", "format"} & value.keys()
            return {name: value[name] for name in kept}
        return {name: _without_locations(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_without_locations(child) for child in value]
    return value
