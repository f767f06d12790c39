"""Gives verl a data set in the run's order of tasks: row ``k`` is the run's ``k``-th draw."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from reopold_agent.train.collect import step_episodes
from reopold_agent.train.data_order import TaskOrder


class StepTasks(Dataset[dict[str, Any]]):
    """The task draws of a run, in the order of the local engine.

    verl's loader counts how many rows it has handed out and continues there after a resume; as the
    rows are a function of seed and position, none is lost or used twice.

    Args:
        order: of the tasks.
        prompts, samples: tasks per step, episodes per task.
        steps: of the whole run.
    """

    def __init__(self, order: TaskOrder, prompts: int, samples: int, steps: int) -> None:
        self._order = order
        self._prompts, self._samples, self._steps = prompts, samples, steps

    def __len__(self) -> int:
        return self._prompts * self._steps

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Returns ``position``, ``step``, ``env``, ``index``, ``first_sample``, and ``raw_prompt``
        for verl."""
        step, place = divmod(position, self._prompts)
        first = step * self._prompts
        drawn = [self._order[first + k] for k in range(place + 1)]
        episode = step_episodes(drawn, self._samples)[place * self._samples]
        return {
            "raw_prompt": [],  # verl counts the rows by this column
            "position": position,
            "step": step,
            "env": episode.env,
            "index": episode.index,
            "first_sample": episode.sample,
        }
