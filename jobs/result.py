"""What a job leaves behind: its scores and the facts of how they came about."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Weights = Literal["dense", "pruned", "repaired"]
"""Which weights a score was measured on."""


@dataclass(frozen=True)
class Score:
    """One metric on one benchmark, with its uncertainty."""

    weights: Weights
    benchmark: str
    metric: str
    score: float
    """On the metric's own scale; exact match is a fraction, 0 to 1."""
    score_low: float | None
    score_high: float | None
    """95% confidence interval; null where the metric has none."""
    num_items: int


@dataclass(frozen=True)
class JobResult:
    """The outcome of one job. A failed one, and one stopped early, has an error and no scores."""

    job_key: str
    status: Literal["complete", "failed", "stopped"]
    scores: tuple[Score, ...] = ()
    error: str | None = None
    error_kind: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Columns beside the job's own settings, by name: see `orchestrator.leaderboard.SCHEMA`."""

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> "JobResult":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**value, "scores": tuple(Score(**score) for score in value["scores"])})
