"""Environments of a run, made through Gymnasium's registry."""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from reopold_agent.config import TrainConfig
from reopold_agent.envs.registration import load_env
from reopold_agent.policies.vision import PixelLimits, VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import RolloutLimits, RolloutRunner


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
        kwargs.setdefault("data", {"train": config.data.train, "eval": config.data.eval})
    spec = gymnasium.spec(config.env.id)
    if max_turns is not None and "max_turns" not in kwargs:
        creator = spec.entry_point
        made: Any = load_env_creator(creator) if isinstance(creator, str) else creator
        if _accepts(made, "max_turns"):
            kwargs["max_turns"] = max_turns
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
