"""Judges by name. Other packages add theirs by the entry-point group ``reopold_agent.judges``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reopold_agent.judges.rules import grade_boxed
from reopold_agent.judges.verdict import Verdict
from reopold_agent.registry import Registry


@dataclass(frozen=True)
class Judge:
    """Decides whether a response is right.

    Attributes:
        name: as environments select it (``judge=NAME``).
        grade: ``grade(response, answers) -> Verdict``; ``answers`` are the acceptable ones. It is
            called from several threads at once.
    """

    name: str
    grade: Callable[[str, Sequence[str]], Verdict]


JUDGES: Registry[Judge] = Registry("judge", "reopold_agent.judges", Judge)

RULES = JUDGES.register("rules", Judge("rules", grade_boxed))
"""The last ``\\boxed{}`` against the answers, by rule: no model, no network."""
