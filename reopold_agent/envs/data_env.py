"""Tool environments whose tasks come from data, one specification per split."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from typing_extensions import override

from reopold_agent.data import load_tasks
from reopold_agent.data.checks import CheckedTasks, DataReport
from reopold_agent.data.fingerprint import pictures_digest, tasks_digest, tasks_in_common
from reopold_agent.data.loading import suitable_tool_options
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError
from reopold_agent.types import Task, TaskSource

SplitData: TypeAlias = "Mapping[str, Any] | TaskSource | None"
"""Tasks, a specification for `reopold_agent.data.load_tasks`, or None if the split has none."""

SAMPLE = 64
"""About how many tasks `tasks_to_check` takes of those that are made when they are read."""


class DataEnv(ToolEnv):
    """A `ToolEnv` whose tasks come from data.

    Args:
        data: tasks or a specification for each split. A specification's source may bring tool
            options that suit its tasks; ``tool_options`` overrides them.
        left_out: by split, positions of tasks to leave out.
        **settings: of `ToolEnv`.

    Raises:
        ConfigError: an unknown setting.
    """

    def __init__(
        self,
        *,
        data: Mapping[str, SplitData],
        left_out: Mapping[str, Collection[int]] | None = None,
        **settings: Any,
    ) -> None:
        self._data, self._left_out = dict(data), dict(left_out or {})
        super().__init__(**settings)

    @override
    def load_tasks(self, split: str) -> TaskSource:
        """Returns the tasks of a split, as given or as its specification says."""
        spec = self._data.get(split)
        if spec is None:
            raise ConfigError(f"no data for the split '{split}'; set data.{split}")
        tasks = load_tasks(spec) if isinstance(spec, Mapping) else spec
        left_out = frozenset(self._left_out.get(split, ()))
        return _Without(tasks, left_out) if left_out else tasks

    @override
    def default_tool_options(self) -> Mapping[str, Mapping[str, Any]]:
        return suitable_tool_options(self._data.values())

    def data_report(self, split: str) -> DataReport | None:
        """Returns the report on the rows of a split; None for tasks that are not from files.

        Raises:
            ConfigError, DataError: the tasks cannot be loaded.
        """
        tasks = self._split(split)
        return tasks.report if isinstance(tasks, CheckedTasks) else None

    def digest(self, split: str, teacher_key: str | None = None) -> str:
        """Returns the fingerprint of a split's tasks (`tasks_digest`); it reads all of them.

        Raises:
            ConfigError, DataError: the tasks cannot be loaded.
        """
        return tasks_digest(self._split(split), teacher_key)

    def pictures_digest(self, split: str) -> str:
        """Returns the fingerprint of the pictures of a split's tasks; it reads all of them.

        Raises:
            ConfigError, DataError: the tasks cannot be loaded.
        """
        return pictures_digest(self._split(split))

    def tasks_in_common(self) -> int:
        """Returns how many held-out tasks are training tasks; it reads all of them.

        Raises:
            ConfigError, DataError: the tasks cannot be loaded.
        """
        return tasks_in_common(self._split("train"), self._split("eval"))


def tasks_to_check(env: ToolEnv, split: str, most: int | None = None) -> range:
    """Returns the tasks to look at before a run: all from files, about `SAMPLE` that are made.

    Args:
        env: the environment.
        split: of the tasks.
        most: how many of the split's first tasks are used; None for all.
    """
    total = env.num_tasks(split)
    if most is not None:
        total = min(total, most)
    files = isinstance(env, DataEnv) and env.data_report(split) is not None
    return range(0, total, 1 if files else max(1, total // SAMPLE))


class _Without:
    """Tasks without those at some positions; the others keep their order."""

    def __init__(self, tasks: TaskSource, left_out: Collection[int]) -> None:
        self._tasks = tasks
        self._kept = [i for i in range(len(tasks)) if i not in left_out]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int, /) -> Task:
        return self._tasks[self._kept[index]]
