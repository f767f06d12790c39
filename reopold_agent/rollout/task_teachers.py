"""Finds the teachers that tasks name themselves (``model.teacher_key``), and checks them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gymnasium

from reopold_agent.config import DEFAULT_TEACHER, TrainConfig
from reopold_agent.data.checks import RowError
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.data_env import tasks_to_check
from reopold_agent.envs.from_config import make_env
from reopold_agent.errors import ConfigError, DataError, suggestion
from reopold_agent.types import Task

if TYPE_CHECKING:
    from reopold_agent.rollout.runner import EpisodeSpec

_log = logging.getLogger(__name__)


def named_teacher(env: gymnasium.Env[Any, Any], key: str) -> str:
    """Returns the teacher that the task of an environment's running episode names.

    Args:
        env: the environment; one that is no `ToolEnv` has no tasks, so that they name none.
        key: of the tasks' metadata.
    """
    inner = env.unwrapped
    state = inner.episode if isinstance(inner, ToolEnv) else None
    return "" if state is None else state.task.named_teacher(key)


def teacher_problem(config: TrainConfig, env: str, task: Task) -> RowError | None:
    """Returns why a task of a run's environment has no teacher; None if it has one.

    Args:
        config: the run's.
        env: the environment's name among the run's (`TrainConfig.members`).
        task: the task.
    """
    key, models = config.model.teacher_key, config.model
    if key is None:
        return None
    named = task.named_teacher(key)
    if models.teacher_name(env, named) is not None:
        return None
    known = ", ".join(models.all_teachers)
    if named:
        told = f"'{key}' is '{named[:80]}', and model.teachers has {known}"
        return RowError("unknown teacher", told)
    told = f"nothing in '{key}', and model.teachers has no {DEFAULT_TEACHER}, only {known}"
    return RowError("no teacher", told)


def taught_splits(config: TrainConfig) -> tuple[str, ...]:
    """Returns the splits in which a run's teachers are used."""
    return config.splits if config.evaluation.teacher else ("train",)


def with_teachers(config: TrainConfig, episodes: Sequence[EpisodeSpec]) -> list[EpisodeSpec]:
    """Returns episodes with the teachers that their tasks name (``model.teacher_key``)."""
    key, members = config.model.teacher_key, config.members
    if key is None:
        return list(episodes)
    envs = {name: make_env(members[name]) for name in {episode.env for episode in episodes}}
    found = []
    for episode in episodes:
        env = envs[episode.env].unwrapped
        if isinstance(env, ToolEnv):
            named = env.task(episode.split, episode.index).named_teacher(key)
            episode = replace(episode, teacher=named)
        found.append(episode)
    for each in envs.values():
        each.close()
    return found


def check_task_teachers(config: TrainConfig) -> None:
    """Checks that each task has a teacher, and each teacher a training task.

    It looks at `tasks_to_check`, without those that are left out. A teacher that none of a sample
    of tasks names is only warned of, since a rare one may be absent from it.

    Args:
        config: the run's, with the tasks to leave out filled in.

    Raises:
        ConfigError: no training task that it looks at names a teacher, or none of all training
            tasks names one of the teachers.
        DataError: a task has no teacher.
    """
    key = config.model.teacher_key
    if key is None:
        return
    used: set[str | None] = set()
    columns: set[str] = set()
    looked, named, whole = 0, False, True
    for name, member in config.members.items():
        made = make_env(member)
        try:
            env = made.unwrapped
            if not isinstance(env, ToolEnv):
                used.add(member.model.teacher_name(name))
                continue
            for split in taught_splits(config):
                indices = tasks_to_check(env, split)
                whole &= indices.step == 1 or split != "train"
                for index in indices:
                    task = env.task(split, index)
                    columns.update(task.metadata.keys() - {key})
                    problem = teacher_problem(member, name, task)
                    if problem is not None:
                        raise DataError(
                            f"task {task.id} of '{split}' in env={name} has no teacher: {problem}."
                            f"\n{suggestion(key, columns)}Add model.teachers."
                            f"{task.named_teacher(key) or DEFAULT_TEACHER}=PATH, or correct "
                            "model.teacher_key."
                        )
                    if split == "train":
                        looked += 1
                        used.add(member.model.teacher_name(name, task.named_teacher(key)))
                        named |= bool(task.named_teacher(key))
        finally:
            made.close()
    if not named:
        none = "no training task" if whole else f"none of {looked} training tasks looked at"
        raise ConfigError(
            f"model.teacher_key={key}, but {none} has a value there.\n"
            f"{suggestion(key, columns)}Correct the column, or leave out model.teacher_key: each "
            "environment then has its own teacher."
        )
    unused = sorted(set(config.model.all_teachers) - used - {DEFAULT_TEACHER})
    if unused and not whole:
        _log.warning(
            "none of the %d training tasks looked at names model.teachers.%s in '%s' "
            "(model.teacher_key); if no other does either, it teaches nothing",
            looked,
            unused[0],
            key,
        )
    elif unused:
        raise ConfigError(
            f"model.teachers.{unused[0]} teaches nothing: no training task names it in '{key}' "
            "(model.teacher_key).\nLeave it out, or correct the name or the column."
        )
