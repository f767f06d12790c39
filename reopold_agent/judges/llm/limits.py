"""How fast, how many and how long: rate limits, budget, backoff and deadlines.

Time comes through a `Clock`, so that a minute of waiting can be tested in no time.
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

from reopold_agent.errors import ConfigError
from reopold_agent.judges.llm.failures import TransientError

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The user's limits.

    Attributes:
        concurrency: attempts in flight at once.
        requests_per_minute: attempts started in any 60 seconds; None: no limit.
        tokens_per_minute: likewise for tokens; estimated before, corrected after each reply.
        max_calls: attempts of this judge in this process, retries included; None: no limit.
        timeout: seconds for one attempt.
        deadline: seconds for all attempts at one prompt and the pauses between them. Waiting for
            one's turn under the rate limits is not counted.
        attempts: how often to try.
        backoff: seconds before the second attempt; doubled for each further one.
        longest_backoff: the most seconds between two attempts. A longer Retry-After is kept to
            if the deadline allows it.
        give_up_after: so many prompts in a row without a usable reply stop the judge: going on
            would cost a deadline for each of thousands of rows.
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
    """Seconds that only go forward, and waiting."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float, stop: threading.Event) -> None:
        """Waits, or returns early once ``stop`` is set."""
        ...


class RealClock:
    """The machine's clock."""

    def now(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def sleep(self, seconds: float, stop: threading.Event) -> None:
        """See `Clock`."""
        stop.wait(seconds)


class TokenBucket:
    """At most ``per_minute`` in any 60 seconds, with bursts of at most one second's worth.

    Whoever takes from it is told how long to wait before going on; the bucket may be in debt
    meanwhile, so that turns are given in order and a late wake-up costs no rate.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._clock = clock
        self._capacity = max(1, per_minute // 60)
        # What a full bucket gives at once is part of the minute's total.
        self._rate = (per_minute - self._capacity + 1) / 60
        self._level = float(self._capacity)
        self._at = clock.now()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Takes, and returns the seconds to wait before using it."""
        with self._lock:
            now = self._clock.now()
            self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
            self._at = now
            self._level -= amount
            return max(0.0, -self._level / self._rate)

    def correct(self, amount: float) -> None:
        """Takes more (or gives back, if negative) once the true amount is known."""
        with self._lock:
            self._level = min(self._capacity, self._level - amount)


class Throttle:
    """Lets attempts through as the limits allow. Shared by all threads of a judge."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self._slots = threading.BoundedSemaphore(limits.concurrency)
        self._requests = _bucket(limits.requests_per_minute, clock)
        self._tokens = _bucket(limits.tokens_per_minute, clock)
        self._resume_at = -math.inf
        self._left = limits.max_calls
        self._lock = threading.Lock()

    def spend(self) -> bool:
        """Takes one call from the budget; False if it is used up."""
        with self._lock:
            if self._left is None:
                return True
            self._left -= 1
            return self._left >= 0

    def enter(self, tokens: int, stop: threading.Event) -> None:
        """Waits for one's turn and takes a slot, to be given back by `leave`."""
        self._slots.acquire()
        wait = max(
            self._requests.take(1) if self._requests else 0.0,
            self._tokens.take(tokens) if self._tokens else 0.0,
        )
        if wait > 0:
            self._clock.sleep(wait, stop)
        # Another thread may have been told to wait while this one was waiting.
        while (pause := self._resume_at - self._clock.now()) > 0 and not stop.is_set():
            self._clock.sleep(pause, stop)

    def leave(self) -> None:
        """Gives the slot back."""
        self._slots.release()

    def settle(self, estimated: int, used: int) -> None:
        """Corrects the tokens that `enter` was told."""
        if self._tokens is not None:
            self._tokens.correct(used - estimated)

    def pause(self, seconds: float) -> None:
        """Holds everyone back: the provider's Retry-After is about the key, not one request."""
        with self._lock:
            self._resume_at = max(self._resume_at, self._clock.now() + seconds)


def _bucket(per_minute: int | None, clock: Clock) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock)


def backoff_seconds(limits: Limits, attempt: int, source: random.Random) -> float:
    """Pause after the ``attempt``-th failure (from 1): between half and all of a doubling time.

    Jitter keeps threads that failed together from coming back together; the half that is always
    waited keeps the server from being asked again at once.
    """
    full = min(limits.longest_backoff, limits.backoff * 2.0 ** min(attempt - 1, 60))
    return full * (0.5 + source.random() / 2)


_GRACE = 2.0
"""Seconds by which a transport's own timeout comes first; it knows better what went wrong."""


def with_deadline(function: Callable[[], T], seconds: float) -> T:
    """Calls a function and waits no longer than that for it.

    A socket's timeout restarts with every byte; a server that trickles would hold a row for ever.
    The thread of such a call is left behind (it is a daemon and ends with its connection).

    Raises:
        TransientError: it took longer.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            done.put((function(), None))
        # Not swallowed: it is raised in the thread that waits.
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
