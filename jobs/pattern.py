"""Which zeros are asked for: how many, and in what pattern.

`2:4` means that 2 of every 4 consecutive inputs are KEPT. Some tools count the dropped ones; for
2:4 and 4:8 that is the same.
"""

import re
from dataclasses import dataclass

_FORMS = "write 'unstructured', or N:M with 0 < N < M for N kept of every M, such as 2:4"


@dataclass(frozen=True)
class Pattern:
    """Zeros anywhere (both fields None), or `kept` weights of every `group` consecutive inputs."""

    kept: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kept is None and self.group is None:
            return
        if self.kept is None or self.group is None or not 0 < self.kept < self.group:
            raise ValueError(f"pattern keeps {self.kept} of every {self.group}: {_FORMS}")

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read what `str()` writes: "unstructured" or "2:4". ValueError for anything else."""
        if text == "unstructured":
            return cls()
        if not re.fullmatch(r"[0-9]+:[0-9]+", text):
            raise ValueError(f"unknown pattern '{text}': {_FORMS}")
        kept, group = map(int, text.split(":"))
        return cls(kept, group)

    def __str__(self) -> str:
        return "unstructured" if self.kept is None else f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float | None:
        """The one sparsity that an N:M pattern has; None for unstructured."""
        if self.kept is None or self.group is None:
            return None
        return 1 - self.kept / self.group

    def check_inputs(self, num_inputs: int, where: str) -> None:
        """Raise ValueError where the groups do not fill a layer's inputs exactly."""
        if self.group is not None and num_inputs % self.group:
            raise ValueError(
                f"{where}: pattern {self} needs a number of inputs divisible by {self.group}, and "
                f"this layer has {num_inputs}. Prune it unstructured, or leave it out"
            )


@dataclass(frozen=True)
class Target:
    """What one layer is asked for. Sparsity 0 asks for nothing, whatever the pattern."""

    sparsity: float
    pattern: Pattern = Pattern()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity}, a fraction in [0, 1): half is 0.5")
        fixed = self.pattern.sparsity
        if fixed is not None and self.sparsity and abs(self.sparsity - fixed) > 1e-9:
            raise ValueError(
                f"sparsity is {self.sparsity}, and pattern {self.pattern} always has {fixed}"
            )
