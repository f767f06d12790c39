"""Grades responses: decides whether a response's answer is right."""

from reopold_agent.judges.boxed import extract_boxed
from reopold_agent.judges.math import close_workers
from reopold_agent.judges.registry import JUDGES, Judge
from reopold_agent.judges.rules import KINDS, equivalent, grade
from reopold_agent.judges.verdict import Verdict

__all__ = [
    "JUDGES",
    "KINDS",
    "Judge",
    "Verdict",
    "close_workers",
    "equivalent",
    "extract_boxed",
    "grade",
]
