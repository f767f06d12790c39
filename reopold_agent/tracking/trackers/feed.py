"""Sends a run's rows to its trackers, each on a thread of its own.

The queue is ``metrics.jsonl`` itself: a thread reads new rows, sends them, and saves its position
(``RUN/trackers.json``). So no step waits for a tracker, memory does not grow while one is
unreachable, missed rows are sent when it is back or when the run resumes, and engines whose trainer
is another process need nothing more. Kept by hand: no tracker's client sends each row exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from reopold_agent.common.files import dump_json, write_bytes_atomic
from reopold_agent.common.secrets import Redactor
from reopold_agent.errors import CheckpointError
from reopold_agent.tracking.trackers.base import (
    Point,
    TrackedRun,
    Tracker,
    flat_settings,
    make_trackers,
    point_of,
)

_log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Pause between checks for new rows."""

RETRY_SECONDS = (1.0, 5.0, 30.0, 120.0)
"""Pauses after failed calls; after one more failure in a row the tracker is given up."""

LAST_TRIES = 3
"""Failed calls in a row at the end of a run after which the remaining rows stay unsent."""

CLOSE_SECONDS = 30.0
"""Longest wait for all trackers at the end of a run."""

Rows = Callable[[bool], Sequence[Point]]
"""Returns the rows so far; the argument says whether the run has finished."""


class MetricsTail:
    """Rows of a ``metrics.jsonl`` that grows and may be truncated; thread-safe.

    There are no rows until the file changes: a run that resumes from a checkpoint first drops the
    rows that it will write again, and a refused run must not send anything. At the end of a run
    that was already complete there are all rows.

    Attributes:
        before: the rows at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _state(path)
        self._changed = False
        self._file = 0
        self._offset = 0
        self._points: list[Point] = []
        self._lock = threading.Lock()
        if self._seen is not None:
            self._read()
        self.before = tuple(self._points)

    def __call__(self, complete: bool) -> Sequence[Point]:
        """Returns the rows so far, oldest first."""
        with self._lock:
            state = _state(self._path)
            self._changed = self._changed or complete or state != self._seen
            if not self._changed or state is None:
                return []
            self._read()
            return tuple(self._points)

    def _read(self) -> None:
        with self._path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            if found.st_ino != self._file or found.st_size < self._offset:  # replaced, or cut
                self._file, self._offset, self._points = found.st_ino, 0, []
            stream.seek(self._offset)
            data = stream.read(found.st_size - self._offset)
        whole = data[: data.rfind(b"\n") + 1]  # the last line may still be being written
        self._offset += len(whole)
        self._points += [point_of(json.loads(line)) for line in whole.splitlines()]


class Trackers:
    """The trackers of a run; a context manager whose errors never reach the run.

    Args:
        trackers: the trackers by name.
        folder: the run folder.
        kind: ``train`` or ``evaluate``.
        config: the run's settings.
        rows: source of the rows.
        before: rows from before this process.

    Raises:
        CheckpointError: ``trackers.json`` is damaged.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        folder: Path,
        kind: str,
        config: Mapping[str, Any],
        rows: Rows,
        before: Sequence[Point] = (),
    ) -> None:
        self.rows, self._before = rows, before
        self._path = folder / "trackers.json"
        self._lock = threading.Lock()
        self._state = _load_state(self._path)
        settings = flat_settings(config)
        self._feeders = []
        for name, tracker in trackers.items():
            known = self._state.get(name, {})
            sent = int(known.get("rows", 0))
            run = TrackedRun(folder, kind, settings, known.get("id"), sent, (), 0)
            self._feeders.append(_Feeder(name, tracker, run, self))

    def begin_anew(self) -> None:
        """Lets the trackers begin new runs; call it before the run changes its rows."""
        self._before = ()
        for feeder in self._feeders:
            feeder.run = dataclasses.replace(feeder.run, id=None, sent=0)

    def __enter__(self) -> Self:
        for feeder in self._feeders:
            feeder.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            status = "finished"
        else:
            status = "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        for feeder in self._feeders:
            feeder.end(status)
        until = time.monotonic() + CLOSE_SECONDS
        for feeder in self._feeders:
            feeder.thread.join(max(0.0, until - time.monotonic()))
            for line in feeder.complaints():
                _log.warning(line)
                print(f"warning: {line}", file=sys.stderr)

    def kept(self, points: Sequence[Point]) -> int:
        """Returns the number of first points that are unchanged since before this process."""
        pairs = enumerate(zip(self._before, points, strict=False))
        shared = min(len(self._before), len(points))
        return next((at for at, (old, new) in pairs if old != new), shared)

    def remember(self, name: str, identity: str | None, sent: int) -> None:
        """Saves the position of a tracker."""
        with self._lock:
            self._state[name] = {"id": identity, "rows": sent}
            write_bytes_atomic(self._path, dump_json(self._state, indent=2) + b"\n", flush=False)


class _Feeder:
    """Thread of a tracker: starts it with the first row, sends, retries and gives up."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, owner: Trackers) -> None:
        self._name, self._tracker, self.run, self._owner = name, tracker, run, owner
        self._started = False
        self._id, self._sent, self._total = run.id, run.sent, 0
        self._in_a_row, self._failures = 0, 0
        self._reason = ""
        self._status = ""
        self._end = threading.Event()
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    def end(self, status: str) -> None:
        """Makes the thread send the rest and close the tracker."""
        self._status = status
        self._end.set()

    def complaints(self) -> list[str]:
        """Returns warnings for the end of the run."""
        missing = self._total - self._sent
        if self.thread.is_alive():
            reason = f"it did not answer within {CLOSE_SECONDS:g} s"
        elif missing > 0 or self._reason:
            reason = self._reason or "it was not tried again"
        else:
            if self._failures:
                _log.info("tracking=%s failed %d times, then took all", self._name, self._failures)
            return []
        what = f"{missing} of {self._total} rows were not sent" if missing > 0 else "not closed"
        return [
            f"tracking={self._name}: {what}; {self._failures} calls failed ({reason}).\n"
            "  metrics.jsonl has every row; run the same command again to send the rest."
        ]

    def _work(self) -> None:
        while not self._end.is_set():
            self._attempt(self._send)
            if self._in_a_row > len(RETRY_SECONDS):
                self._end.wait()  # given up
            elif self._in_a_row:
                self._end.wait(RETRY_SECONDS[self._in_a_row - 1])
            else:
                self._end.wait(LOOK_SECONDS)
        # Last attempts: one if the tracker was given up before, else a few in a short time.
        tries = 1 if self._in_a_row > len(RETRY_SECONDS) else LAST_TRIES
        self._in_a_row = 0
        while not self._attempt(self._send) and self._in_a_row < tries:
            time.sleep(RETRY_SECONDS[0])
        if self._started:
            self._attempt(lambda: self._tracker.finish(self._status))

    def _send(self) -> None:
        points = self._owner.rows(self._status == "finished")
        self._total = len(points)
        if not points:
            return
        if not self._started:
            kept = self._owner.kept(points)
            run = dataclasses.replace(self.run, points=points, kept=kept)
            begun = self._tracker.start(run)
            self._started, self._id = True, begun.id
            # An evaluation that was repeated has other values in its single row.
            self._sent = begun.sent if self.run.kind == "train" else 0
            self._owner.remember(self._name, self._id, self._sent)
        while self._sent < len(points):
            self._tracker.log(points[self._sent], self._sent + 1)
            self._sent += 1
            self._in_a_row = 0
            self._owner.remember(self._name, self._id, self._sent)

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:  # must not end the run
            self._failures += 1
            self._in_a_row += 1
            redact = Redactor(os.environ)
            self._reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])
            detail = "".join(traceback.format_exception(error)) if _debug() else self._reason
            _log.info("tracking=%s failed: %s", self._name, redact(detail))
            if self._failures == 1:
                _log.error("tracking=%s: %s; training continues", self._name, self._reason)
            if self._in_a_row == len(RETRY_SECONDS) + 1:
                _log.error("tracking=%s is given up until the end of the run", self._name)
            return False
        self._in_a_row, self._reason = 0, ""
        return True


def follow_run(settings: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Trackers:
    """Returns the trackers of a training run, fed from its ``metrics.jsonl``.

    Args:
        settings: the section ``tracking``.
        folder: the run folder; nothing is written there before the run writes a row itself.
        config: the run's settings as plain values.

    Raises:
        ReopoldError: as `make_trackers`, or ``trackers.json`` is damaged.
    """
    trackers = make_trackers(settings)
    if not trackers:
        return Trackers({}, folder, "train", config, lambda _: ())
    tail = MetricsTail(folder / "metrics.jsonl")
    return Trackers(trackers, folder, "train", config, tail, tail.before)


def send_results(
    settings: Mapping[str, Any],
    folder: Path,
    config: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """Sends the metrics of an evaluation as one row of step 0, and waits for it.

    A repeated evaluation is sent again, to the same run of the tracker.
    """
    point = Point(0, dict(figures))
    with Trackers(make_trackers(settings), folder, "evaluate", config, lambda _: (point,)):
        pass  # leaving the context sends and waits


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _load_state(path: Path) -> dict[str, dict[str, Any]]:
    try:
        state: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        return {str(name): dict(known) for name, known in state.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Delete it: trackers then begin a new run"
        ) from error


def _debug() -> bool:
    return os.environ.get("REOPOLD_DEBUG") == "1"
