"""One question, one answer: the environment of mathematics and geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from reopold_agent.envs.data_env import DataEnv, SplitData
from reopold_agent.types import Task


class SingleTurnEnv(DataEnv):
    """``reopold/SingleTurn-v0``: no tools; the first turn is the answer.

    Without a system message in the settings or the task, the prompt has none, and the checkpoint's
    chat template decides: Qwen2.5's adds a default, DeepSeek-R1-Distill's none. A task with its own
    is asked as its row has it, without the default guideline.

    Args:
        data: as for `DataEnv`.
        **settings: of `ToolEnv`.
    """

    default_guideline: ClassVar[str] = (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    default_system_message: ClassVar[str] = ""

    def __init__(self, *, data: Mapping[str, SplitData], **settings: Any) -> None:
        self._has_guideline = settings.get("guideline") is not None
        once = {"tools": settings.get("tools") or [], "max_turns": 1}
        super().__init__(data=data, **{**settings, **once})

    @override
    def question(self, task: Task) -> str:
        as_it_is = self.own_system_message(task) is not None and not self._has_guideline
        return task.question if as_it_is else super().question(task)
