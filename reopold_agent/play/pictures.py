"""Draws pictures in a terminal: by kitty's or iTerm2's protocol, sixel, or coloured half blocks.

Sources: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html,
https://vt100.net/docs/vt3xx-gp/chapter14.html (sixel).
"""

from __future__ import annotations

import base64
import io
import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO

import numpy as np
from PIL import Image

from reopold_agent.errors import ConfigError

MODES = ("auto", "path", "blocks", "kitty", "iterm", "sixel")

ANSWER_SECONDS = 0.3
"""Limit of the wait for a terminal's answer about its abilities; local ones need milliseconds."""

_CHUNK = 4096
_SIXEL_TERMS = ("foot", "mlterm", "contour", "yaft", "sixel")
_SIXEL_COLOURS = 128
_CELL = 10
"""Assumed width of a character, pixels; its height is twice that."""

_COLUMNS, _LINES = 80, 30
"""Most columns and lines of a picture."""


def check_mode(mode: str) -> None:
    """Refuses an unknown mode.

    Raises:
        ConfigError: the mode is unknown; the message lists all.
    """
    if mode not in MODES:
        raise ConfigError(f"pictures must be one of {', '.join(MODES)}; got '{mode}'")


def detect(
    environment: Mapping[str, str], terminal: bool, ask: Callable[[], bool] | None = None
) -> str:
    """Returns how this terminal can draw: ``kitty``, ``iterm``, ``sixel``, or ``path`` if not.

    Args:
        environment: variables.
        terminal: whether input and output are a terminal.
        ask: asks the terminal whether it has sixel; called only if it may answer.
    """
    term = environment.get("TERM", "")
    if not terminal or term in ("", "dumb"):
        return "path"
    # In tmux and screen the variables describe the outer terminal, which these sequences do not
    # reach.
    inside = "TMUX" in environment or term.startswith(("screen", "tmux"))
    program = environment.get("TERM_PROGRAM", "")
    if not inside:
        if "kitty" in term or "ghostty" in term or "KITTY_WINDOW_ID" in environment:
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if any(name in term for name in _SIXEL_TERMS):
            return "sixel"
    return "sixel" if ask is not None and ask() else "path"


def answers_sixel(source: IO[str], out: IO[str], seconds: float = ANSWER_SECONDS) -> bool:
    """Asks the terminal for its attributes (DA1); number 4 is sixel.

    Waits at most ``seconds``; a terminal that does not answer has no sixel. Does not ask while
    typed characters wait, since they would be taken for the answer.
    """
    if sys.platform == "win32":
        return False
    import termios
    import tty

    number = source.fileno()
    if select.select([number], [], [], 0)[0]:
        return False
    before = termios.tcgetattr(number)
    answer = b""
    try:
        tty.setcbreak(number)
        out.write("\x1b[c")
        out.flush()
        end = time.monotonic() + seconds
        while not answer.endswith(b"c") and (left := end - time.monotonic()) > 0:
            if select.select([number], [], [], left)[0]:
                answer += os.read(number, 1)
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
    return b"4" in answer.strip(b"\x1b[?c").split(b";")[1:]


def drawn(image: Image.Image, mode: str, columns: int) -> str:
    """Returns the characters that draw a picture; empty for ``path``.

    Args:
        image: RGB.
        mode: ``path``, ``blocks``, ``kitty``, ``iterm`` or ``sixel``.
        columns: width of the terminal, characters.
    """
    width = max(1, min(_COLUMNS, columns - 1, 2 * _LINES * image.width // image.height))
    if mode == "blocks":
        return blocks(image, width)
    wide = min(width, max(20, round(image.width / _CELL)))  # a small crop is shown enlarged
    if mode == "kitty":
        return kitty(image, wide) + "\n"
    if mode == "iterm":
        return iterm(image, wide) + "\n"
    return sixel(_resized(image, wide * _CELL)) + "\n" if mode == "sixel" else ""


def kitty(image: Image.Image, columns: int) -> str:
    """Draws by kitty's protocol: a PNG in base64, in pieces; ``q=2`` suppresses answers."""
    data = base64.b64encode(_png(image)).decode()
    pieces = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
    keys = f"a=T,f=100,q=2,c={columns},"
    drawing = []
    for position, piece in enumerate(pieces):
        more = int(position < len(pieces) - 1)
        drawing.append(f"\x1b_G{keys if position == 0 else ''}m={more};{piece}\x1b\\")
    return "".join(drawing)


def iterm(image: Image.Image, columns: int) -> str:
    """Draws by iTerm2's protocol for inline images."""
    png = _png(image)
    data = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns}:{data}\a"


def blocks(image: Image.Image, columns: int) -> str:
    """Draws half blocks: a character's foreground is the upper pixel, its background the lower."""
    small = _resized(image, min(columns, image.width))
    rows = np.asarray(small)
    if len(rows) % 2:
        rows = np.concatenate([rows, rows[-1:]])
    lines = []
    for upper, lower in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\N{UPPER HALF BLOCK}"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def sixel(image: Image.Image) -> str:
    """Draws sixel graphics: bands of six rows, one pass over a band per colour."""
    reduced = image.quantize(_SIXEL_COLOURS, method=Image.Quantize.MEDIANCUT)
    palette = reduced.getpalette() or []
    colours = np.asarray(reduced)
    drawing = [f'\x1bPq"1;1;{image.width};{image.height}']
    for number in np.unique(colours).tolist():
        r, g, b = (round(value * 100 / 255) for value in palette[3 * number : 3 * number + 3])
        drawing.append(f"#{number};2;{r};{g};{b}")
    for top in range(0, image.height, 6):
        band = colours[top : top + 6]
        weights = 1 << np.arange(len(band))
        passes = []
        for number in np.unique(band).tolist():
            values = ((band == number) * weights[:, None]).sum(0) + 63
            passes.append(f"#{number}{_run_lengths(values)}")
        drawing.append("$".join(passes) + "-")
    return "".join(drawing) + "\x1b\\"


def _run_lengths(values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str:
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return "".join(
        f"!{length}{chr(value)}" if length > 3 else chr(value) * length
        for value, length in zip(values[starts].tolist(), lengths.tolist(), strict=True)
    )


def _resized(image: Image.Image, width: int) -> Image.Image:
    if width == image.width:
        return image
    height = max(1, round(image.height * width / image.width))
    smooth = width < image.width
    return image.resize(
        (width, height), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
