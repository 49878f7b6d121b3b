"""The settings of each pruning method, as a person writes them under `prune.method`."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class MethodOptions(BaseModel):
    """What every method has: its name, what it needs, and the polish after it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    saliency_needs_statistics: ClassVar[bool] = True
    solves_for_weights: ClassVar[bool] = False

    reconstruct: Literal["none", "pcg"] = "none"
    """`pcg`: afterwards solve for all kept weights at once so that the layer's outputs come as near
    the dense ones as the mask allows (masked conjugate gradients)."""
    reconstruct_iterations: int = Field(default=10, ge=1)
    """Steps of conjugate gradients. One costs O * I^2 multiplications."""
    reconstruct_damping: float = Field(default=0.01, gt=0)
    """Weight of staying near the trained weights, as a share of each input's own energy. Raise it
    to 0.1 where there are fewer calibration tokens than 4 times the inputs."""

    @property
    def updates_weights(self) -> bool:
        """Whether kept weights change: then a repair needs the dense model as its teacher."""
        return self.solves_for_weights or self.reconstruct != "none"

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration has to run."""
        return self.saliency_needs_statistics or self.reconstruct != "none"


class DenseSpec(MethodOptions):
    """Prune nothing, whatever the target: the row that the others are compared with."""

    name: Literal["dense"] = "dense"
    reconstruct: Literal["none"] = "none"
    saliency_needs_statistics: ClassVar[bool] = False


class MagnitudeSpec(MethodOptions):
    """Drop the weights that are smallest."""

    name: Literal["magnitude"] = "magnitude"
    compare: Literal["row", "layer"] = "layer"
    """Who competes when unstructured: the inputs of one output feature, or the whole layer."""
    saliency_needs_statistics: ClassVar[bool] = False


class WandaSpec(MethodOptions):
    """Drop by |weight| times the norm of its input, arXiv:2306.11695."""

    name: Literal["wanda"] = "wanda"
    compare: Literal["row", "layer"] = "row"
    """Who competes when unstructured: the inputs of one output feature, or the whole layer."""


class SparseGPTSpec(MethodOptions):
    """Drop column by column, and let the later columns make up for it, arXiv:2301.00774."""

    name: Literal["sparsegpt"] = "sparsegpt"
    mode: Literal["improved", "reference"] = "improved"
    """`reference` reproduces the published code: it drops one weight too many per panel, and ties,
    and damps by the mean of all inputs. It fixes `threshold`, `damping_rule` and `block_size`."""
    threshold: Literal["panel", "row", "layer"] = "panel"
    """Who competes when unstructured: all weights of one panel of columns (the paper), the rest of
    one output feature's row, or the rest of the layer."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal. Where that does not do, 0.1 and 1 are tried."""
    damping_rule: Literal["normalised", "reference"] = "normalised"
    """A share of each input's own energy, or (the paper) of the mean over the inputs, which drowns
    ordinary inputs where a few loud ones dominate."""
    block_size: int = Field(default=128, ge=1)
    """Columns in a panel."""
    solves_for_weights: ClassVar[bool] = True


MethodSpec = Annotated[
    DenseSpec | MagnitudeSpec | WandaSpec | SparseGPTSpec, Field(discriminator="name")
]
