"""GKD: distillation on the whole next-token distribution, on the student's own samples."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from reopold_agent.objectives.base import (
    DivergenceSettings,
    LossTerms,
    Needs,
    Objective,
    TokenBatch,
    required,
)
from reopold_agent.objectives.divergence import check_beta
from reopold_agent.objectives.pieces import at_least_float32, importance_ratio


@dataclass(frozen=True)
class GKD(Objective):
    """``gkd``: generalised JSD of student and teacher, mean over the student's tokens (Agarwal et
    al. 2024; the paper's table 8).

    There is no importance ratio: as in GKD, the divergence at each visited prefix is
    differentiated, and the choice of prefixes is not.

    Attributes:
        beta: 0 is forward KL, 1 reverse KL; for values between them see
            `reopold_agent.objectives.divergence`.
        top_k: use only the teacher's k likeliest tokens (the paper's approximation uses 5); None
            for the whole vocabulary.
        rest: with ``top_k``, count all other tokens as one more outcome.
    """

    beta: float = 0.5
    top_k: int | None = None
    rest: bool = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    @property
    def needs(self) -> Needs:
        """Both models' distributions, and the teacher's log-probs for the logs."""
        return Needs.TEACHER | Needs.DISTRIBUTIONS

    @property
    @override
    def divergence(self) -> DivergenceSettings:
        return DivergenceSettings(self.beta, self.top_k, self.rest)

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        mask_BT = batch.loss_mask
        divergence_BT = at_least_float32(required(batch.divergence, "divergence"))
        reward_BT = -divergence_BT.detach()
        return LossTerms(
            numerator=divergence_BT[mask_BT].sum(),
            denominator=mask_BT.sum(),
            reward=reward_BT,
            clipped_reward=reward_BT,
            mask=mask_BT,
            ratio=importance_ratio(batch.logp.detach(), batch.logp_old),
        )
