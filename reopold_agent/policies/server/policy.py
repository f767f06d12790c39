"""Generates and scores with a model behind HTTP."""

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

from reopold_agent.common.http import Deadline
from reopold_agent.common.secrets import key_from_environment
from reopold_agent.errors import (
    ConfigError,
    ModelError,
    ModelServerError,
    PolicyRequestError,
    ReopoldError,
    ServerStalledError,
)
from reopold_agent.policies.server.clients import Identity, ServerClient
from reopold_agent.policies.server.completions import CompletionsClient, MaskBound
from reopold_agent.policies.server.protocol import Vocabulary
from reopold_agent.policies.server.reopold import ReopoldClient
from reopold_agent.policies.server.settings import ServerSettings
from reopold_agent.policies.server.transport import Address, AttemptError, StatusError, Transport
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
"""`ServerGenerator.step` returns this often, so that results of tools can be submitted."""


class ServerPolicy:
    """A model behind HTTP; implements `Policy` and `ScoresBeside`.

    Args:
        settings: addresses, limits and the kind of server.
        vocabulary: the facts about ids on which the server must agree.
        wanted: the checkpoint that it should serve; None accepts any.
    """

    def __init__(
        self, settings: ServerSettings, vocabulary: Vocabulary, wanted: Identity | None = None
    ) -> None:
        self.settings = settings
        self.served: Identity | None = None
        """What the first server that answered says it serves."""
        self._wanted = wanted
        self._served: dict[Address, Identity] = {}
        self.scoring_threads = settings.max_in_flight
        key = key_from_environment([settings.api_key_env] if settings.api_key_env else [])
        self.transport = Transport(settings, key, self._check)
        arguments = (settings, vocabulary, self.transport)
        self._ours, self._vllm = ReopoldClient(*arguments), CompletionsClient(*arguments)
        self._client: ServerClient | None = None
        if settings.kind != "auto":
            self._client = self._ours if settings.kind == "reopold" else self._vllm
        self._detecting = threading.Lock()
        # Limits all requests together: of scoring threads, generators and releases.
        self._slots = threading.BoundedSemaphore(settings.max_in_flight)
        self.pool = ThreadPoolExecutor(settings.max_in_flight, "reopold-server")

    @property
    def mask_bound(self) -> MaskBound:
        """The error bounds of a vLLM server's log-probs; empty for our own server."""
        return self._vllm.bound

    def check(self) -> None:
        """Checks that a server answers and has the right model.

        The other addresses are checked when they are first used.

        Raises:
            ModelServerError: no server answered, after retries.
            ModelError: the server has another model.
        """
        self.transport.call(lambda address, deadline: None, "connecting")

    def generator(self, sampling: Sampling) -> ServerGenerator:
        """Returns a new generation session."""
        return ServerGenerator(self, sampling)

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """Scores trajectories, as `Policy.score`; may be called from several threads.

        Raises:
            PolicyRequestError: some trajectories could not be scored, after retries; it holds the
                scores of the others.
            ServerStalledError: a server sent nothing for too long, after retries.
            ModelError: a server has another model, or answered about other ids.
            NonFiniteError: a server gave log-probs that are not finite.
            ValueError: entropies were asked of a server that gives none.
        """
        step = self.client.score_batch
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
        """Generates one turn and waits for it.

        Raises:
            ModelServerError, ModelError, NonFiniteError: as `score`.
        """
        client = self.client
        with self._slots:
            return self.transport.call(
                lambda address, deadline: client.generate(
                    address, name, request, sampling, deadline
                ),
                f"a turn of sequence {request.key}",
                prefer=request.key,
            )

    def forget(self, names: Sequence[str]) -> None:
        """Tells all servers in use that they may forget these sequences, which have ended."""
        for address in self.transport.addresses:
            if address.checked:
                try:
                    deadline = Deadline(time.monotonic() + self.settings.connect_seconds)
                    self.client.release(address, names, deadline)
                except (AttemptError, ReopoldError) as error:  # nothing depends on it
                    _log.debug("could not release sequences at %s: %s", address.url, error)

    def close(self) -> None:
        """Closes the connections; the servers keep running."""
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
    def client(self) -> ServerClient:
        """The client for this kind of server.

        Raises:
            ModelServerError: the kind is not known yet, and no server answers.
        """
        if self._client is None:
            self.check()
        if self._client is None:
            raise ConfigError("the kind of server is not known; set policy.kind")
        return self._client

    def _part(
        self, trajectories: Sequence[Trajectory], with_entropy: bool
    ) -> list[TokenScores | ModelServerError]:
        """Scores with one request; returns scores, or errors for trajectories that have none."""
        client = self.client
        what = f"scoring {', '.join(t.task_id for t in trajectories)}"
        try:
            with self._slots:
                return list(
                    self.transport.call(
                        lambda address, deadline: client.score(
                            address, trajectories, with_entropy, deadline
                        ),
                        what,
                    )
                )
        except StatusError as error:
            if len(trajectories) == 1:
                return [error]
        except ServerStalledError:
            raise
        except ModelServerError as error:
            return [error] * len(trajectories)
        # The server refused the request, perhaps because of one trajectory: score each alone.
        return [each for t in trajectories for each in self._part([t], with_entropy)]

    def _check(self, address: Address, deadline: Deadline) -> None:
        with self._detecting:
            if self._client is None:
                try:
                    found = self._ours.check(address, deadline)
                    self._client = self._ours
                except StatusError as error:
                    if error.status != 404:
                        raise
                    found = self._vllm.check(address, deadline)
                    self._client = self._vllm
                self._same(address, found)
                return
        found = self._client.check(address, deadline)
        with self._detecting:
            self._same(address, found)

    def _same(self, address: Address, found: Identity) -> None:
        """Compares what an address serves with what is wanted, with what it served before, and with
        what the others serve.

        Raises:
            ModelError: it is known to be another model.
        """
        before, wanted = self._served.get(address), self._wanted
        if before is not None and (before.weights, before.model) != (found.weights, found.model):
            raise ModelError(
                f"the server {address.url} had '{before.model}', and now has other weights or "
                f"another name: '{found.model}'.\nServe the first one again and continue."
            )
        if wanted is not None and found.differs(wanted):
            raise ModelError(
                f"the server {address.url} has '{found.model}', whose weights are not those of "
                f"{wanted.model} here.\nServe this checkpoint there, or name the served one here."
            )
        if self.served is not None and self.served.differs(found):
            raise ModelError(
                f"the server {address.url} has '{found.model}', whose weights are not those of "
                f"'{self.served.model}' at another address.\nServe one checkpoint at all urls."
            )
        known = [each for each in (wanted, self.served) if each is not None]
        other = next(
            (e for e in known if e.differs(found) is None and e.model != found.model), None
        )
        if before is None and other is not None and self.settings.model is None:
            _log.warning(
                "the server %s has '%s', and nothing tells whether these are the weights of %s "
                "(policy.ROLE.model=%s says so)",
                address.url,
                found.model,
                other.model,
                found.model,
            )
        self._served[address] = found
        self.served = self.served or found


_Parts: TypeAlias = "Sequence[Future[list[TokenScores | ModelServerError]]]"


@dataclass(frozen=True)
class _Ended:
    key: int
    number: int
    outcome: Future[Completion]


class ServerGenerator:
    """One generation session; implements `Generator` and `RunsBeside`.

    Each turn is one request with all ids so far; the server reuses its computation of earlier
    turns.
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
            # Copied, because the runner extends its lists.
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
        """Waits a moment and returns the turns that have ended, in order of their keys.

        A turn that could not be generated, after retries, has ``error`` set.

        Raises:
            ServerStalledError: a server sent nothing for too long, after retries.
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
            wait = 0.0  # further ones only if they have ended already
            if self._turns.get(ended.key) != ended.number:
                continue  # released meanwhile
            del self._turns[ended.key]
            try:
                completions.append(ended.outcome.result())
            except ServerStalledError:
                raise
            except ModelServerError as error:
                _log.warning("%s", error)
                completions.append(Completion(ended.key, (), (), (), "length", error=str(error)))

    def release(self, key: int) -> None:
        """Forgets a sequence here, and tells the servers to forget it."""
        self._turns.pop(key, None)
        self._policy.pool.submit(self._policy.forget, [self._name(key)])

    def _end(self, key: int, number: int, outcome: Future[Completion]) -> None:
        self._ended.put(_Ended(key, number, outcome))

    def _name(self, key: int) -> str:
        return f"{self._session}/{key}"


def _all(futures: _Parts) -> _Parts:
    """Waits for all futures, so that none is still running when one raises; returns them."""
    for future in futures:
        future.exception()
    return futures
