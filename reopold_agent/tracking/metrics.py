"""Reads and appends files of JSON lines: ``metrics.jsonl`` and ``trajectories.jsonl``.

Each line is written by one call, without fsync, so killing the process can only cut off the last
line. Opening the file again repairs it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from reopold_agent.common.files import dump_json, replaced_file, writing
from reopold_agent.errors import DataError

_BLOCK = 1 << 20


def read_json_lines(path: str | Path, most: int | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a file, except a last line that a kill cut off.

    Args:
        path: the file.
        most: if the file has more lines, about so many are read, evenly spread over it.

    Raises:
        DataError: there is no such file, or a line before the last is not a JSON object; the
            message names file and line.
    """
    path, every = Path(path), 1
    if most is not None and path.exists():
        with path.open("rb") as stream:
            every = max(1, -(-sum(1 for _ in stream) // most))
    return list(_rows(path, _parse, every))


def _rows(
    path: Path, parse: Callable[[bytes], dict[str, Any] | None], every: int = 1
) -> Iterator[dict[str, Any]]:
    """Yields what ``parse`` reads of every so many lines, blank ones left out."""
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    with stream:
        for number, line in itertools.islice(enumerate(stream, start=1), 0, None, every):
            if not line.strip():
                continue
            row = parse(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):  # otherwise it is the last one and was cut off
                raise DataError(
                    f"{path}, line {number}: not a JSON object; repair or delete the line"
                )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of ``metrics.jsonl``; ``path`` is the file or its run folder.

    Raises:
        DataError: as `read_json_lines`.
    """
    path = Path(path)
    return read_json_lines(path / "metrics.jsonl" if path.is_dir() else path)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        return None
    return row if isinstance(row, dict) else None


_BEGINNING = re.compile(rb'\{"kind": "(\w+)", "step": (\d+)(?=[,}])')


def _parse_beginning(line: bytes) -> dict[str, Any] | None:
    """Returns kind and step of a row that begins with them, as those of runs do, else all of it.

    The rest may be most of a gigabyte of tokens: a run that continues need not parse it.
    """
    found = _BEGINNING.match(line)
    if found is None or not line.rstrip().endswith(b"}"):
        return _parse(line)
    return {"kind": found[1].decode(), "step": int(found[2])}


class JsonLines:
    """Appends rows to a file, one strict JSON object per line; the folder must exist.

    Only one process may write to a file (`RunFolder` has a lock). NaN and the infinities are
    written as null, and no value makes `write` fail (see `to_json`); a full disk does.

    Opening the file removes a last line that a kill cut off, or adds its missing line break.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()
        self._repair()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Raises:
            StorageError: the row could not be written completely; the written part is removed.
        """
        line = memoryview(dump_json(row) + b"\n")
        with writing(self.path):
            start = self._stream.seek(0, 2)
            try:
                while line:  # a raw write may write only a part
                    line = line[self._stream.write(line) or 0 :]
            except OSError:
                self._stream.truncate(start)
                raise

    def truncate_after(self, step: int) -> int:
        """Drops the rows that a run will write again when it resumes from checkpoint ``step``.

        A checkpoint's step is the number of updates done. Rows with ``kind`` "eval" are dropped
        if their step is greater, and all other rows if it is at least ``step`` (it counts from 0,
        so row ``step`` belongs to the update after the checkpoint). Rows without a step stay. The
        file is replaced atomically.

        Returns:
            Number of rows dropped.
        """
        rows = _rows(self.path, _parse_beginning)
        dropped = {number for number, row in enumerate(rows) if _is_after(row, step)}
        if dropped:
            self._stream.close()
            try:
                with self.path.open("rb") as old, replaced_file(self.path) as new:
                    lines = (line for line in old if line.strip())
                    new.writelines(
                        line for number, line in enumerate(lines) if number not in dropped
                    )
            finally:
                self._open()
        return len(dropped)

    def close(self) -> None:
        """Closes the file; writing afterwards raises ValueError."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        # Unbuffered, so that the kernel has the line when `write` returns.
        with writing(self.path):
            self._stream = self.path.open("ab", buffering=0)

    def _repair(self) -> None:
        with self.path.open("rb") as stream:
            end = start = stream.seek(0, 2)
            last = b""
            while start and b"\n" not in last:  # rows before the last one are not read
                start = max(0, start - max(_BLOCK, len(last)))
                stream.seek(start)
                last = stream.read(end - start)
        last = last.rpartition(b"\n")[2]
        if last:
            if _parse(last) is None:
                self._stream.truncate(end - len(last))
                return
            with writing(self.path):
                self._stream.write(b"\n")


def _is_after(row: Mapping[str, Any], step: int) -> bool:
    at = row.get("step")
    if isinstance(at, bool) or not isinstance(at, int | float):
        return False
    return at > step if row.get("kind") == "eval" else at >= step


class MetricsWriter(JsonLines):
    """``metrics.jsonl`` of a run: one row per training step and one per evaluation.

    Rows of a training step have ``kind`` "train" and ``step`` counted from 0; rows of an
    evaluation have ``kind`` "eval" and as ``step`` the number of updates done.
    """

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Raises:
            ValueError: the row's ``kind`` is neither "train" nor "eval", or its ``step`` is not
                an integer, so that a resume could not decide whether to drop it.
            StorageError: as in `JsonLines.write`.
        """
        kind, step = row.get("kind"), row.get("step")
        if kind not in ("train", "eval"):
            raise ValueError(f"a row of metrics needs kind 'train' or 'eval', got {kind!r}")
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise ValueError(f"a row of metrics needs an integer step, got {step!r}")
        super().write(row)
