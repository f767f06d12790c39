"""Example plugin: an objective as a dataclass whose fields are its settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reopold_agent.objectives import LossTerms, Objective, TokenBatch
from reopold_agent.objectives.base import required
from reopold_agent.objectives.pieces import distillation_reward, importance_ratio


@dataclass(frozen=True)
class ClampedReverseKL(Objective):
    """``clamped_rkl``: policy gradient on ``log pi_T - log pi``, clamped to ``[-limit, limit]``.

    Reopold's floor bounds only negative rewards (paper, eq. 7); this bounds positive ones too.

    Attributes:
        limit: largest absolute reward, nats.
        first_steps: number of steps at the start of the run that learn from positive rewards only.
    """

    limit: float = 2.5
    first_steps: int = 0

    def __post_init__(self) -> None:
        # Messages that begin with the setting's name are shown as `objective.limit ...`.
        if self.limit <= 0:
            raise ValueError(f"limit must be positive, got {self.limit}")
        if self.first_steps < 0:
            raise ValueError(f"first_steps must be >= 0, got {self.first_steps}")

    def phase(self, step: int) -> str:
        """Returns the phase of a step (from 0), for the logs."""
        return "praise" if step < self.first_steps else "training"

    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        """Returns the sums of one micro-batch; the engine adds them up and divides once."""
        teacher_BT = required(batch.logp_teacher, "logp_teacher")
        reward_BT: Tensor = distillation_reward(batch.logp, teacher_BT)  # carries no gradient
        clamped_BT = reward_BT.clamp(-self.limit, self.limit)
        mask_BT = batch.loss_mask
        if step < self.first_steps:
            mask_BT = mask_BT & (reward_BT > 0)
        # Select by the mask instead of multiplying by it: masked values may be infinite or NaN.
        ratio_K = importance_ratio(batch.logp[mask_BT], batch.logp_old[mask_BT])
        return LossTerms(
            numerator=-(ratio_K * clamped_BT[mask_BT]).sum(),
            denominator=mask_BT.sum(),
            reward=reward_BT,
            clipped_reward=clamped_BT,
            mask=mask_BT,
            ratio=importance_ratio(batch.logp.detach(), batch.logp_old),
        )
