"""Limits of a judge: rates, budget, backoff and deadlines.

Time comes from a `Clock`, so that tests need not wait.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from typing_extensions import override

from reopold_agent.errors import ConfigError
from reopold_agent.judges.llm.failures import TransientError

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The limits that the user sets.

    Attributes:
        concurrency: attempts in flight at once.
        requests_per_minute: attempts started in any 60 seconds; None: no limit.
        tokens_per_minute: their tokens, estimated before and corrected after each reply.
        max_calls: attempts of this judge in this process, retries included; None: no limit.
        timeout: seconds for one attempt.
        deadline: seconds for all attempts at one prompt and the pauses between them. Waiting
            because of the rate limits is not counted.
        attempts: most attempts at one prompt.
        backoff: seconds before the second attempt; doubled for each further one.
        longest_backoff: the most seconds between two attempts. A longer Retry-After is obeyed
            if the deadline allows it.
        give_up_after: the judge stops after this many prompts in a row without a usable reply;
            otherwise each of thousands of rows would wait for its deadline.
    """

    concurrency: int = 16
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_calls: int | None = None
    timeout: float = 60.0
    deadline: float = 300.0
    attempts: int = 6
    backoff: float = 1.0
    longest_backoff: float = 60.0
    give_up_after: int = 20

    def __post_init__(self) -> None:
        least = {"max_calls": 0, "backoff": 0, "longest_backoff": 0}
        for name, value in vars(self).items():
            if value is None:
                continue
            low = least.get(name, 1 if isinstance(value, int) else 0.001)
            if not value >= low or math.isinf(value):
                raise ConfigError(f"judge.{name}={value} must be a number >= {low}")


class Clock(Protocol):
    """A monotonic clock that can wait."""

    def now(self) -> float:
        """Returns the seconds since a fixed moment."""
        ...

    def sleep(self, seconds: float, stop: threading.Event) -> None:
        """Waits, or returns early once ``stop`` is set."""
        ...


class RealClock(Clock):
    """The clock of this machine."""

    @override
    def now(self) -> float:
        return time.monotonic()

    @override
    def sleep(self, seconds: float, stop: threading.Event) -> None:
        stop.wait(seconds)


class TokenBucket:
    """A rate limit: at most ``per_minute`` in any 60 seconds, and bursts of one second's amount.

    `take` returns how long to wait. The level may be negative meanwhile, so that callers go on in
    their order and waking up late does not lower the rate.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._clock = clock
        self._capacity = max(1, per_minute // 60)
        # A burst from a full bucket counts towards the minute's total.
        self._rate = (per_minute - self._capacity + 1) / 60
        self._level = float(self._capacity)
        self._at = clock.now()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Takes an amount; returns the seconds to wait before using it."""
        with self._lock:
            now = self._clock.now()
            self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
            self._at = now
            self._level -= amount
            return max(0.0, -self._level / self._rate)

    def correct(self, amount: float) -> None:
        """Takes a further amount, or returns it if negative, once the true amount is known."""
        with self._lock:
            self._level = min(self._capacity, self._level - amount)


class Throttle:
    """Delays attempts as the limits require; all threads of a judge share it."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self._slots = threading.BoundedSemaphore(limits.concurrency)
        self._requests = _bucket(limits.requests_per_minute, clock)
        self._tokens = _bucket(limits.tokens_per_minute, clock)
        self._resume_at = -math.inf
        self._left = limits.max_calls
        self._lock = threading.Lock()

    def spend(self) -> bool:
        """Takes one call from the budget; returns False if the budget is used up."""
        with self._lock:
            if self._left is None:
                return True
            self._left -= 1
            return self._left >= 0

    def enter(self, tokens: int, stop: threading.Event) -> None:
        """Waits until an attempt may start and takes a slot, which `leave` returns."""
        self._slots.acquire()
        wait = max(
            self._requests.take(1) if self._requests else 0.0,
            self._tokens.take(tokens) if self._tokens else 0.0,
        )
        if wait > 0:
            self._clock.sleep(wait, stop)
        # Another thread may have received a Retry-After while this one was waiting.
        while (pause := self._resume_at - self._clock.now()) > 0 and not stop.is_set():
            self._clock.sleep(pause, stop)

    def leave(self) -> None:
        """Returns the slot."""
        self._slots.release()

    def settle(self, estimated: int, used: int) -> None:
        """Replaces the estimate given to `enter` by the tokens used."""
        if self._tokens is not None:
            self._tokens.correct(used - estimated)

    def pause(self, seconds: float) -> None:
        """Delays all threads, because a provider's Retry-After applies to the key."""
        with self._lock:
            self._resume_at = max(self._resume_at, self._clock.now() + seconds)


def _bucket(per_minute: int | None, clock: Clock) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock)


def backoff_seconds(limits: Limits, attempt: int, source: random.Random) -> float:
    """Returns the pause after the ``attempt``-th failure (from 1), which doubles each time.

    It is a random part, at least half, of the full pause: threads that failed together do not
    retry together, and no thread retries at once.
    """
    full = min(limits.longest_backoff, limits.backoff * 2.0 ** min(attempt - 1, 60))
    return full * (0.5 + source.random() / 2)


_GRACE = 2.0
"""Seconds by which a backend's own timeout comes first, since its message says more."""


def with_deadline(function: Callable[[], T], seconds: float) -> T:
    """Calls a function and waits for its result for a limited time.

    A socket's timeout restarts with every byte, so a slow server could hold a row for ever. The
    thread of such a call is left running; it is a daemon and ends with its connection.

    Raises:
        TransientError: the function took longer.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            done.put((function(), None))
        # Not suppressed: the waiting thread raises it.
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=call, name="judge-attempt", daemon=True).start()
    try:
        value, error = done.get(timeout=seconds + _GRACE)
    except queue.Empty:
        late = True
    else:
        late = False
    if late:
        raise TransientError("timeout", f"no complete reply within {seconds:.0f} s")
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
