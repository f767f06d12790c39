"""Tasks that are generated from (seed, split, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from reopold_agent.types import Task

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class GeneratedTasks:
    """The tasks of a split, each made by `make` when it is read.

    Attributes:
        split: ``"train"`` or ``"eval"`` (held out).
        size: number of tasks.
        seed: of the tasks.

    Raises:
        ValueError: an attribute is out of range.
    """

    split: Split = "train"
    size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "eval"):
            raise ValueError(f"split must be 'train' or 'eval', got {self.split!r}")
        if self.size < 1 or self.seed < 0:
            raise ValueError(f"size must be >= 1 and seed >= 0, got {self.size} and {self.seed}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Task:
        """Returns the task at ``index``.

        Raises:
            IndexError: not in ``range(len(self))``.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"task {index} of {self.size}")
        return self.make(index)

    def rng(self, index: int) -> np.random.Generator:
        """Returns the random generator of a task."""
        return np.random.default_rng((self.seed, int(self.split == "eval"), index))

    def make(self, index: int) -> Task:
        """Makes the task at ``index``."""
        raise NotImplementedError(f"{type(self).__name__} makes no tasks")
