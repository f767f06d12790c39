"""Makes a judge of any backend: prompts, cache, limits, retries, validation and counting."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from reopold_agent.judges.llm.base import (
    Backend,
    Completion,
    Counters,
    How,
    JudgeReply,
    JudgeRequest,
    Price,
    Prompt,
    ProseJudge,
)
from reopold_agent.judges.llm.cache import ReplyCache, cache_key
from reopold_agent.judges.llm.failures import JudgeError, TransientError, UndecidedError
from reopold_agent.judges.llm.limits import (
    Clock,
    Limits,
    RealClock,
    Throttle,
    backoff_seconds,
    with_deadline,
)
from reopold_agent.judges.llm.pool import run_in_threads
from reopold_agent.judges.llm.prompts import build, read_reply

_log = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 4
_REPLY_TOKENS = 32
"""Estimated before a call; the true number replaces it afterwards."""

_KEPT = (How.JUDGE, How.BLOCKED, How.TOO_LONG)
"""Outcomes that would not change if asked again, so they are cached; others are asked again."""


class _StoppedError(JudgeError):
    """The run or the judge was closed while this request waited."""


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a prompt before it is parsed; ``said`` is the model's text, if any."""

    how: How
    said: str = ""
    error: str | None = None
    tokens: tuple[int, int] = (0, 0)
    version: str = ""


class LlmJudge(ProseJudge):
    """A judge that asks a model through a `Backend`.

    Args:
        backend: sends prompts to the model.
        limits: rates, budget, deadlines.
        cache: keeps replies and is closed with the judge; None keeps none.
        price: to estimate the cost.
        longest_response: most characters of a response that are shown to the judge.
        clock: gives the time; tests replace it.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits | None = None,
        *,
        cache: ReplyCache | None = None,
        price: Price | None = None,
        longest_response: int = 32_000,
        clock: Clock | None = None,
    ) -> None:
        self.backend, self.limits, self._cache = backend, limits or Limits(), cache
        self._price, self._longest = price, longest_response
        self._clock = clock or RealClock()
        self._throttle = Throttle(self.limits, self._clock)
        self._random = random.Random()
        self._lock = threading.Lock()
        self._counters = Counters()
        self._flights: dict[str, Future[_Outcome]] = {}
        self._fruitless = 0
        self._closed = threading.Event()

    @property
    @override
    def name(self) -> str:
        return f"{self.backend.name}:{self.backend.model}"

    @override
    def run(
        self, requests: Iterable[JudgeRequest], *, ordered: bool = False
    ) -> Iterator[JudgeReply]:
        return run_in_threads(self.ask, requests, self.limits.concurrency, ordered=ordered)

    @override
    def ask(self, request: JudgeRequest, stop: threading.Event | None = None) -> JudgeReply:
        # Asks in the calling thread. Once ``stop`` is set, pauses end and nothing is sent.
        prompt = build(request, self._longest)
        key = cache_key(self.backend.name, self.backend.model, self.backend.settings(), prompt)
        self._count(requests=1)
        while True:
            # Equal prompts (of greedy samples) arrive together: only one of them is sent.
            with self._lock:
                flight = self._flights.get(key)
                mine = flight is None
                if flight is None:
                    flight = self._flights[key] = Future()
            if mine:
                return self._fly(request, prompt, key, flight, stop or self._closed)
            try:
                outcome = flight.result()
            except _StoppedError:
                continue  # the run that sent it was stopped, so this run sends it itself
            self._count(shared=1)
            return self._read(request, prompt, outcome, cached=True)

    def _fly(
        self,
        request: JudgeRequest,
        prompt: Prompt,
        key: str,
        flight: Future[_Outcome],
        stop: threading.Event,
    ) -> JudgeReply:
        """Finds the outcome of a prompt for all threads that wait for ``flight``."""
        try:
            outcome, cached = self._outcome(prompt, key, stop)
        except BaseException as error:
            # Removed first, so that a thread that then sends the prompt itself does not find it.
            self._land(key)
            flight.set_exception(error)
            raise
        self._land(key)
        flight.set_result(outcome)
        return self._read(request, prompt, outcome, cached)

    def _land(self, key: str) -> None:
        with self._lock:
            del self._flights[key]

    def _outcome(self, prompt: Prompt, key: str, stop: threading.Event) -> tuple[_Outcome, bool]:
        kept = self._cache.get(key) if self._cache is not None else None
        if kept is not None and kept[0] in _KEPT:
            self._count(cached=1)
            how = How(kept[0])
            error = None if how is How.JUDGE else f"{how} (known from an earlier run)"
            # Without a version the provider gave none, and the model itself is recorded.
            version = kept[2] if kept[2] != self.backend.model else ""
            return _Outcome(how, kept[1], error, version=version), True
        try:
            completion = self._complete(prompt, stop)
            tokens = completion.input_tokens, completion.output_tokens
            outcome = _Outcome(How.JUDGE, completion.text, None, tokens, completion.version)
        except UndecidedError as failure:
            outcome = _Outcome(failure.how, failure.said, str(failure), failure.tokens)
            if failure.how not in (How.UNAVAILABLE, How.BUDGET):
                self._count(failure=failure.how)
        self._count(input_tokens=outcome.tokens[0], output_tokens=outcome.tokens[1])
        self._watch(outcome)
        if self._cache is not None and outcome.how in _KEPT:
            model = outcome.version or self.backend.model
            self._cache.put(key, model, outcome.how, outcome.said, outcome.tokens)
        return outcome, False

    def _complete(self, prompt: Prompt, stop: threading.Event) -> Completion:
        """Returns a valid completion, after as many attempts as the limits allow."""
        limits, elapsed, attempt = self.limits, 0.0, 1
        while True:
            result = self._attempt(prompt, stop, min(limits.timeout, limits.deadline - elapsed))
            if isinstance(result, Completion):
                return _validated(result, prompt)
            seconds, failure = result
            pause = backoff_seconds(limits, attempt, self._random)
            if failure.retry_after is not None:
                pause = max(pause, failure.retry_after)
                self._throttle.pause(failure.retry_after)
            elapsed += seconds + pause
            if attempt == limits.attempts or elapsed >= limits.deadline:
                raise UndecidedError(How.UNAVAILABLE, f"after {attempt} attempts: {failure}")
            _log.debug("%s: attempt %d failed: %s", self.name, attempt, failure)
            self._count(retries=1)
            self._clock.sleep(pause, stop)
            attempt += 1

    def _attempt(
        self, prompt: Prompt, stop: threading.Event, timeout: float
    ) -> Completion | tuple[float, TransientError]:
        """Makes one attempt; returns the completion, or the failure and the seconds until it."""
        estimate = prompt.characters // _CHARACTERS_PER_TOKEN + _REPLY_TOKENS
        used = 0
        self._throttle.enter(estimate, stop)
        try:
            if stop.is_set():
                raise _StoppedError("the judge was stopped before this request was sent")
            if not self._throttle.spend():
                calls = self.limits.max_calls
                raise UndecidedError(How.BUDGET, f"the budget of {calls} calls is used up")
            self._count(calls=1)
            started = self._clock.now()
            try:
                completion = with_deadline(lambda: self.backend.ask(prompt, timeout), timeout)
            except TransientError as failure:
                self._count(failure=failure.kind)
                return self._clock.now() - started, failure
            except UndecidedError as failure:
                used = sum(failure.tokens)
                raise
            used = completion.input_tokens + completion.output_tokens
            return completion
        finally:
            self._throttle.settle(estimate, used)
            self._throttle.leave()

    def _watch(self, outcome: _Outcome) -> None:
        """Stops a judge that gives no usable replies.

        Raises:
            JudgeError: ``limits.give_up_after`` prompts in a row got none.
        """
        with self._lock:
            if outcome.how in (How.UNAVAILABLE, How.MALFORMED, How.EMPTY, How.TRUNCATED):
                self._fruitless += 1
            elif outcome.how is not How.BUDGET:
                self._fruitless = 0
            fruitless = self._fruitless
        if fruitless >= self.limits.give_up_after:
            raise JudgeError(
                f"{self.name}: {fruitless} requests in a row without a usable reply; the last: "
                f"{outcome.error}. Usable replies are kept: fix the cause and run the same "
                "command again, or use judge=none."
            )

    def _read(
        self, request: JudgeRequest, prompt: Prompt, outcome: _Outcome, cached: bool
    ) -> JudgeReply:
        how, error, value = outcome.how, outcome.error, None
        if how is How.JUDGE:
            try:
                value = read_reply(outcome.said, prompt)
            except UndecidedError as failure:  # from a damaged cache: new replies were checked
                how, error = failure.how, str(failure)
            else:
                how = How.NO_ANSWER if value is None else how
        reply = JudgeReply(
            extracted=value if isinstance(value, str) else None,
            how=how,
            equal=value if isinstance(value, bool) else None,
            cached=cached,
            input_tokens=0 if cached else outcome.tokens[0],
            output_tokens=0 if cached else outcome.tokens[1],
            error=error,
            said=outcome.said,
            id=request.id,
            version=outcome.version,
        )
        self._count(
            version=outcome.version,
            undecided=int(reply.undecided),
            decided=int(not reply.undecided),
        )
        return reply

    def _count(self, failure: str | None = None, version: str = "", **amounts: int) -> None:
        with self._lock:
            if version:
                self._counters.answered_by(version)
            if failure is not None:
                self._counters.fail(str(failure))
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)

    @override
    def counters(self) -> dict[str, Any]:
        with self._lock:
            counted = dataclasses.asdict(self._counters)
        if self._price is not None:
            cost = self._price.of(counted["input_tokens"], counted["output_tokens"])
            counted["cost"] = {"estimate": cost, "currency": self._price.currency}
        return counted

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "name": self.backend.name,
            "model": self.backend.model,
            "settings": dict(self.backend.settings()),
            "limits": dataclasses.asdict(self.limits),
            "longest_response": self._longest,
            "cache": None if self._cache is None else str(self._cache.path),
            **self.backend.describe(),
        }

    @override
    def close(self) -> None:
        self._closed.set()
        self.backend.close()
        if self._cache is not None:
            self._cache.close()


def _validated(completion: Completion, prompt: Prompt) -> Completion:
    try:
        read_reply(completion.text, prompt)
    except UndecidedError as failure:
        # An invalid reply costs money too.
        failure.tokens = (completion.input_tokens, completion.output_tokens)
        raise
    return completion
