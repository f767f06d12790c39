"""The figures: points, lines and labels for a problem's values, true to scale.

Each function draws one figure on a `Board` and returns a `Measure` for each label: the points whose
angle or distance is the labelled value. A test measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from reopold_agent.demo.figures.drawing import SIDE, Board, Point, label_size, unit

MARGIN: Final = 12.0
UNKNOWN: Final = "x"


@dataclass(frozen=True)
class Measure:
    """A labelled part of a figure.

    Attributes:
        label: a number, or `UNKNOWN`.
        what: ``angle`` (three points, the vertex in the middle) or ``length`` (two points).
        points: in pixels of the picture.
    """

    label: str
    what: Literal["angle", "length"]
    points: tuple[Point, ...]


def triangle(
    board: Board,
    rng: np.random.Generator,
    angles: Sequence[int],
    labels: Sequence[str],
    equal: bool = False,
) -> list[Measure]:
    """Draws a triangle.

    Args:
        board: to draw on.
        rng: for all random draws.
        angles: at the three corners, degrees.
        labels: of the angles; empty ones are left out.
        equal: mark the two sides that meet at the first corner as equal.
    """
    a, b, c = (math.radians(angle) for angle in angles)
    # The sides are proportional to the sines of the opposite angles.
    corners = [
        (0.0, 0.0),
        (math.sin(c), 0.0),
        (math.sin(b) * math.cos(a), math.sin(b) * math.sin(a)),
    ]
    points = _placed(corners, rng)
    board.polygon(points)
    if equal:
        board.tick(points[0], points[1])
        board.tick(points[0], points[2])
    measures = []
    for i, text in enumerate(labels):
        if text:
            arms = (points[i - 1], points[i], points[(i + 1) % 3])
            measures.append(_angle(board, rng, arms, text))
    return measures


def circle_lengths(
    board: Board, rng: np.random.Generator, radius_label: str, diameter_label: str
) -> list[Measure]:
    """Draws a circle with a labelled radius and diameter."""
    radius = float(rng.uniform(100, 120))
    centre = _centre(rng, radius)
    board.circle(centre, radius)
    board.dot(centre, 5)
    turn = float(rng.uniform(0, 2 * math.pi))
    side = turn + float(rng.uniform(math.radians(70), math.radians(110)))
    start, end = _around(centre, radius, turn), _around(centre, radius, turn + math.pi)
    tip = _around(centre, radius, side)
    board.line(start, end)
    board.line(centre, tip)
    middle = ((centre[0] + tip[0]) / 2, (centre[1] + tip[1]) / 2)
    board.label(_beside(middle, side + math.pi / 2, radius_label), radius_label)
    # On the side of the diameter that is opposite to the radius.
    board.label(
        _beside(_around(centre, 0.3 * radius, turn), side + math.pi, diameter_label), diameter_label
    )
    return [
        Measure(radius_label, "length", (centre, tip)),
        Measure(diameter_label, "length", (start, end)),
    ]


def circle_angles(
    board: Board, rng: np.random.Generator, central: int, central_label: str, inscribed_label: str
) -> list[Measure]:
    """Draws an angle at the centre of a circle and one on the circle over the same arc."""
    radius = float(rng.uniform(115, 125))
    centre = _centre(rng, radius)
    board.circle(centre, radius)
    board.dot(centre, 5)
    turn, half = float(rng.uniform(0, 2 * math.pi)), math.radians(central / 2)
    a, b = _around(centre, radius, turn - half), _around(centre, radius, turn + half)
    # Near the middle of the far arc, so that the centre lies inside the inscribed angle.
    c = _around(centre, radius, turn + math.pi + float(rng.uniform(-0.25, 0.25)))
    for one, other in ((centre, a), (centre, b), (c, a), (c, b)):
        board.line(one, other)
    return [
        _angle(board, rng, (a, centre, b), central_label),
        _angle(board, rng, (a, c, b), inscribed_label),
    ]


def parallel_lines(
    board: Board,
    rng: np.random.Generator,
    angle: int,
    relation: Literal["corresponding", "co-interior"],
    given_first: bool,
) -> list[Measure]:
    """Draws two parallel lines and a transversal, with the given angle and `UNKNOWN`.

    Args:
        board: to draw on.
        rng: for all random draws.
        angle: the given angle, degrees.
        relation: of the unknown angle to the given one.
        given_first: put the given angle at the first crossing, not at the second.
    """
    turn = math.radians(float(rng.uniform(-25, 25))) + (math.pi / 2) * int(rng.integers(4))
    along = (math.cos(turn), math.sin(turn))
    # The angle at q between its line and the direction to p; with the co-interior one at p it
    # adds up to 180 degrees.
    slope = math.radians(angle if given_first or relation == "corresponding" else 180 - angle)
    across = (math.cos(turn + slope), math.sin(turn + slope))
    gap = float(rng.uniform(95, 115)) / math.sin(slope)
    middle = (SIDE / 2 + float(rng.uniform(-8, 8)), SIDE / 2 + float(rng.uniform(-8, 8)))
    q, p = (_shifted(middle, across, sign * gap / 2) for sign in (-1, 1))
    reach = 118.0
    ends: dict[str, tuple[Point, Point]] = {}
    for name, point in (("q", q), ("p", p)):
        # Lines are centred on the picture, not on their crossing.
        offset = (middle[0] - point[0]) * along[0] + (middle[1] - point[1]) * along[1]
        ends[name] = (
            _shifted(point, along, offset - reach),
            _shifted(point, along, offset + reach),
        )
        board.line(*ends[name])
        board.arrow(*ends[name])
    tips = (_shifted(q, across, -55), _shifted(p, across, 55))
    board.line(*tips)
    at_q = (ends["q"][1], q, p)
    at_p = (ends["p"][1], p, tips[1] if relation == "corresponding" else q)
    first, second = (at_q, at_p) if given_first else (at_p, at_q)
    return [
        _angle(board, rng, first, str(angle)),
        _angle(board, rng, second, UNKNOWN),
    ]


def _angle(
    board: Board, rng: np.random.Generator, arms: tuple[Point, Point, Point], text: str
) -> Measure:
    """Marks and labels an angle, as near to the vertex as its arms allow."""
    a, vertex, b = arms
    (ax, ay), (bx, by) = unit(vertex, a), unit(vertex, b)
    length = math.hypot(ax + bx, ay + by)
    x, y = (ax + bx) / length, (ay + by) / length
    degrees = text != UNKNOWN
    width, height = label_size(text, degrees)
    room = 0.0
    for ux, uy in ((ax, ay), (bx, by)):
        # How far the label reaches towards an arm, and how fast its distance from it grows.
        reach = (width * abs(uy) + height * abs(ux)) / 2 + 3
        away = abs(x * uy - y * ux)
        room = max(room, reach / away)
    radius = min(max(room, 26.0), 88.0) + float(rng.uniform(0, 4))
    near = radius - (width * abs(x) + height * abs(y)) / 2
    board.arc(vertex, a, b, max(14.0, near - 5))
    board.label((vertex[0] + radius * x, vertex[1] + radius * y), text, degrees)
    return Measure(text, "angle", arms)


def _placed(corners: Sequence[Point], rng: np.random.Generator) -> list[Point]:
    """Places a shape: rotated at random, about as large as the picture allows, and shifted."""
    turn = float(rng.uniform(0, 2 * math.pi))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = math.cos(turn), math.sin(turn)
    turned = np.array(
        [(x * cos - mirror * y * sin, x * sin + mirror * y * cos) for x, y in corners]
    )
    turned -= turned.min(axis=0)
    turned *= (SIDE - 2 * MARGIN) / turned.max() * float(rng.uniform(0.93, 1.0))
    free = SIDE - 2 * MARGIN - turned.max(axis=0)
    turned += MARGIN + free * rng.uniform(0.2, 0.8, size=2)
    return [(float(x), float(y)) for x, y in turned]


def _centre(rng: np.random.Generator, radius: float) -> Point:
    free = SIDE / 2 - radius - 4
    x, y = rng.uniform(-free, free, size=2)
    return SIDE / 2 + float(x), SIDE / 2 + float(y)


def _around(centre: Point, radius: float, turn: float) -> Point:
    return centre[0] + radius * math.cos(turn), centre[1] + radius * math.sin(turn)


def _shifted(point: Point, direction: Point, distance: float) -> Point:
    return point[0] + direction[0] * distance, point[1] + direction[1] * distance


def _beside(point: Point, turn: float, text: str) -> Point:
    """Returns the centre of a label beside ``point``, in a direction."""
    width, height = label_size(text)
    reach = (width * abs(math.cos(turn)) + height * abs(math.sin(turn))) / 2 + 8
    return _around(point, reach, turn)
