"""Follows a file of JSON lines while another process writes to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL = 1024
"""How many of the last bytes read are compared at the next read, to detect a file that was
rewritten in place. (A resumed run replaces its files, which changes the inode.)"""


@dataclass(frozen=True)
class Line:
    """A row with its offset and length in the file, in bytes."""

    offset: int
    length: int
    row: dict[str, Any]


class Follower:
    """Reads each complete line once; a line that is still being written is read later.

    Args:
        path: the file; it need not exist yet.
        head: reads as much of a line as is needed, or None for lines that it cannot read, which
            are read completely.

    Attributes:
        path: the file.
        generation: grows when the file was rewritten or replaced and is read from its start again.
        bad: number of complete lines that are not JSON objects; they are skipped.
    """

    def __init__(
        self, path: Path, head: Callable[[bytes], dict[str, Any] | None] | None = None
    ) -> None:
        self.path, self.generation, self.bad = path, 0, 0
        self._head = head or parse
        self._offset, self._tail = 0, b""
        self._inode: tuple[int, int] | None = None

    def read(self, max_rows: int = 500, max_bytes: int = 1 << 24) -> list[Line]:
        """Returns the next rows.

        Args:
            max_rows, max_bytes: about how much to read; a longer line is still read completely.

        Raises:
            OSError: the file exists and cannot be read.
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
                row = self._head(data) or parse(data)
                if row is not None:
                    found.append(Line(self._offset, len(data), row))
                elif data.strip():
                    self.bad += 1
                self._offset += len(data)
                self._tail = (self._tail + data)[-_TAIL:]
        return found

    def restart(self) -> None:
        """Starts again from the beginning of the file at the next read."""
        self._offset, self._tail, self.bad, self._inode = 0, b"", 0, None
        self.generation += 1


def read_at(path: Path, offset: int, length: int) -> dict[str, Any] | None:
    """Reads the row at a position that `Follower` gave; None if something else is there now.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        return parse(stream.read(length))


def parse(data: bytes) -> dict[str, Any] | None:
    """Parses the JSON object of a line; None if it is not one."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):  # bad UTF-8 is a ValueError; brackets may nest too deep
        return None
    return row if isinstance(row, dict) else None
