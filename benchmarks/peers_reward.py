"""The reward of the case ``verl`` of ``peers.py``, for all sides.

Random models solve nothing, and equal rewards leave GRPO nothing to learn. So the reward is made
of the number of a response's characters: its last two digits over 100.
"""

from __future__ import annotations

from typing import Any

from reopold_agent.envs import register_env
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.types import Task


class DigitsEnv(SingleTurnEnv):
    """``env=digits``: a question, and this module's reward."""

    def reward(self, task: Task, answer: str, *args: Any, **kwargs: Any) -> tuple[float, bool]:
        """Returns the reward, and whether it is above a half."""
        reward = compute_score(answer)
        return reward, reward > 0.5


def compute_score(solution_str: str, **_: Any) -> float:
    """Returns the reward of a response; verl's ``reward.custom_reward_function``."""
    return len(solution_str) % 100 / 100


register_env(
    "digits", id="peers/Digits-v0", entry_point="peers_reward:DigitsEnv",
    config={"takes_data": True},
)  # fmt: skip
