"""Runs a policy for many clients: requests come from any thread, one thread runs the model.

Waiting requests are processed together: scoring requests become one call of `Policy.score`, turns
join the generation session of their sampling. A faulty request fails alone.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from reopold_agent.errors import ModelServerError
from reopold_agent.policies.base import Generator, Policy, ScoresBeside
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

T = TypeVar("T")

_log = logging.getLogger(__name__)

_GATHER_SECONDS = 0.002
"""Requests that were sent together arrive within this time, and then share a pass."""

BEAT_SECONDS = 1.0
"""A caller that waits is told this often that the model works."""

_SUPERSEDED = "the sequence was released or asked for again"


class BusyError(Exception):
    """Too many requests are waiting; a later attempt may succeed."""


@dataclass(eq=False)
class _Scoring:
    trajectories: list[Trajectory]
    with_entropy: bool
    done: Future[list[TokenScores]] = field(default_factory=Future)


@dataclass(eq=False)
class _Turn:
    name: str
    request: Request
    sampling: Sampling
    done: Future[Completion] = field(default_factory=Future)


@dataclass(eq=False)
class _Abandon:
    """Nobody waits for a turn any more."""

    turn: _Turn
    done: Future[None] = field(default_factory=Future)


@dataclass(eq=False)
class _Release:
    names: list[str]
    done: Future[int] = field(default_factory=Future)


_Job: TypeAlias = "_Scoring | _Turn | _Abandon | _Release"


@dataclass(eq=False)
class _Kept:
    """A sequence of a client and the session that has computed it so far."""

    generator: Generator
    key: int
    turn: _Turn | None
    used: float


class PolicyService:
    """Runs a policy for clients on other threads.

    Args:
        policy: used on one thread, and for scoring on others if it is `ScoresBeside`.
        max_waiting: most requests at once; further ones are refused.
        seconds: a request fails when the model has worked on none for so long; there is no limit
            on waiting for its turn, or on how long it takes.
        max_kept: most sequences whose keys and values are kept between turns.
        idle_seconds: a sequence that is not continued for this long is forgotten.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_waiting: int = 1024,
        seconds: float = 3600.0,
        max_kept: int = 256,
        idle_seconds: float = 600.0,
    ) -> None:
        self._policy = policy
        self._max_waiting, self._seconds = max_waiting, seconds
        self._max_kept, self._idle_seconds = max_kept, idle_seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting = 0
        self._worked_at = time.monotonic()
        self._lock = threading.Lock()
        self._sessions: dict[Sampling, Generator] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._by_key: dict[int, _Kept] = {}
        self._keys = itertools.count()
        self._pool = None
        if isinstance(policy, ScoresBeside):
            self._pool = ThreadPoolExecutor(policy.scoring_threads, "reopold-score")
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="reopold-model", daemon=True)
        self._thread.start()

    def score(
        self,
        trajectories: Sequence[Trajectory],
        *,
        with_entropy: bool = False,
        working: Callable[[], None] | None = None,
    ) -> list[TokenScores]:
        """Scores trajectories, as `Policy.score`; may be called from any thread.

        Args:
            trajectories, with_entropy: as of `Policy.score`.
            working: called now and then while the model works, on this or on other requests; what
                it raises ends the call.

        Raises:
            BusyError: too many requests wait.
            ModelServerError: the model does not work any more.
        """
        job = _Scoring(list(trajectories), with_entropy)
        return self._run(job, job.done, working)

    def generate(
        self,
        name: str,
        request: Request,
        sampling: Sampling,
        working: Callable[[], None] | None = None,
    ) -> Completion:
        """Generates one turn; may be called from any thread.

        Args:
            name: the sequence's name; a later turn of it computes only its new ids. A second
                request while a turn of it is being generated replaces the first.
            request: its ``key`` is not used.
            sampling: temperature and top_p.
            working: as of `score`.

        Raises:
            BusyError, ModelServerError: as `score`.
            ValueError: the request is invalid.
            ModelError: its ids and pictures do not match.
        """
        job = _Turn(name, request, sampling)
        try:
            return self._run(job, job.done, working)
        except BaseException:
            if not job.done.done():
                self._jobs.put(_Abandon(job))
            raise

    def release(self, names: Sequence[str]) -> int:
        """Forgets sequences; returns how many were known."""
        job = _Release(list(names))
        return self._run(job, job.done)

    @property
    def waiting(self) -> int:
        """Number of requests that wait or are being computed."""
        return self._waiting

    def close(self) -> None:
        """Ends the thread; requests that wait fail."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout=30.0)
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _run(self, job: _Job, done: Future[T], working: Callable[[], None] | None = None) -> T:
        with self._lock:
            if self._closed:
                raise ModelServerError("the server is being stopped")
            if self._waiting >= self._max_waiting:
                raise BusyError(f"{self._waiting} requests are waiting already")
            self._waiting += 1
        try:
            self._jobs.put(job)
            self._wait(done, working)
            return done.result()
        except BaseException:
            done.cancel()
            raise
        finally:
            with self._lock:
                self._waiting -= 1

    def _wait(self, done: Future[Any], working: Callable[[], None] | None) -> None:
        """Waits until a job is done.

        Raises:
            ModelServerError: the model does not work any more.
        """
        told = started = time.monotonic()
        while True:
            wait([done], BEAT_SECONDS)
            if done.done():
                return
            worked = self._worked_at
            if time.monotonic() - max(worked, started) > self._seconds:
                raise ModelServerError(f"the model has done nothing for {self._seconds:g} s")
            if worked > told and working is not None:
                working()
                told = worked

    # On the model's thread

    def _serve(self) -> None:
        while True:
            jobs = self._take()
            if self._closed:
                break
            try:
                self._start(jobs)
                self._step()
                self._worked_at = time.monotonic()
                self._forget_idle()
            # A defect of the policy: waiting requests get the error, and the server goes on.
            except Exception as error:
                _log.exception("the policy failed")
                self._fail_all(jobs, error)
        self._fail_all(self._drain([]), ModelServerError("the server is being stopped"))

    def _take(self) -> list[_Job]:
        """Returns the jobs that have arrived; waits for one if there is nothing to generate."""
        if any(kept.turn is not None for kept in self._kept.values()):
            return self._drain([])
        try:
            first = self._jobs.get(timeout=1.0)
        except queue.Empty:
            return []
        if first is None:
            return []
        time.sleep(_GATHER_SECONDS)
        return self._drain([first])

    def _drain(self, jobs: list[_Job]) -> list[_Job]:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs
            if job is not None:
                jobs.append(job)

    def _start(self, jobs: Sequence[_Job]) -> None:
        live = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        scorings = [job for job in live if isinstance(job, _Scoring)]
        for with_entropy in (False, True):
            some = [job for job in scorings if job.with_entropy == with_entropy]
            if self._pool is not None:
                for job in some:
                    self._pool.submit(self._score, [job], with_entropy)
            elif some:
                self._score(some, with_entropy)
        turns: dict[str, _Turn] = {}
        for each in live:
            if isinstance(each, _Abandon):
                kept = self._kept.get(each.turn.name)
                if kept is not None and kept.turn is each.turn:  # not another attempt
                    self._release(each.turn.name)
            elif isinstance(each, _Release):
                each.done.set_result(sum(self._release(name) for name in each.names))
            elif isinstance(each, _Turn):
                if each.name in turns:
                    turns[each.name].done.set_exception(ModelServerError(_SUPERSEDED))
                turns[each.name] = each
        for sampling in {turn.sampling: None for turn in turns.values()}:
            self._submit([turn for turn in turns.values() if turn.sampling == sampling], sampling)

    def _score(self, jobs: Sequence[_Scoring], with_entropy: bool) -> None:
        together = [trajectory for job in jobs for trajectory in job.trajectories]
        try:
            scores = self._policy.score(together, with_entropy=with_entropy)
            if len(scores) != len(together):
                raise RuntimeError(f"{len(scores)} scores for {len(together)} trajectories")
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:  # to find the faulty one
                    self._score([job], with_entropy)
            else:
                jobs[0].done.set_exception(error)
            return
        remaining = iter(scores)
        for job in jobs:
            job.done.set_result(list(itertools.islice(remaining, len(job.trajectories))))

    def _submit(self, turns: Sequence[_Turn], sampling: Sampling) -> None:
        generator = self._sessions.get(sampling)
        if generator is None:
            generator = self._sessions[sampling] = self._policy.generator(sampling)
        requests = [self._register(turn, generator) for turn in turns]
        try:
            generator.submit(requests)
        except Exception:
            # One is faulty, or does not continue its kept sequence: restart each one alone.
            for turn in turns:
                self._submit_alone(turn, generator)

    def _submit_alone(self, turn: _Turn, generator: Generator) -> None:
        self._kept[turn.name].turn = None
        self._release(turn.name)
        request = self._register(turn, generator)
        try:
            generator.submit([request])
        except Exception as error:
            self._kept[turn.name].turn = None
            self._release(turn.name)
            turn.done.set_exception(error)

    def _register(self, turn: _Turn, generator: Generator) -> Request:
        kept = self._kept.get(turn.name)
        if kept is not None and (kept.turn is not None or kept.generator is not generator):
            # The client gave up the turn and asks again, or its sampling has changed.
            self._release(turn.name)
            kept = None
        if kept is None:
            while len(self._kept) >= self._max_kept:
                resting = [name for name, each in self._kept.items() if each.turn is None]
                if not resting:
                    break
                self._release(resting[0])
            kept = _Kept(generator, next(self._keys), None, 0.0)
            self._kept[turn.name] = self._by_key[kept.key] = kept
        kept.turn, kept.used = turn, time.monotonic()
        self._kept.move_to_end(turn.name)
        request = turn.request
        return Request(kept.key, request.ids, request.images, request.max_tokens, request.seed)

    def _step(self) -> None:
        for generator in self._sessions.values():
            if not generator.in_flight:
                continue
            for completion in generator.step():
                kept = self._by_key[completion.key]
                turn, kept.turn = kept.turn, None
                kept.used = time.monotonic()
                if turn is not None:
                    turn.done.set_result(completion)

    def _release(self, name: str) -> bool:
        kept = self._kept.pop(name, None)
        if kept is None:
            return False
        del self._by_key[kept.key]
        if kept.turn is not None:
            kept.turn.done.set_exception(ModelServerError(_SUPERSEDED))
        with suppress(KeyError):  # the session may have refused the sequence
            kept.generator.release(kept.key)
        return True

    def _forget_idle(self) -> None:
        before = time.monotonic() - self._idle_seconds
        idle = [n for n, kept in self._kept.items() if kept.turn is None and kept.used < before]
        for name in idle:
            self._release(name)

    def _fail_all(self, jobs: Sequence[_Job], error: Exception) -> None:
        """Ends these jobs and all turns in flight, and starts new sessions."""
        # A round scores first, so its scoring jobs are done or under way in the pool.
        waiting = [job for job in jobs if self._closed or not isinstance(job, _Scoring)]
        turns = [kept.turn for kept in self._kept.values() if kept.turn is not None]
        unfinished: list[_Job] = [*waiting, *turns]
        for job in unfinished:
            if not job.done.done():
                job.done.set_exception(error)
        self._sessions.clear()
        self._kept.clear()
        self._by_key.clear()
