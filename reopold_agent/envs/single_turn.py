"""One question, one answer: the degenerate environment of mathematics and geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.envs.data_env import DataEnv, SplitData


class SingleTurnEnv(DataEnv):
    """``reopold/SingleTurn-v0``: no tools; the first turn is the answer.

    Args:
        data: see `DataEnv`.
        **settings: see `ToolEnv`.
    """

    default_guideline: ClassVar[str] = (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )

    def __init__(self, *, data: Mapping[str, SplitData], **settings: Any) -> None:
        once = {"tools": settings.get("tools") or [], "max_turns": 1}
        super().__init__(data=data, **{**settings, **once})
