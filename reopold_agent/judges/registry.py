"""The registry of judges. Plugins add theirs by the entry-point group ``reopold_agent.judges``."""

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
        name: by which environments select it (``judge=NAME``).
        grade: ``grade(response, answers) -> Verdict``, with all acceptable answers. It is called
            from several threads at once.
    """

    name: str
    grade: Callable[[str, Sequence[str]], Verdict]


JUDGES: Registry[Judge] = Registry("judge", "reopold_agent.judges", Judge)

RULES = JUDGES.register("rules", Judge("rules", grade_boxed))
"""Compares the last ``\\boxed{}`` with the answers by rule, without a model or network."""
