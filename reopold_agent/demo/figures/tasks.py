"""Made-up geometry: drawn figures with exact answers, in three families.

A `Problem` is a kind and its values; a figure is one drawing of it, with its own place, turn, size
and colours. Training and held-out tasks pose the same kinds of problems on other figures: what is
held out is the reading of a figure. (Models this small learn "45+80=125" as a fact, and cannot
know a fact that training leaves out.) Everything is a function of (seed, split, index).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from reopold_agent.demo.figures import shapes
from reopold_agent.demo.figures.drawing import Board, Style
from reopold_agent.demo.figures.shapes import UNKNOWN, Measure
from reopold_agent.demo.tasks import ArrayImage
from reopold_agent.types import PixelArray, Task

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Problem:
    """What is given and asked.

    Attributes:
        kind: a key of `KINDS`.
        given: the labelled numbers, smallest first.
        answer: the number that `UNKNOWN` stands for.
    """

    kind: str
    given: tuple[int, ...]
    answer: int


Drawer = Callable[[Board, np.random.Generator, Problem], list[Measure]]


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        family: ``triangle``, ``circle`` or ``parallel``.
        question: the words beside the figure.
        givens: every combination of labelled numbers.
        solve: the answer from what is given.
        draw: draws one figure of a problem.
    """

    family: str
    question: str
    givens: tuple[tuple[int, ...], ...]
    solve: Callable[[tuple[int, ...]], int]
    draw: Drawer


def _third_angle(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    known = [*problem.given]
    rng.shuffle(known)
    angles = [*known, problem.answer]
    labels = [*map(str, known), UNKNOWN]
    return shapes.triangle(board, rng, angles, labels)


def _isosceles_base(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    [top] = problem.given
    angles = (top, problem.answer, problem.answer)
    return shapes.triangle(board, rng, angles, (str(top), UNKNOWN, ""), equal=True)


def _isosceles_top(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    [base] = problem.given
    angles = (problem.answer, base, base)
    return shapes.triangle(board, rng, angles, (UNKNOWN, str(base), ""), equal=True)


def _diameter(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    return shapes.circle_lengths(board, rng, str(problem.given[0]), UNKNOWN)


def _radius(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    return shapes.circle_lengths(board, rng, UNKNOWN, str(problem.given[0]))


def _central(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    return shapes.circle_angles(board, rng, problem.answer, UNKNOWN, str(problem.given[0]))


def _inscribed(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    [central] = problem.given
    return shapes.circle_angles(board, rng, central, str(central), UNKNOWN)


def _corresponding(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    first = bool(rng.random() < 0.5)
    return shapes.parallel_lines(board, rng, problem.given[0], "corresponding", first)


def _cointerior(board: Board, rng: np.random.Generator, problem: Problem) -> list[Measure]:
    first = bool(rng.random() < 0.5)
    return shapes.parallel_lines(board, rng, problem.given[0], "co-interior", first)


def _single(values: range) -> tuple[tuple[int, ...], ...]:
    return tuple((value,) for value in values)


LEAST_ANGLE: Final = 35
"""Degrees: a label has to fit between the arms of every angle of a triangle."""

KINDS: Final[dict[str, Kind]] = {
    "third_angle": Kind(
        "triangle",
        "Find the angle x of the triangle.",
        tuple(
            (a, b)
            for a in range(LEAST_ANGLE, 181, 5)
            for b in range(a + 5, 181 - LEAST_ANGLE - a, 5)
        ),
        lambda given: 180 - sum(given),
        _third_angle,
    ),
    "isosceles_base": Kind(
        "triangle",
        "The marked sides are equal. Find the base angle x.",
        _single(range(40, 111, 10)),
        lambda given: (180 - given[0]) // 2,
        _isosceles_base,
    ),
    "isosceles_top": Kind(
        "triangle",
        "The marked sides are equal. Find the angle x between them.",
        _single(range(35, 71, 5)),
        lambda given: 180 - 2 * given[0],
        _isosceles_top,
    ),
    "diameter": Kind(
        "circle",
        "The radius of the circle is given. Find the diameter x.",
        _single(range(2, 31)),
        lambda given: 2 * given[0],
        _diameter,
    ),
    "radius": Kind(
        "circle",
        "The diameter of the circle is given. Find the radius x.",
        _single(range(4, 61, 2)),
        lambda given: given[0] // 2,
        _radius,
    ),
    "central_angle": Kind(
        "circle",
        "Both angles stand on one arc of the circle. Find the central angle x.",
        _single(range(35, 76, 5)),
        lambda given: 2 * given[0],
        _central,
    ),
    "inscribed_angle": Kind(
        "circle",
        "Both angles stand on one arc of the circle. Find the inscribed angle x.",
        _single(range(70, 151, 10)),
        lambda given: given[0] // 2,
        _inscribed,
    ),
    "corresponding": Kind(
        "parallel",
        "The lines are parallel. Find the corresponding angle x.",
        _single(range(45, 136, 5)),
        lambda given: given[0],
        _corresponding,
    ),
    "cointerior": Kind(
        "parallel",
        "The lines are parallel. Find the co-interior angle x.",
        _single(range(45, 136, 5)),
        lambda given: 180 - given[0],
        _cointerior,
    ),
}
SHARES: Final = {
    "third_angle": 4,
    "isosceles_base": 1,
    "isosceles_top": 1,
    "diameter": 1,
    "radius": 1,
    "central_angle": 1,
    "inscribed_angle": 1,
    "corresponding": 1,
    "cointerior": 1,
}
"""How often each kind is posed, in parts; the one with most problems most."""


@functools.cache
def problems(kind: str) -> tuple[Problem, ...]:
    """All problems of a kind."""
    rule = KINDS[kind]
    return tuple(Problem(kind, given, rule.solve(given)) for given in rule.givens)


def draw(problem: Problem, rng: np.random.Generator) -> tuple[PixelArray, dict[str, Any]]:
    """One figure of a problem.

    Returns:
        The picture, (`SIDE`, `SIDE`, 3) uint8, and what is drawn: ``measures`` (`Measure` s) and
        ``boxes`` (each label's text and left, top, right, bottom in pixels).
    """
    style = Style.drawn(rng)
    for _ in range(50):  # one drawing in a hundred puts one label on another
        board = Board(style)
        measures = KINDS[problem.kind].draw(board, rng, problem)
        if not board.crowded:
            break
    return board.finished(), {"measures": tuple(measures), "boxes": tuple(board.boxes)}


@dataclass(frozen=True)
class FigureTasks:
    """The tasks of a split, drawn when they are asked for.

    Attributes:
        split: ``"train"`` or ``"eval"`` (other figures).
        size: number of tasks.
        seed: another seed, other tasks.
        kind: pose only this kind; "" for all of them.

    Raises:
        ValueError: an attribute is out of range.
    """

    split: Split = "train"
    size: int = 4096
    seed: int = 0
    kind: str = ""

    def __post_init__(self) -> None:
        if self.split not in ("train", "eval"):
            raise ValueError(f"split must be 'train' or 'eval', got {self.split!r}")
        if self.size < 1 or self.seed < 0:
            raise ValueError(f"size must be >= 1 and seed >= 0, got {self.size} and {self.seed}")
        if self.kind and self.kind not in KINDS:
            raise ValueError(f"kind must be '' or one of {', '.join(KINDS)}, got {self.kind!r}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Task:
        """The task at ``index``.

        Raises:
            IndexError: not in ``range(len(self))``.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"task {index} of {self.size}")
        rng = np.random.default_rng((self.seed, int(self.split == "eval"), index))
        parts = np.array(list(SHARES.values()))
        kind = str(rng.choice(list(SHARES), p=parts / parts.sum()))
        choices = problems(self.kind or kind)
        problem = choices[int(rng.integers(len(choices)))]
        pixels, drawn = draw(problem, rng)
        rule = KINDS[problem.kind]
        return Task(
            id=f"figure-{self.split}-{self.seed}-{index}",
            question=rule.question,
            answers=(str(problem.answer),),
            images=(ArrayImage(pixels),),
            metadata={
                "kind": problem.kind,
                "category": rule.family,
                "given": problem.given,
                **drawn,
            },
        )
