"""Supervised fine-tuning on an expert's trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from reopold_agent.objectives.base import LossTerms, Needs, Objective, TokenBatch
from reopold_agent.objectives.pieces import at_least_float32, importance_ratio


@dataclass(frozen=True)
class SFT(Objective):
    """``sft``: cross-entropy of the expert's tokens, mean over the tokens of a mini-batch.

    Attributes:
        source: with ``teacher`` the teacher plays the step's tasks (sequence-level distillation,
            Kim and Rush 2016); with ``recorded`` conversations come from ``data.demonstrations``.
        only_successes: learn only from those of the teacher's episodes that the environment
            rewarded (rejection sampling).
    """

    source: str = "teacher"
    only_successes: bool = False

    def __post_init__(self) -> None:
        if self.source not in ("teacher", "recorded"):
            raise ValueError(f"source must be 'teacher' or 'recorded', got '{self.source}'")

    @property
    def needs(self) -> Needs:
        """Demonstrations and, with ``source=teacher``, the teacher that plays them."""
        both = Needs.DEMONSTRATIONS | Needs.TEACHER
        return both if self.source == "teacher" else Needs.DEMONSTRATIONS

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        mask_BT = batch.loss_mask
        ones_BT = torch.ones_like(batch.logp, dtype=torch.float32).detach()
        return LossTerms(
            numerator=-at_least_float32(batch.logp[mask_BT]).sum(),
            denominator=mask_BT.sum(),
            reward=ones_BT,
            clipped_reward=ones_BT,
            mask=mask_BT,
            ratio=importance_ratio(batch.logp.detach(), batch.logp_old),
        )
