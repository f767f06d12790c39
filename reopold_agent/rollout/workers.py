"""One environment per thread, with a bound on every call.

Threads are daemons: an environment that hangs for ever costs its thread, never the run or the
process's exit. (Peers wait for ever: verl #2445.)
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a call gave: its value, or the error as text (last line first, then the traceback)."""

    value: Any
    error: str | None
    seconds: float


class Worker:
    """Owns one environment and runs its calls in order on one daemon thread."""

    def __init__(self, make_env: Callable[[], gymnasium.Env[Any, str]]) -> None:
        self._calls: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._make_env = make_env
        self._called_at = 0.0
        self._thread = threading.Thread(target=self._serve, daemon=True, name="reopold-env")
        self._thread.start()

    def call(self, function: Callable[[Any], Any]) -> None:
        """Queues ``function(env)``; the time of `result` counts from here."""
        self._called_at = time.perf_counter()
        self._calls.put(function)

    def result(self, seconds: float) -> Outcome:
        """The outcome of the call, waiting at most until ``seconds`` after it was made.

        Workers that hang at the same time thus cost one time limit, not one each.
        """
        remaining = self._called_at + seconds - time.perf_counter()
        try:
            return self._outcomes.get(timeout=max(0.0, remaining))
        except queue.Empty:
            return Outcome(None, f"no answer within {seconds:g} s", seconds)

    def answered(self, seconds: float) -> bool:
        """Whether `result` would return at once: there is an outcome, or the time is up."""
        late = time.perf_counter() >= self._called_at + seconds
        return late or not self._outcomes.empty()

    def abandon(self) -> None:
        """Lets the thread end after its current call, if that ever returns."""
        self._calls.put(None)

    def close(self) -> None:
        """Closes the environment and waits a moment for the thread."""
        self._calls.put(None)
        self._thread.join(timeout=5.0)

    def _serve(self) -> None:
        env: gymnasium.Env[Any, str] | None = None
        while True:
            function = self._calls.get()
            if function is None:
                break
            started = time.perf_counter()
            try:
                if env is None:
                    env = self._make_env()
                outcome = Outcome(function(env), None, time.perf_counter() - started)
            except BaseException as error:
                # The boundary to third-party code, SystemExit included: reported, not hidden.
                text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                outcome = Outcome(None, text, time.perf_counter() - started)
            self._outcomes.put(outcome)
        if env is not None:
            try:
                env.close()
            except Exception:
                _log.exception("an environment failed to close")
