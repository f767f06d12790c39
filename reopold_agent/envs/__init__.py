"""Environments. Importing this package registers them with Gymnasium."""

from reopold_agent.envs.registration import ENVS, EnvEntry, load_env, register_env

# As a string: the class, and what it needs, is imported by the first gymnasium.make.
register_env(
    "pixel_reasoner",
    id="reopold/PixelReasoner-v0",
    entry_point="reopold_agent.envs.pixel_reasoner:PixelReasonerEnv",
)

__all__ = ["ENVS", "EnvEntry", "load_env", "register_env"]
