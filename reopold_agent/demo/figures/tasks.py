"""Generated geometry: drawn figures with exact answers, in three families.

A `Problem` is a kind and its values; a figure is one drawing of it, with its own place, rotation,
size and colours. Training and held-out tasks have the same problems but different figures, so that
the held-out tasks test the reading of figures. (Models this small learn "45+80=125" as a fact and
cannot know facts that are not in their training.) A task is a function of (seed, split, index).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from typing_extensions import override

from reopold_agent.demo.base import GeneratedTasks
from reopold_agent.demo.figures import shapes
from reopold_agent.demo.figures.drawing import Board, Style
from reopold_agent.demo.figures.shapes import UNKNOWN, Measure
from reopold_agent.demo.tasks import ArrayImage
from reopold_agent.types import PixelArray, Task


@dataclass(frozen=True)
class Problem:
    """The given numbers and the answer of a problem.

    Attributes:
        kind: a key of `KINDS`.
        given: the labelled numbers, smallest first.
        answer: the value of `UNKNOWN`.
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
        question: the text beside the figure.
        givens: all combinations of labelled numbers.
        solve: computes the answer from the labelled numbers.
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
"""Relative frequency of each kind; the one with the most problems is the most frequent."""


@functools.cache
def problems(kind: str) -> tuple[Problem, ...]:
    """Returns all problems of a kind."""
    rule = KINDS[kind]
    return tuple(Problem(kind, given, rule.solve(given)) for given in rule.givens)


def draw(problem: Problem, rng: np.random.Generator) -> tuple[PixelArray, dict[str, Any]]:
    """Draws one figure of a problem.

    Returns:
        The picture, (`SIDE`, `SIDE`, 3) uint8, and its contents: ``measures`` (`Measure` objects)
        and ``boxes`` (each label's text and left, top, right, bottom in pixels).
    """
    style = Style.drawn(rng)
    for _ in range(50):  # labels overlap in one drawing of a hundred
        board = Board(style)
        measures = KINDS[problem.kind].draw(board, rng, problem)
        if not board.crowded:
            break
    return board.finished(), {"measures": tuple(measures), "boxes": tuple(board.boxes)}


@dataclass(frozen=True)
class FigureTasks(GeneratedTasks):
    """The tasks of a split, each drawn when it is read.

    Attributes:
        split: ``"train"`` or ``"eval"`` (other figures).
        size: number of tasks.
        seed: of the tasks.
        kind: the only kind of problem; "" for all kinds.

    Raises:
        ValueError: an attribute is out of range.
    """

    kind: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind and self.kind not in KINDS:
            raise ValueError(f"kind must be '' or one of {', '.join(KINDS)}, got {self.kind!r}")

    @override
    def make(self, index: int) -> Task:
        rng = self.rng(index)
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
