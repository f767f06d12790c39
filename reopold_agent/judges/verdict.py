"""The result of grading."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """Whether a response is right, and how that was found.

    Attributes:
        correct: whether the response is right; an undecided response counts as wrong.
        extracted: the response's answer, or None if none was found.
        how: where the answer was found and which rule decided: "boxed:number", "stated:option",
            "bare:math-verify", or "undecided".
        undecided: no rule could decide, so a judge model may be asked.
        reason: why it is undecided; "" for decided ones.
    """

    correct: bool
    extracted: str | None
    how: str = ""
    undecided: bool = False
    reason: str = field(default="", compare=False)
