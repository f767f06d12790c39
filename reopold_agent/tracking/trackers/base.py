"""The interface of trackers, and their registry."""

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
"""Name of an additional metric: the number of rows sent, for trackers that can return the last
value of a metric. It is sent with the row, so that a kill cannot separate the two."""


@dataclass(frozen=True)
class Point:
    """The numbers of one row of ``metrics.jsonl``.

    Attributes:
        step: step of the row. Both kinds of rows describe the student after that many updates:
            the episodes of training step 7 (from 0) are those of a student with 7 updates.
        values: numbers by name, as in ``metrics.jsonl``; those of an evaluation have a prefix:
            ``eval/student/greedy/success``.
    """

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker starts with.

    Attributes:
        folder: the run folder.
        kind: ``train`` or ``evaluate``.
        config: the run's settings by dotted key (see `flat_settings`).
        id: the tracker's id of this run, if the tracker has been started for it before.
        sent: number of rows that it acknowledged before.
        points: rows of the run so far, in order; steps never decrease.
        kept: number of first rows that are unchanged since before this process; a run that
            resumes from a checkpoint makes the later ones again, with other values.
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
    """State of a tracker after its start.

    Attributes:
        id: the tracker's id of the run, saved for when the run resumes.
        sent: number of rows that the tracker has; the later ones are sent.
    """

    id: str | None
    sent: int


@runtime_checkable
class Tracker(Protocol):
    """A destination of a run's metrics besides its folder.

    A tracker is a dataclass whose fields are the settings ``tracking.NAME.*``; other packages
    register theirs through the entry-point group ``reopold_agent.trackers``. The three methods are
    called on one thread, in this order. Each may block and may raise: a call that raised is
    repeated a few times, while training continues.
    """

    def start(self, run: TrackedRun) -> Started:
        """Opens a new run, or resumes the one with ``run.id``."""
        ...

    def log(self, point: Point, sent: int) -> None:
        """Sends the ``sent``-th row, which must survive a kill of this process afterwards."""
        ...

    def finish(self, status: str) -> None:
        """Closes the run: ``finished``, ``failed`` or ``stopped``."""
        ...


TRACKERS: Registry[type[Any]] = Registry("tracker", "reopold_agent.trackers", type)


def make_trackers(settings: Mapping[str, Any]) -> dict[str, Tracker]:
    """Makes the trackers of a run, by name.

    Args:
        settings: the section ``tracking``: settings of each tracker by name.

    Raises:
        ConfigError: unknown settings, or a plugin that is not a tracker.
        UnknownNameError: no tracker has that name; the message lists the known ones.
        MissingExtraError: the tracker's package is not installed.
    """
    made: dict[str, Tracker] = {}
    for name, values in settings.items():
        kind = TRACKERS.get(name)
        where = f"tracking.{name}"
        if values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"'{where}' must be a group of settings; use tracking={name}")
        try:
            tracker = build(kind, values or {}, f"{where}.")
        except TypeError as error:
            raise ConfigError(f"the tracker '{name}' is not a dataclass: {error}") from error
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
    """Returns the numbers of a row of ``metrics.jsonl``, without text, nulls and lists."""
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
    """Flattens a nested configuration to dotted keys; null and lists become text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": item for name, item in flat_settings(value).items()})
        else:
            flat[str(key)] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
