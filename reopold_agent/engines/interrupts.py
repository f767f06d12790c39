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

from reopold_agent.errors import Terminated


class EvaluationStoppedError(Exception):
    """A signal came during a held-out evaluation, which broke off."""


class Interrupts:
    """The first Ctrl-C (or SIGTERM) lets the step finish; the second ends at once."""

    def __init__(self) -> None:
        self.received = False
        self._number = 0
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

    def error(self) -> KeyboardInterrupt:
        """What ends the run: `Terminated` after SIGTERM."""
        return Terminated() if self._number == signal.SIGTERM else KeyboardInterrupt()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._number = number
        if self.received:
            signal.signal(number, signal.SIG_DFL)  # a third one need not ask anybody
            raise self.error()
        self.received = True
        print("\nFinishing this step, then saving; once more to stop at once.", file=sys.stderr)


def resume_command(command: Sequence[str], folder: Path) -> str:
    """The command line that continues a run."""
    kept = [w for w in command if not w.startswith(("resume=", "hydra.run.dir="))]
    return shlex.join(["python", "-m", "reopold_agent.train", *kept, f"hydra.run.dir={folder}"])
