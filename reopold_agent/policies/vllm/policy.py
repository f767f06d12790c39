"""Generation and scoring with vLLM on this machine."""

from __future__ import annotations

import logging
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from reopold_agent.errors import ModelError, ModelServerError, ServerStalledError
from reopold_agent.policies.vllm.engine import Job, VllmEngine
from reopold_agent.policies.vllm.requests import (
    completion_of,
    prompt_of,
    sampling_parameters,
    scores_of,
    scoring_parameters,
)
from reopold_agent.policies.vllm.settings import VllmSettings
from reopold_agent.policies.vllm.sync import written_weights
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
"""`VllmGenerator.step` returns at least this often, so that the caller can handle tool results."""


class VllmPolicy:
    """A vLLM engine as a policy; implements `Policy`, `ScoresBeside` and `TakesWeights`.

    Args:
        engine: an engine that only this policy uses.
        settings: time limits and retries.
        allowed_ids: size of the tokenizer; further rows of the output embedding are padding.
        forbidden_ids: ids that have probability 0 everywhere.
        stop_ids: a turn ends with the first of these.
        image_token_id: id of the image placeholder; None for text-only models.
        dtype: dtype of the engine's weights.

    Raises:
        ModelError: vLLM's logits cannot be masked for this architecture.
    """

    def __init__(
        self,
        engine: VllmEngine,
        settings: VllmSettings,
        *,
        allowed_ids: int,
        forbidden_ids: Sequence[int],
        stop_ids: Sequence[int],
        image_token_id: int | None,
        dtype: str = "float32",
    ) -> None:
        self.engine, self.settings = engine, settings
        self.stop_ids = frozenset(stop_ids)
        self.image_token_id = image_token_id
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.scoring_threads = settings.max_num_seqs
        forbidden = sorted(int(i) for i in forbidden_ids)
        places = self.rpc("mask_ids", allowed_ids, forbidden, what="masking ids")
        if not all(places):
            raise ModelError("vLLM's model has no logits layer in which ids can be masked")

    def generator(self, sampling: Sampling) -> VllmGenerator:
        """Starts a generation session with the engine's current weights."""
        return VllmGenerator(self, sampling)

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        """Computes log-probs of the student's tokens; may be called from several threads.

        Raises:
            ValueError: ``with_entropy`` is set; vLLM returns no entropies.
            ModelServerError: a request failed after all retries.
            ModelError: the answer is for other ids.
        """
        if with_entropy:
            raise ValueError("vLLM returns no entropies; score with the trainer's model")
        waiting = [_Scoring(self, trajectory) for trajectory in trajectories]
        logps = [each.result() for each in waiting]
        return [TokenScores(logp, np.zeros_like(logp)) for logp in logps]

    def rpc(self, method: str, *arguments: Any, what: str) -> list[Any]:
        """Calls a method of `WorkerExtension` in every worker process."""
        return self.engine.call(
            lambda engine: list(engine.collective_rpc(method, args=arguments)),
            self.settings.seconds,
            what,
        )

    def check_alive(self) -> None:
        """Checks that the engine works, since retries cannot help otherwise.

        Raises:
            ServerStalledError: it has computed nothing for its requests for too long.
            ModelServerError: it has failed.
        """
        name, limit = self.engine.name, self.settings.seconds
        if self.engine.idle_seconds > limit:
            raise ServerStalledError(
                f"the {name}'s vLLM engine stopped: it computed no token for {limit:g} s.\n"
                "Start the run again to continue from its last checkpoint; if the engine is only "
                f"slow, raise policy.{name}.seconds."
            )
        if self.engine.broken is not None:
            raise ModelServerError(
                f"the {self.engine.name}'s {self.engine.broken}. Start the run again to continue "
                "from its last checkpoint"
            )

    def sync(self, model: nn.Module) -> None:
        """Replaces the weights by the trainer's, in place, and drops what the old ones computed.

        LoRA adapters are merged. No turn may be in flight.

        Raises:
            ModelServerError: the engine failed to load them.
            ModelError: the model has adapters other than LoRA.
        """
        for path in written_weights(model, self.dtype, self.settings.bucket_mib * 2**20):
            self.rpc("load_file", path, what="loading weights")
        self.engine.call(_clear_caches, self.settings.seconds, "emptying the caches")

    def sleep(self) -> None:
        """Frees GPU memory: moves the weights to the CPU and drops the cache."""
        if self.settings.sleep:
            self.engine.call(lambda engine: engine.sleep(1), self.settings.seconds, "sleeping")

    def wake(self) -> None:
        """Moves the weights back to the GPU."""
        if self.settings.sleep:
            self.engine.call(lambda engine: engine.wake_up(), self.settings.seconds, "waking")

    def close(self) -> None:
        """Ends the engine's processes."""
        self.engine.close()


@dataclass(eq=False)
class _Turn:
    """A request in flight."""

    request: Request
    job: Job
    attempt: int


class VllmGenerator:
    """One generation session; implements `Generator`.

    The turns of a sequence are separate requests to vLLM; later ones reuse keys and values of
    earlier ones from its prefix cache.
    """

    runs_beside = True

    def __init__(self, policy: VllmPolicy, sampling: Sampling) -> None:
        self._policy, self._sampling = policy, sampling
        self._turns: dict[int, _Turn] = {}
        self._ended: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()

    @property
    def in_flight(self) -> int:
        """Number of turns being generated."""
        return len(self._turns)

    def submit(self, requests: Sequence[Request]) -> None:
        """Submits the requests to the engine and returns at once.

        Raises:
            ValueError: a key already has a turn in flight.
            ModelError: a request's ids and pictures do not match.
        """
        for request in requests:
            if request.key in self._turns:
                raise ValueError(f"sequence {request.key} already has a turn in flight")
            self._start(request, attempt=0)

    def step(self) -> list[Completion]:
        """Waits briefly for turns to end and returns those that have, in order of their keys.

        A turn that failed is retried, and finally returned with ``error`` set.

        Raises:
            ServerStalledError: vLLM has stopped computing.
            ModelError: vLLM continued other ids than the request's.
        """
        completions: list[Completion] = []
        try:
            wait = _POLL_SECONDS
            while True:
                key, job = self._ended.get(timeout=wait)
                wait = 0.0  # collect all others that have ended by now
                turn = self._turns.get(key)
                if turn is None or turn.job is not job:
                    continue  # an earlier attempt, which was aborted
                completions += self._end(turn)
        except queue.Empty:
            pass
        self._policy.check_alive()
        return sorted(completions, key=lambda completion: completion.key)

    def release(self, key: int) -> None:
        """Cancels the sequence's turn in flight; vLLM evicts its prefix cache by itself."""
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._policy.engine.abort(turn.job)

    def _start(self, request: Request, attempt: int) -> None:
        policy = self._policy
        job = Job(
            prompt_of(request.ids, request.images, policy.image_token_id),
            sampling_parameters(
                request, self._sampling, policy.stop_ids, seeded=policy.settings.seeds
            ),
            lambda job: self._ended.put((request.key, job)),
        )
        self._turns[request.key] = _Turn(request, job, attempt)
        policy.engine.start(job)

    def _end(self, turn: _Turn) -> list[Completion]:
        error = failure_of(turn.job)
        if error is not None:
            return self._failed(turn, error)
        del self._turns[turn.request.key]
        return [completion_of(turn.request, turn.job.output, self._policy.stop_ids)]

    def _failed(self, turn: _Turn, error: str) -> list[Completion]:
        name, key = self._policy.engine.name, turn.request.key
        _log.warning("a turn of the %s failed (attempt %d): %s", name, turn.attempt + 1, error)
        del self._turns[key]
        self._policy.check_alive()
        if turn.attempt < self._policy.settings.retries:
            self._start(turn.request, turn.attempt + 1)
            return []
        return [Completion(key, (), (), (), "length", error=error)]


class _Scoring:
    """One trajectory being scored."""

    def __init__(self, policy: VllmPolicy, trajectory: Trajectory) -> None:
        self._policy, self._trajectory = policy, trajectory
        self._ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._start()

    def _start(self) -> None:
        trajectory = self._trajectory
        prompt = prompt_of(trajectory.ids, trajectory.images, self._policy.image_token_id)
        parameters = scoring_parameters(seeded=self._policy.settings.seeds)
        self._job = Job(prompt, parameters, self._ended.put)
        self._policy.engine.start(self._job)

    def result(self) -> Any:
        settings = self._policy.settings
        for attempt in range(settings.retries + 1):
            if attempt:
                self._start()
            error = self._wait()
            if error is None:
                return scores_of(self._trajectory, self._job.output)
            self._policy.check_alive()
            _log.warning("scoring failed (attempt %d): %s", attempt + 1, error)
        raise ModelServerError(
            f"scoring task {self._trajectory.task_id} failed {settings.retries + 1} times; the "
            f"last error: {error}"
        )

    def _wait(self) -> str | None:
        while True:
            try:
                return failure_of(self._ended.get(timeout=min(1.0, self._policy.settings.seconds)))
            except queue.Empty:
                self._policy.check_alive()


def failure_of(job: Job) -> str | None:
    """Returns why an ended job failed; None if it succeeded."""
    if job.error is not None:
        return job.error
    (answer,) = job.output.outputs
    if answer.finish_reason not in ("stop", "length"):
        return f"vLLM ended the request with '{answer.finish_reason}'"
    return None


def _clear_caches(engine: Any) -> None:
    """Drops keys, values and picture features that the old weights computed."""
    if not engine.reset_prefix_cache():
        raise RuntimeError("a turn is still in flight")
    engine.reset_encoder_cache()
