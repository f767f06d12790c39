"""Environments. Importing this package registers them with Gymnasium."""

import gymnasium

from reopold_agent.envs.registration import ENVS, EnvEntry, load_env, register_env

# As strings, so that only the first gymnasium.make imports the class and what it needs.
register_env(
    "pixel_reasoner",
    id="reopold/PixelReasoner-v0",
    entry_point="reopold_agent.envs.pixel_reasoner:PixelReasonerEnv",
)

register_env(
    "math",
    id="reopold/Math-v0",
    entry_point="reopold_agent.envs.single_turn:SingleTurnEnv",
)

register_env(
    "geometry",
    id="reopold/Geometry-v0",
    entry_point="reopold_agent.envs.single_turn:SingleTurnEnv",
)

gymnasium.register(
    id="reopold/SingleTurn-v0",
    entry_point="reopold_agent.envs.single_turn:SingleTurnEnv",
)

gymnasium.register(
    id="reopold/Gymnasium-v0",
    entry_point="reopold_agent.envs.gym_env:GymnasiumEnv",
)

__all__ = ["ENVS", "EnvEntry", "load_env", "register_env"]
