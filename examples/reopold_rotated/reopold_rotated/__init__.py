"""Example plugin: importing it registers the environment, which its entry point asks for."""

from reopold_agent.envs import register_env

register_env(
    "rotated_digits",
    id="reopold_rotated/RotatedDigits-v0",
    # As text, so that the list of environments does not wait for what an environment imports.
    entry_point="reopold_rotated.env:RotatedDigitsEnv",
    config={
        # Arguments of the environment.
        "kwargs": {"tool_time_limit_s": 20.0},
        # Sections of the run's configuration that suit it: to turn, to brighten, to crop and to
        # answer takes four turns. (The pictures are the embedded task's size, so the pixel limits
        # of the group `data` are right as they are.)
        "rollout": {"max_turns": 4, "max_response_tokens": 320},
        "evaluation": {"max_turns": 4},
    },
)
