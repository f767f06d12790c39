"""What the player sees: text without control characters, pictures as files and perhaps drawn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from reopold_agent.playing.pictures import drawn
from reopold_agent.tracking.progress import is_terminal, write_plain
from reopold_agent.types import IMAGE_MARK, PixelArray

Part: TypeAlias = "str | PixelArray"


class Screen:
    """Writes to a terminal, in colour, or to a file or pipe, plainly.

    Args:
        console: where to.
        folder: pictures are saved there.
        pictures: how they are drawn as well: one of `reopold_agent.playing.pictures.MODES`, not
            ``auto``.
    """

    def __init__(self, console: Console, folder: Path, pictures: str = "path") -> None:
        self._console, self.folder, self._pictures = console, folder, pictures
        self._styled = is_terminal(console)

    @property
    def drawing(self) -> str:
        """How pictures are drawn."""
        return self._pictures

    def say(self, text: str, style: str = "") -> None:
        """Writes lines; control characters in them become spaces."""
        if self._styled:
            self._console.print(Text(visible(text), style), highlight=False, soft_wrap=True)
        else:
            write_plain(self._console.file, visible(text))

    def picture(self, pixels: PixelArray, name: str, caption: str) -> Path:
        """Saves a picture as ``folder/name.png``, names it, and draws it where that is wanted.

        Args:
            pixels: (height, width, 3) uint8.
            name: of the file.
            caption: what stands before size and path.
        """
        path = self.folder / f"{name}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        image.save(path)
        self.say(f"{caption}: {image.width}x{image.height}, {path}", "cyan")
        characters = drawn(image, self._pictures, self._console.width)
        if characters:  # past rich, which would count and wrap them
            self._console.file.write(characters)
            self._console.file.flush()
        return path


def visible(text: str) -> str:
    """The text with every control character but the line break as a space.

    What a model, a tool or a question says must not steer the terminal.
    """
    text = text.expandtabs(4).replace("\r\n", "\n")
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def parts_of(observation: Any) -> list[Part]:
    """Text and pictures of an observation in reading order.

    Args:
        observation: `reopold_agent.types.Observation`, or whatever another Gymnasium environment
            gives: a text, a picture, or anything else, which is shown as its ``repr``.
    """
    if isinstance(observation, Mapping) and isinstance(observation.get("text"), str):
        images = [np.asarray(image) for image in observation.get("images", ())]
        parts: list[Part] = []
        for position, text in enumerate(observation["text"].split(IMAGE_MARK)):
            if position and images:
                parts.append(images.pop(0))
            if text:
                parts.append(text)
        return [*parts, *images]  # more pictures than marks: shown all the same
    if isinstance(observation, str):
        return [observation] if observation else []
    if _is_picture(observation):
        return [observation]
    return [repr(observation)]


def _is_picture(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 3
        and value.shape[2] == 3
        and value.size > 0
    )


def speaks_utf8() -> None:
    """Lets odd characters pass both ways instead of ending the game: unreadable bytes come in,
    and characters that the terminal's encoding lacks go out, as replacement characters."""
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)  # streams of tests have none
        if reconfigure is not None:
            reconfigure(errors="replace")
