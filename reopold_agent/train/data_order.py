"""Computes the order of tasks from seed and position only, so a resumed run continues exactly.

(Peers that carry an iterator's state skip or repeat data on resume: verl #7401.)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from reopold_agent.config import whole_weights


class DataOrder:
    """Passes over ``size`` tasks, each pass in its own random order.

    Args:
        size: number of tasks.
        seed: of the run.
        stream: further numbers that tell apart the orders of one run.

    Raises:
        ValueError: there are no tasks.
    """

    def __init__(self, size: int, seed: int, stream: tuple[int, ...] = ()) -> None:
        if size < 1:
            raise ValueError("there are no training tasks")
        self._size, self._seed, self._stream = size, seed, stream
        self._epoch = -1
        self._permutation = np.arange(size)

    def __getitem__(self, position: int) -> int:
        """Returns the index of the task at a position (0, 1, 2 ... without end)."""
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, 3, epoch, *self._stream])
            self._permutation, self._epoch = rng.permutation(self._size), epoch
        return int(self._permutation[offset])


class TaskOrder:
    """The draws of a run: environments take turns by weight, each in its own order of tasks.

    Turns repeat after a cycle, in which each environment has exactly its share, as evenly spread as
    whole turns can be.

    Args:
        tasks: number of tasks of each environment.
        seed: of the run.
        weights: share of each environment, up to a common factor.

    Raises:
        ValueError: an environment has no tasks.
    """

    def __init__(self, tasks: Mapping[str, int], seed: int, weights: Mapping[str, float]) -> None:
        several = len(tasks) > 1
        self._orders = {
            name: DataOrder(size, seed, (zlib.crc32(name.encode()),) if several else ())
            for name, size in tasks.items()
        }
        self._turns = turns(weights) if several else list(tasks)
        self._shares = {name: self._turns.count(name) for name in tasks}

    def __getitem__(self, position: int) -> tuple[str, int]:
        """Returns environment and index of the task at a position (0, 1, 2 ... without end)."""
        cycles, place = divmod(position, len(self._turns))
        name = self._turns[place]
        drawn = cycles * self._shares[name] + self._turns[:place].count(name)
        return name, self._orders[name][drawn]


def tasks_of(tasks: Mapping[str, Mapping[str, int]], split: str) -> dict[str, int]:
    """Returns the number of tasks of a split by environment; those without the split have none."""
    return {name: counts.get(split, 0) for name, counts in tasks.items()}


def turns(weights: Mapping[str, float]) -> list[str]:
    """Returns one cycle of names with exact shares: smooth weighted round-robin, as in nginx.

    At each turn every name gains its weight; the one with the most has the turn (the first of
    several) and pays the sum of all weights.
    """
    counts = whole_weights(weights)
    total = sum(counts.values())
    gained = dict.fromkeys(counts, 0)
    cycle = []
    for _ in range(total):
        for name, count in counts.items():
            gained[name] += count
        chosen = max(gained, key=lambda name: gained[name])
        gained[chosen] -= total
        cycle.append(chosen)
    return cycle
