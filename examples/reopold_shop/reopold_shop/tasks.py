"""Tasks: each has a small shop of its own and asks for one of its items."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from reopold_agent.types import Task

SIDES = {"ball": 30, "box": 4, "tent": 3}
COLOURS = ("red", "green", "blue", "purple")
PATTERNS = ("plain", "striped", "dotted")
LOOKS = list(itertools.product(SIDES, COLOURS, PATTERNS))
HELD_OUT = LOOKS[::5]
"""Held-out tasks ask for these, training tasks for the others. All kinds, colours and patterns are
in both."""


@dataclass(frozen=True)
class ShopTasks:
    """Tasks that depend only on split and index, so they are the same on every machine.

    A task's metadata: ``stock``, a list of items with kind, colour, pattern and price (coins);
    ``asked``, the kind, colour and pattern that are asked for; ``budget`` (coins).
    """

    split: str
    size: int = 1024

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Task:
        """Returns the task at ``index``.

        Raises:
            IndexError: not in ``range(len(self))``.
        """
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng((index, self.split == "eval"))
        looks = HELD_OUT if self.split == "eval" else [x for x in LOOKS if x not in HELD_OUT]
        asked = looks[rng.integers(len(looks))]
        others = [look for look in LOOKS if look != asked]
        budget = int(rng.integers(10, 20))
        # The item, one that looks the same but costs too much, and four that look different.
        items = [_item(asked, budget - int(rng.integers(5))), _item(asked, budget + 3)]
        items += [_item(others[n], int(rng.integers(5, 25))) for n in rng.choice(35, 4, False)]
        kind, colour, pattern = asked
        return Task(
            f"shop-{self.split}-{index}",
            f"Buy a {colour}, {pattern} {kind} for at most {budget} coins, and nothing else.",
            metadata={
                "stock": [items[n] for n in rng.permutation(len(items))],
                "asked": {"kind": kind, "colour": colour, "pattern": pattern},
                "budget": budget,
            },
        )


def _item(look: tuple[str, str, str], price: int) -> dict[str, Any]:
    return {**dict(zip(("kind", "colour", "pattern"), look, strict=True)), "price": price}


def draw(item: Mapping[str, Any], side: int = 84) -> Image.Image:
    """Draws an item on white: a shape of its colour, with white stripes or dots."""
    filled = Image.new("RGB", (side, side), item["colour"])
    pen = ImageDraw.Draw(filled)
    for x, y in itertools.product(range(6, side, 12), repeat=2):
        if item["pattern"] != "plain":
            pen.rectangle((x, y, x + (12 if item["pattern"] == "striped" else 4), y + 4), "white")
    shape = Image.new("L", filled.size)
    circle = (side / 2, side / 2, side / 2 - 2)
    ImageDraw.Draw(shape).regular_polygon(circle, SIDES[item["kind"]], fill=255)
    page = Image.new("RGB", filled.size, "white")
    page.paste(filled, mask=shape)
    return page
