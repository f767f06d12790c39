"""Agentic multimodal RL environments and on-policy distillation with Reopold."""

__version__ = "0.1.0"
