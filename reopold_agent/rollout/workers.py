"""Runs each environment on its own thread, with a time limit on every call.

The threads are daemons: an environment that hangs blocks its thread, but neither the run nor the
end of the process. (Peers wait for ever: verl #2445.)
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium

from reopold_agent.errors import EnvironmentCodeError, told_in_full

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a call: its value, or the error as `told_in_full`.

    ``fault`` is the error itself if the environment's own code returned what it may not.
    """

    value: Any
    error: str | None
    seconds: float
    fault: EnvironmentCodeError | None = None


class Worker:
    """An environment whose calls run in order on one daemon thread."""

    def __init__(self, make_env: Callable[[], gymnasium.Env[Any, str]]) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], bool] | None]
        self._calls = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._make_env = make_env
        self._called_at = 0.0
        self._thread = threading.Thread(target=self._serve, daemon=True, name="reopold-env")
        self._thread.start()

    def call(self, function: Callable[[Any], Any]) -> None:
        """Queues ``function(env)``; the time limit of `result` starts here."""
        self._called_at = time.perf_counter()
        self._calls.put((function, True))

    def tell(self, function: Callable[[Any], None]) -> None:
        """Queues ``function(env)``, which has no outcome; an error is logged."""
        self._calls.put((function, False))

    def result(self, seconds: float) -> Outcome:
        """Returns the outcome of the call, waiting at most until ``seconds`` after `call`.

        So workers that hang at the same time cost one time limit together, not one each.
        """
        remaining = self._called_at + seconds - time.perf_counter()
        try:
            return self._outcomes.get(timeout=max(0.0, remaining))
        except queue.Empty:
            return Outcome(None, f"no answer within {seconds:g} s", seconds)

    def answered(self, seconds: float) -> bool:
        """Returns whether `result` would return at once: with an outcome or because time is up."""
        late = time.perf_counter() >= self._called_at + seconds
        return late or not self._outcomes.empty()

    def abandon(self) -> None:
        """Lets the thread end after its current call, if that call ever returns."""
        self._calls.put(None)

    def close(self) -> None:
        """Closes the environment and waits a moment for the thread."""
        self._calls.put(None)
        self._thread.join(timeout=5.0)

    def _serve(self) -> None:
        env: gymnasium.Env[Any, str] | None = None
        while True:
            called = self._calls.get()
            if called is None:
                break
            function, answers = called
            started = time.perf_counter()
            try:
                if env is None:
                    env = self._make_env()
                outcome = Outcome(function(env), None, time.perf_counter() - started)
            except BaseException as error:
                # Third-party code may raise anything, SystemExit included; it is reported.
                spent = time.perf_counter() - started
                fault = error if isinstance(error, EnvironmentCodeError) else None
                outcome = Outcome(None, told_in_full(error), spent, fault)
                del fault
            if answers:
                self._outcomes.put(outcome)
            elif outcome.error is not None:
                _log.error("a call of an environment failed: %s", outcome.error)
            del called, function, outcome  # while it waits, the pictures in them are not held
        if env is not None:
            try:
                env.close()
            except Exception:
                _log.exception("an environment failed to close")
