"""What calibration remembers of one input tensor: raw sums, so that they can be added.

One `Statistics` serves all layers that read the same tensor (q, k and v), and every method derives
what it needs from it. Text and visual tokens are kept in two of them.

Shape letters: I input features, T tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.errors import NumericError


def all_finite(tensor: Tensor) -> bool:
    """Like `isfinite().all()`, in one pass that allocates nothing. A NaN becomes both extremes."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


@dataclass
class Statistics:
    """Sums over the tokens seen so far. Two of them add up to those of all their tokens."""

    gram_II: Tensor
    """Sum of x xᵀ, (I, I). Float32; float64 while calibration still adds to it."""
    sum_I: Tensor
    """Sum of x. Float64, (I,)."""
    num_tokens: float = 0
    """A fraction only after scaling."""
    num_sequences: float = 0

    @classmethod
    def empty(
        cls,
        num_inputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Statistics":
        """Of no tokens. The Gram is summed in `dtype`."""
        return cls(
            torch.zeros(num_inputs, num_inputs, dtype=dtype, device=device),
            torch.zeros(num_inputs, dtype=torch.float64, device=device),
        )

    @property
    def input_norm_I(self) -> Tensor:
        """The 2-norm of each input over all tokens. Float32, (I,)."""
        return self.gram_II.diagonal().sqrt()

    @property
    def mean_I(self) -> Tensor:
        """The mean of each input over all tokens. Float64, (I,)."""
        return self.sum_I / self.num_tokens

    @torch.no_grad()
    def update(self, x_TI: Tensor, num_sequences: int) -> None:
        """Add the tokens of `num_sequences` sequences. Many tokens a call are faster than few.

        A product of two 16-bit numbers is exact in fp32, so nothing is lost by multiplying in the
        input's own type while summing in fp32.
        """
        if x_TI.ndim != 2 or x_TI.shape[1] != len(self.sum_I):
            raise ValueError(
                f"tokens have shape {tuple(x_TI.shape)}; expected (T, {len(self.sum_I)}). "
                "Flatten (sequences, tokens, inputs) and leave out padding"
            )
        if x_TI.is_cuda and x_TI.dtype in (torch.float16, torch.bfloat16):
            self.gram_II += torch.mm(x_TI.T, x_TI, out_dtype=torch.float32)
        else:
            x = x_TI.float()
            self.gram_II += x.T @ x
        self.sum_I += x_TI.sum(dim=0, dtype=torch.float32)  # in float64, half a Gram's time
        self.num_tokens += len(x_TI)
        self.num_sequences += num_sequences

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both sets of sequences, as if one worker had seen them all."""
        return Statistics(
            self.gram_II + other.gram_II,
            self.sum_I + other.sum_I,
            self.num_tokens + other.num_tokens,
            self.num_sequences + other.num_sequences,
        )

    def scaled(self, weight: float) -> "Statistics":
        """As if each token had been seen `weight` times, in as many sequences as before."""
        return Statistics(
            self.gram_II * weight, self.sum_I * weight, self.num_tokens * weight, self.num_sequences
        )

    def check_finite(self, where: str) -> None:
        """Raise NumericError for a NaN, an infinity, or for no tokens at all."""
        if self.num_tokens == 0:
            raise NumericError(f"{where}: no token reached this input during calibration")
        for name, tensor in (("gram", self.gram_II), ("sum", self.sum_I)):
            if not all_finite(tensor):
                num_bad = int((~tensor.isfinite()).sum())
                raise NumericError(
                    f"{where}: {num_bad} of {tensor.numel()} entries of the input {name} are NaN "
                    f"or infinite after {self.num_tokens} tokens. Calibrate in bfloat16 or float32"
                )

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file. `from_tensors` reads it back bit for bit."""
        counts = torch.tensor([self.num_tokens, self.num_sequences], dtype=torch.float64)
        return {"gram_II": self.gram_II, "sum_I": self.sum_I, "counts": counts}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Statistics":
        num_tokens, num_sequences = tensors["counts"].tolist()
        return cls(tensors["gram_II"], tensors["sum_I"], num_tokens, num_sequences)


def mix(parts: Mapping[str, Statistics], weights: Mapping[str, float]) -> Statistics:
    """One statistic out of several modalities' of the same sequences, each token weighted.

    Weights of 1 everywhere give the plain sum, in which visual tokens outnumber text tokens; a
    weight of 1 / num_tokens gives each modality an equal say. A part of weight 0 is left out.

    Raises:
        ValueError: a weight for a part that does not exist or without a weight, a weight that is
            negative or not finite, or no weight above 0.
    """
    if parts.keys() != weights.keys():
        raise ValueError(f"weights for {sorted(weights)}, but statistics of {sorted(parts)}")
    if not all(math.isfinite(w) and w >= 0 for w in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights are {dict(weights)}; each is 0 or more, and one is above 0")
    scaled = [parts[name].scaled(weight) for name, weight in weights.items() if weight]
    total = scaled[0]
    for part in scaled[1:]:
        total = total + part
    total.num_sequences = max(part.num_sequences for part in scaled)
    return total
