"""The texts that the two models learn to write about a figure, and exercises for parts of them.

The expert reads the labels, smallest first, calculates step by step, and answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from reopold_agent.demo.figures.drawing import LETTER, Board, Style, label_size
from reopold_agent.demo.figures.shapes import UNKNOWN
from reopold_agent.demo.figures.tasks import KINDS, Problem
from reopold_agent.types import PixelArray

Script = Callable[[Problem, np.random.Generator], str]

EXERCISE_SIDE: Final = 168
"""Pixels of an exercise's picture, both ways; its labels are as large as a figure's."""
READ: Final = "Read the numbers."
CALCULATE: Final = "Calculate."

_RULES: Final[dict[str, Callable[[tuple[int, ...]], list[str]]]] = {
    "third_angle": lambda g: [_plus(*g), _rest(sum(g))],
    "isosceles_base": lambda g: [_rest(g[0]), _half(180 - g[0])],
    "isosceles_top": lambda g: [_twice(g[0]), _rest(2 * g[0])],
    "diameter": lambda g: [_twice(g[0])],
    "radius": lambda g: [_half(g[0])],
    "central_angle": lambda g: [_twice(g[0])],
    "inscribed_angle": lambda g: [_half(g[0])],
    "corresponding": lambda g: [],
    "cointerior": lambda g: [_rest(g[0])],
}
_WRONG_RULES: Final[dict[str, Callable[[tuple[int, ...]], list[str]]]] = {
    "third_angle": lambda g: [_plus(*g)],
    "isosceles_base": lambda g: [_rest(g[0])],
    "isosceles_top": lambda g: [_rest(g[0])],
    "diameter": lambda g: [],
    "radius": lambda g: [_twice(g[0])],
    "central_angle": lambda g: [],
    "inscribed_angle": lambda g: [_twice(g[0])],
    "corresponding": lambda g: [_rest(g[0])],
    "cointerior": lambda g: [],
}


def expert(problem: Problem, rng: np.random.Generator) -> str:
    """Reads, calculates by the rule of the problem's kind and answers; not random."""
    return worked(problem.given, _RULES[problem.kind](problem.given))


@dataclass(frozen=True)
class Careless:
    """Mostly guesses at once, or reads and then applies a wrong rule.

    Attributes:
        at_once: probability of guessing without reading.
        wrong_rule: probability of a wrong rule; otherwise `expert`.
    """

    at_once: float = 0.5
    wrong_rule: float = 0.32

    def __call__(self, problem: Problem, rng: np.random.Generator) -> str:
        """Returns the assistant's text for a problem."""
        habit = rng.random()
        if habit < self.at_once:
            return conclusion(int(rng.integers(2, 31)) * 5)
        if habit < self.at_once + self.wrong_rule:
            return worked(problem.given, _WRONG_RULES[problem.kind](problem.given))
        return expert(problem, rng)


def reading(numbers: tuple[int, ...]) -> str:
    """Returns the sentence that says which numbers the figure shows."""
    return f"I read {' and '.join(map(str, numbers))}."


def conclusion(answer: int | str) -> str:
    """Returns the sentence that answers."""
    return f"So x is \\boxed{{{answer}}}."


def worked(given: tuple[int, ...], steps: list[str]) -> str:
    """Returns reading, steps and conclusion, whose answer is the last number."""
    last = steps[-1].rpartition("=")[2] if steps else given[-1]
    return " ".join([reading(given), *(f"{step}." for step in steps), conclusion(last)])


def equations(rng: np.random.Generator, count: int = 6) -> list[str]:
    """Returns random equations of all the forms that figures need."""
    drawn = []
    for _ in range(count):
        kind = int(rng.integers(8))
        if kind < 4:
            a, b = sorted(int(v) * 5 for v in rng.integers(7, 23, size=2))
            drawn.append(_plus(a, b))
        elif kind == 4:
            drawn.append(_rest(int(rng.integers(7, 30)) * 5))
        elif kind == 5:
            drawn.append(_half(2 * int(rng.integers(2, 76))))
        else:
            drawn.append(_twice(int(rng.integers(2, 76))))
    return drawn


def exercise_picture(
    rng: np.random.Generator, difficulty: float = 1.0
) -> tuple[PixelArray, tuple[int, ...]]:
    """Draws one or two numbers, perhaps an x, among a few lines.

    Args:
        rng: for all random draws.
        difficulty: 0 to 1. At 0 there is one number, always in the middle, because learning to read
            anywhere hardly starts otherwise. Then it moves, and lines, an x and a second number
            are added.

    Returns:
        The picture, (side, side, 3) uint8, and its numbers in ascending order.
    """
    count = 1 + int(difficulty > 0.6 and rng.random() < 0.5)
    wide = count == 2 or (difficulty > 0.6 and rng.random() < 0.3)
    side = EXERCISE_SIDE if wide else EXERCISE_SIDE * 2 // 3
    board = Board(Style.drawn(rng), side)
    angles = count == 2 or rng.random() < 0.7
    numbers = (
        [int(v) * 5 for v in rng.choice(np.arange(7, 31), size=count, replace=False)]
        if angles
        else [int(rng.integers(2, 61))]
    )
    if difficulty > 0.3:
        for _ in range(int(rng.integers(0, 4))):
            points = rng.uniform(0, side, size=(2, 2))
            board.line(*((float(x), float(y)) for x, y in points))
    texts = [str(number) for number in numbers]
    texts += [UNKNOWN] * int(difficulty > 0.4 and rng.random() < 0.6)
    spread = min(1.0, difficulty / 0.6)
    taken: list[tuple[float, float, float]] = []
    for text in texts:
        degrees = angles and text != UNKNOWN
        half = label_size(text, degrees)[0] / 2
        for _ in range(20):  # until it does not touch the others
            x, y = (float(v) for v in rng.uniform(-0.5, 0.5, size=2))
            x = side / 2 + x * spread * (side - 2 * half - 6)
            y = side / 2 + y * spread * (side - LETTER)
            if all(abs(x - u) > half + w + 4 or abs(y - v) > 34 for u, v, w in taken):
                break
        else:
            if text == UNKNOWN:
                continue
        taken.append((x, y, half))
        board.label((x, y), text, degrees)
    return board.finished(), tuple(sorted(numbers))


def phrases() -> list[str]:
    """Returns the pieces of texts that become one token each; digits are single tokens anyway."""
    pieces = ["I read ", " and ", ".", ". ", "So x is \\boxed{", "}.", "+", "-", "/", "*", "="]
    return [*pieces, READ, CALCULATE, *(rule.question for rule in KINDS.values())]


def _plus(a: int, b: int) -> str:
    return f"{a}+{b}={a + b}"


def _rest(a: int) -> str:
    return f"180-{a}={180 - a}"


def _twice(a: int) -> str:
    return f"2*{a}={2 * a}"


def _half(a: int) -> str:
    return f"{a}/2={a // 2}"
