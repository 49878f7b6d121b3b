"""ATV: calibrate on the text and on the visual tokens that a block changes, arXiv:2603.16001.

How many visual tokens a sample adds depends on the block's mean drift over all samples, as in the
published code. So it is known only when the last batch has passed; but it is never more than one
per text token, and so the inputs of few tokens need to be held until then.

Shape letters: B samples in a batch, T tokens, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How far a block turned each visual token of a batch: 1 - cos(before, after), in float32."""

    drift_BT: Tensor
    """Minus infinity where there is no visual token."""
    num_text_B: Tensor

    @classmethod
    def of(
        cls, before_BTD: Tensor, after_BTD: Tensor, is_text_BT: Tensor, is_visual_BT: Tensor
    ) -> "Drift":
        cosine_BT = torch.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        drift_BT = (1 - cosine_BT).masked_fill(~is_visual_BT, -torch.inf)
        return cls(drift_BT, is_text_BT.sum(dim=1))

    @property
    def is_visual_BT(self) -> Tensor:
        return self.drift_BT > -torch.inf

    def total(self) -> tuple[float, int]:
        """The sum over the visual tokens, and their number."""
        visual = self.drift_BT[self.is_visual_BT]
        return float(visual.sum(dtype=torch.float64)), len(visual)

    def most(self, share: float = 1.0) -> Tensor:
        """The visual tokens that drift most, `round(share * text tokens)` of each sample.

        Returns:
            Bool, (B, T). All visual tokens of a sample that has fewer. Among equals, the leftmost.
        """
        count_B = torch.tensor(
            [round(share * int(n)) for n in self.num_text_B], device=self.drift_BT.device
        )
        order_BT = self.drift_BT.argsort(dim=1, descending=True, stable=True)
        rank_BT = order_BT.argsort(dim=1)
        return (rank_BT < count_B[:, None]) & self.is_visual_BT


def share_of_text(total: float, count: int, alpha: float) -> float:
    """Visual tokens per text token: min(1, alpha * mean drift); 0 where there are none."""
    return min(1.0, alpha * total / count) if count else 0.0
