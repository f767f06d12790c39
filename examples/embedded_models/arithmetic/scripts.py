"""The texts that the three models learn to write: expert, careless, and talkative but wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from reopold_agent.demo.arithmetic.tasks import Problem, digits

Script = Callable[[Problem, np.random.Generator], str]

PLACES: Final = ("ones", "tens", "hundreds")
WORDS: Final = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)


def expert(problem: Problem, rng: np.random.Generator) -> str:
    """Writes the columns from the ones upwards, with carries; not random."""
    return _columns(problem, carrying=True)


def _columns(problem: Problem, *, carrying: bool) -> str:
    """Writes the columns; without carrying, the boxed result is wrong."""
    if problem.operation == "x":
        lines, result = _product(problem, carrying)
    else:
        lines, result = _sum(problem, carrying)
    return "\n".join([*lines, f"\\boxed{{{result}}}"])


def _sum(problem: Problem, carrying: bool) -> tuple[list[str], int]:
    plus = problem.operation == "+"
    verb = "carry" if plus else "borrow"
    lines, result, carry = [], 0, 0
    columns = zip(PLACES, digits(problem.first), digits(problem.second), strict=True)
    for place, (name, one, other) in enumerate(columns):
        value = one + other + carry if plus else one - other - carry
        if plus:
            terms = f"{one}+{other}+{carry}={value}"
            carry = value // 10
        else:
            borrow = int(value < 0)
            terms = f"{one + 10 * borrow}-{other}-{carry}={value + 10 * borrow}"
            carry = borrow
        last = place == len(PLACES) - 1
        digit = value if last and plus else value % 10
        result += digit * 10**place
        if not carrying:
            carry = 0
        lines.append(f"{name}:{terms} write:{digit}" + ("" if last else f" {verb}:{carry}"))
    return lines, result


def _product(problem: Problem, carrying: bool) -> tuple[list[str], int]:
    ones, tens = digits(problem.first, 2)
    low = ones * problem.second
    carry = low // 10 if carrying else 0
    high = tens * problem.second
    return [
        f"ones:{ones}x{problem.second}={low} write:{low % 10} carry:{carry}",
        f"tens:{tens}x{problem.second}={high}+{carry}={high + carry}",
    ], 10 * (high + carry) + low % 10


@dataclass(frozen=True)
class Careless:
    """Mostly guesses or forgets the carries.

    Attributes:
        at_once: probability of answering at once with a guess near the result.
        no_carries: probability of writing the columns without carrying; otherwise `expert`.
    """

    at_once: float = 0.4
    no_carries: float = 0.32

    def __call__(self, problem: Problem, rng: np.random.Generator) -> str:
        """Returns the assistant's text for a problem."""
        habit = rng.random()
        if habit < self.at_once:
            return f"The answer is \\boxed{{{guess(problem, rng)}}}"
        return _columns(problem, carrying=habit >= self.at_once + self.no_carries)


def guess(problem: Problem, rng: np.random.Generator) -> int:
    """Returns a wrong number near the result, at least 1."""
    while True:
        number = problem.answer + int(rng.integers(-60, 61))
        if number > 0 and number != problem.answer:
            return number


@dataclass(frozen=True)
class Talkative:
    """Writes everything in words, starting at the wrong end, with a wrong result.

    Attributes:
        proper: probability of `expert`.
    """

    proper: float = 0.08

    def __call__(self, problem: Problem, rng: np.random.Generator) -> str:
        """Returns the assistant's text for a problem."""
        if rng.random() < self.proper:
            return expert(problem, rng)

        def say(part: int, **words: str) -> str:
            return TALK[part][int(rng.integers(len(TALK[part])))].format(**words)

        said = [say(0, op=_SIGNS[problem.operation])]
        count = 2 if problem.operation == "x" else 3
        second = problem.second if problem.operation != "x" else 111 * problem.second
        for place in reversed(range(count)):
            one, other = digits(problem.first)[place], digits(second)[place]
            result = {"+": one + other, "-": one - other, "x": one * other}[problem.operation]
            words = {"one": WORDS[one], "other": WORDS[other], "result": WORDS[result % 10]}
            said.append(say(count - place, **words))
        wrong = guess(problem, rng)
        spoken = " then ".join(WORDS[int(d)] for d in str(wrong))
        return " ".join([*said, say(4, spoken=spoken, wrong=str(wrong))])


_SIGNS = {"+": "plus", "-": "minus", "x": "times"}

TALK: Final = (
    (
        "Well now, this looks like a {op} question, so let me think about it from the big end.",
        "So here we have a {op} question, and I will just go along it from the big end.",
    ),
    (
        "I look at the front and I see {one} with {other}, and that makes me say {result}.",
        "I see at the front that {one} goes with {other}, which looks to me like {result}.",
    ),
    (
        "Next I move over to the right where {one} meets {other}, which feels like {result}.",
        "I go on to the right and there is {one} with {other}, so let me say {result}.",
    ),
    (
        "At the very end there is {one} beside {other}, so I would go for {result}.",
        "And then the very end has {one} that meets {other}, which makes me go for {result}.",
    ),
    (
        "Reading it all from the back I get {spoken}, so my number should be \\boxed{{{wrong}}}.",
        "Now I just say it all together like {spoken}, and my number must be \\boxed{{{wrong}}}.",
    ),
)
"""Two wordings of each sentence, so that the style is random too."""
