"""Example plugin: an environment, registered when this module is imported by its entry point."""

from reopold_agent.envs import register_env

register_env(
    "rotated_digits",
    id="reopold_rotated/RotatedDigits-v0",
    # As text, so that listing environments does not import what this one needs.
    entry_point="reopold_rotated.env:RotatedDigitsEnv",
    config={
        # Arguments of the environment.
        "kwargs": {"tool_time_limit_s": 20.0},
        # Settings of the run that suit it: turning, brightening, cropping and answering take four
        # turns. (The pictures have the embedded task's size, so the pixel limits of the group
        # `data` fit.)
        "rollout": {"max_turns": 4, "max_response_tokens": 320},
        "evaluation": {"max_turns": 4},
    },
)
