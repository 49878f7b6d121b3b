"""The settings of each pruning method, as a person writes them under `prune.method`."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IS_ATTENTION = re.compile(r"\battn|_attn|attention")
"""Found in the names of attention's layers in all families: self_attn.q_proj, attention.query."""


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

    bias: Literal["keep", "compensate"] = "keep"
    """`compensate`: afterwards a layer's bias takes up what the pruned weights change in the mean
    of its outputs. Layers without a bias stay as they are: most language towers have none."""

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration has to run."""
        return (
            self.saliency_needs_statistics
            or self.reconstruct != "none"
            or self.bias == "compensate"
        )

    def of_layer(self, name: str) -> "MethodOptions":
        """How it is applied to a layer, by the layer's name in the model."""
        return self


class DenseSpec(MethodOptions):
    """Prune nothing, whatever the target: the row that the others are compared with."""

    name: Literal["dense"] = "dense"
    reconstruct: Literal["none"] = "none"
    bias: Literal["keep"] = "keep"
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
    and damps by the mean of all inputs. It ignores `budget` and `damping_rule`."""
    budget: Literal["layer", "panel"] = "layer"
    """Unstructured: how many weights each panel of columns loses. `panel`: the same fraction (the
    paper). `layer`: as many as would go if the whole layer were ranked, fewer in the last panels,
    whose loss no later column makes up for."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal. Where that does not do, 0.1 and 1 are tried. Raise it to 0.1
    where there are fewer calibration tokens than 4 times the inputs."""
    damping_rule: Literal["normalised", "reference"] = "normalised"
    """A share of each input's own energy, or (the paper) of the mean over the inputs, which drowns
    ordinary inputs where a few loud ones dominate."""
    block_size: int = Field(default=128, ge=1)
    """Columns in a panel."""
    solves_for_weights: ClassVar[bool] = True


class RIASpec(MethodOptions):
    """Drop by a weight's share of its row and of its column, times its input, ICLR 2024."""

    name: Literal["ria"] = "ria"
    activation_power: float = Field(default=0.5, ge=0)
    """Exponent of the input's norm; 0 leaves the inputs out."""
    compare: Literal["row", "layer"] = "layer"
    """Who competes when unstructured: the inputs of one output feature, or the whole layer."""


class DSnoTSpec(MethodOptions):
    """Swap dropped weights for kept ones until an output's mean is right, arXiv:2310.08915.

    SparseSwaps does the same by the exact squared error, and better.
    """

    name: Literal["dsnot"] = "dsnot"
    initial: Literal["wanda", "magnitude", "ria", "sparsegpt", "admm", "sparseswaps"] = "wanda"
    """Whose mask it starts from: that method's, as it is by default, but by row where it can be.
    What to drop instead is chosen by Wanda's saliency whatever the start."""
    layers: Literal["all", "attention"] = "all"
    """Where it swaps; elsewhere the start's mask stays. The published code does so in attention."""
    max_cycles: int = Field(default=50, ge=0)
    """Swaps per output feature at most."""
    stop_below: float = Field(default=0.1, ge=0)
    """An output whose mean, summed over a sequence's tokens, is off by less is left alone."""
    variance_power: float = Field(default=1.0, ge=0)
    """How much inputs that vary are avoided when choosing what to bring back."""
    same_sign: bool = True
    """Refuse a swap that overshoots. The published code means to, and does so only for N:M."""

    @property
    def start(self) -> MethodOptions:
        """Who gives the mask that it starts from."""
        starts = (
            WandaSpec(),
            MagnitudeSpec(compare="row"),
            RIASpec(compare="row"),
            SparseGPTSpec(),
            ADMMSpec(compare="row"),
            SparseSwapsSpec(),
        )
        return next(spec for spec in starts if spec.name == self.initial)

    def of_layer(self, name: str) -> "DSnoTSpec":
        if self.layers == "all" or IS_ATTENTION.search(name):
            return self
        return self.model_copy(update={"max_cycles": 0})


class ADMMSpec(MethodOptions):
    """Solve for the weights and mask them, in turn, ever more strictly, arXiv:2401.02938."""

    name: Literal["admm"] = "admm"
    compare: Literal["row", "layer"] = "layer"
    """Who competes when unstructured: the inputs of one output feature, or the whole layer."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Hessian, as a share of each input's own energy."""
    iterations: int = Field(default=20, ge=1)
    """Solves in all."""
    masking_iterations: int = Field(default=15, ge=1)
    """Over how many of them the mask tightens to the target; at most `iterations`."""
    rho: float = Field(default=1.0, gt=0)
    """How strongly the solution is pulled to the masked weights."""
    solves_for_weights: ClassVar[bool] = True

    @model_validator(mode="after")
    def _masks_before_it_ends(self) -> "ADMMSpec":
        if self.masking_iterations > self.iterations:
            raise ValueError(
                f"masking_iterations is {self.masking_iterations}, more than the "
                f"{self.iterations} iterations"
            )
        return self


class SparseSwapsSpec(MethodOptions):
    """Swap a dropped weight for a kept one as long as the layer's squared error falls."""

    name: Literal["sparseswaps"] = "sparseswaps"
    max_swaps: int = Field(default=100, ge=1)
    """Swaps per output feature at most."""
    candidates: int = Field(default=32, ge=1)
    """Unstructured: pairs are tried among this many of the most promising on either side."""


MethodSpec = Annotated[
    DenseSpec
    | MagnitudeSpec
    | WandaSpec
    | RIASpec
    | DSnoTSpec
    | SparseGPTSpec
    | ADMMSpec
    | SparseSwapsSpec,
    Field(discriminator="name"),
]
