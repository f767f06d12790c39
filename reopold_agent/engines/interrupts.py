"""Stopping a run so that it can go on later."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """The first Ctrl-C (or SIGTERM) lets the step finish; the second ends at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        print("\nFinishing this step, then saving; once more to stop at once.", file=sys.stderr)


def resume_command(command: Sequence[str], folder: Path) -> str:
    """The command line that continues a run."""
    kept = [w for w in command if not w.startswith(("resume=", "hydra.run.dir="))]
    return shlex.join(["python", "-m", "reopold_agent.train", *kept, f"hydra.run.dir={folder}"])
