"""Plays episodes in processes that replace verl's agent loops.

verl asks for ``generate_sequences(prompts)`` and finds the trajectories in its TransferQueue. What
happens between is this project's own `RolloutRunner`, the same as in the local engine, with the
vLLM servers as its policy.

A worker that dies is started again by Ray, which also repeats the prompts it was at; random draws
depend on seed, step, task and sample only, and a row is written under its episode's key, so
nothing is lost or counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch
import transfer_queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from reopold_agent.config import TrainConfig
from reopold_agent.errors import ModelServerError, NonFiniteError, ServerStalledError
from reopold_agent.objectives import Needs
from reopold_agent.policies.loading import load_processing, student_spec
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.train.engine import run_objective
from reopold_agent.train.nonfinite import describe, invalid_logp, invalid_outcome
from reopold_agent.train.rows import Row
from reopold_agent.train.teachers import Teachers, run_teachers
from reopold_agent.train.verl.client import Servers, SharedPictures, VerlPolicy, score
from reopold_agent.train.verl.records import EPISODE, from_row, pixels_of, plain_rows, to_row
from reopold_agent.types import Sampling, Trajectory

_log = logging.getLogger(__name__)

TRAIN = "train"
"""The partition of TransferQueue for training rows."""


@dataclass(frozen=True)
class Prompt:
    """One task of a step and the episodes to play on it.

    ``uid`` names the group in TransferQueue, ``step`` counts from 0.
    """

    uid: str
    step: int
    env: str
    index: int
    first_sample: int
    samples: int


class Player:
    """Plays episodes in one process, for `RolloutWorker`, the Ray actor."""

    def __init__(
        self,
        config: TrainConfig,
        student: Any,
        teachers: Mapping[str, Any],
        loop: asyncio.AbstractEventLoop,
        concurrency: int,
    ) -> None:
        processing = load_processing(student_spec(config.model), "student")
        self._config, self._vision = config, processing.vision
        self._chat = ChatRenderer(
            processing.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call
        )
        stops, self.pictures = frozenset(self._chat.stop_ids), SharedPictures()
        engine = config.engine
        seeded = bool(engine.seeded_requests)
        shared = (loop, stops, self.pictures)

        def servers(client: Any, role: str, limit: float) -> Servers:
            return Servers(client, *shared, role=role, stall_seconds=limit, seeded=seeded)

        self.student = servers(student, "student", engine.student_server.stall_seconds)
        limit = engine.teacher_server.stall_seconds
        made = {}
        for each in run_teachers(config) if teachers else ():
            only = next(iter(teachers.values()))  # which verl names itself
            client = teachers[each.names[0]] if len(teachers) > 1 else only
            made[each.role] = servers(client, "teacher", limit)
        self.teachers = Teachers.of_run(config, made)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="reopold-episode")
        # One thread at a time uses a runner, whose environment is kept for the next episode.
        self._idle: dict[str, queue.SimpleQueue[RolloutRunner]] = {}

    async def episode(
        self,
        spec: EpisodeSpec,
        sampling: Sampling,
        seed: tuple[int, ...],
        *,
        by_teacher: bool = False,
    ) -> Trajectory:
        """Plays one episode on a thread."""
        servers = self.teachers.of(spec) if by_teacher else self.student
        policy = VerlPolicy(servers)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._play, policy, spec, sampling, seed)

    def trajectory(self, row: Mapping[str, Any]) -> Trajectory:
        """Returns the trajectory of a stored row, with its pictures."""
        trajectory = from_row(row).trajectory
        if self._vision is not None:
            trajectory.images = [self._vision.adopt(pixels) for pixels in pixels_of(row)]
        return trajectory

    def _play(
        self,
        policy: VerlPolicy,
        spec: EpisodeSpec,
        sampling: Sampling,
        seed: tuple[int, ...],
    ) -> Trajectory:
        idle = self._idle.setdefault(spec.split, queue.SimpleQueue())
        try:
            runner = idle.get_nowait()
        except queue.Empty:
            runner = make_runner(
                self._config, self._chat, self._vision, split=spec.split, concurrency=1
            )
        try:
            return runner.run(policy, [spec], sampling, seed)[0]
        finally:
            idle.put(runner)


class RolloutWorker:
    """A Ray actor: plays prompts and puts their scored trajectories into TransferQueue."""

    def __init__(
        self, config: TrainConfig, student: Any, teachers: Mapping[str, Any], concurrency: int
    ) -> None:
        torch.set_num_threads(1)
        transfer_queue.init()
        self._config = config
        loop = asyncio.get_event_loop()
        self._player = Player(config, student, teachers, loop, concurrency)
        self._sampling = Sampling(config.sampling.temperature, config.sampling.top_p)
        self._scored_at_once = not config.engine.shares_gpus
        self._outcomes = bool(run_objective(config).needs & Needs.OUTCOME)

    async def play(self, prompt: Prompt) -> None:
        """Plays the prompt's episodes and marks it as finished. Safe to repeat."""
        await transfer_queue.async_kv_put(
            key=prompt.uid, partition_id=TRAIN, tag={"status": "running"}
        )
        await asyncio.gather(*[self._record(prompt, session) for session in range(prompt.samples)])
        # verl trains on the stored rows; a group may have lost episodes.
        await transfer_queue.async_kv_put(
            key=prompt.uid, partition_id=TRAIN, tag={"status": "finished"}
        )

    async def evaluate(
        self,
        episodes: Sequence[EpisodeSpec],
        sampling: Sampling,
        seed: tuple[int, ...],
        by_teacher: bool,
    ) -> list[Trajectory]:
        """Plays held-out episodes; the trajectories come without pictures."""
        playing = [
            self._player.episode(spec, sampling, seed, by_teacher=by_teacher) for spec in episodes
        ]
        played = await asyncio.gather(*playing)
        for trajectory in played:
            self._player.pictures.forget(trajectory.images)
            trajectory.images = []
        return list(played)

    async def _record(self, prompt: Prompt, session: int) -> None:
        """Plays one episode and stores its row; a teacher with GPUs of its own scores it first.

        An unusable episode is logged but not stored; the step counts it as dropped.
        """
        sample = prompt.first_sample + session
        spec = EpisodeSpec("train", prompt.index, sample, prompt.env)
        trajectory = await self._player.episode(
            spec, self._sampling, (self._config.seed, 1, prompt.step)
        )
        at_once = self._scored_at_once
        if not trajectory.trainable or not await self._usable(trajectory, prompt.step, at_once):
            self._player.pictures.forget(trajectory.images)
            return
        row = {**to_row(trajectory), "uid": prompt.uid}
        length = len(trajectory.ids)
        tag = {
            "status": "success",
            "prompt_len": trajectory.prompt_length,
            "response_len": length - trajectory.prompt_length,
            "seq_len": length,
            "global_steps": prompt.step + 1,
            "min_global_steps": prompt.step,
            "max_global_steps": prompt.step,
        }
        await transfer_queue.async_kv_batch_put(
            keys=[f"{prompt.uid}_{session}_0"],
            fields=list_of_dict_to_tensordict([row]),
            tags=[tag],
            partition_id=TRAIN,
        )

    async def score(self, keys: Sequence[str], step: int) -> list[str]:
        """Lets the teacher score stored episodes, all at once. Safe to repeat.

        Returns:
            The keys of those that cannot be used.
        """
        usable = await asyncio.gather(*[self._score_row(key, step) for key in keys])
        return [key for key, use in zip(keys, usable, strict=True) if not use]

    async def _score_row(self, key: str, step: int) -> bool:
        fields = ["prompts", "responses", "response_mask", "rollout_log_probs", EPISODE]
        table = await transfer_queue.async_kv_batch_get(
            keys=[key], partition_id=TRAIN, select_fields=[*fields, "multi_modal_inputs"]
        )
        (row,) = plain_rows(table)
        trajectory = self._player.trajectory(row)
        if not await self._usable(trajectory, step, True):
            return False
        scores = {"teacher_logprobs": to_row(trajectory)["teacher_logprobs"]}
        await transfer_queue.async_kv_batch_put(
            keys=[key], partition_id=TRAIN, fields=list_of_dict_to_tensordict([scores])
        )
        return True

    async def _usable(self, trajectory: Trajectory, step: int, scored: bool) -> bool:
        """Checks the numbers of an episode, and lets the teacher, if there is one, score it first.

        Args:
            trajectory: gets ``teacher_logp``.
            step: from 0.
            scored: whether the teacher scores it now.

        Returns:
            Whether it can be trained on; the reason is logged otherwise.

        Raises:
            NonFiniteError: numbers are not finite, and ``on_nonfinite=fail``.
        """
        try:
            if scored and self._player.teachers.distinct:
                trajectory.teacher_logp = await score(
                    self._player.teachers.of(trajectory), trajectory
                )
            wrong = self._invalid(trajectory)
            if wrong is not None:
                raise NonFiniteError(describe(step, [(Row(trajectory), wrong)]))
        except ServerStalledError:
            raise
        except ModelServerError as error:
            _log.error("task %s of step %d is dropped: %s", trajectory.task_id, step, error)
            return False
        except NonFiniteError as error:
            if self._config.on_nonfinite == "fail":
                raise
            _log.warning("dropped: %s", error)
            return False
        finally:
            self._player.pictures.forget(trajectory.images)
        return True

    def _invalid(self, trajectory: Trajectory) -> str | None:
        """Returns why the numbers from other processes are invalid; None if they are valid."""
        if self._outcomes and (wrong := invalid_outcome(trajectory)):
            return wrong
        wrong = invalid_logp(trajectory.logp, trajectory, "student's (vLLM)")
        if wrong is None and trajectory.teacher_logp is not None:
            wrong = invalid_logp(trajectory.teacher_logp, trajectory, "teacher's (vLLM)")
        return wrong


class RolloutManager:
    """Spreads prompts over `RolloutWorker` processes, on all nodes in turn.

    Args:
        config: the run's.
        student: verl's client of the student's servers.
        teachers: of the teachers', by name; empty without a teacher.
        workers: number of processes.

    Attributes:
        failure: why a prompt failed for good; the run must not continue then. None before.
        seconds: how long the prompts of the last step that has ended took.
    """

    def __init__(
        self, config: TrainConfig, student: Any, teachers: Mapping[str, Any], workers: int
    ) -> None:
        self._config = config
        nodes = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) > 0
        ]
        # Kept, because a worker that is restarted needs its arguments again.
        self._arguments = [ray.put(value) for value in (config, student, teachers)]
        actor = ray.remote(RolloutWorker)
        self._workers = [
            actor.options(
                num_cpus=0,
                max_concurrency=10_000,  # coroutines; the threads limit how many run at once
                max_restarts=-1,
                max_task_retries=3,
                name=f"reopold_rollout_{number}",
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    node_id=nodes[number % len(nodes)], soft=True
                ),
            ).remote(*self._arguments, config.rollout.concurrency)
            for number in range(workers)
        ]
        self._next = 0
        self.failure: Exception | None = None
        self.seconds = 0.0
        self._watching: threading.Thread | None = None

    def generate_sequences(self, prompts: Any) -> None:
        """Starts the prompts of a step (verl's call); returns at once.

        Args:
            prompts: TensorDict with the columns of `tasks.StepTasks` and ``uid``.
        """
        samples = self._config.batch.samples
        started = {}
        for uid, step, env, index, first in zip(
            *[list(prompts[name]) for name in ("uid", "step", "env", "index", "first_sample")],
            strict=True,
        ):
            prompt = Prompt(str(uid), int(step), str(env), int(index), int(first), samples)
            started[self._turn().play.remote(prompt)] = prompt.uid
        self._watching = threading.Thread(target=self._watch, args=(started,), daemon=True)
        self._watching.start()

    def wait(self) -> None:
        """Waits until all prompts that were started have ended."""
        if self._watching is not None:
            self._watching.join()

    def score(self, keys: Sequence[str], step: int) -> set[str]:
        """Lets the teacher score stored episodes; returns the keys of those that cannot be used.

        Args:
            keys: of TransferQueue's rows.
            step: from 0.
        """
        count = len(self._workers)
        scoring = [
            worker.score.remote(list(keys[number::count]), step)
            for number, worker in enumerate(self._workers)
        ]
        return {key for part in ray.get(scoring) for key in part}

    def evaluate(
        self,
        episodes: Sequence[EpisodeSpec],
        sampling: Sampling,
        seed: tuple[int, ...],
        *,
        by_teacher: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> list[Trajectory]:
        """Plays held-out episodes; returns their trajectories in the given order.

        ``check`` is called every second while they are played, and may raise to end this.
        """
        count = len(self._workers)
        parts = [list(episodes[number::count]) for number in range(count)]
        playing = [
            worker.evaluate.remote(part, sampling, seed, by_teacher)
            for worker, part in zip(self._workers, parts, strict=True)
            if part
        ]
        while len(ray.wait(playing, num_returns=len(playing), timeout=1.0)[0]) < len(playing):
            check()
        played = {(t.group, t.sample): t for part in ray.get(playing) for t in part}
        return [played[(each.env, each.index), each.sample] for each in episodes]

    def _turn(self) -> Any:
        worker = self._workers[self._next % len(self._workers)]
        self._next += 1
        return worker

    def _watch(self, started: dict[Any, str]) -> None:
        """Marks the prompts of workers that failed for good, so that the step does not wait."""
        begun = time.perf_counter()
        for reference, uid in started.items():
            try:
                ray.get(reference)
            except Exception as error:
                _log.exception("prompt %s failed", uid)
                self.failure = error
                transfer_queue.kv_put(key=uid, partition_id=TRAIN, tag={"status": "failure"})
        self.seconds = time.perf_counter() - begun
