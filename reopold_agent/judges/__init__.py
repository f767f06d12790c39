"""Deciding whether an answer is right."""

from reopold_agent.judges.rules import Verdict, extract_boxed, grade

__all__ = ["Verdict", "extract_boxed", "grade"]
