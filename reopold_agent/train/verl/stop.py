"""Carries a signal from the command to the trainer, which is another process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reopold_agent.train.interrupts import Interrupts


class StoppedError(Exception):
    """Ends the trainer's loop after a request to stop."""


class StopRequest:
    """A request that the trainer stops: a file in the run folder, which both processes see.

    Ray's actors run one method at a time, so the trainer could not be called while it trains.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".stop"

    def wait(self, ended: Callable[[float], bool], interrupts: Interrupts) -> None:
        """Waits until the trainer has ended, and passes a signal on to it.

        Args:
            ended: waits for the trainer for so many seconds, and returns whether it has ended.
            interrupts: the signals received.

        Raises:
            KeyboardInterrupt: a second signal was received.
        """
        self._path.unlink(missing_ok=True)  # of a run that was killed
        try:
            while not ended(1.0):
                if interrupts.received:
                    self._path.touch()
        finally:
            self._path.unlink(missing_ok=True)

    @property
    def made(self) -> bool:
        """Whether the trainer should stop."""
        return self._path.exists()

    def obey(self) -> None:
        """Ends the trainer's loop if it should stop.

        Raises:
            StoppedError: it should.
        """
        if self.made:
            raise StoppedError
