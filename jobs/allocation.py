"""How the zeros are shared out among the layers, as a person writes it under `grid.allocation`."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class AllocationOptions(BaseModel):
    """What every allocation has: its name, and what it has to look at."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    needs_data: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False
    """Whether it reads the dense model's statistics, which the grid computes once."""


class UniformSpec(AllocationOptions):
    """Every layer of a tower gets the tower's sparsity."""

    name: Literal["uniform"] = "uniform"
    needs_data: ClassVar[bool] = False


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
    needs_statistics: ClassVar[bool] = True


class ATPSpec(AllocationOptions):
    """Sparsity grows from block to block by one step, arXiv:2502.14770."""

    name: Literal["atp"] = "atp"
    slope: float | Literal["search"] = "search"
    """Sparsity added per block (the paper's beta). `search`: that of the least calibration loss."""
    num_slopes: int = Field(default=10, ge=2)
    """How many slopes are tried, evenly spaced from 0 (uniform) to below the steepest there is."""
    needs_statistics: ClassVar[bool] = True


class ECoFLaPSpec(BudgetedSpec):
    """Keep more where a little noise in the weights moves the loss more, arXiv:2310.02998."""

    name: Literal["ecoflap"] = "ecoflap"
    noise: float = Field(default=1e-3, gt=0)
    """Standard deviation of the noise that is added to, and taken from, a layer's weights."""
    num_samples: int = Field(default=32, ge=1)
    """Calibration samples whose loss is measured; at most as many as there are."""
    cap: float = Field(default=0.1, gt=0)
    """No layer's sparsity is above the average by more than this."""


class ModuleDropSpec(BudgetedSpec):
    """Keep more of an attention or MLP whose removal costs more, as MoPE-CLIP (CVPR 2024)."""

    name: Literal["module_drop"] = "module_drop"
    spread: float = Field(default=0.08, ge=0, lt=0.5)
    """The sparsest and the densest module differ by twice this."""


AllocationSpec = Annotated[
    UniformSpec | OWLSpec,
    Field(discriminator="name"),
]
