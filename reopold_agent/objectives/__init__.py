"""Objectives: pure functions on tensors, no I/O and no models."""

from reopold_agent.objectives.base import LossTerms, Objective, TokenBatch
from reopold_agent.objectives.reopold import Reopold, reopold_loss

__all__ = ["LossTerms", "Objective", "Reopold", "TokenBatch", "reopold_loss"]
