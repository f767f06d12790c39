"""Makes the environments of a run through Gymnasium's registry."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
from gymnasium.envs.registration import load_env_creator

from reopold_agent.common.files import write_json_atomic
from reopold_agent.common.pixels import PixelLimits, ShownSizes
from reopold_agent.config import PixelsConfig, TrainConfig
from reopold_agent.data.checks import BadRowsError, DataReport
from reopold_agent.envs.base import ToolEnv, show_as
from reopold_agent.envs.checks import opened_pictures
from reopold_agent.envs.data_env import DataEnv
from reopold_agent.envs.registration import find_env, load_env, make_found
from reopold_agent.errors import ConfigError, DataError, EnvironmentCodeError
from reopold_agent.types import Task

_log = logging.getLogger(__name__)

MADE = "made"
"""Key of the report on the rows for tasks that an environment makes itself."""

_LOOKED_AT = 1000
"""Most tasks of a split that are made to compare them with others."""

BadTasks: TypeAlias = "Mapping[int, tuple[str, DataError]]"
"""Tasks that cannot be played, by position: the task's name and why."""


def make_env(config: TrainConfig, *, max_turns: int | None = None) -> gymnasium.Env[Any, str]:
    """Makes one environment from the run's configuration.

    Args:
        config: the run's. ``env`` names the environment; ``data`` is passed if it takes data.
        max_turns: turn budget; passed if the environment has such a setting.

    Raises:
        UnknownNameError: no environment has that name.
        ConfigError, DataError: its settings or data cannot be used.
    """
    load_env(config.env.name)
    kwargs: dict[str, Any] = dict(config.env.kwargs)
    if config.env.takes_data:
        kwargs = {**config.data.env_kwargs, **kwargs}
        data = {s: config.data.specification(s) for s in ("train", "eval")}
        if (column := config.model.teacher_key) is not None:
            data = {s: spec and {**spec, "teacher": column} for s, spec in data.items()}
        kwargs.setdefault("data", data)
    creator = find_env(config.env.id, "env.id").entry_point
    made: Any = load_env_creator(creator) if isinstance(creator, str) else creator
    if config.data.left_out:
        kwargs["left_out"] = config.data.left_out
    if max_turns is not None and "max_turns" not in kwargs and _accepts(made, "max_turns"):
        kwargs["max_turns"] = max_turns
    isolation = _tool_isolation(config)
    if isolation["mode"] != "none" and "tool_isolation" not in kwargs:
        if _accepts(made, "tool_isolation"):
            kwargs["tool_isolation"] = isolation
        elif config.tools.isolation != "auto":
            raise ConfigError(
                f"tools.isolation={config.tools.isolation}, but the environment {config.env.id} "
                "has no such setting (no ToolEnv); use tools.isolation=none"
            )
    env = make_found(config.env.id, "env.id", **kwargs)
    show_as(env, shown_sizes(config.pixels))
    return env


def shown_sizes(pixels: PixelsConfig, factor: int = 28) -> ShownSizes:
    """Returns the rule by which pictures are resized for a model.

    Args:
        pixels: the limits.
        factor: the model's patch x merge; by default Qwen2.5-VL's. (A `RolloutRunner` tells its
            environments that of its model.)
    """
    prompt, observation = (
        PixelLimits(**vars(each)) for each in (pixels.prompt, pixels.observation)
    )
    return ShownSizes(prompt, observation, factor)


def checked_tasks(
    config: TrainConfig,
    report: Path,
    examine: Callable[[str, DataEnv, str], BadTasks] | None = None,
) -> dict[str, dict[str, int]]:
    """Reads and checks the rows of each environment and split that the run uses.

    Args:
        config: the run's.
        report: file for the report on the rows, as JSON by split (in a mixture by NAME/SPLIT); it
            is written even if rows are refused.
        examine: finds further problems in tasks from files, given the environment's name, the
            environment and the split.

    Returns:
        The number of tasks by environment and split.

    Raises:
        UnknownNameError, ConfigError, DataError: as for `make_env`, or rows cannot be used.
    """
    counts: dict[str, dict[str, int]] = {}
    found: dict[str, Any] = {}
    try:
        for name, member in config.members.items():
            look = None if examine is None else partial(examine, name)
            counts[name] = _checked_splits(member, report_keys(config, name), found, look)
    finally:
        if found:
            write_json_atomic(report, found)
    return counts


def report_keys(config: TrainConfig, name: str) -> dict[str, str]:
    """Returns an environment's keys in the report on the rows, by the split that the run uses."""
    return {split: split if config.mix is None else f"{name}/{split}" for split in config.splits}


def _checked_splits(
    config: TrainConfig,
    keys: Mapping[str, str],
    found: dict[str, Any],
    examine: Callable[[DataEnv, str], BadTasks] | None,
) -> dict[str, int]:
    """Checks the rows of one environment; returns the number of tasks by split."""
    env = make_env(config)
    counts: dict[str, int] = {}
    try:
        for split, key in keys.items():
            try:
                counts[split] = num_tasks(env, split)
                inner = env.unwrapped
                told = inner.data_report(split) if isinstance(inner, DataEnv) else None
                if isinstance(inner, ToolEnv) and told is None:
                    _check_first(inner, split)
                if isinstance(inner, DataEnv) and told is not None and examine is not None:
                    bad = examine(inner, split)
                    counts[split] -= len(bad)
                    _leave_out(bad, told, config, split)
            except BadRowsError as error:
                found[key] = error.report.record()
                raise
            if told is not None:
                found[key] = told.record()
                if isinstance(inner, DataEnv):
                    found[key]["sha256"] = inner.digest(split, config.model.teacher_key)
                    found[key]["pictures_sha256"] = inner.pictures_digest(split)
        inner = env.unwrapped
        if isinstance(inner, DataEnv) and len(keys) > 1 and found.keys() >= {*keys.values()}:
            common = inner.tasks_in_common()
            if common:
                found[keys["eval"]]["trained_on"] = common
        if isinstance(inner, ToolEnv) and not isinstance(inner, DataEnv):
            prefix = keys["train"].removesuffix("train")
            found[f"{prefix}{MADE}"] = _made(inner, list(keys), config.evaluation.tasks)
    finally:
        env.close()
    return counts


def _made(env: ToolEnv, splits: Sequence[str], most: int) -> dict[str, Any]:
    """Returns what is known of the tasks that an environment makes: of the first `_LOOKED_AT`.

    Args:
        env: the environment.
        splits: those that the run uses.
        most: number of held-out tasks that are played.

    Returns:
        How many held-out tasks are training tasks as ``trained_on``, of ``usable`` that were looked
        at; the SHA-256 of each split's tasks as ``sha256``.
    """

    def asked(task: Task) -> tuple[str, str]:
        # Without answers, or with pictures that are asked the same, the name may be what differs.
        name = None if task.answers and not task.images else task.id
        what = (name, task.question, task.answers, task.history, len(task.images))
        return repr(what), repr(sorted(task.metadata.items()))

    try:
        tasks = {
            split: [asked(env.task(split, i)) for i in range(min(_LOOKED_AT, env.num_tasks(split)))]
            for split in splits
        }
    except Exception:
        _log.debug("a task cannot be made", exc_info=True)  # its episode tells
        return {"usable": 0, "trained_on": 0}
    known, held_out = set(tasks["train"]), tasks.get("eval", [])[:most]
    digests = {  # without metadata, whose words may be others in each process
        split: hashlib.sha256(repr([what for what, _ in each]).encode()).hexdigest()
        for split, each in tasks.items()
    }
    common = sum(each in known for each in held_out)
    return {"usable": len(held_out), "trained_on": common, "sha256": digests}


def _check_first(env: ToolEnv, split: str) -> None:
    """Checks the first task of a split that is not from files, and its pictures.

    Raises:
        EnvironmentCodeError: the environment's code returns what it may not.
    """
    task = env.task(split, 0)
    try:
        opened_pictures(task, type(env).__name__)
    except EnvironmentCodeError:
        raise
    except Exception:
        _log.debug("a picture of the first task cannot be opened", exc_info=True)  # episodes tell


def _leave_out(bad: BadTasks, report: DataReport, config: TrainConfig, split: str) -> None:
    """Adds tasks to the report and logs it.

    Raises:
        BadRowsError: the settings do not say to leave them out, or none is left.
    """
    if not bad:
        return
    for name, error in bad.values():
        report.add(name, error)
    report.usable -= len(bad)
    lost = report.rows - report.usable
    told = f"{lost} of {report.rows} rows of {report.path} cannot be used:\n{report.table()}"
    spec = config.data.specification(split) or {}
    if spec.get("on_bad_row", "fail") != "skip" or not report.usable:
        advice = f"leave them out with data.{split}.on_bad_row=skip"
        raise BadRowsError(f"{told}\nChange the settings named above, or {advice}.", report)
    _log.warning("%s", told)


def _tool_isolation(config: TrainConfig) -> dict[str, Any]:
    """Returns settings of `reopold_agent.tools.Isolation`; resolves ``auto``, allows the data."""
    settings = dict(vars(config.tools))
    mode = settings.pop("isolation")
    if mode == "auto":
        # A rollout process of Ray serves many episodes; one bad tool must not end them all.
        mode = "plugins" if config.engine.name == "verl" and hasattr(os, "fork") else "none"
    sources = [spec.get("path") for spec in (config.data.train, config.data.eval) if spec]
    folders = [os.path.abspath(path) for path in sources if path and os.path.exists(path)]
    return {**settings, "mode": mode, "read": [*settings["read"], *folders]}


def num_tasks(env: gymnasium.Env[Any, Any], split: str) -> int:
    """Returns the number of tasks of a split; 2**20, one per seed, if the environment has none."""
    inner: Any = env.unwrapped
    if hasattr(inner, "num_tasks"):
        return int(inner.num_tasks(split))
    return 2**20


def _accepts(creator: Any, name: str) -> bool:
    """Whether a class (or a base class of it) or a function has the parameter."""
    candidates = creator.__mro__ if inspect.isclass(creator) else [creator]
    for candidate in candidates:
        function = candidate.__init__ if inspect.isclass(candidate) else candidate
        if name in inspect.signature(function).parameters:
            return True
    return False
