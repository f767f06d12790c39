"""Following a file of JSON lines while another process writes to it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL = 1024
"""So many of the last bytes read are compared at the next look: a file that was cut and written
again in place seldom has the same ones there. (A resumed run replaces its files: another inode.)"""


@dataclass(frozen=True)
class Line:
    """A row and where it lies in the file, bytes."""

    offset: int
    length: int
    row: dict[str, Any]


class Follower:
    """Reads each finished line once; what is still being written waits for the next look.

    Attributes:
        path: the file; it need not exist yet.
        generation: grows when the file was cut or replaced and is read from its start again.
        bad: number of finished lines that are no JSON objects; they are skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.generation, self.bad = path, 0, 0
        self._offset, self._tail = 0, b""
        self._inode: tuple[int, int] | None = None

    def read(self, max_rows: int = 500, max_bytes: int = 1 << 24) -> list[Line]:
        """The next rows, none when there is nothing new.

        Args:
            max_rows, max_bytes: about how much to read at once; a longer line is still read whole.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            if self._offset:
                self.restart()
            return []
        found: list[Line] = []
        with stream:
            status = os.fstat(stream.fileno())
            inode = status.st_dev, status.st_ino
            stream.seek(max(0, self._offset - len(self._tail)))
            if stream.read(len(self._tail)) != self._tail or self._inode not in (None, inode):
                self.restart()
            self._inode = inode
            stream.seek(self._offset)
            start = self._offset
            while len(found) < max_rows and self._offset - start < max_bytes:
                data = stream.readline()
                if not data.endswith(b"\n"):
                    break
                row = parse(data)
                if row is not None:
                    found.append(Line(self._offset, len(data), row))
                elif data.strip():
                    self.bad += 1
                self._offset += len(data)
                self._tail = (self._tail + data)[-_TAIL:]
        return found

    def restart(self) -> None:
        """Reads from the start again at the next look."""
        self._offset, self._tail, self.bad, self._inode = 0, b"", 0, None
        self.generation += 1


def read_at(path: Path, offset: int, length: int) -> dict[str, Any] | None:
    """The row at a place that `Follower` gave; None if something else lies there now.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        return parse(stream.read(length))


def parse(data: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):  # bad UTF-8 is a ValueError; brackets may nest too deep
        return None
    return row if isinstance(row, dict) else None
