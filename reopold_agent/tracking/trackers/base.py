"""What a tracker is, what it is told, and where trackers are found by name."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from reopold_agent.config import build
from reopold_agent.errors import ConfigError, MissingExtraError
from reopold_agent.registry import Registry

SENT = "reopold/rows"
"""A metric beside the run's own in trackers that can be asked for the last value of one: how many
rows they hold. It comes with the row itself, so no kill can fall between the two."""


@dataclass(frozen=True)
class Point:
    """The numbers of one row of ``metrics.jsonl``.

    Attributes:
        step: the row's own. Both kinds of rows describe the student after that many updates: the
            episodes of training step 7 (counted from 0) are those of a student with 7 updates.
        values: by name. A training row's names are those of ``metrics.jsonl``; an evaluation's
            are prefixed: ``eval/student/greedy/success``.
    """

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when it starts.

    Attributes:
        folder: the run folder.
        kind: ``train`` or ``evaluate``.
        config: the run's settings by dotted key (see `flat_settings`).
        id: the tracker's own name for this run, if it has been started for it before.
        sent: rows that it acknowledged before.
        points: the rows that the run has by now, in order; steps never fall.
        kept: how many of the first of these are as they were before this process began; a run
            that goes on from a checkpoint makes the later ones anew, with other values.
    """

    folder: Path
    kind: str
    config: Mapping[str, bool | int | float | str]
    id: str | None
    sent: int
    points: Sequence[Point]
    kept: int

    @property
    def name(self) -> str:
        """The last two parts of the folder, as ``pixel_reasoner/2026-01-31_12-00-00``."""
        return "/".join(self.folder.parts[-2:]).strip("/")


@dataclass(frozen=True)
class Started:
    """What a tracker says when it has started.

    Attributes:
        id: its own name for the run, remembered for when the run goes on.
        sent: how many rows it holds; those behind them are sent.
    """

    id: str | None
    sent: int


@runtime_checkable
class Tracker(Protocol):
    """Where a run's figures go besides its folder.

    A tracker is a dataclass whose fields are the settings ``tracking.NAME.*``; other packages
    register theirs by the entry-point group ``reopold_agent.trackers``. The three methods are
    called on one thread, in this order. Each may block and may raise: a call that raised is made
    again a few times, and training goes on all the while.
    """

    def start(self, run: TrackedRun) -> Started:
        """Opens the run, or goes on with the one that ``run.id`` names."""
        ...

    def log(self, point: Point, sent: int) -> None:
        """Takes one row, the ``sent``-th; when it returns, a kill of this process must not lose
        the row."""
        ...

    def finish(self, status: str) -> None:
        """Closes the run: ``finished``, ``failed`` or ``stopped``."""
        ...


TRACKERS: Registry[type[Any]] = Registry("tracker", "reopold_agent.trackers", type)


def make_trackers(settings: Mapping[str, Any]) -> dict[str, Tracker]:
    """The trackers of a run by name.

    Args:
        settings: the section ``tracking``: each tracker's settings by its name.

    Raises:
        ConfigError: unknown settings, or a plugin that is no tracker.
        UnknownNameError: no such tracker; lists what exists and the closest match.
        MissingExtraError: its package is not installed.
    """
    made: dict[str, Tracker] = {}
    for name, values in settings.items():
        kind = TRACKERS.get(name)
        where = f"tracking.{name}"
        if values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"'{where}' must be a group of settings; tracking={name} makes it")
        try:
            tracker = build(kind, values or {}, f"{where}.")
        except TypeError as error:
            raise ConfigError(f"the tracker '{name}' is no dataclass: {error}") from error
        if not isinstance(tracker, Tracker):
            raise ConfigError(f"the tracker '{name}' lacks one of start, log and finish")
        made[name] = tracker
    return made


def require(package: str, module: str, tracker: str) -> None:
    """Checks that a package can be imported, without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(package, "track", f"tracking={tracker}")


def point_of(row: Mapping[str, Any]) -> Point:
    """The numbers of a row of ``metrics.jsonl``; text, null, lists and histograms stay there."""
    prefix = f"eval/{row['who']}/{row['sampling']}/" if row["kind"] == "eval" else ""
    values = {
        f"{prefix}{key}": float(value)
        for key, value in row.items()
        if key != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
    return Point(int(row["step"]), values)


def flat_settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A nested configuration by dotted key; null and lists as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": item for name, item in flat_settings(value).items()})
        else:
            flat[str(key)] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
