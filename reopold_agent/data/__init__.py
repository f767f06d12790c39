"""Rows in, tasks out."""

from reopold_agent.data.loading import load_tasks

__all__ = ["load_tasks"]
