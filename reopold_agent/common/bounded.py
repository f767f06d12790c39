"""Runs functions for a limited time."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from reopold_agent.errors import ReopoldError

T = TypeVar("T")

_Outcome: TypeAlias = "queue.SimpleQueue[tuple[bool, Any]]"
"""Whether a function returned, and what it returned or raised."""


class DeadlineError(ReopoldError):
    """A call did not finish within its time limit."""


class RaisedError(Exception):
    """Stands for an exception that cannot be passed on: an exit, an interrupt, or anything that
    was raised in another process.

    Attributes:
        kind: class name of the exception.
        details: its traceback, for the log.
    """

    def __init__(self, kind: str, details: str) -> None:
        self.kind, self.details = kind, details
        super().__init__(kind, details)

    def __str__(self) -> str:
        return f"{self.kind}\n{self.details}"


class BoundedThread:
    """A daemon thread that runs functions in turn, for as long as their callers wait.

    A function that never returns keeps the thread, but blocks neither its caller nor the exit of
    the process; what is run afterwards waits for it. (A thread cannot bound code that never
    releases the interpreter lock.)
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], _Outcome] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="reopold-bounded").start()

    def run(self, function: Callable[[], T], seconds: float | None) -> T:
        """Runs a function and waits at most ``seconds`` for it; None sets no limit.

        Raises:
            DeadlineError: the time is up.
            RaisedError: the function tried to end the process (SystemExit, KeyboardInterrupt ...).
            Exception: any other exception of the function.
        """
        outcome: _Outcome = queue.SimpleQueue()
        self._calls.put((function, outcome))
        try:
            ok, value = outcome.get(timeout=None if seconds is None else max(0.0, seconds))
        except queue.Empty:
            raise DeadlineError(f"no result within {seconds:g} seconds") from None
        if not ok:
            raise value
        result: T = value
        return result

    def close(self) -> None:
        """Lets the thread end after what it still has to run."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (called := self._calls.get()) is not None:
            function, outcome = called
            try:
                outcome.put((True, function()))
            except Exception as error:  # raised again by the caller's thread
                outcome.put((False, error))
            except BaseException as error:  # SystemExit and the like must not pass for success
                outcome.put((False, RaisedError(type(error).__name__, traceback.format_exc())))
            del called, function, outcome  # while it waits, it holds nothing of them


def run_bounded(function: Callable[[], T], seconds: float) -> T:
    """Runs a function on a `BoundedThread` of its own and waits at most ``seconds`` for it.

    Raises:
        DeadlineError, RaisedError, Exception: as `BoundedThread.run`.
    """
    thread = BoundedThread()
    try:
        return thread.run(function, seconds)
    finally:
        thread.close()
