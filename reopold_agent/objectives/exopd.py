"""ExOPD: distillation towards a point beyond the teacher, seen from a reference model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from reopold_agent.objectives.base import LossTerms, Needs, TokenBatch, required
from reopold_agent.objectives.distillation import ReverseKLStopGradient
from reopold_agent.objectives.pieces import at_least_float32


@dataclass(frozen=True)
class ExOPD(ReverseKLStopGradient):
    """``exopd``: generalised on-policy distillation with reward extrapolation (Yang et al. 2026,
    arXiv 2602.12125).

    ``R = sg(logp_ref - logp + scale (logp_T - logp_ref))``: the reward of KL-constrained
    reinforcement learning, ``logp_T - logp_ref``, counts ``scale`` times against the KL to the
    reference.

    Attributes:
        scale: the paper's lambda. 1 is `ReverseKLStopGradient`, whatever the reference; more
            extrapolates beyond the teacher, less interpolates between reference and teacher.
        reference: checkpoint of the reference model; None is the student before training.
    """

    scale: float = 1.25
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    @property
    def needs(self) -> Needs:
        """The log-probs of teacher and reference."""
        return Needs.TEACHER | Needs.REFERENCE

    @property
    @override
    def reference_path(self) -> str | None:
        return self.reference

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        reference = at_least_float32(required(batch.logp_reference, "logp_reference"))
        teacher = at_least_float32(required(batch.logp_teacher, "logp_teacher"))
        aim = reference + self.scale * (teacher - reference)
        return super().terms(replace(batch, logp_teacher=aim), step, threshold)
