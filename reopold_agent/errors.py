"""All errors that users can encounter; each also subclasses the built-in type it refines."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def suggestion(name: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """Returns "Did you mean 'NAME'? ", with a space at its end, or "" if no name is close.

    Args:
        name: the unknown name.
        known: the names that there are.
        prefix: what stands before the suggested name.
        cutoff: how similar a name must be, from 0 to 1 (`difflib.get_close_matches`).
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"Did you mean '{prefix}{close[0]}'? " if close else ""


class ReopoldError(Exception):
    """Base of all errors with a message for users; commands print it without a traceback."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; handled like Ctrl-C, but with another exit status."""


class ConfigError(ReopoldError, ValueError):
    """A setting is missing, unknown or contradicts another."""


class EnvironmentCodeError(ConfigError):
    """An environment's own code returned what it may not; the message says what to return.

    It ends a run in which no episode of that environment has ended with an answer yet.
    """


class UnknownNameError(ReopoldError, KeyError):
    """A registry has no such name; the message lists the known names and the closest match.

    Args:
        kind: what has names, in a word or two.
        name: the unknown one.
        known: the others.
        where: where they were looked for, if there are several places.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], where: str = "") -> None:
        self.kind, self.name, self.known, self.where = kind, name, sorted(known), where
        super().__init__(kind, name, self.known, where)

    def __str__(self) -> str:
        hint = suggestion(self.name, self.known, cutoff=0.5)
        listed = ", ".join(self.known) or "none"
        where = f" in {self.where}" if self.where else ""
        return f"no {self.kind} is called '{self.name}'{where}. {hint}Known: {listed}."


class MissingExtraError(ReopoldError, ImportError):
    """An optional dependency is not installed; the message gives the pip command for it."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        self.package, self.extra, self.why = package, extra, why
        super().__init__(package, extra, why)

    def __str__(self) -> str:
        return (
            f"{self.why} needs the package '{self.package}', which is not installed. "
            f'Run in the clone: pip install -e ".[{self.extra}]"'
        )


class DataError(ReopoldError, ValueError):
    """A data file or row cannot be used; the message names it."""


class ModelError(ReopoldError, ValueError):
    """A checkpoint is missing, incomplete or does not fit its counterpart."""


class VocabularyMismatchError(ModelError):
    """Student and teacher do not map the same ids to the same tokens."""


class ModelServerError(ReopoldError, RuntimeError):
    """A model server gave no usable answer after all retries."""


class ServerStalledError(ModelServerError):
    """A model server stopped working on its requests.

    It ends the run, because leaving out what was not answered would leave out the longest answers.
    """


class PolicyRequestError(ModelServerError):
    """Some of the trajectories of one call could not be scored, after all retries.

    Attributes:
        failed: the reason for each failed trajectory, by its position in the call.
        scores: `TokenScores` in the order of the call; None for trajectories that failed.
    """

    def __init__(self, failed: Mapping[int, str], scores: Sequence[Any]) -> None:
        self.failed, self.scores = dict(failed), list(scores)
        super().__init__(self.failed, self.scores)

    def __str__(self) -> str:
        first = next(iter(self.failed.values()))
        return f"{len(self.failed)} of {len(self.scores)} trajectories were not scored; {first}"


class CheckpointError(ReopoldError, RuntimeError):
    """A run folder cannot be resumed as requested."""


class StorageError(ReopoldError, OSError):
    """A run's file cannot be written: the disk is full or permission is missing."""


class NonFiniteError(ReopoldError, ArithmeticError):
    """A loss, gradient or log-prob is NaN or infinite."""


class PreflightError(ReopoldError, ValueError):
    """A preflight found what would spoil the run; the message says what to do."""


class ToolError(ReopoldError, ValueError):
    """A tool call was invalid; the message is shown to the model and the episode continues."""


class ToolTimeoutError(ToolError, TimeoutError):
    """The tool did not finish within its time limit."""


class ToolResultError(ReopoldError, ValueError):
    """A tool returned something that cannot be shown; the message says what."""


class ToolProcessError(ReopoldError, RuntimeError):
    """A tool's worker process died or exceeded a limit; the message says which."""


def told_in_full(error: BaseException) -> str:
    """Returns what a log says of an error, with its traceback unless the message says what to do.

    Only a `ReopoldError` is written for users; of all others the place in the code is needed.
    """
    if isinstance(error, ReopoldError):
        return str(error)
    lines = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\n{lines}"


def first_line(error: BaseException | None) -> str:
    """Returns the first line of an error's message, or its class name when it has none.

    Libraries put what went wrong on the first line and details for developers below it.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
