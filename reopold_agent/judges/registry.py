"""The registry of judges. Plugins add theirs by the entry-point group ``reopold_agent.judges``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reopold_agent.judges.rules import grade_boxed, grade_stated
from reopold_agent.judges.verdict import Verdict
from reopold_agent.registry import Registry
from reopold_agent.types import Task


@dataclass(frozen=True)
class Judge:
    """Decides whether a response is right.

    Attributes:
        name: by which environments select it (``judge=NAME``).
        grade: ``grade(response, answers) -> Verdict``, with all acceptable answers. It is called
            from several threads at once.
        takes_options: whether ``grade`` also takes ``options=``: the texts of the question's
            options, whose letters (from A) are the answers.
    """

    name: str
    grade: Callable[..., Verdict]
    takes_options: bool = False

    def verdict(self, response: str, task: Task) -> Verdict:
        """Grades the response to a task."""
        options: Sequence[str] = task.metadata.get("options") or ()
        if options and self.takes_options:
            return self.grade(response, task.answers, options=options)
        return self.grade(response, task.answers)


JUDGES: Registry[Judge] = Registry("judge", "reopold_agent.judges", Judge)

RULES = JUDGES.register("rules", Judge("rules", grade_boxed, takes_options=True))
"""Compares the last ``\\boxed{}`` with the answers by rule, without a model or network."""

STATED = Judge("rules", grade_stated, takes_options=True)
"""The same for a prompt that asks for the answer in another form (`asks_for_another_form`)."""
