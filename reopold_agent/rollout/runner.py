"""Plays many episodes at once, with many environments and one policy.

The loop keeps the generator busy: a finished turn goes to its environment on a worker thread and
comes back with its observation, while other episodes keep decoding. When an episode comes back
depends on counts, never on the clock, so that runs with the same seeds give the same trajectories.
(A generator that runs in the background gets observations as they arrive; see `RunsBeside`.)
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import gymnasium
import numpy as np

from reopold_agent.common.pixels import PixelLimits, ShownSizes
from reopold_agent.envs.base import (
    ToolEnv,
    end_episode,
    show_as,
    take_turn,
    truncate_episode,
    without_pictures,
)
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import as_observation, succeeded
from reopold_agent.errors import DataError, EnvironmentCodeError, ModelError, told_in_full
from reopold_agent.policies.base import Generator, Policy, RunsBeside
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.rollout.reading import Opening, Reader, Readers, Shown
from reopold_agent.rollout.task_teachers import named_teacher
from reopold_agent.rollout.workers import Outcome, Worker
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Message,
    Observation,
    Request,
    Sampling,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

Env: TypeAlias = "gymnasium.Env[Any, str]"

_log = logging.getLogger(__name__)


class RolloutCancelledError(Exception):
    """Ends a rollout that another thread has cancelled."""


PROMPT_TOO_LONG = "prompt too long"
"""Beginning of the error of an episode that is not played for its prompt's length."""

_INVALID = (AttributeError, LookupError, TypeError, ValueError)
"""What the code here raises for values of an environment that are none."""


@dataclass(frozen=True)
class RolloutLimits:
    """Budgets of one episode.

    Attributes:
        max_response_tokens: number of tokens after the prompt: turns, observations, separators.
        max_turn_tokens: number of tokens of one assistant turn.
        max_turns: number of assistant turns; the environment may end an episode earlier.
        env_seconds: time limit of one ``reset`` or ``step`` of an environment. Tools have their
            own, shorter limits; this one catches environments that hang.
        concurrency: number of episodes in flight at once.
        max_prompt_tokens: number of tokens of a prompt; an episode with a longer one fails. None
            sets no limit.
        prompt_limit: what sets it, for messages.
    """

    max_response_tokens: int = 8192
    max_turn_tokens: int = 4096
    max_turns: int = 5
    env_seconds: float = 120.0
    concurrency: int = 64
    max_prompt_tokens: int | None = None
    prompt_limit: str = "engine.max_prompt_tokens"

    def __post_init__(self) -> None:
        for name in ("max_response_tokens", "max_turn_tokens", "max_turns", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        if self.env_seconds <= 0:
            raise ValueError(f"rollout.env_seconds must be positive, got {self.env_seconds}")


@dataclass(frozen=True)
class EpisodeSpec:
    """The episode to play: repetition ``sample`` of task ``index`` of ``split``.

    ``env`` is the environment's name, for the trajectory; with several it says which one plays.
    ``teacher`` is `Trajectory.teacher` where it is known before the episode is played.
    """

    split: str
    index: int
    sample: int = 0
    env: str = ""
    teacher: str = ""


@dataclass(frozen=True)
class _ForTeacher:
    """What the start of an episode says about its teacher.

    Attributes:
        name: `Trajectory.teacher`.
        reader: makes the teacher's form of the episode; None if that is the student's.
        opening: what the environment knows for a teacher with a view, whether it reads or plays.
    """

    name: str
    reader: Reader | None
    opening: Opening | None


@dataclass
class RolloutStats:
    """Wall-clock seconds that the main thread spent on a rollout, and the tokens sampled."""

    generate_seconds: float = 0.0
    env_wait_seconds: float = 0.0
    render_seconds: float = 0.0
    sampled_tokens: int = 0


@dataclass(eq=False)
class _Episode:
    key: int
    spec: EpisodeSpec
    rules: RolloutRunner
    worker: Worker
    started: float
    prompt_length: int = 0
    prompt_digest: str = ""
    task_id: str = ""
    ids: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    images: list[EncodedImage] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stop: StopReason | None = None
    reward: float = 0.0
    success: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    last_info: Mapping[str, Any] = field(default_factory=dict)
    teacher: _ForTeacher = _ForTeacher("", None, None)
    shown: Shown | None = None

    def append(self, ids: Sequence[int]) -> None:
        """Adds tokens that the student did not sample."""
        self.ids += ids
        self.loss += [False] * len(ids)
        self.logp += [0.0] * len(ids)
        self.entropy += [0.0] * len(ids)


class RolloutRunner:
    """Plays episodes and records them as trajectories.

    Args:
        make_env: makes one environment; called once per concurrent episode; environments are
            reused.
        chat: renders conversations for the policy's tokenizer.
        vision: encodes pictures; None for text-only models (a picture is then an error).
        prompt_pixels: size limits of the first observation's pictures.
        observation_pixels: size limits of the pictures that tools return.
        limits: budgets of an episode.
        members: with several environments the runner of each by its name, which gives their
            episodes all of the above; this runner plays them together, as many at once as its own
            ``limits`` say.
        reader: makes the teacher's form of each episode, for several teachers `Readers`; None if
            that is the student's.
        plays_as: renders prompts and pictures for a teacher with a view that plays episodes itself;
            None for all others.
        teacher_key: metadata of the tasks that name their teachers; None if they do not.
    """

    def __init__(
        self,
        make_env: Callable[[], Env],
        chat: ChatRenderer,
        vision: VisionProcessor | None,
        *,
        prompt_pixels: PixelLimits,
        observation_pixels: PixelLimits,
        limits: RolloutLimits,
        members: Mapping[str, RolloutRunner] | None = None,
        reader: Reader | Readers | None = None,
        plays_as: Reader | None = None,
        teacher_key: str | None = None,
    ) -> None:
        self._make_env = make_env
        self.reader, self._plays_as, self._teacher_key = reader, plays_as, teacher_key
        self.chat, self.vision = chat, vision
        self.prompt_pixels, self.observation_pixels = prompt_pixels, observation_pixels
        self.limits = limits
        self._members = dict(members or {})
        self._idle: list[Worker] = []
        self._cancelled = self._has_answered = False
        self.stats = RolloutStats()

    def check_template(self) -> None:
        """Checks that the chat template can be used for the pictures and turns of an episode.

        Raises:
            ModelError: it leaves words or pictures out, or rewrites earlier turns and several are
                possible.
        """
        for member in self._members.values():
            member.check_template()
        if self._members:
            return
        self.chat.check_words()
        if self.vision is not None:
            self.chat.check_pictures()
        if self.limits.max_turns == 1:
            return
        try:
            self.chat.check_appends()
        except ModelError:
            env = self._make_env()
            inner = env.unwrapped
            env.close()
            if not isinstance(inner, ToolEnv) or inner.max_turns > 1:
                raise

    def check_pictures(self) -> None:
        """Checks that the environment can do without pictures, if the model reads text only.

        Raises:
            ModelError: it cannot.
        """
        for member in self._members.values():
            member.check_pictures()
        if self.vision is None and not self._members:
            self._make().close()

    def prompt(
        self,
        observation: Observation,
        info: Mapping[str, Any],
        opening: Opening | None = None,
        images: list[EncodedImage] | None = None,
    ) -> tuple[list[int], list[EncodedImage]]:
        """Renders the first turns: system message and history of ``info``, and the question.

        Args:
            observation, info: what the environment's ``reset`` returned.
            opening: what it knows for a teacher; needed where one with a view plays.
            images: the observation's pictures, if they are encoded already.

        Returns:
            The ids for the policy to continue, and the pictures in order.
        """
        if self._plays_as is not None and opening is not None:
            shown = self._plays_as.begin(observation, info, opening)
            return self._plays_as.prompt(shown, shown.hint)
        system = str(info.get("system_prompt", ""))
        messages = [Message("system", (system,))] if system else []
        for role, turn in info.get("history", ()):
            content = observation_message(turn, self._encode(turn, self.prompt_pixels)).content
            messages.append(Message(role, content))
        if images is None:
            images = self._encode(observation, self.prompt_pixels)
        messages.append(Message("user", observation_message(observation, images).content))
        return self.chat.prompt(messages)

    def prompt_tokens(self, spec: EpisodeSpec) -> int | None:
        """Returns the length of an episode's prompt; None if its environment fails, as it will say.

        The environment has its time limit here too, and is closed afterwards.
        """
        worker = Worker(self._make)
        self._begin(worker, spec)
        outcome = worker.result(self.limits.env_seconds)
        worker.abandon()
        if outcome.error is not None:
            return None
        try:
            (observation, info), teacher, _ = outcome.value
            return len(self.prompt(as_observation(observation), info, teacher.opening)[0])
        except _INVALID:
            return None

    def continuation(
        self, observation: Observation, last: int, images: list[EncodedImage] | None = None
    ) -> tuple[list[int], list[EncodedImage]]:
        """Renders what the environment answered to a turn whose last token is ``last``.

        Args:
            observation: the answer.
            last: the token.
            images: the answer's pictures, if they are encoded already.

        Returns:
            The ids up to the student's next turn, and the pictures in order.
        """
        if images is None:
            images = self._encode(observation, self._answer_pixels)
        return self.chat.continuation(observation_message(observation, images), last)

    @property
    def _answer_pixels(self) -> PixelLimits:
        return (self._plays_as or self).observation_pixels

    def run(
        self,
        policy: Policy,
        episodes: Iterable[EpisodeSpec],
        sampling: Sampling,
        seed: tuple[int, ...],
        *,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Plays the episodes and returns their trajectories in the given order.

        Args:
            policy: generates the turns.
            episodes: the episodes to play.
            sampling: temperature and top_p.
            seed: determines every random draw together with the episode's index and sample, and
                its environment's name where there are several. The environment's seed depends on
                split and index only, so that all samples of a group get the same task.
            on_done: called with each trajectory when its episode ends.

        Raises:
            RolloutCancelledError: `cancel` was called.
            EnvironmentCodeError: the code of an environment is wrong, and none of its episodes has
                ended with an answer yet.
        """
        self.stats = RolloutStats()
        specs = list(episodes)
        generator = policy.generator(sampling)
        waiting = list(enumerate(specs))[::-1]
        finished: dict[int, Trajectory] = {}
        pending: list[_Episode] = []  # at their environments, in order of arrival there
        playing: dict[int, _Episode] = {}
        try:
            while len(finished) < len(specs):
                if self._cancelled:
                    raise RolloutCancelledError
                while waiting and len(playing) < self.limits.concurrency:
                    key, spec = waiting.pop()
                    rules = self._members[spec.env] if self._members else self
                    worker = rules._worker()
                    episode = _Episode(key, spec, rules, worker, time.perf_counter())
                    playing[key] = episode
                    pending.append(episode)
                    rules._begin(worker, spec)
                due = self._due(pending, generator)
                if due:
                    pending = [e for e in pending if e not in due]
                    ready = [e for e in due if self._receive(e, generator)]
                    self._submit(ready, generator, seed)
                for completion in self._timed_step(generator):
                    episode = playing[completion.key]
                    if completion.error is not None:
                        self._fail_generation(episode, completion.error)
                        generator.release(episode.key)
                        continue
                    self._end_turn(episode, completion)
                    pending.append(episode)
                for key in [k for k, e in playing.items() if e.stop is not None]:
                    episode = playing.pop(key)
                    episode.rules._has_answered |= episode.stop is StopReason.ANSWER
                    finished[key] = self._trajectory(episode)
                    if episode.stop is not StopReason.ENV_ERROR:
                        episode.worker.tell(end_episode)
                        episode.rules._idle.append(episode.worker)
                    if on_done is not None:
                        on_done(finished[key])
        finally:
            for episode in playing.values():
                episode.worker.abandon()
        return [finished[key] for key in range(len(specs))]

    def cancel(self) -> None:
        """Ends `run`, which is on another thread, at its next token; it cannot run again."""
        self._cancelled = True

    def close(self) -> None:
        """Closes the environments."""
        for worker in self._idle:
            worker.close()
        self._idle.clear()
        for member in self._members.values():
            member.close()

    def _worker(self) -> Worker:
        return self._idle.pop() if self._idle else Worker(self._make)

    def _make(self) -> Env:
        env = self._make_env()
        if self.vision is not None:
            sizes = ShownSizes(self.prompt_pixels, self.observation_pixels, self.vision.factor)
            show_as(env, sizes)
        else:
            without_pictures(env)
        return env

    def _begin(self, worker: Worker, spec: EpisodeSpec) -> None:
        options = {"split": spec.split, "index": spec.index}
        seed = task_seed(spec.split, spec.index)
        readers, plays_as, key = self.reader, self._plays_as, self._teacher_key
        limits = self.prompt_pixels if plays_as is None else None

        def reset(env: Env) -> tuple[Any, _ForTeacher, list[EncodedImage] | None]:
            shown = env.reset(seed=seed, options=options)
            name = "" if key is None else named_teacher(env, key)
            reader = readers.of(name) if isinstance(readers, Readers) else readers
            opener = reader or plays_as
            opening = None if opener is None else opener.opening(env)
            return shown, _ForTeacher(name, reader, opening), self._resized(shown[0], limits)

        worker.call(reset)

    def _resized(self, observation: Any, limits: PixelLimits | None) -> list[EncodedImage] | None:
        """Encodes pictures on an environment's thread, beside the generator and other episodes.

        Returns:
            The pictures; None leaves them, and what is wrong with them, to `_encode`.
        """
        if limits is None:
            return None
        try:
            return self._encode(observation, limits)
        except _INVALID:
            return None

    def _due(self, pending: list[_Episode], generator: Generator) -> list[_Episode]:
        """Returns the episodes whose environments to wait for now."""
        if not isinstance(generator, RunsBeside):
            # Receives once at least as many episodes wait as decode, for few, large prefills. The
            # rule depends on counts, never on the clock.
            return pending if len(pending) >= generator.in_flight else []
        arrived = [e for e in pending if e.worker.answered(e.rules.limits.env_seconds)]
        # With nothing to generate, wait for the episode that has waited longest.
        return arrived or ([] if generator.in_flight else pending[:1])

    def _receive(self, episode: _Episode, generator: Generator) -> bool:
        """Receives the environment's answer; returns whether the student continues."""
        started = time.perf_counter()
        outcome = episode.worker.result(episode.rules.limits.env_seconds)
        self.stats.env_wait_seconds += time.perf_counter() - started
        if episode.turns:
            episode.turns[-1].env_seconds = outcome.seconds
        started = time.perf_counter()
        try:
            continues = self._handle(episode, outcome)
        except _INVALID as error:
            # The environment returned something invalid, which fails only its own episode.
            fault = error if isinstance(error, EnvironmentCodeError) else None
            continues = self._fail_env(episode, told_in_full(error), fault)
        finally:
            self.stats.render_seconds += time.perf_counter() - started
        if not continues and episode.turns:
            generator.release(episode.key)
        return continues

    def _handle(self, episode: _Episode, outcome: Outcome) -> bool:
        if outcome.error is not None:
            return self._fail_env(episode, outcome.error, outcome.fault)
        if not episode.turns:
            (observation, info), teacher, images = outcome.value
            episode.task_id = str(info.get("task_id", f"{episode.spec.split}-{episode.spec.index}"))
            observation = as_observation(observation)
            ids, images = episode.rules.prompt(observation, info, teacher.opening, images)
            self._add_prompt(episode, ids, images)
            episode.teacher = teacher
            if teacher.reader is not None and teacher.opening is not None:
                episode.shown = teacher.reader.begin(observation, info, teacher.opening)
            return True
        (observation, reward, terminated, truncated, info), images = outcome.value
        turn = episode.turns[-1]
        call = info.get("tool_call")
        turn.tool_call = call if isinstance(call, ToolCall) else None
        episode.reward += float(reward)
        turn.observation = observation["text"]
        episode.last_info = info
        if terminated or truncated:
            episode.success = succeeded(info, episode.reward)
            episode.info = {k: info[k] for k in ("answer", "success", "feedback") if k in info}
            if terminated:
                # A cut turn may be graded (`ToolEnv.truncation_reward`), but it is no answer.
                cut = turn.finish == "length"
                episode.stop = StopReason.MAX_TOKENS if cut else StopReason.ANSWER
            elif info.get("cut_short"):
                episode.stop = StopReason.MAX_TOKENS
            elif info.get("time_limit"):
                episode.stop = StopReason.TIME_LIMIT
            else:
                episode.stop = StopReason.MAX_TURNS
            return False
        return self._add_observation(episode, observation, images)

    @staticmethod
    def _fail_env(episode: _Episode, error: str, fault: EnvironmentCodeError | None = None) -> bool:
        """Ends the episode with what it has so far and abandons its environment.

        Raises:
            EnvironmentCodeError: the ``fault``, if no episode has ended with an answer yet: most
                others would probably fail likewise.
        """
        if fault is not None and not episode.rules._has_answered:
            raise fault
        where = "step" if episode.turns else "reset"
        task = episode.task_id or episode.spec
        if error.startswith(PROMPT_TOO_LONG):
            _log.error("task %s is not played: %s", task, error)
        else:
            _log.error("the environment failed in %s of task %s: %s", where, task, error)
        episode.info["error"] = error
        episode.stop = StopReason.ENV_ERROR
        episode.worker.abandon()
        return False

    @staticmethod
    def _fail_generation(episode: _Episode, error: str) -> None:
        """Ends the episode because its next turn could not be generated."""
        _log.error("no turn could be generated for task %s: %s", episode.task_id, error)
        episode.info["error"] = error
        episode.stop = StopReason.POLICY_ERROR

    @staticmethod
    def _add_prompt(episode: _Episode, ids: list[int], images: list[EncodedImage]) -> None:
        most = episode.rules.limits.max_prompt_tokens
        if most is not None and len(ids) > most:
            limit = episode.rules.limits.prompt_limit
            raise DataError(f"{PROMPT_TOO_LONG}: {len(ids)} tokens; {limit} is {most}")
        episode.append(ids)
        episode.images += images
        episode.prompt_length = len(ids)
        shown = [(each.pixels.shape, zlib.crc32(each.pixels.tobytes())) for each in images]
        episode.prompt_digest = hashlib.sha256(repr((ids, shown)).encode()).hexdigest()[:16]

    def _truncate(self, episode: _Episode, stop: StopReason) -> bool:
        """Ends an episode at a budget that its environment does not know."""
        episode.worker.call(lambda env: truncate_episode(env, episode.last_info))
        outcome = episode.worker.result(episode.rules.limits.env_seconds)
        if outcome.error is not None:
            return self._fail_env(episode, outcome.error, outcome.fault)
        reward, episode.success = outcome.value
        episode.reward += reward
        episode.stop = stop
        return False

    def _add_observation(
        self, episode: _Episode, observation: Observation, images: list[EncodedImage] | None
    ) -> bool:
        limits = episode.rules.limits
        if len(episode.turns) >= limits.max_turns:
            return self._truncate(episode, StopReason.MAX_TURNS)
        ids, images = episode.rules.continuation(observation, episode.ids[-1], images)
        used = len(episode.ids) - episode.prompt_length
        # An observation is added as a whole or not at all, so that no image is cut, and it must
        # leave room for at least one token of the student.
        if used + len(ids) + 1 > limits.max_response_tokens:
            return self._truncate(episode, StopReason.MAX_TOKENS)
        episode.append(ids)
        episode.images += images
        if episode.teacher.reader is not None and episode.shown is not None:
            episode.teacher.reader.observe(episode.shown, observation)
        return True

    def _encode(self, observation: Observation, limits: PixelLimits) -> list[EncodedImage]:
        if not observation["images"]:
            return []
        if self.vision is None:
            raise ValueError("the environment shows pictures, but the model reads text only")
        return [self.vision.encode(image, limits) for image in observation["images"]]

    def _submit(
        self, episodes: Sequence[_Episode], generator: Generator, seed: tuple[int, ...]
    ) -> None:
        requests = []
        for episode in episodes:
            used = len(episode.ids) - episode.prompt_length
            spec, limits = episode.spec, episode.rules.limits
            room = limits.max_response_tokens - used
            # Tasks of several environments share indices, but no random draws.
            stream = (zlib.crc32(spec.env.encode()),) if self._members else ()
            stop_ids = frozenset(episode.rules.chat.stop_ids) if self._members else None
            requests.append(
                Request(
                    key=episode.key,
                    ids=episode.ids,
                    images=episode.images,
                    max_tokens=min(limits.max_turn_tokens, room),
                    seed=(*seed, *stream, spec.index, spec.sample, len(episode.turns)),
                    stop_ids=stop_ids,
                )
            )
        if requests:
            started = time.perf_counter()
            generator.submit(requests)
            self.stats.generate_seconds += time.perf_counter() - started

    def _timed_step(self, generator: Generator) -> list[Completion]:
        if not generator.in_flight:
            return []
        started = time.perf_counter()
        completions = generator.step()
        self.stats.generate_seconds += time.perf_counter() - started
        return completions

    def _end_turn(self, episode: _Episode, completion: Completion) -> None:
        """Records the student's turn and passes its text to the environment."""
        start = len(episode.ids)
        episode.ids += completion.ids
        episode.loss += [True] * len(completion.ids)
        episode.logp += completion.logp
        episode.entropy += completion.entropy
        self.stats.sampled_tokens += len(completion.ids)
        text = self.chat.text(completion.ids)
        episode.turns.append(Turn(start, len(episode.ids), text, completion.finish))
        rules = episode.rules

        def step(env: Env) -> tuple[Any, list[EncodedImage] | None]:
            taken = take_turn(env, text, completion.finish)
            observation, _, terminated, truncated, _ = taken
            limits = None if terminated or truncated else rules._answer_pixels
            return taken, rules._resized(observation, limits)

        episode.worker.call(step)

    @staticmethod
    def _trajectory(episode: _Episode) -> Trajectory:
        if episode.stop is None:
            raise RuntimeError("an unfinished episode has no trajectory")
        trajectory = Trajectory(
            task_id=episode.task_id,
            index=episode.spec.index,
            sample=episode.spec.sample,
            prompt_length=episode.prompt_length,
            ids=np.array(episode.ids, dtype=np.int64),
            loss_mask=np.array(episode.loss, dtype=np.bool_),
            logp=np.array(episode.logp, dtype=np.float32),
            entropy=np.array(episode.entropy, dtype=np.float32),
            images=episode.images,
            turns=episode.turns,
            stop_reason=episode.stop,
            reward=episode.reward,
            success=episode.success,
            info=episode.info,
            seconds=time.perf_counter() - episode.started,
            env=episode.spec.env,
            teacher=episode.teacher.name,
            prompt_digest=episode.prompt_digest,
        )
        reader = episode.teacher.reader
        if reader is not None and episode.shown is not None and trajectory.trainable:
            trajectory.reading = reader.read(trajectory, episode.shown)
        return trajectory
