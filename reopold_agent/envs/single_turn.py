"""One question, one answer: the degenerate environment of mathematics and geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.envs.data_env import DataEnv, SplitData


class SingleTurnEnv(DataEnv):
    """``reopold/SingleTurn-v0``: no tools; the first turn is the answer.

    Args:
        data: see `DataEnv`.
        system_message: empty by default: then a prompt has no system message of its own, and the
            checkpoint's chat template does what its makers meant (Qwen2.5's writes a default,
            DeepSeek-R1-Distill wants none).
        **settings: see `ToolEnv`.
    """

    default_guideline: ClassVar[str] = (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )

    def __init__(
        self, *, data: Mapping[str, SplitData], system_message: str = "", **settings: Any
    ) -> None:
        once = {
            "tools": settings.get("tools") or [],
            "max_turns": 1,
            "system_message": system_message,
        }
        super().__init__(data=data, **{**settings, **once})
