"""Objectives: losses as pure functions on tensors, without I/O or models."""

from reopold_agent.objectives.base import (
    DivergenceSettings,
    LossTerms,
    Needs,
    Objective,
    Outcomes,
    RunFacts,
    TokenBatch,
    whole_loss,
)
from reopold_agent.objectives.distillation import (
    ClippedReverseKL,
    EntropyMaskedReverseKL,
    Reopold,
    ReverseKL,
    ReverseKLStopGradient,
    SkewReverseKL,
)
from reopold_agent.objectives.eopd import EOPD
from reopold_agent.objectives.exopd import ExOPD
from reopold_agent.objectives.gkd import GKD
from reopold_agent.objectives.grpo import GRPO
from reopold_agent.objectives.outcome import WithOutcome
from reopold_agent.objectives.registry import OBJECTIVES, make_objective, register_objective
from reopold_agent.objectives.reopold import reopold_loss
from reopold_agent.objectives.sft import SFT
from reopold_agent.objectives.weighted import IWOPD, SOD

__all__ = [
    "EOPD",
    "GKD",
    "GRPO",
    "IWOPD",
    "OBJECTIVES",
    "SFT",
    "SOD",
    "ClippedReverseKL",
    "DivergenceSettings",
    "EntropyMaskedReverseKL",
    "ExOPD",
    "LossTerms",
    "Needs",
    "Objective",
    "Outcomes",
    "Reopold",
    "ReverseKL",
    "ReverseKLStopGradient",
    "RunFacts",
    "SkewReverseKL",
    "TokenBatch",
    "WithOutcome",
    "make_objective",
    "register_objective",
    "reopold_loss",
    "whole_loss",
]
