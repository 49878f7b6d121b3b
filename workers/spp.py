"""SPP: scale the weights that are left, so that what is zero stays zero by construction.

    y = x W_effᵀ + b        W_eff = W ⊙ (1 + s · repeat(A) ⊙ c)        s = alpha / rank

A row of A scales the inputs of O / R consecutive rows of W, c each output. No mask is needed; a
kept weight that is exactly 0 stays 0 too.

Shape letters: O output features, I input features, R rank (rows of A).

Source: SPP, arXiv:2405.16057, section 3; which rows share one of A, and the start (A as in LoRA, c
at zero), as in its released code.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from workers.lora import ReweightedLinear


class SPPLinear(nn.Module):
    """Takes the place of a linear layer, whose parameters it shares."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        weight_OI = linear.weight
        self.weight, self.bias = weight_OI, linear.bias
        self.scale = alpha / rank
        self.A_RI = nn.Parameter(weight_OI.new_empty(rank, weight_OI.shape[1]))
        self.column_O1 = nn.Parameter(weight_OI.new_zeros(weight_OI.shape[0], 1))
        nn.init.kaiming_uniform_(self.A_RI, a=math.sqrt(5))
        group_O = torch.arange(len(weight_OI), device=weight_OI.device) * rank // len(weight_OI)
        self.register_buffer("group_O", group_O, persistent=False)
        """The row of A that each row of W goes with."""

    group_O: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return ReweightedLinear.apply(x, self.bias, self, self.A_RI, self.column_O1)  # type: ignore[no-any-return,no-untyped-call]

    def effective_weight(self, *parameters: Tensor) -> Tensor:
        A_RI, column_O1 = parameters
        factor_OI = (column_O1 * self.scale) * A_RI[self.group_O]
        return torch.addcmul(self.weight, self.weight, factor_OI)

    def gradients(self, grad_OI: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        A_RI, column_O1 = parameters
        grad_OI *= self.weight * self.scale
        grad_A = torch.zeros_like(A_RI).index_add_(0, self.group_O, column_O1 * grad_OI)
        grad_column = (A_RI[self.group_O] * grad_OI).sum(dim=1, keepdim=True)
        return grad_A, grad_column


def add_spp(model: nn.Module, ranks: dict[str, int], *, alpha: float, seed: int) -> None:
    """Give the named linear layers SPP's parameters, in place.

    Args:
        ranks: layer name to R.
        seed: of the initial A.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, rank in ranks.items():
            linear: Any = model.get_submodule(name)
            model.set_submodule(name, SPPLinear(linear, rank=rank, alpha=alpha))


@torch.no_grad()
def merge_spp(model: nn.Module, names: list[str]) -> None:
    """Write W_eff into the layers, in place: plain nn.Linear again, zeros where they were."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SPPLinear)
        weight_OI = layer.effective_weight(layer.A_RI, layer.column_O1)
        outputs, inputs = weight_OI.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
