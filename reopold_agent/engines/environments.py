"""Environments of a run, made through Gymnasium's registry."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from reopold_agent.config import TrainConfig
from reopold_agent.data.checks import BadRowsError
from reopold_agent.envs.data_env import DataEnv
from reopold_agent.envs.registration import load_env
from reopold_agent.errors import ConfigError
from reopold_agent.tracking.files import write_json_atomic

if TYPE_CHECKING:
    from reopold_agent.policies.vision import VisionProcessor
    from reopold_agent.rollout.chat import ChatRenderer
    from reopold_agent.rollout.runner import RolloutRunner


def make_env(config: TrainConfig, *, max_turns: int | None = None) -> gymnasium.Env[Any, str]:
    """Makes one environment from the run's configuration.

    Args:
        config: ``env`` names it; ``data`` goes to environments that take data.
        max_turns: turn budget, for environments that have such a setting.

    Raises:
        UnknownNameError: no such environment.
        ConfigError, DataError: its settings or data cannot be used.
    """
    load_env(config.env.name)
    kwargs: dict[str, Any] = dict(config.env.kwargs)
    if config.env.takes_data:
        kwargs = {**config.data.env_kwargs, **kwargs}
        kwargs.setdefault("data", {s: config.data.specification(s) for s in ("train", "eval")})
    spec = gymnasium.spec(config.env.id)
    creator = spec.entry_point
    made: Any = load_env_creator(creator) if isinstance(creator, str) else creator
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
    # The checker would look at every step again; tests run it once per environment.
    return gymnasium.make(config.env.id, disable_env_checker=True, **kwargs)


def make_runner(
    config: TrainConfig,
    chat: ChatRenderer,
    vision: VisionProcessor | None,
    *,
    max_turns: int,
    concurrency: int | None = None,
) -> RolloutRunner:
    """A runner of the run's environment within its budgets.

    Args:
        config: the run's.
        chat: renders conversations for the policy's tokenizer.
        vision: encodes pictures; None for text-only models.
        max_turns: assistant turns; training and evaluation differ.
        concurrency: episodes at once; None takes the configuration's.
    """
    # Not at the top: who plays by hand (`reopold_agent.play`) need not wait for PyTorch.
    from reopold_agent.policies.vision import PixelLimits
    from reopold_agent.rollout.runner import RolloutLimits, RolloutRunner

    return RolloutRunner(
        lambda: make_env(config, max_turns=max_turns),
        chat,
        vision,
        prompt_pixels=PixelLimits(**vars(config.pixels.prompt)),
        observation_pixels=PixelLimits(**vars(config.pixels.observation)),
        limits=RolloutLimits(
            max_response_tokens=config.rollout.max_response_tokens,
            max_turn_tokens=config.rollout.max_turn_tokens,
            max_turns=max_turns,
            env_seconds=config.rollout.env_seconds,
            concurrency=config.rollout.concurrency if concurrency is None else concurrency,
        ),
    )


def checked_tasks(config: TrainConfig, report: Path) -> dict[str, int]:
    """How many tasks each split has, once its rows are read and checked.

    Args:
        config: the run's.
        report: file for what was found in the rows, as JSON by split; also when they are refused.

    Raises:
        UnknownNameError, ConfigError, DataError: as of `make_env`, or rows cannot be used.
    """
    env = make_env(config)
    counts: dict[str, int] = {}
    found: dict[str, Any] = {}
    try:
        for split in ("train", "eval"):
            try:
                counts[split] = num_tasks(env, split)
            except BadRowsError as error:
                found[split] = error.report.record()
                raise
            inner = env.unwrapped
            told = inner.data_report(split) if isinstance(inner, DataEnv) else None
            if told is not None:
                found[split] = told.record()
    finally:
        env.close()
        if found:
            write_json_atomic(report, found)
    return counts


def _tool_isolation(config: TrainConfig) -> dict[str, Any]:
    """Settings of `reopold_agent.tools.Isolation`: ``auto`` is decided, the data may be read."""
    settings = dict(vars(config.tools))
    mode = settings.pop("isolation")
    if mode == "auto":
        # Ray's rollout processes serve many episodes; one bad tool must not take them down.
        mode = "plugins" if config.engine.name == "verl" and hasattr(os, "fork") else "none"
    sources = [spec.get("path") for spec in (config.data.train, config.data.eval) if spec]
    folders = [os.path.abspath(path) for path in sources if path and os.path.exists(path)]
    return {**settings, "mode": mode, "read": [*settings["read"], *folders]}


def num_tasks(env: gymnasium.Env[Any, Any], split: str) -> int:
    """How many tasks a split has; an environment that does not say has 2**20 of them by seed."""
    inner: Any = env.unwrapped
    if hasattr(inner, "num_tasks"):
        return int(inner.num_tasks(split))
    return 2**20


def _accepts(creator: Any, name: str) -> bool:
    """Whether a class or function takes the keyword, itself or through a base class."""
    candidates = creator.__mro__ if inspect.isclass(creator) else [creator]
    for candidate in candidates:
        function = candidate.__init__ if inspect.isclass(candidate) else candidate
        if name in inspect.signature(function).parameters:
            return True
    return False
