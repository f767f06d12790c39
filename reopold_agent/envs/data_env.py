"""Tool environments whose tasks come from data, one source per split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from reopold_agent.data import load_tasks
from reopold_agent.data.checks import CheckedTasks, DataReport
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError
from reopold_agent.types import TaskSource

SplitData: TypeAlias = "Mapping[str, Any] | TaskSource | None"
"""Tasks, a specification for `reopold_agent.data.load_tasks`, or None: this split has none."""


class DataEnv(ToolEnv):
    """A `ToolEnv` that is given its data.

    Args:
        data: tasks or a specification for each split.
        **settings: see `ToolEnv`.

    Raises:
        ConfigError: an unknown setting.
    """

    def __init__(self, *, data: Mapping[str, SplitData], **settings: Any) -> None:
        self._data = dict(data)
        super().__init__(**settings)
        if self._source:
            raise ConfigError(f"unknown settings: {', '.join(self._source)}")

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        """The tasks of a split, as given or as its specification says."""
        spec = self._data.get(split)
        if spec is None:
            raise ConfigError(f"no data for the split '{split}'; set data.{split}")
        return load_tasks(spec) if isinstance(spec, Mapping) else spec

    def data_report(self, split: str) -> DataReport | None:
        """What was found in the rows of a split; None for tasks that are not from files.

        Raises:
            ConfigError, DataError: the tasks cannot be had.
        """
        tasks = self._split(split)
        return tasks.report if isinstance(tasks, CheckedTasks) else None
