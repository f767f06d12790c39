"""verl's vLLM servers as a `Generator`, and as the teacher that scores trajectories.

`RolloutRunner` is synchronous, verl's client asynchronous: each episode runs on its own
thread and its requests run on the process's event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np

from reopold_agent.errors import (
    ModelError,
    ModelServerError,
    NonFiniteError,
    ServerStalledError,
)
from reopold_agent.types import (
    Completion,
    EncodedImage,
    FloatArray,
    Request,
    Sampling,
    TokenScores,
    Trajectory,
)

_log = logging.getLogger(__name__)


class SharedPictures:
    """Pictures in Ray's object store, put there once and read by any server on any node."""

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}

    def reference(self, image: EncodedImage) -> Any:
        """Returns a reference to the picture's pixels."""
        import ray

        if image.key not in self._references:
            self._references[image.key] = ray.put(image.pixels)
        return self._references[image.key]

    def forget(self, images: Sequence[EncodedImage]) -> None:
        """Releases the pictures of an episode that has ended."""
        for image in images:
            self._references.pop(image.key, None)


@dataclass
class Servers:
    """Access to the servers of one model from one process.

    Attributes:
        client: verl's ``LLMServerClient``.
        loop: the event loop that the client belongs to.
        stop_ids: a turn ends with the first of these.
        pictures: shared by the student's and the teacher's servers.
        role: ``student`` or ``teacher``.
        stall_seconds: a server that gives no request a token for so long has stopped. There is no
            other limit on the time of a request.
        seeded: whether each turn is sampled with a seed of its own.
        retries: further attempts after a failed request.
    """

    client: Any
    loop: asyncio.AbstractEventLoop
    stop_ids: frozenset[int]
    pictures: SharedPictures
    role: str
    stall_seconds: float
    seeded: bool = True
    retries: int = 2

    async def request(
        self,
        ids: Sequence[int],
        images: Sequence[EncodedImage],
        parameters: Mapping[str, Any],
        session: str,
    ) -> Any:
        """Sends a request, with retries; returns verl's ``TokenOutput``.

        No two attempts are at servers together: one that stalls has cancelled the request.

        Raises:
            ServerStalledError: all attempts failed, and a server stalled.
            ModelServerError: all attempts failed.
        """
        error: BaseException | None = None
        stalled = False
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(min(30.0, 2.0**attempt))
                session = uuid4().hex  # verl keeps a session at its server, which may be dead
            try:
                output = await self.client.generate(
                    session,
                    prompt_ids=list(ids),
                    sampling_params=dict(parameters),
                    image_data=[self.pictures.reference(image) for image in images] or None,
                    stall_seconds=self.stall_seconds,
                )
            except Exception as caught:
                # The boundary to another process (Ray, vLLM): any exception is retried, and the
                # last one is reported.
                error = caught
                stalled |= isinstance(caught, ServerStalledError)
                _log.warning("a request failed (attempt %d): %s", attempt + 1, caught)
                continue
            if output.stop_reason == "aborted":
                error = RuntimeError("the server aborted the request")
                continue
            return output
        if stalled:
            raise ServerStalledError(
                f"a vLLM server of the {self.role} stopped: in {self.stall_seconds:g} s no request "
                "there got a token, and other attempts failed, too.\nThe same command continues "
                "from the last checkpoint; for servers that are only slow, raise "
                f"engine.{self.role}_server.stall_seconds."
            ) from error
        raise ModelServerError(
            f"a request to the vLLM server failed {self.retries + 1} times, at last with "
            f"{type(error).__name__}: {error}"
        ) from error


class VerlPolicy:
    """A `Policy` over verl's vLLM servers."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def generator(self, sampling: Sampling) -> VerlGenerator:
        """Returns a session; an episode stays at one server, which caches its prefix."""
        return VerlGenerator(self._servers, sampling)

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """Returns the servers' log-probs of the trajectories' tokens; servers give no entropies.

        Raises:
            ValueError: entropies were asked for.
        """
        if with_entropy:
            raise ValueError("vLLM servers give no entropies")
        futures = [
            asyncio.run_coroutine_threadsafe(score(self._servers, t), self._servers.loop)
            for t in trajectories
        ]
        scores = [future.result() for future in futures]
        return [TokenScores(logp, np.zeros_like(logp)) for logp in scores]


class VerlGenerator:
    """A generation session; implements `Generator`. Its entropies are zeros."""

    def __init__(self, servers: Servers, sampling: Sampling) -> None:
        self._servers, self._sampling = servers, sampling
        self._session = uuid4().hex
        self._turns: dict[concurrent.futures.Future[Completion], int] = {}

    @property
    def in_flight(self) -> int:
        """Number of turns being generated."""
        return len(self._turns)

    def submit(self, requests: Sequence[Request]) -> None:
        """Sends the requests."""
        for request in requests:
            future = asyncio.run_coroutine_threadsafe(self._complete(request), self._servers.loop)
            self._turns[future] = request.key

    def step(self) -> list[Completion]:
        """Waits for the next turn to end; a failed one carries its error."""
        done, _ = concurrent.futures.wait(self._turns, return_when="FIRST_COMPLETED")
        return [self._outcome(future, self._turns.pop(future)) for future in done]

    def release(self, key: int) -> None:
        """Does nothing: the servers' prefix cache evicts by itself."""

    @staticmethod
    def _outcome(future: concurrent.futures.Future[Completion], key: int) -> Completion:
        try:
            return future.result()
        except ServerStalledError:
            raise
        except ModelServerError as error:
            return Completion(key, (), (), (), "stop", error=str(error))

    async def _complete(self, request: Request) -> Completion:
        output = await self._servers.request(
            request.ids,
            request.images,
            self._parameters(request),
            f"{self._session}-{request.key}",
        )
        ids = tuple(int(i) for i in output.token_ids)
        logp = tuple(float(v) for v in output.log_probs or ())
        if not ids or len(logp) != len(ids) or not np.isfinite(logp).all():
            raise ModelServerError(
                f"the vLLM server answered with {len(ids)} tokens and {len(logp)} log-probs, or "
                "some that are not finite"
            )
        stopped = ids[-1] in (request.stop_ids or self._servers.stop_ids)
        return Completion(
            key=request.key,
            ids=ids,
            logp=logp,
            entropy=(0.0,) * len(ids),
            finish="stop" if stopped else "length",
        )

    def _parameters(self, request: Request) -> dict[str, Any]:
        seed = {}
        if self._servers.seeded:
            seed["seed"] = int(np.random.SeedSequence(request.seed).generate_state(1)[0])
        return {
            **seed,
            "max_tokens": request.max_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": -1,
            "stop_token_ids": sorted(request.stop_ids or self._servers.stop_ids),
            "logprobs": True,
            "detokenize": False,
        }


async def score(servers: Servers, trajectory: Trajectory) -> FloatArray:
    """Returns a model's log-probs of the student's tokens, given the same ids and pictures.

    Returns:
        (L,) float32, 0 where ``loss_mask`` is false.

    Raises:
        ModelServerError: the request failed.
        ModelError: the answer is about other tokens.
        NonFiniteError: a log-prob is not finite.
    """
    parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
    output = await servers.request(
        trajectory.ids.tolist(), trajectory.images, parameters, uuid4().hex
    )
    ids = np.asarray(output.extra_fields["prompt_ids"], dtype=np.int64)[:, 0]
    values = np.asarray(output.extra_fields["prompt_logprobs"], dtype=np.float32)[:, 0]
    return aligned_scores(trajectory, ids, values)


def aligned_scores(trajectory: Trajectory, ids: Any, values: FloatArray) -> FloatArray:
    """Checks a server's answer and converts it to this project's alignment.

    Args:
        trajectory: the trajectory that was scored.
        ids: (L,) int64; verl's alignment: entry ``i`` is token ``i + 1``, the last one is
            meaningless.
        values: (L,) their log-probs.

    Raises:
        ModelError: other tokens or another length (peers were off by some positions: ms-swift
            #9011).
        NonFiniteError: values that are not finite.
    """
    length = len(trajectory.ids)
    if len(ids) != length or len(values) != length:
        raise ModelError(
            f"the teacher's server scored {len(ids)} tokens of task {trajectory.task_id}, which "
            f"has {length}: the server must have expanded pictures to another number of tokens"
        )
    if not np.array_equal(ids[:-1], trajectory.ids[1:]):
        first = int(np.nonzero(ids[:-1] != trajectory.ids[1:])[0][0]) + 1
        raise ModelError(
            f"the teacher's server scored other tokens of task {trajectory.task_id}: at position "
            f"{first} id {int(ids[first - 1])} instead of {int(trajectory.ids[first])}"
        )
    scores = np.zeros(length, dtype=np.float32)
    scores[1:] = np.where(trajectory.loss_mask[1:], values[:-1], 0.0)
    if not np.isfinite(scores).all():
        raise NonFiniteError(
            f"the teacher's log-probs of task {trajectory.task_id} are not finite; its vLLM may "
            "have masked an id that the student can sample"
        )
    return scores
