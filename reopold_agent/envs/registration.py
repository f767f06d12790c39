"""Environments by name: Gymnasium's registry, our short names, and other packages' plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from reopold_agent.errors import ConfigError
from reopold_agent.registry import Registry


@dataclass(frozen=True)
class EnvEntry:
    """An environment that ``env=NAME`` selects.

    Attributes:
        name: the short name.
        id: Gymnasium's id, ``namespace/Name-v0``.
        config: what ``env=NAME`` composes: ``kwargs`` for the environment, and optionally whole
            sections of the run's configuration that suit it (``data``, ``pixels``, ``rollout``,
            ``batch``, ``evaluation``, ``model`` ...).
    """

    name: str
    id: str
    config: Mapping[str, Any] = field(default_factory=dict)


ENVS: Registry[EnvEntry] = Registry("environment", "reopold_agent.envs", EnvEntry)


def register_env(
    name: str,
    *,
    id: str,
    entry_point: str | Callable[..., gymnasium.Env[Any, Any]],
    config: Mapping[str, Any] | None = None,
) -> EnvEntry:
    """Registers an environment with Gymnasium and under a short name.

    A third-party package calls this in a module that its ``reopold_agent.envs`` entry point
    names; after ``pip install`` of it, ``python -m reopold_agent.train env=NAME`` works.

    Args:
        name: for ``env=NAME``: letters, digits, ``_`` and ``-``.
        id: Gymnasium's id, with a version.
        entry_point: the class, or ``"package.module:Class"``.
        config: see `EnvEntry`.

    Raises:
        ConfigError: a bad name, or one that is taken.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"an environment's name has letters, digits, _ and -, got '{name}'")
    entry = ENVS.register(name, EnvEntry(name, id, dict(config or {})))
    gymnasium.register(id=id, entry_point=entry_point)
    return entry


def load_env(name: str) -> EnvEntry:
    """The environment of that name; plugins are imported if needed.

    Raises:
        UnknownNameError: lists what exists and the closest match.
    """
    return ENVS.get(name)


def task_seed(split: str, index: int) -> int:
    """The environment's seed for a task: the split's letters and the index, nothing of the process,
    so that every run and every sample of a group faces the same one."""
    words = [*split.encode(), index]
    return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x7FFFFFFF
