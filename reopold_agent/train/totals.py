"""Adds up token counts over the micro-batches of an update, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reopold_agent.objectives import LossTerms
from reopold_agent.objectives.pieces import ppo_clipped


@dataclass
class TokenTotals:
    """Sums that add up over micro-batches and ranks; ``ratio_max`` is their largest.

    ``numerator`` and ``denominator`` are the loss's; ``ratio_cut`` counts `ppo_clipped` tokens.
    """

    numerator: float = 0.0
    denominator: float = 0.0
    tokens: int = 0
    kept: int = 0
    ratio_cut: int = 0
    ratio_sum: float = 0.0
    ratio_max: float = 0.0

    def add(self, terms: LossTerms, live: Tensor) -> None:
        """Adds a micro-batch's terms; ``live`` (batch, time) bool marks its loss tokens."""
        self.numerator += float(terms.numerator.detach())
        self.denominator += float(terms.denominator)
        ratio, reward = terms.ratio[live], terms.clipped_reward[live]
        if ratio.numel() == 0:
            return
        self.tokens += ratio.numel()
        self.kept += int(terms.mask.sum())
        self.ratio_cut += int(ppo_clipped(ratio, reward).sum())
        self.ratio_sum += float(ratio.sum())
        self.ratio_max = max(self.ratio_max, float(ratio.max()))

    def merge(self, other: TokenTotals) -> None:
        """Adds the counts of another rank or mini-batch."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "ratio_max" else mine + value)

    @property
    def loss(self) -> float:
        """The mean loss over the kept tokens."""
        return self.numerator / max(1.0, self.denominator)

    def shares(self) -> dict[str, float]:
        """Returns ``kept_share``, ``ratio_mean``, ``ratio_max`` and ``ppo_clip_share``."""
        count = max(1, self.tokens)
        return {
            "kept_share": self.kept / count,
            "ratio_mean": self.ratio_sum / count,
            "ratio_max": self.ratio_max,
            "ppo_clip_share": self.ratio_cut / count,
        }
