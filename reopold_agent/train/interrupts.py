"""Handles signals, so that a stopped run can continue later."""

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
    """Stops a held-out evaluation after a signal."""


class Interrupts:
    """Handles Ctrl-C and SIGTERM: the first lets the step finish, the second ends the run at once.

    Attributes:
        received: whether a signal was received.
    """

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
        """Returns the exception that ends the run: `Terminated` after SIGTERM."""
        return Terminated() if self._number == signal.SIGTERM else KeyboardInterrupt()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._number = number
        if self.received:
            signal.signal(number, signal.SIG_DFL)  # a third one kills the process
            raise self.error()
        self.received = True
        print(
            "\nFinishing this step, then saving (an evaluation ends); press Ctrl-C again to stop "
            "at once.",
            file=sys.stderr,
        )


def say_stopped(state: str, command: Sequence[str], folder: Path) -> None:
    """Prints where a run has stopped and the command that goes on.

    Args:
        state: a sentence's end, with the words that introduce the command: ``after step 3; saved
            PATH.\\nContinue with:``.
        command: the command line's arguments.
        folder: the run's.
    """
    print(f"\nStopped {state}\n  {resume_command(command, folder)}", file=sys.stderr)


def resume_command(command: Sequence[str], folder: Path) -> str:
    """Returns the command line that continues a run."""
    return again(command, f"hydra.run.dir={folder}")


def again(command: Sequence[str], *changes: str) -> str:
    """Returns the command line of another run.

    Args:
        command: the arguments of the first run, of which the folder and ``resume`` are left out.
        changes: settings that replace those of the first run.
    """
    replaced = {"resume", "hydra.run.dir", *(word.partition("=")[0] for word in changes)}
    kept = [word for word in command if word.partition("=")[0].lstrip("+") not in replaced]
    return shlex.join(["python", "-m", "reopold_agent.train", *kept, *changes])
