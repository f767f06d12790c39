"""Sends metrics to TensorBoard: event files in the run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reopold_agent.tracking.trackers.base import (
    TRACKERS,
    Point,
    Started,
    TrackedRun,
    require,
)


@TRACKERS.add("tensorboard")
@dataclass
class TensorBoard:
    """Writes event files.

    A run that resumes tells TensorBoard to purge the last step and later ones, and writes them
    again, so that TensorBoard shows the content of ``metrics.jsonl``.

    Attributes:
        folder: output folder; null: ``RUN/tensorboard``.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    folder: str | None = None
    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require("tensorboard", "tensorboard", "tensorboard")

    def start(self, run: TrackedRun) -> Started:
        """Opens a new event file beside earlier ones."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = Path(self.folder) if self.folder else run.folder / "tensorboard"
        sent, step = first_unsure(run.points, min(run.sent, run.kept))
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=step)
        # Not `add_hparams`, which would create a separate run.
        for summary in hparams(dict(run.config), {"eval/student/greedy/success": 0.0}):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()
        return Started(None, sent)

    def log(self, point: Point, sent: int) -> None:
        """Writes the scalars and flushes the file."""
        for name, value in point.values.items():
            self._writer.add_scalar(name, value, point.step)
        self._writer.flush()

    def finish(self, status: str) -> None:
        """Closes the file."""
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Waits until a new event file sorts last, since files are read in the order of their names.

    A name begins with the time in seconds.
    """
    names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(name[3]) for name in names if name[3].isdecimal()), default=0)
    for _ in range(20):  # not for ever: the clock may have been set back
        if int(time.time()) > newest:
            return
        time.sleep(0.1)


def first_unsure(points: Sequence[Point], sent: int) -> tuple[int, int]:
    """Returns the first row to write again after a kill, and its step.

    TensorBoard cannot purge single rows of a step, so all rows of the last sent step are written
    again.
    """
    if sent == 0:
        return 0, 0
    step = points[sent - 1].step
    while sent > 0 and points[sent - 1].step == step:
        sent -= 1
    return sent, step
