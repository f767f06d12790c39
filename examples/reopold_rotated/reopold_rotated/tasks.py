"""The embedded digits, in dark photographs that are turned to the side or upside down."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from reopold_agent.demo.base import Split
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.types import ImageSource, Task


@dataclass(frozen=True)
class SpoiledImage:
    """A picture that is turned (by degrees, counter-clockwise) and darkened when it is opened."""

    source: ImageSource
    degrees: int
    brightness: float

    def open(self) -> Image.Image:
        """Returns the spoiled picture, RGB."""
        dark = ImageEnhance.Brightness(self.source.open()).enhance(self.brightness)
        return dark.rotate(self.degrees, expand=True)


@dataclass(frozen=True)
class RotatedDigits:
    """Tasks that depend only on (seed, split, index), so they are the same on every machine.

    A task's metadata has ``degrees``, the turn that makes the picture upright again.
    """

    split: Split
    size: int = 4096
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Task:
        """Returns the task at ``index``.

        Raises:
            IndexError: not in ``range(len(self))``.
        """
        task = DemoTasks(self.split, self.size, self.seed, video_share=0.0)[index]
        rng = np.random.default_rng((self.seed, index, 1))
        spoiled, brightness = int(rng.choice((90, 180, 270))), float(rng.uniform(0.1, 0.3))
        return replace(
            task,
            id=task.id.replace("demo", "rotated"),
            question="The picture is dark and not upright. Which digit is on the white card in it?",
            images=tuple(SpoiledImage(image, spoiled, brightness) for image in task.images),
            # The original's metadata of the card's place no longer hold.
            metadata={
                "overview_max_side": task.metadata["overview_max_side"],
                "degrees": 360 - spoiled,
                "brightness": brightness,
            },
        )
