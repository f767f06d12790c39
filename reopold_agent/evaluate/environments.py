"""Environments as benchmarks: any registered environment's held-out tasks, graded by itself.

They are played as the held-out evaluation of training plays them, with the same random draws: the
first sample of each task is the episode that training's sampled evaluation plays.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium

from reopold_agent.config import TrainConfig, build
from reopold_agent.envs.base import ToolEnv, without_pictures
from reopold_agent.envs.from_config import make_env, num_tasks
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import as_observation
from reopold_agent.errors import ConfigError, DataError, ModelError
from reopold_agent.evaluate.answers import identity
from reopold_agent.evaluate.questions import LOOKED_AT, Questions
from reopold_agent.judges import KINDS, grade
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.types import IMAGE_MARK, Sampling, Task, Trajectory

HOW = "environment"
"""How answers are graded, in rows and results."""

_SECONDS = 30.0
"""Most time for starting episodes again only to see what they ask."""


@dataclass(frozen=True)
class Shown:
    """What an environment shows at the start of an episode; ``task`` is None if it has no tasks.

    ``as_is``: the task is asked as the data has it.
    """

    text: str
    system: str
    task: Task | None
    as_is: bool


class RecordingEnv(gymnasium.Wrapper[Any, str, Any, str]):
    """Records what an environment shows at the start of each task.

    Args:
        env: the environment.
        shown: where it is recorded, by the task's index; several environments share it.
    """

    def __init__(self, env: gymnasium.Env[Any, str], shown: dict[int, Shown]) -> None:
        super().__init__(env)
        self._shown = shown

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode of the task ``options["index"]``."""
        observation, info = self.env.reset(seed=seed, options=options)
        inner = self.unwrapped
        episode = inner.episode if isinstance(inner, ToolEnv) else None
        text = as_observation(observation)["text"].replace(IMAGE_MARK, "<image>")
        system = str(info.get("system_prompt", ""))
        task = None if episode is None else episode.task
        as_is = isinstance(inner, ToolEnv) and _asks_as_is(inner)
        self._shown[(options or {}).get("index", 0)] = Shown(text, system, task, as_is)
        return observation, info


def run_settings(
    name: str, sections: Mapping[str, Any], tools: Mapping[str, Any], concurrency: int
) -> TrainConfig:
    """Returns an environment's settings as those of a run of no steps.

    Args:
        name: the environment's name, for messages.
        sections: `words.SECTIONS`.
        tools: where tools run.
        concurrency: upper bound of the episodes at once.

    Raises:
        ConfigError: a setting is wrong.
    """
    defaults = ("engine", "batch", "optimizer", "checkpoint", "logging")
    unused: dict[str, Any] = {key: {} for key in defaults}
    unused |= {"objective": {"name": "reopold"}, "model": {"student": {"path": ""}}, "seed": 0}
    if not sections["evaluation"]["tasks"]:
        raise ConfigError(
            f"evaluation.tasks=0 leaves nothing to evaluate of env={name}. Set it to at least 1."
        )
    config = build(TrainConfig, {**unused, **sections, "tools": dict(tools), "steps": 0})
    fewer = min(config.rollout.concurrency, concurrency)
    return replace(config, rollout=replace(config.rollout, concurrency=fewer))


def environment_questions(name: str, config: TrainConfig, *, samples: int, seed: int) -> Questions:
    """Makes an environment and opens its first held-out tasks.

    Args:
        name: name in the results.
        config: its settings, see `run_settings`.
        samples: episodes per task.
        seed: seed of the sampling.

    Raises:
        ConfigError, DataError: it cannot be made, or has no held-out tasks.
    """
    shown: dict[int, Shown] = {}
    turns, limits = config.evaluation.max_turns, config.rollout
    env = RecordingEnv(make_env(config, max_turns=turns), shown)
    try:
        count = min(config.evaluation.tasks, num_tasks(env, "eval"))
        if count < 1:
            raise DataError(f"env={config.env.name} has no held-out tasks (split 'eval')")
        pictures = 0
        for index in range(min(count, LOOKED_AT)):
            options = {"split": "eval", "index": index}
            observation, _ = env.reset(seed=task_seed("eval", index), options=options)
            pictures += len(as_observation(observation)["images"])
        needed = pictures > 0 and not _does_without(env)
    finally:
        env.close()

    def runner(chat: ChatRenderer, vision: VisionProcessor | None) -> RolloutRunner:
        return make_runner(
            config, chat, vision, max_turns=turns, wrap=lambda env: RecordingEnv(env, shown)
        )

    sampling = Sampling(config.sampling.temperature, config.sampling.top_p)
    data = config.data.specification("eval") if config.env.takes_data else None
    return Questions(
        name=name,
        count=count,
        samples=samples,
        sampling=sampling,
        seed=(seed, 2),  # that of train.evaluation.play_held_out
        make_runner=runner,
        row_of=lambda trajectory: _row(trajectory, shown.get(trajectory.index)),
        has_pictures=needed,
        stop_at_tool_call=limits.stop_at_tool_call,
        identities=lambda indices: _identities(config, indices),
        facts={
            "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p},
            "budget": {"max_turns": turns, "max_tokens": limits.max_response_tokens},
            "pixels": {
                "prompt": vars(config.pixels.prompt),
                "observation": vars(config.pixels.observation),
            },
            "prompt": {"system": shown[0].system, "first_question": shown[0].text},
            "files": {},
            "environment": {
                "name": config.env.name,
                "id": config.env.id,
                "kwargs": config.env.kwargs,
                "data": data,
            },
        },
    )


def _does_without(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether an environment that has shown pictures shows none to a model that reads text only."""
    try:
        without_pictures(env)
    except ModelError:
        return False
    options = {"split": "eval", "index": 0}
    observation, _ = env.unwrapped.reset(seed=task_seed("eval", 0), options=options)
    return not as_observation(observation)["images"]


def _identities(config: TrainConfig, indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """Yields what identifies tasks in their rows, as far as the environment says it."""
    shown: dict[int, Shown] = {}
    env = RecordingEnv(make_env(config, max_turns=config.evaluation.max_turns), shown)
    inner = env.unwrapped
    until = time.monotonic() + _SECONDS
    try:
        for index in indices:
            if isinstance(inner, ToolEnv):
                task = inner.task("eval", index)
                yield _asked(task) if _asks_as_is(inner) else {"answers": list(task.answers)}
                continue
            if time.monotonic() > until:
                return
            try:
                env.reset(seed=task_seed("eval", index), options={"split": "eval", "index": index})
            except Exception:  # of any environment; the episode that is played will tell
                return
            yield {"question": shown[index].text}
    finally:
        env.close()


def _asked(task: Task) -> dict[str, Any]:
    """Returns `identity` of a task, without its id: the episode's may be another one."""
    return {key: value for key, value in identity(task).items() if key != "id"}


def _asks_as_is(env: ToolEnv) -> bool:
    """Whether the words and pictures of a task do not come about only in its episode."""
    return type(env).opened is ToolEnv.opened


def questions_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the SHA-256 of all questions with their ids and answers, by index."""
    asked = sorted({(r["index"], r["id"], r["question"], tuple(r["answers"])) for r in rows})
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _row(trajectory: Trajectory, shown: Shown | None) -> dict[str, Any]:
    """Returns the environment's verdict on an episode, and the answer that rules find in it."""
    task = None if shown is None else shown.task
    answers = [] if task is None else list(task.answers)
    question = task.question if task is not None else "" if shown is None else shown.text
    options = [] if task is None else [str(each) for each in task.metadata.get("options", ())]
    kind = "auto" if task is None else str(task.metadata.get("answer_kind", "auto"))
    kind = kind if kind in KINDS else "auto"
    extracted = None
    if answers and trajectory.turns:  # for the vote of maj@k
        extracted = grade(trajectory.turns[-1].text, answers, kind, options=options).extracted
    return {
        "id": trajectory.task_id,
        "question": question.replace(IMAGE_MARK, "<image>"),
        "answers": answers,
        **(_asked(task) if task is not None and shown is not None and shown.as_is else {}),
        "kind": kind,
        "category": "" if task is None else str(task.metadata.get("category", "")),
        "options": options,
        "group": {},
        "extracted": extracted,
        "correct": trajectory.success,
        "how": HOW,
        "undecided": False,
        # JSON has no NaN, and a mean with one in it says nothing.
        "reward": trajectory.reward if math.isfinite(trajectory.reward) else None,
    }
