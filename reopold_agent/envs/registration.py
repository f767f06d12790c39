"""Environments by name: Gymnasium's registry, short names for ``env=``, and plugins."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from reopold_agent.errors import ConfigError, first_line, suggestion
from reopold_agent.registry import Registry


@dataclass(frozen=True)
class EnvEntry:
    """An environment for ``env=NAME``.

    Attributes:
        name: the short name.
        id: Gymnasium's id, ``namespace/Name-v0``.
        config: configuration that ``env=NAME`` composes: ``kwargs`` for the environment, and
            optionally whole sections that suit it (``data``, ``pixels``, ``rollout``, ``batch``,
            ``evaluation``, ``model`` ...).
    """

    name: str
    id: str
    config: Mapping[str, Any] = field(default_factory=dict)


GYM = "gym:"
"""Beginning of the names of Gymnasium's environments: ``env=gym:ID``."""

ENVS: Registry[EnvEntry] = Registry("environment", "reopold_agent.envs", EnvEntry)


def register_env(
    name: str,
    *,
    id: str,
    entry_point: str | Callable[..., gymnasium.Env[Any, Any]],
    config: Mapping[str, Any] | None = None,
) -> EnvEntry:
    """Registers an environment with Gymnasium and under a short name.

    A third-party package calls this in the module of its ``reopold_agent.envs`` entry point; once
    the package is installed, ``python -m reopold_agent.train env=NAME`` works.

    Args:
        name: for ``env=NAME``: letters, digits, ``_`` and ``-``.
        id: Gymnasium's id, with a version.
        entry_point: the class, or ``"package.module:Class"``.
        config: as in `EnvEntry`.

    Raises:
        ConfigError: the name is invalid or taken.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"an environment's name has letters, digits, _ and -, got '{name}'")
    entry = ENVS.register(name, EnvEntry(name, id, dict(config or {})))
    gymnasium.register(id=id, entry_point=entry_point)
    return entry


def load_env(name: str) -> EnvEntry:
    """Returns the environment of that name; imports plugins if needed.

    Raises:
        UnknownNameError: no environment has that name; the message lists them and suggests one.
            (``gym:ID`` is looked up when the environment is made.)
    """
    if not name.startswith(GYM):
        return ENVS.get(name)
    kwargs: dict[str, Any] = {
        "gym_id": name.removeprefix(GYM),
        "kwargs": {},
        "show": "auto",
        "success_return": None,
    }
    turns = {"max_turns": 20}
    config = {"kwargs": kwargs, "rollout": turns, "evaluation": turns}
    return EnvEntry(name, "reopold/Gymnasium-v0", config)


def find_env(id: str, setting: str) -> EnvSpec:
    """Returns what Gymnasium knows under an id.

    Args:
        id: ``namespace/Name-v0``.
        setting: the setting that names it, for messages.

    Raises:
        ConfigError: nothing has that id; the message lists this project's and plugins'.
    """
    try:
        return gymnasium.spec(id)
    except (gymnasium.error.Error, ImportError) as error:
        entries = [ENVS.get(name) for name in ENVS.names()]
        known = sorted({entry.id for entry in entries} | set(filter(_is_ours, gymnasium.registry)))
        short = {entry.name: entry.id for entry in entries}
        hint = f"Did you mean '{short[id]}'? " if id in short else suggestion(id, known)
        raise ConfigError(
            f"{setting}={id}: {first_line(error).rstrip('.')}\n{hint}Known: {', '.join(known)}."
        ) from error


def make_found(id: str, setting: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Makes an environment.

    Args:
        id, setting: as in `find_env`.
        kwargs: arguments of its constructor.

    Raises:
        ConfigError: nothing has that id, or its constructor lacks one of the parameters.
    """
    find_env(id, setting)
    try:
        # The checker would check every step; tests run it once per environment.
        return gymnasium.make(id, disable_env_checker=True, **kwargs)
    except TypeError as error:
        cause = error.__cause__ or error  # Gymnasium raises it again with all arguments
        *_, (frame, _) = traceback.walk_tb(cause.__traceback__)
        if frame.f_globals.get("__name__") != gymnasium.make.__module__:
            raise  # from inside the environment
        raise ConfigError(
            f"{setting}={id}: {first_line(cause)}\nTake an environment that is made for this, "
            "such as one of docs/environments.md, or leave the setting out."
        ) from error


def _is_ours(id: str) -> bool:
    return id.startswith("reopold/")


def task_seed(split: str, index: int) -> int:
    """Returns the environment's seed for a task, 0 to 2**31 - 1.

    It depends on split and index only, so every run and every sample of a group gets the same one.
    Seeds of held-out tasks are odd and those of all others even, so that an environment whose seed
    selects the task is never evaluated on a task that it was trained on.
    """
    words = [*split.encode(), index]
    drawn = int(np.random.SeedSequence(words).generate_state(1)[0])
    return drawn & 0x7FFFFFFE | (split == "eval")
