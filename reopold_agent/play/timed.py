"""An environment whose calls have a time limit, as in a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium

from reopold_agent.common.bounded import BoundedThread, DeadlineError

T = TypeVar("T")
Env = gymnasium.Env[Any, str]


class TimedEnv:
    """An environment on a thread of its own; one that hangs is given up, and made anew if needed.

    Args:
        make: makes the environment.
        seconds: time limit of one call.

    Raises:
        ReopoldError: the environment cannot be made.
    """

    def __init__(self, make: Callable[[], Env], seconds: float) -> None:
        self._make, self._seconds, self._hangs = make, seconds, False
        self._start()

    def ask(self, function: Callable[[Env], T]) -> T:
        """Returns ``function(env)``.

        Raises:
            DeadlineError: it took longer than the limit; the next call gets a new environment.
            Exception: any other of the environment.
        """
        if self._hangs:
            self._start()
        try:
            return self._thread.run(lambda: function(self.env), self._seconds)
        except DeadlineError as error:
            self._hangs = True
            self._thread.close()
            raise DeadlineError(
                f"it did not answer within {self._seconds:g} s (rollout.env_seconds).\n"
                "Another task gets a new environment."
            ) from error

    def close(self) -> None:
        """Closes the environment, unless it hangs."""
        if not self._hangs:
            self.ask(lambda env: env.close())
            self._thread.close()

    def _start(self) -> None:
        self._thread = BoundedThread()
        self.env: Env = self._thread.run(self._make, None)
        self._hangs = False
