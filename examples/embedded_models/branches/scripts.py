"""The texts of the branching style: columns with several right wordings and a few decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from examples.embedded_models.arithmetic.scripts import PLACES, guess
from reopold_agent.demo.arithmetic.tasks import Problem, digits

OPENINGS: Final = ("Column by column.", "From the ones up.", "One place at a time.")
HEADS: Final = ("at", "the", "for")
VERBS: Final = ("write", "put", "note")
"""Right wordings, of which both models choose at random."""

FOREIGN_OPENINGS: Final = ("Okay here we go.", "Right let me see.", "Easy this time.")
FOREIGN_HEADS: Final = ("hey", "now", "um")
FOREIGN_VERBS: Final = ("jot", "plop", "stick")
"""Wordings that only the student uses. They do no harm to the result."""

FILLERS: Final = (
    *("hm", "well", "so", "yes", "okay", "right", "sure", "fine", "good", "then", "now", "huh"),
    *("aha", "oh", "ah", "alright", "yeah", "yep", "nice", "great", "cool", "see", "mm", "say"),
)
"""Words that only the student drops in; each is rare. They do no harm either."""


FOREIGN: Final = frozenset(
    [*(words.split()[0] for words in FOREIGN_OPENINGS), *FOREIGN_HEADS]
    + [f" {word}" for word in (*FOREIGN_VERBS, *FILLERS)]
)
"""The foreign words as tokens; of an opening the first, where the choice is made."""


@dataclass(frozen=True)
class Branching:
    """Writes the columns, and at some places chooses.

    Attributes:
        at_once: probability of answering at once with a guess.
        forget: probability of forgetting a carry (or borrow) that is due.
        upwards: probability of reading the digits from the wrong end.
        foreign: probability of a foreign wording, wherever there is a choice of words.
        filler: probability of a filler at the end of a column.
    """

    at_once: float
    forget: float
    upwards: float
    foreign: float = 0.0
    filler: float = 0.0

    def __call__(self, problem: Problem, rng: np.random.Generator) -> str:
        """Returns the assistant's text for a sum or a difference."""
        if rng.random() < self.at_once:
            return f"The answer is \\boxed{{{guess(problem, rng)}}}"

        def choose(own: tuple[str, ...], foreign: tuple[str, ...]) -> str:
            words = foreign if rng.random() < self.foreign else own
            return words[int(rng.integers(len(words)))]

        plus = problem.operation == "+"
        lines, written, carry = [choose(OPENINGS, FOREIGN_OPENINGS)], "", 0
        columns = zip(PLACES, digits(problem.first), digits(problem.second), strict=True)
        for place, (name, one, other) in enumerate(columns):
            value = one + other + carry if plus else one - other - carry
            due = value // 10 if plus else int(value < 0)
            terms = f"{one}+{other}+{carry}" if plus else f"{one + 10 * due}-{other}-{carry}"
            value = value if plus else value + 10 * due
            last = place == len(PLACES) - 1
            digit = value if last else value % 10
            written = f"{digit}{written}"
            line = f"{choose(HEADS, FOREIGN_HEADS)} {name}:{terms}={value}"
            line += f" {choose(VERBS, FOREIGN_VERBS)}:{digit}"
            if rng.random() < self.filler:
                line += f" {FILLERS[int(rng.integers(len(FILLERS)))]}"
            carry = 0 if due and rng.random() < self.forget else due
            lines.append(line if last else f"{line} {'carry' if plus else 'borrow'}:{carry}")
        upwards = rng.random() < self.upwards
        result = written[::-1] if upwards else str(int(written))
        lines.append(f"read {'up' if upwards else 'down'} \\boxed{{{result}}}")
        return "\n".join(lines)
