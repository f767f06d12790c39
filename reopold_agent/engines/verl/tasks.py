"""The run's order of tasks as verl's data set: row ``k`` is the run's ``k``-th draw."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from reopold_agent.engines.collect import step_episodes
from reopold_agent.engines.data_order import DataOrder


class StepTasks(Dataset[dict[str, Any]]):
    """All draws of a run, in the order of the local engine.

    verl's loader counts how many rows it has handed out and goes on there after a resume; as the
    rows are a function of seed and position, none is lost or used twice.

    Args:
        tasks: number of training tasks.
        prompts, samples: tasks per step, episodes per task.
        steps: of the whole run.
        seed: the run's.
    """

    def __init__(self, tasks: int, prompts: int, samples: int, steps: int, seed: int) -> None:
        self._order = DataOrder(tasks, seed)
        self._prompts, self._samples, self._steps = prompts, samples, steps

    def __len__(self) -> int:
        return self._prompts * self._steps

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Columns ``position``, ``step``, ``index``, ``first_sample`` and verl's ``raw_prompt``."""
        step, place = divmod(position, self._prompts)
        first = step * self._prompts
        drawn = [self._order[first + k] for k in range(place + 1)]
        episode = step_episodes(drawn, self._samples)[place * self._samples]
        return {
            "raw_prompt": [],  # verl takes the number of rows from this column
            "position": position,
            "step": step,
            "index": episode.index,
            "first_sample": episode.sample,
        }
