"""EOPD: reverse KL on the sampled tokens, and forward KL where the teacher is uncertain."""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from reopold_agent.objectives.base import (
    DivergenceSettings,
    LossTerms,
    Needs,
    TokenBatch,
    required,
)
from reopold_agent.objectives.distillation import ReverseKLStopGradient
from reopold_agent.objectives.pieces import at_least_float32


@dataclass(frozen=True)
class EOPD(ReverseKLStopGradient):
    """``eopd``: entropy-aware on-policy distillation (Jin et al. 2026, arXiv 2603.07079).

    ``loss = sum_t (-ratio R + alpha 1[H_T >= tau] sum_{k of top} p_T log(p_T / p)) / tokens``: the
    policy gradient of reverse KL at every token, and where the teacher's entropy reaches ``tau``
    forward KL over its likeliest tokens (equations 9 and 10), neither renormalised nor completed
    by a rest, as in the authors' code; equation 10 renormalises the teacher's.

    Attributes:
        tau: the teacher's entropy from which on forward KL counts, nats.
        alpha: weight of the forward KL.
        top_k: number of the teacher's likeliest tokens in the forward KL.
    """

    tau: float = 0.8
    alpha: float = 1.0
    top_k: int = 16

    def __post_init__(self) -> None:
        for name in ("tau", "alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    @property
    def needs(self) -> Needs:
        """The teacher's log-probs of the sampled tokens, and its distributions."""
        return Needs.TEACHER | Needs.DISTRIBUTIONS

    @property
    @override
    def weighs_tokens(self) -> bool:
        return True  # of the reverse KL; the forward KL does not pass through the log-probs

    @property
    @override
    def divergence(self) -> DivergenceSettings:
        return DivergenceSettings(0.0, self.top_k, rest=False, min_entropy=self.tau)

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        own = super().terms(batch, step, threshold)
        forward_K = at_least_float32(required(batch.divergence, "divergence"))[own.mask]
        return replace(own, numerator=own.numerator + self.alpha * forward_K.sum())
