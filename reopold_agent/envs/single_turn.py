"""One question, one answer: the degenerate environment of mathematics and geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.data import load_tasks
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError
from reopold_agent.types import TaskSource


class SingleTurnEnv(ToolEnv):
    """``reopold/SingleTurn-v0``: no tools; the first turn is the answer.

    Args:
        data: for each split, tasks or a specification for `reopold_agent.data.load_tasks`.
        **settings: see `ToolEnv`.
    """

    default_guideline: ClassVar[str] = (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )

    def __init__(
        self, *, data: Mapping[str, Mapping[str, Any] | TaskSource | None], **settings: Any
    ) -> None:
        self._data = dict(data)
        super().__init__(**{**settings, "tools": settings.get("tools") or [], "max_turns": 1})
        if self._source:
            raise ConfigError(f"unknown settings: {', '.join(self._source)}")

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        """The tasks of a split, as given."""
        spec = self._data.get(split)
        if spec is None:
            raise ConfigError(f"no data for the split '{split}'; set data.{split}")
        return load_tasks(spec) if isinstance(spec, Mapping) else spec
