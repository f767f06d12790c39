"""Deciding whether an answer is right."""

from reopold_agent.judges.registry import JUDGES, Judge
from reopold_agent.judges.rules import Verdict, extract_boxed, grade

__all__ = ["JUDGES", "Judge", "Verdict", "extract_boxed", "grade"]
