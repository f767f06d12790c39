"""Shows text and pictures to the player."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from reopold_agent.common.terminal import is_terminal, visible, write_plain
from reopold_agent.play.pictures import drawn
from reopold_agent.types import PixelArray


class Screen:
    """Writes in colour to a terminal, or plain text to a file or pipe.

    Args:
        console: the output.
        folder: folder to save pictures in.
        pictures: how to draw pictures: one of `reopold_agent.play.pictures.MODES` but ``auto``.
    """

    def __init__(self, console: Console, folder: Path, pictures: str = "path") -> None:
        self._console, self.folder, self._pictures = console, folder, pictures
        self._styled = is_terminal(console)

    @property
    def drawing(self) -> str:
        """How pictures are drawn."""
        return self._pictures

    def say(self, text: str, style: str = "") -> None:
        """Writes lines; replaces their control characters by spaces."""
        if self._styled:
            self._console.print(Text(visible(text), style), highlight=False, soft_wrap=True)
        else:
            write_plain(self._console.file, visible(text))

    def picture(self, pixels: PixelArray, name: str, caption: str) -> Path:
        """Saves a picture as ``folder/name.png``, prints its path and draws it.

        Args:
            pixels: (height, width, 3) uint8.
            name: of the file, without suffix.
            caption: text before size and path.
        """
        path = self.folder / f"{name}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        image.save(path)
        self.say(f"{caption}: {image.width}x{image.height}, {path}", "cyan")
        characters = drawn(image, self._pictures, self._console.width)
        if characters:  # not by rich, which would wrap them
            self._console.file.write(characters)
            self._console.file.flush()
        return path


def speaks_utf8() -> None:
    """Makes unreadable bytes of the input, and characters that the terminal's encoding lacks,
    replacement characters instead of errors."""
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)  # streams of tests have none
        if reconfigure is not None:
            reconfigure(errors="replace")
