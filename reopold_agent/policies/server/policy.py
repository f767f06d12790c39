"""Generation and scoring by a model behind HTTP."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from reopold_agent.errors import ConfigError, ModelServerError, PolicyRequestError, ReopoldError
from reopold_agent.judges.llm.redact import key_from_environment
from reopold_agent.policies.server.backends import Backend
from reopold_agent.policies.server.completions import CompletionsBackend, MaskBound
from reopold_agent.policies.server.protocol import Vocabulary
from reopold_agent.policies.server.reopold import ReopoldBackend
from reopold_agent.policies.server.settings import ServerSettings
from reopold_agent.policies.server.transport import Address, AttemptError, StatusError, Transport
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
"""`ServerGenerator.step` returns at least this often, so that tools' results find someone."""


class ServerPolicy:
    """A model served elsewhere; implements `Policy` and `ScoresBeside`.

    Args:
        settings: addresses, limits and the kind of server.
        vocabulary: what the server must agree on.
    """

    def __init__(self, settings: ServerSettings, vocabulary: Vocabulary) -> None:
        self.settings = settings
        self.scoring_threads = settings.max_in_flight
        key = key_from_environment([settings.api_key_env] if settings.api_key_env else [])
        self.transport = Transport(settings, key, self._check)
        arguments = (settings, vocabulary, self.transport)
        self._ours, self._vllm = ReopoldBackend(*arguments), CompletionsBackend(*arguments)
        self._backend: Backend | None = None
        if settings.kind != "auto":
            self._backend = self._ours if settings.kind == "reopold" else self._vllm
        self._detecting = threading.Lock()
        # One bound on requests, whoever asks: scoring threads, generators, releases.
        self._slots = threading.BoundedSemaphore(settings.max_in_flight)
        self.pool = ThreadPoolExecutor(settings.max_in_flight, "reopold-server")

    @property
    def mask_bound(self) -> MaskBound:
        """How exact the log-probs of a vLLM server are; stays empty for our own server."""
        return self._vllm.bound

    def check(self) -> None:
        """Makes sure that a server answers and has the right model; the others are checked when
        they are first used.

        Raises:
            ModelServerError: none answered, after retries.
            ModelError: it has another model.
        """
        self.transport.call(lambda address, deadline: None, "connecting")

    def generator(self, sampling: Sampling) -> ServerGenerator:
        """A new session."""
        return ServerGenerator(self, sampling)

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """See `Policy.score`; may be called from several threads.

        Raises:
            PolicyRequestError: some trajectories could not be scored, after retries; it holds the
                scores of the others.
            ModelError: a server has another model, or answered about other ids.
            NonFiniteError: a server gave log-probs that are not finite.
            ValueError: entropies were asked of a server that gives none.
        """
        step = self.backend.score_batch
        parts = [list(trajectories[i : i + step]) for i in range(0, len(trajectories), step)]
        if len(parts) == 1:
            outcomes = self._part(parts[0], with_entropy)
        else:
            futures = [self.pool.submit(self._part, part, with_entropy) for part in parts]
            outcomes = [outcome for future in _all(futures) for outcome in future.result()]
        failed = {i: str(each) for i, each in enumerate(outcomes) if isinstance(each, Exception)}
        if failed:
            scores = [None if isinstance(each, Exception) else each for each in outcomes]
            raise PolicyRequestError(failed, scores)
        return [each for each in outcomes if isinstance(each, TokenScores)]

    def turn(self, name: str, request: Request, sampling: Sampling) -> Completion:
        """One turn; waits for it.

        Raises:
            ModelServerError, ModelError, NonFiniteError: as `score`.
        """
        backend = self.backend
        with self._slots:
            return self.transport.call(
                lambda address, deadline: backend.generate(
                    address, name, request, sampling, deadline
                ),
                f"a turn of sequence {request.key}",
                prefer=request.key,
            )

    def forget(self, names: Sequence[str]) -> None:
        """Tells all servers in use that sequences have ended; they would find out by themselves."""
        for address in self.transport.addresses:
            if address.checked:
                try:
                    deadline = time.monotonic() + self.settings.connect_seconds
                    self.backend.release(address, names, deadline)
                except (AttemptError, ReopoldError) as error:  # nothing depends on it
                    _log.debug("could not release sequences at %s: %s", address.url, error)

    def close(self) -> None:
        """Ends connections; the servers go on."""
        self.transport.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.mask_bound.tokens:
            _log.info(
                "masked ids may have changed the server's log-probs by at most %.2g nats on "
                "average over %d tokens, %.2g at most",
                self.mask_bound.mean,
                self.mask_bound.tokens,
                self.mask_bound.largest,
            )

    @property
    def backend(self) -> Backend:
        """Speaks to these servers' kind.

        Raises:
            ModelServerError: it is not known yet, and no server answers.
        """
        if self._backend is None:
            self.check()
        if self._backend is None:
            raise ConfigError("the kind of server could not be told; set policy.kind")
        return self._backend

    def _part(
        self, trajectories: Sequence[Trajectory], with_entropy: bool
    ) -> list[TokenScores | ModelServerError]:
        """Scores of one request, or for each trajectory why there are none."""
        backend = self.backend
        what = f"scoring {', '.join(t.task_id for t in trajectories)}"
        try:
            with self._slots:
                return list(
                    self.transport.call(
                        lambda address, deadline: backend.score(
                            address, trajectories, with_entropy, deadline
                        ),
                        what,
                    )
                )
        except StatusError as error:
            if len(trajectories) == 1:
                return [error]
        except ModelServerError as error:
            return [error] * len(trajectories)
        # The server refused them together: one may be at fault.
        return [each for t in trajectories for each in self._part([t], with_entropy)]

    def _check(self, address: Address, deadline: float) -> None:
        with self._detecting:
            if self._backend is None:
                try:
                    self._ours.check(address, deadline)
                    self._backend = self._ours
                    return
                except StatusError as error:
                    if error.status != 404:
                        raise
                self._vllm.check(address, deadline)
                self._backend = self._vllm
                return
        self._backend.check(address, deadline)


_Parts: TypeAlias = "Sequence[Future[list[TokenScores | ModelServerError]]]"


@dataclass(frozen=True)
class _Ended:
    key: int
    number: int
    outcome: Future[Completion]


class ServerGenerator:
    """One generation session; implements `Generator` and `RunsBeside`.

    Each turn is a request of its own that carries all ids; the server finds what it has computed
    of earlier turns.
    """

    runs_beside = True

    def __init__(self, policy: ServerPolicy, sampling: Sampling) -> None:
        self._policy, self._sampling = policy, sampling
        self._session = uuid.uuid4().hex
        self._turns: dict[int, int] = {}
        self._number = 0
        self._ended: queue.SimpleQueue[_Ended] = queue.SimpleQueue()

    @property
    def in_flight(self) -> int:
        """Number of turns being generated."""
        return len(self._turns)

    def submit(self, requests: Sequence[Request]) -> None:
        """Sends the requests; returns at once.

        Raises:
            ValueError: a key already has a turn in flight.
        """
        for request in requests:
            if request.key in self._turns:
                raise ValueError(f"sequence {request.key} already has a turn in flight")
            self._number += 1
            self._turns[request.key] = self._number
            # The ids are the runner's own list, which grows.
            kept = Request(
                request.key,
                tuple(request.ids),
                tuple(request.images),
                request.max_tokens,
                request.seed,
            )
            future = self._policy.pool.submit(
                self._policy.turn, self._name(request.key), kept, self._sampling
            )
            future.add_done_callback(partial(self._end, request.key, self._number))

    def step(self) -> list[Completion]:
        """Waits a moment for turns to end and returns those that have, in order of their keys.

        A turn that could not be had, after retries, comes with ``error`` set.

        Raises:
            ModelError: a server has another model, or continued other ids.
            NonFiniteError: a server gave log-probs that are not finite.
        """
        completions: list[Completion] = []
        wait = _POLL_SECONDS
        while True:
            try:
                ended = self._ended.get(timeout=wait)
            except queue.Empty:
                return sorted(completions, key=lambda completion: completion.key)
            wait = 0.0  # whatever else has ended by now
            if self._turns.get(ended.key) != ended.number:
                continue  # was released
            del self._turns[ended.key]
            try:
                completions.append(ended.outcome.result())
            except ModelServerError as error:
                _log.warning("%s", error)
                completions.append(Completion(ended.key, (), (), (), "length", error=str(error)))

    def release(self, key: int) -> None:
        """Forgets a sequence, here and at the server."""
        self._turns.pop(key, None)
        self._policy.pool.submit(self._policy.forget, [self._name(key)])

    def _end(self, key: int, number: int, outcome: Future[Completion]) -> None:
        self._ended.put(_Ended(key, number, outcome))

    def _name(self, key: int) -> str:
        return f"{self._session}/{key}"


def _all(futures: _Parts) -> _Parts:
    """Waits for all, so that none is left running when one raises."""
    for future in futures:
        future.exception()
    return futures
