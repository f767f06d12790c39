"""Computes the order of tasks from seed and position only, so a resumed run continues exactly.

(Peers that carry an iterator's state skip or repeat data on resume: verl #7401.)
"""

from __future__ import annotations

import numpy as np


class DataOrder:
    """Passes over ``size`` tasks, each pass in its own random order."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("there are no training tasks")
        self._size, self._seed = size, seed
        self._epoch = -1
        self._permutation = np.arange(size)

    def __getitem__(self, position: int) -> int:
        """Returns the index of the task at a position (0, 1, 2 ... without end)."""
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, 3, epoch])
            self._permutation, self._epoch = rng.permutation(self._size), epoch
        return int(self._permutation[offset])
