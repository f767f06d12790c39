"""The longest prompt and episode of a run, for its checks, the engines and the plan alike."""

from __future__ import annotations

from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError

VERL_PROMPT_TOKENS = 8192
"""Longest prompt with ``engine=verl`` unless a setting says otherwise; its servers reserve it."""


def prompt_limit(config: TrainConfig, context: int | None) -> int | None:
    """Returns the number of tokens of the longest prompt; None without a limit.

    Args:
        config: the run's.
        context: longest sequence of the models, if they have one.

    Raises:
        ConfigError: prompt and response do not fit the context.
    """
    limit, response = config.engine.max_prompt_tokens, config.rollout.max_response_tokens
    if context is None:
        by_default = VERL_PROMPT_TOKENS if config.engine.name == "verl" else None
        return by_default if limit is None else limit
    room = context - response - 1  # scoring adds a token
    if room < 1:
        raise ConfigError(
            f"a response of {response} tokens leaves no room for a prompt in the models' context "
            f"of {context}.\nLower rollout.max_response_tokens."
        )
    if limit is None:
        return min(room, VERL_PROMPT_TOKENS) if config.engine.name == "verl" else room
    if limit > room:
        raise ConfigError(
            f"a prompt of {limit} and a response of {response} tokens do not fit the models' "
            f"context of {context}: lower engine.max_prompt_tokens or rollout.max_response_tokens"
        )
    return limit


def episode_limit(config: TrainConfig, context: int | None) -> int | None:
    """Returns the tokens of the longest episode with the one that scoring adds, or None.

    Raises:
        ConfigError: prompt and response do not fit the context.
    """
    prompt = prompt_limit(config, context)
    return None if prompt is None else prompt + config.rollout.max_response_tokens + 1
