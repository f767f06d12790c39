"""Every error a user can meet. Each also subclasses the standard type it refines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ReopoldError(Exception):
    """Base of all errors whose message is written for the user; `train` prints it bare."""


class Terminated(KeyboardInterrupt):
    """SIGTERM asked for what Ctrl-C does; the exit status tells them apart."""


class ConfigError(ReopoldError, ValueError):
    """A setting is missing, unknown or contradicts another."""


class UnknownNameError(ReopoldError, KeyError):
    """A registry has no such name; the message lists what exists and the closest match."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(kind, name, self.known)

    def __str__(self) -> str:
        close = difflib.get_close_matches(self.name, self.known, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        listed = ", ".join(self.known) or "none"
        return f"no {self.kind} is called '{self.name}'.{hint} Known: {listed}."


class MissingExtraError(ReopoldError, ImportError):
    """An optional dependency is absent; the message is the pip command that installs it."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        self.package, self.extra, self.why = package, extra, why
        super().__init__(package, extra, why)

    def __str__(self) -> str:
        return (
            f"{self.why} needs the package '{self.package}', which is not installed. "
            f'Run: pip install "reopold-agent[{self.extra}]"'
        )


class DataError(ReopoldError, ValueError):
    """A data file or row cannot be used; the message names it."""


class ModelError(ReopoldError, ValueError):
    """A checkpoint is missing, incomplete or does not fit its counterpart."""


class VocabularyMismatchError(ModelError):
    """Student and teacher do not map the same ids to the same tokens."""


class ModelServerError(ReopoldError, RuntimeError):
    """A model's server did not answer, or not usefully, after all retries."""


class PolicyRequestError(ModelServerError):
    """Some of the trajectories of one call could not be scored, after all retries.

    Attributes:
        failed: the reason for each, by its position in the call.
        scores: the others' `TokenScores` in the order of the call; None for those that failed.
    """

    def __init__(self, failed: Mapping[int, str], scores: Sequence[Any]) -> None:
        self.failed, self.scores = dict(failed), list(scores)
        super().__init__(self.failed, self.scores)

    def __str__(self) -> str:
        first = next(iter(self.failed.values()))
        return f"{len(self.failed)} of {len(self.scores)} trajectories were not scored; {first}"


class CheckpointError(ReopoldError, RuntimeError):
    """A run folder cannot be resumed as asked."""


class StorageError(ReopoldError, OSError):
    """A file of a run cannot be written: the disk is full, or it is not allowed."""


class NonFiniteError(ReopoldError, ArithmeticError):
    """A loss, gradient or log-prob is NaN or infinite."""


class ToolError(ReopoldError, ValueError):
    """Raised by a tool to tell the model what was wrong with its call; never ends an episode."""


class ToolTimeoutError(ToolError, TimeoutError):
    """The tool did not finish within its time limit."""


class ToolResultError(ReopoldError, ValueError):
    """A tool returned something that cannot be shown; the message says what, for model and log."""


class ToolProcessError(ReopoldError, RuntimeError):
    """A tool's worker process ended, or took more than it may; the message says which."""


def first_line(error: BaseException | None) -> str:
    """What an error says, without the lines that libraries add for developers; else its class."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
