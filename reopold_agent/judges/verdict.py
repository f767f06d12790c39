"""What grading returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a response is right, and how that was found.

    Attributes:
        correct: right or not; an undecided response counts as wrong.
        extracted: what was taken for the response's answer; None if none was found.
        how: where the answer stood and which rule decided, as "boxed:number", "stated:option",
            "bare:math-verify", or "undecided".
        undecided: no rule could tell what the answer is, so a judge may be asked for it.
    """

    correct: bool
    extracted: str | None
    how: str = ""
    undecided: bool = False
