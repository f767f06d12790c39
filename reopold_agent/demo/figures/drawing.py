"""A small drawing board: antialiased lines, arcs and labels on one square picture.

Everything is drawn `FINER` times larger and averaged down. Labels use Pillow's built-in typeface,
so no font file is needed; a rim of the paper's colour keeps them legible on lines.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reopold_agent.types import PixelArray

SIDE: Final = 280
"""Width and height of a figure, pixels."""
FINER: Final = 2
LETTER: Final = 36
"""Size of a label's typeface, pixels: digits are 25 high, or 13 in a prompt of 140 x 140."""

LATTICE: Final = 14.0
LATTICE_START: Final = -10.0
"""Labels start on a grid of this many pixels, half a patch of a prompt. If a digit can lie across
patches in few ways only, models this small learn to read in minutes; otherwise hardly at all."""

Point = tuple[float, float]
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

PAPERS: Final[tuple[Colour, ...]] = (
    (255, 255, 255),
    (252, 250, 244),
    (244, 248, 252),
    (246, 246, 246),
)
INKS: Final[tuple[Colour, ...]] = (
    (20, 20, 20),
    (30, 50, 110),
    (120, 40, 30),
    (20, 90, 70),
    (80, 60, 120),
)
LABEL_INK: Final[Colour] = (10, 10, 10)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Every wheel of Pillow contains FreeType; without it this returns a bitmap of one size.
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("figures need a Pillow with FreeType; install Pillow's own wheel")
    return font


@functools.cache
def label_size(text: str, degrees: bool = False) -> tuple[float, float]:
    """Returns width and height of a label with its degree sign, in pixels."""
    left, top, right, bottom = _font(LETTER * FINER).getbbox(text, anchor="ls")
    sign = LETTER * FINER * (_SIGN_GAP + 2 * _SIGN_RADIUS) if degrees else 0
    return (right - left + sign) / FINER, (bottom - top) / FINER


_SIGN_RADIUS: Final = 0.1
_SIGN_GAP: Final = 0.06
"""Of a degree sign, as shares of the typeface's size. The typeface may lack the sign, so it is
drawn."""


@dataclass(frozen=True)
class Style:
    """The random appearance of a figure, which has no meaning."""

    paper: Colour
    ink: Colour
    tint: Colour
    width: float

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Style:
        """Draws a random style."""
        paper = PAPERS[int(rng.integers(len(PAPERS)))]
        ink = INKS[int(rng.integers(len(INKS)))]
        strength = 0.08 if rng.random() < 0.4 else 0.0
        tint = tuple(round(p + (i - p) * strength) for p, i in zip(paper, ink, strict=True))
        return cls(paper, ink, (tint[0], tint[1], tint[2]), float(rng.uniform(2.0, 3.6)))


@dataclass
class Board:
    """A picture to draw on. Coordinates are pixels of the finished picture, y downwards."""

    style: Style
    side: int = SIDE
    boxes: list[tuple[str, Box]] = field(default_factory=list)
    """Labels so far: text and (left, top, right, bottom)."""

    def __post_init__(self) -> None:
        size = (self.side * FINER, self.side * FINER)
        self._picture = Image.new("RGB", size, self.style.paper)
        self._draw = ImageDraw.Draw(self._picture)
        self._labels: list[tuple[Point, str, bool]] = []

    def line(self, a: Point, b: Point) -> None:
        """Draws a line with round ends."""
        width = self.style.width * FINER
        self._draw.line([_fine(a), _fine(b)], self.style.ink, round(width))
        for point in (a, b):
            self.dot(point, self.style.width / 2)

    def polygon(self, points: list[Point]) -> None:
        """Draws a closed outline, faintly filled."""
        self._draw.polygon([_fine(point) for point in points], fill=self.style.tint)
        for a, b in zip(points, [*points[1:], points[0]], strict=True):
            self.line(a, b)

    def dot(self, point: Point, radius: float) -> None:
        """Draws a filled disc."""
        self._draw.ellipse(_around(point, radius), fill=self.style.ink)

    def circle(self, centre: Point, radius: float) -> None:
        """Draws a circle, faintly filled."""
        width = round(self.style.width * FINER)
        self._draw.ellipse(_around(centre, radius), self.style.tint, self.style.ink, width)

    def tick(self, a: Point, b: Point, length: float = 14.0) -> None:
        """Draws the mark of equal sides: a short stroke across the middle of a side."""
        middle, (x, y) = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), unit(a, b)
        half = length / 2
        self.line(
            (middle[0] - y * half, middle[1] + x * half),
            (middle[0] + y * half, middle[1] - x * half),
        )

    def arrow(self, a: Point, b: Point, length: float = 9.0) -> None:
        """Draws the mark of parallel lines: an arrowhead at ``b`` that points away from ``a``."""
        x, y = unit(a, b)
        for side in (-1, 1):
            end = (b[0] - length * (x + side * 0.7 * y), b[1] - length * (y - side * 0.7 * x))
            self.line(b, end)

    def arc(self, vertex: Point, a: Point, b: Point, radius: float) -> None:
        """Draws the arc of the angle (below 180 degrees) between two arms."""
        start, end = sorted(
            math.degrees(math.atan2(p[1] - vertex[1], p[0] - vertex[0])) for p in (a, b)
        )
        if end - start > 180:
            start, end = end, start + 360
        width = max(2, round(self.style.width * FINER * 0.6))
        self._draw.arc(_around(vertex, radius), start, end, self.style.ink, width)

    def label(self, centre: Point, text: str, degrees: bool = False) -> None:
        """Adds a label, which `finished` writes on top of everything else.

        Its corner is moved to the `LATTICE`, and inwards if it would leave the picture.
        """
        width, height = label_size(text, degrees)
        left = _on_grid(centre[0] - width / 2, self.side - width - 3)
        top = _on_grid(centre[1] - height / 2, self.side - height - 3)
        x, y = left + width / 2, top + height / 2
        self._labels.append(((x, y), text, degrees))
        self.boxes.append((text, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)))

    @property
    def crowded(self) -> bool:
        """Whether two labels overlap."""
        pairs = itertools.combinations([box for _, box in self.boxes], 2)
        return any(
            a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3] for a, b in pairs
        )

    def finished(self) -> PixelArray:
        """Writes the labels and returns the picture, (side, side, 3) uint8."""
        font, rim = _font(LETTER * FINER), 3 * FINER
        for (text, (left, top, _, bottom)), (_, _, degrees) in zip(
            self.boxes, self._labels, strict=True
        ):
            ink_left, _, ink_right, below = font.getbbox(text, anchor="ls")
            origin = (left * FINER - ink_left, bottom * FINER - below)
            self._draw.text(
                origin,
                text,
                LABEL_INK,
                font,
                "ls",
                stroke_width=rim,
                stroke_fill=self.style.paper,
            )
            self._draw.text(origin, text, LABEL_INK, font, "ls")
            if degrees:
                radius = LETTER * _SIGN_RADIUS
                x = left + (ink_right - ink_left) / FINER + LETTER * _SIGN_GAP + radius
                sign = _around((x, top + radius), radius)
                self._draw.ellipse(sign, self.style.paper, LABEL_INK, 2 * FINER)
        return np.asarray(self._picture.reduce(FINER))


def unit(a: Point, b: Point) -> Point:
    """Returns the direction from ``a`` to ``b`` as a vector of length 1."""
    length = math.dist(a, b)
    return (b[0] - a[0]) / length, (b[1] - a[1]) / length


def _on_grid(value: float, most: float) -> float:
    """Returns the nearest place on the lattice that leaves a rim on both sides."""
    first, last = 1, math.floor((most - LATTICE_START) / LATTICE)
    return LATTICE_START + LATTICE * min(max(round((value - LATTICE_START) / LATTICE), first), last)


def _fine(point: Point) -> Point:
    return point[0] * FINER, point[1] * FINER


def _around(centre: Point, radius: float) -> Box:
    (x, y), r = _fine(centre), radius * FINER
    return x - r, y - r, x + r, y + r
