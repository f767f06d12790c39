"""Tasks made from real pictures: a handwritten digit somewhere in a photograph or a clip.

The digits (1,797 scans of 8 x 8) and the two photographs lie in ``pictures/`` (with `SOURCES.md`).
Training and held-out tasks share neither a digit nor a pixel of a photograph. A task is a function
of (seed, split, index), so a set needs no storage and an index always means the same task.

Image task: a 224 x 224 picture with a 40 x 40 card in one cell of a 4 x 4 grid. The prompt shows it
at 28 x 28 pixels, where the digit is 4 pixels wide: one has to crop the cell.

Video task: `FRAMES` frames, one or two of which show the card's face (white, with the digit), one
its back (dark), the others neither. Mostly the frames have 56 x 56 pixels, the prompt shows them at
7 x 7, and one has to select a frame. In a share of the tasks (``small_share``) the frames have
112 x 112 pixels and the card lies in one quarter of them: one has to select a frame and crop it.
"""

from __future__ import annotations

import functools
import gzip
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import override

from reopold_agent.demo.base import GeneratedTasks, Split
from reopold_agent.types import PixelArray, Task

Kind = Literal["image", "video", "small_video"]

_PICTURES: Final = resources.files("reopold_agent.demo") / "pictures"

SIDE: Final = 224
"""Width and height of an image task's picture, pixels."""
GRID: Final = 4
CELL: Final = SIDE // GRID
CARD: Final = 40
INK: Final = 34
"""Width and height of the digit on its card, pixels."""
FRAMES: Final = (4, 5)
OVERVIEW_SHARE: Final = 8
"""The prompt shows pictures smaller by this factor: a card has 5 x 5 pixels."""
TRAIN_DIGITS: Final = 1400
TRAIN_COLUMNS: Final = 390
"""Photographs are 640 pixels wide: training uses the columns left of this, held-out tasks the rest.
"""
DIGITS_SEED: Final = 20
"""Fixed, so that the held-out digits never depend on a run's seed."""

IMAGE_QUESTION: Final = "Which digit is written on the white card in the picture?"
VIDEO_QUESTION: Final = "Which digit is written on the white card in the video?"


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """A picture in memory: (height, width, 3) uint8."""

    pixels: PixelArray

    def open(self) -> Image.Image:
        """Returns a copy of the picture as RGB."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class DemoTasks(GeneratedTasks):
    """The tasks of a split, each made when it is read.

    Attributes:
        split: ``"train"`` or ``"eval"`` (held-out digits and parts of the photographs).
        size: number of tasks.
        seed: of the tasks.
        video_share: expected share of video tasks, 0 to 1.
        small_share: expected share of video tasks that also need a crop, 0 to 1.
        backdrop: brightness of the photograph, 0 (black) to 1; the recipe fades it in.

    Raises:
        ValueError: an attribute is out of range.
    """

    video_share: float = 0.25
    small_share: float = 0.3
    backdrop: float = field(default=1.0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("video_share", "small_share", "backdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    @override
    def make(self, index: int) -> Task:
        rng = self.rng(index)
        kind: Kind = "image"
        if rng.random() < self.video_share:
            kind = "small_video" if rng.random() < self.small_share else "video"
        digit_index = int(rng.choice(digit_indices(self.split)))
        metadata: dict[str, Any] = {"kind": kind, "digit_index": digit_index}
        if kind == "image":
            pictures, places = _picture(rng, self, digit_index)
        else:
            pictures, places = _clip(rng, self, digit_index, CELL if kind == "video" else 2 * CELL)
        return Task(
            id=f"demo-{self.split}-{self.seed}-{index}",
            question=IMAGE_QUESTION if kind == "image" else VIDEO_QUESTION,
            answers=(digit(digit_index),),
            images=tuple(ArrayImage(picture) for picture in pictures),
            is_video=kind != "image",
            metadata={**metadata, **places},
        )


@functools.cache
def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    with (_PICTURES / "digits.csv.gz").open("rb") as packed, gzip.open(packed, "rt") as rows:
        data = np.loadtxt(rows, delimiter=",")
    return data[:, :-1].reshape(-1, 8, 8), data[:, -1].astype(np.int64)


@functools.cache
def _photographs() -> tuple[PixelArray, ...]:
    photographs = []
    for name in ("china.jpg", "flower.jpg"):
        with (_PICTURES / name).open("rb") as file:
            photographs.append(np.asarray(Image.open(file)))
    return tuple(photographs)


@functools.cache
def digit_indices(split: Split) -> npt.NDArray[np.int64]:
    """Returns the rows of the digits that the split may use."""
    order = np.random.default_rng(DIGITS_SEED).permutation(len(_digits()[1]))
    return order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]


def digit(digit_index: int) -> str:
    """Returns the digit in a row: "0" to "9"."""
    return str(_digits()[1][digit_index])


def card(digit_index: int, paper: int = 240) -> PixelArray:
    """Draws the card with a digit: (`CARD`, `CARD`, 3) uint8, dark ink on light paper."""
    ink = Image.fromarray((_digits()[0][digit_index] * (255 / 16)).astype(np.uint8))
    ink_array = np.asarray(ink.resize((INK, INK), Image.Resampling.BICUBIC), dtype=np.float64)
    face = np.full((CARD, CARD), float(paper))
    edge = (CARD - INK) // 2
    face[edge : edge + INK, edge : edge + INK] -= ink_array / 255 * (paper - 20)
    return np.repeat(face.round().astype(np.uint8)[..., None], 3, axis=2)


def backdrop(rng: np.random.Generator, split: Split, strength: float = 1.0) -> PixelArray:
    """Cuts a piece of a photograph, (`SIDE`, `SIDE`, 3) uint8, from the split's columns only."""
    photos = _photographs()
    photo = photos[int(rng.integers(len(photos)))]
    height, width = photo.shape[:2]
    first, last = (0, TRAIN_COLUMNS) if split == "train" else (TRAIN_COLUMNS, width)
    top = int(rng.integers(height - SIDE + 1))
    left = int(rng.integers(first, last - SIDE + 1))
    piece = photo[top : top + SIDE, left : left + SIDE]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    brightness = rng.uniform(0.5, 0.9) * strength
    return (piece * brightness).astype(np.uint8)


def place_card(
    rng: np.random.Generator, picture: PixelArray, face: PixelArray
) -> dict[str, tuple[int, ...]]:
    """Draws the card into one cell of the picture.

    Returns:
        ``cell`` (row, column) and ``card`` (left, top, right, bottom) in pixels.
    """
    cells = picture.shape[0] // CELL
    row, column = (int(v) for v in rng.integers(cells, size=2))
    y, x = (int(v) for v in rng.integers(CELL - CARD + 1, size=2))
    top, left = row * CELL + y, column * CELL + x
    picture[top : top + CARD, left : left + CARD] = face
    return {"cell": (row, column), "card": (left, top, left + CARD, top + CARD)}


def _picture(
    rng: np.random.Generator, tasks: DemoTasks, digit_index: int
) -> tuple[list[PixelArray], dict[str, Any]]:
    picture = backdrop(rng, tasks.split, tasks.backdrop)
    places = place_card(rng, picture, card(digit_index))
    return [picture], {**places, "overview_max_side": SIDE // OVERVIEW_SHARE}


def _clip(
    rng: np.random.Generator, tasks: DemoTasks, digit_index: int, side: int
) -> tuple[list[PixelArray], dict[str, Any]]:
    """Makes frames of ``side`` pixels: pieces of one scene, as if the camera shook."""
    count = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    scene = backdrop(rng, tasks.split, tasks.backdrop)
    zoomed = Image.fromarray(scene).resize((side + side // 4,) * 2, Image.Resampling.BOX)
    wide = np.asarray(zoomed)
    roles = ["face", "back", "face" if rng.random() < 0.3 else "none"] + ["none"] * (count - 3)
    rng.shuffle(roles)
    frames, cells = [], []
    for role in roles:
        y, x = (int(v) for v in rng.integers(side // 4 + 1, size=2))
        frame = wide[y : y + side, x : x + side].copy()
        if role == "face":
            cells.append(place_card(rng, frame, card(digit_index))["cell"])
        elif role == "back":
            dark = np.full((CARD, CARD, 3), int(rng.integers(10, 50)), dtype=np.uint8)
            place_card(rng, frame, dark)
        frames.append(frame)
    legible = tuple(i + 1 for i, role in enumerate(roles) if role == "face")
    places = {"legible": legible, "cells": tuple(cells)}
    return frames, {**places, "overview_max_side": side // OVERVIEW_SHARE}
