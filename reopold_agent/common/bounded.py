"""Runs a function for a limited time."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from reopold_agent.errors import ReopoldError

T = TypeVar("T")


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


def run_bounded(function: Callable[[], T], seconds: float) -> T:
    """Runs a function on a daemon thread and waits at most ``seconds`` for it.

    A function that never returns keeps its thread, but blocks neither the caller nor the exit of
    the process. (A thread cannot bound code that never releases the interpreter lock.)

    Raises:
        DeadlineError: the time is up.
        RaisedError: the function tried to end the process (SystemExit, KeyboardInterrupt ...).
        Exception: any other exception of the function.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((True, function()))
        except Exception as error:  # raised again by the caller's thread
            outcome.put((False, error))
        except BaseException as error:  # SystemExit and the like must not pass for success
            outcome.put((False, RaisedError(type(error).__name__, traceback.format_exc())))

    threading.Thread(target=work, daemon=True, name="reopold-bounded").start()
    try:
        ok, value = outcome.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise DeadlineError(f"no result within {seconds:g} seconds") from None
    if not ok:
        raise value
    result: T = value
    return result
