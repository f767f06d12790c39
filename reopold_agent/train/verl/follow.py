"""Shows the progress that another process writes to ``metrics.jsonl``."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from reopold_agent.tracking.progress import Progress


class Follower:
    """A thread that hands new rows of a file to `Progress`; a context manager.

    Args:
        path: the file; it need not exist yet. Rows that are there already are not shown.
        progress: where to.
        seconds: between looks.
    """

    def __init__(self, path: Path, progress: Progress, seconds: float = 0.5) -> None:
        self._path, self._progress, self._seconds = path, progress, seconds
        self._offset = path.stat().st_size if path.is_file() else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._stop.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            size = stream.seek(0, 2)
            self._offset = min(self._offset, size)  # a resumed run cuts rows off
            stream.seek(self._offset)
            for line in stream.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                self._show(json.loads(line))

    def _show(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            self._progress.step(row)
        elif row["kind"] == "eval":
            self._progress.evaluation(row)
