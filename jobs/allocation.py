"""How the zeros are shared out among the layers, as a person writes it under `grid.allocation`."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AllocationOptions(BaseModel):
    """What every allocation has: its name, and what it has to look at."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    measure_options: ClassVar[frozenset[str] | None] = None
    """Which options the scores depend on that it allocates by: the grid measures them once, for
    all sparsities. None: it has no scores."""

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration samples at all."""
        return True

    @property
    def needs_statistics(self) -> bool:
        """Whether it reads the dense model's statistics, which the grid computes once."""
        return False


class UniformSpec(AllocationOptions):
    """Every layer of a tower gets the tower's sparsity."""

    name: Literal["uniform"] = "uniform"

    @property
    def needs_data(self) -> bool:
        return False


class BudgetedSpec(AllocationOptions):
    """What allocations have that can move zeros from one tower to another."""

    budget: Literal["tower", "model"] = "tower"
    """`tower`: each tower keeps the sparsity asked of it. `model`: only the total over the pruned
    towers is kept, and zeros may move from one to the other."""


class OWLSpec(BudgetedSpec):
    """Keep more of the blocks with more outliers among |weight| times input, arXiv:2310.05175."""

    name: Literal["owl"] = "owl"
    outlier_multiple: float = Field(default=5.0, gt=0)
    """A product this many times the layer's mean is an outlier (the paper's M)."""
    spread: float = Field(default=0.08, ge=0, lt=0.5)
    """The sparsest and the densest block differ by twice this (the paper's lambda)."""
    measure_options: ClassVar[frozenset[str] | None] = frozenset({"outlier_multiple"})

    @property
    def needs_statistics(self) -> bool:
        return True


class ATPSpec(AllocationOptions):
    """Sparsity grows from block to block by one step, arXiv:2502.14770."""

    name: Literal["atp"] = "atp"
    slope: float | Literal["search"] = "search"
    """Sparsity added per block (the paper's beta). `search`: that of the least calibration loss
    after Wanda, in each tower."""
    num_slopes: int = Field(default=10, ge=2)
    """How many are tried, evenly spaced from 0 (uniform) to just below the steepest there is."""

    @property
    def needs_data(self) -> bool:
        return self.slope == "search"

    @property
    def needs_statistics(self) -> bool:
        return self.slope == "search"


def steepest(sparsity: float, num_blocks: int) -> float:
    """The largest slope for which no block's sparsity leaves [0, 1]."""
    return 2 * min(sparsity, 1 - sparsity) / (num_blocks - 1) if num_blocks > 1 else 0.0


class ECoFLaPSpec(BudgetedSpec):
    """Keep more where a little noise in the weights moves the loss more, arXiv:2310.02998."""

    name: Literal["ecoflap"] = "ecoflap"
    noise: float = Field(default=1e-3, gt=0)
    """Standard deviation of the noise that is added to, and taken from, a layer's weights."""
    num_samples: int = Field(default=32, ge=1)
    """Calibration samples whose loss is measured; at most as many as calibration has."""
    granularity: Literal["block", "layer"] = "block"
    """`block`: the layers of a block add up their scores and share a sparsity."""
    cap: float = Field(default=0.1, gt=0)
    """No layer's sparsity is above the average by more than this."""
    measure_options: ClassVar[frozenset[str] | None] = frozenset({"noise", "num_samples"})


class ModuleDropSpec(BudgetedSpec):
    """Keep more of an attention or MLP whose removal costs more, as MoPE-CLIP (CVPR 2024)."""

    name: Literal["module_drop"] = "module_drop"
    spread: float = Field(default=0.08, ge=0, lt=0.5)
    """The sparsest and the densest module differ by twice this."""
    measure_options: ClassVar[frozenset[str] | None] = frozenset()


class SlimLLaVASpec(BudgetedSpec):
    """Search: evolve the sparsity of each block by its loss on a few samples, arXiv:2503.15369.

    `workers/search.py` says where the paper is silent and what we do there. Candidates are pruned
    from the dense model's statistics: under `propagate: dense` the winner is exported as judged.
    """

    name: Literal["slimllava"] = "slimllava"
    genes: Literal["block", "layer"] = "block"
    """What has a sparsity of its own. A model has about seven times as many layers as blocks: give
    them more generations, or expect little."""
    step: float = Field(default=0.05, gt=0, lt=1)
    """Sparsities tried lie whole steps from the one asked for."""
    reach: float = Field(default=0.2, gt=0, lt=1)
    """How far from it at most."""
    num_samples: int = Field(default=64, ge=2)
    """Samples that candidates are judged on."""
    judged_on: Literal["calibration", "unseen"] = "calibration"
    """`unseen`: samples that the bank was not calibrated on. SparseGPT's weights are fitted to the
    others, on which a candidate's loss says less."""
    early_samples: int = Field(default=16, ge=0)
    """On how many of them a candidate is tried first; the worse half goes no further. 0: none."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per forward pass."""
    population: int = Field(default=50, ge=2)
    """Candidates in a generation: the best of the last one, and their children."""
    survivors: int = Field(default=10, ge=1)
    """The best, which live on and have children."""
    generations: int = Field(default=20, ge=0)
    """After the first, which holds uniform, OWL, slopes as ATP's, and random ones."""
    crossover: float = Field(default=0.5, ge=0, le=1)
    """Share of children with two parents."""
    mutation: float = Field(default=0.1, ge=0, le=1)
    """Chance of each gene of a child to move by a step; one moves always."""
    eta: float | None = Field(default=None, ge=0)
    """Weight of the generalization term, the norm of the pruned weights over the dense ones'.
    Default: as much as makes it equal to the loss, for the uniform allocation. 0: none."""
    projector_every: int = Field(default=5, ge=0)
    """Generations between two tunings of the projector for the survivors. 0: never."""
    projector_steps: int = Field(default=20, ge=1)
    """Gradient steps of a tuning, each on one batch, the survivors' mean loss."""
    projector_learning_rate: float = Field(default=1e-5, gt=0)

    @property
    def needs_statistics(self) -> bool:
        return True

    @model_validator(mode="after")
    def _fits(self) -> "SlimLLaVASpec":
        if self.survivors >= self.population:
            raise ValueError(
                f"survivors is {self.survivors} of a population of {self.population}: nobody is "
                "left to be a child"
            )
        if self.early_samples >= self.num_samples:
            raise ValueError(
                f"early_samples is {self.early_samples}, not fewer than the {self.num_samples} "
                "samples of num_samples. 0 turns early rejection off"
            )
        if self.step > self.reach:
            raise ValueError(f"step is {self.step}, beyond the reach of {self.reach}")
        return self


AllocationSpec = Annotated[
    UniformSpec | OWLSpec | ATPSpec | ECoFLaPSpec | ModuleDropSpec | SlimLLaVASpec,
    Field(discriminator="name"),
]
