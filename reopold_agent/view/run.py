"""Reads a run folder for the page, while the run may still be writing to it."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reopold_agent.errors import DataError
from reopold_agent.tracking.trajectories import row_head
from reopold_agent.view.lines import Follower, parse, read_at
from reopold_agent.view.summaries import evaluation_summary, train_summary

PAGE = 500
"""Rows per answer; the page asks again while there are more."""

PICTURE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}

_PICTURE = re.compile(r"pictures/[\w-][\w.-]*\.(?:png|jpe?g|webp)")
_FACTS = ("config.yaml", "versions.json", "summary.json", "results.json", ".hydra/overrides.yaml")


class Run:
    """A training run or an evaluation.

    Positions and summaries of the rows are kept in memory; a row itself is read when it is shown.
    Methods may be called from several threads.

    Args:
        folder: the run's folder.

    Attributes:
        folder: its absolute path.
        is_evaluation: whether rows are answers of an evaluation, not trajectories of a training.

    Raises:
        DataError: there is no such folder, or nothing in it is a run's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        if not self.folder.is_dir():
            raise DataError(
                f"there is no folder {folder}.\nGive the folder of a run: the one that training "
                "or evaluation printed at its end, or hydra.run.dir."
            )
        answers = self.folder / "responses.jsonl"
        self.is_evaluation = answers.exists() or (self.folder / "results.json").exists()
        names = ("metrics.jsonl", "trajectories.jsonl", "config.yaml", "summary.json")
        if not self.is_evaluation and not any((self.folder / name).exists() for name in names):
            raise DataError(
                f"{folder} is not a run's folder: it has neither metrics.jsonl nor "
                "responses.jsonl.\nGive the folder that training or evaluation printed at its end."
            )
        rows = answers if self.is_evaluation else self.folder / "trajectories.jsonl"
        self._rows = Follower(rows, head=None if self.is_evaluation else row_head)
        self._metrics = Follower(self.folder / "metrics.jsonl")
        self._replies: dict[str, Mapping[str, Any]] = {}
        self._judged_stamp = ""
        self._forget_rows()
        self._forget_points()
        self._lock = threading.Lock()

    def news(
        self, rows: int = 0, metrics: int = 0, generation: str = "", facts: str = ""
    ) -> dict[str, Any]:
        """Returns what is new to the page.

        Args:
            rows, metrics: how many the page has.
            generation: their generation; everything is sent again if it has changed.
            facts: stamp of the facts that the page has.

        Returns:
            ``generation``, ``start`` (how many of the page's rows and metrics are still valid),
            ``rows`` (summaries), ``metrics`` (flat rows), ``more`` (whether to ask again at once),
            ``bad`` (unreadable lines), ``facts_stamp`` and ``facts`` (null when unchanged).
        """
        with self._lock:
            more = self._advance()
            same = generation == self._generation()
            first, first_metrics = (max(0, rows), max(0, metrics)) if same else (0, 0)
            found = self._summaries[first : first + PAGE]
            points = self._points[first_metrics : first_metrics + 4 * PAGE]
            more |= first + len(found) < len(self._summaries)
            more |= first_metrics + len(points) < len(self._points)
            stamp = self._stamp(*_FACTS)
            return {
                "generation": self._generation(),
                "start": {"rows": first, "metrics": first_metrics},
                "rows": found,
                "metrics": points,
                "more": more,
                "bad": self.bad,
                "facts_stamp": stamp,
                "facts": None if stamp == facts else self.facts(),
            }

    def load_all(self) -> None:
        """Reads the files to their ends."""
        while True:
            with self._lock:
                if not self._advance():
                    return

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """Summaries of the rows read so far, in the file's order."""
        return self._summaries

    @property
    def bad(self) -> int:
        """Number of lines that cannot be read."""
        return self._rows.bad + self._metrics.bad

    @property
    def points(self) -> list[dict[str, Any]]:
        """The rows of metrics read so far, flat."""
        return self._points

    def record(self, number: int) -> dict[str, Any] | None:
        """Returns a complete row by its position in the list; None if it no longer exists.

        Raises:
            OSError: the file cannot be read.
        """
        with self._lock:
            if not 0 <= number < len(self._places):
                return None
            row = read_at(self._rows.path, *self._places[number])
            return None if row is None else self._judged(row)

    def picture(self, name: str) -> Path | None:
        """Returns a picture's path; None unless it is in the run's ``pictures`` folder."""
        if not _PICTURE.fullmatch(name):
            return None
        path = (self.folder / name).resolve()
        inside = path.is_relative_to(self.folder.resolve() / "pictures")
        return path if inside and path.is_file() else None

    def _advance(self) -> bool:
        self._read_judged()
        rows = self._rows.read(PAGE)
        points = self._metrics.read(4 * PAGE)
        if self._rows.generation != self._rows_of:
            self._forget_rows()
        if self._metrics.generation != self._points_of:
            self._forget_points()
        for line in rows:
            row = self._judged(line.row)
            summary = evaluation_summary(row) if self.is_evaluation else train_summary(row)
            self._seen[summary["key"]] = count = self._seen.get(summary["key"], 0) + 1
            if count > 1:  # a step may contain a task twice
                summary["key"] += f"/{count}"
            self._summaries.append({"n": len(self._summaries), **summary})
            self._places.append((line.offset, line.length))
        self._points += [_flat(line.row) for line in points]
        return bool(rows or points)

    def _forget_rows(self) -> None:
        self._rows_of = self._rows.generation
        self._summaries: list[dict[str, Any]] = []
        self._places: list[tuple[int, int]] = []
        self._seen: dict[str, int] = {}

    def _forget_points(self) -> None:
        self._points_of = self._metrics.generation
        self._points: list[dict[str, Any]] = []

    def _generation(self) -> str:
        return f"{self._rows.generation}.{self._metrics.generation}"

    def _read_judged(self) -> None:
        if not self.is_evaluation:
            return
        stamp = self._stamp("judged.jsonl")
        if stamp == self._judged_stamp:
            return
        self._judged_stamp = stamp
        self._replies = {}
        follower = Follower(self.folder / "judged.jsonl")
        while lines := follower.read():
            self._replies.update({str(line.row.get("key")): line.row for line in lines})
        if self._summaries:  # verdicts change rows that were read already, so read all again
            self._rows.restart()

    def _judged(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self._replies:
            return row
        # Imported here because it imports PyTorch, and most runs have no judge.
        from reopold_agent.evaluate.judging import merged_row, row_key

        try:
            return dict(merged_row(row, self._replies.get(row_key(row))))
        except KeyError:  # written by another version
            return row

    def _stamp(self, *names: str) -> str:
        parts = []
        for name in names:
            path = self.folder / name
            status = path.stat() if path.is_file() else None
            parts.append("-" if status is None else f"{status.st_mtime_ns}:{status.st_size}")
        return " ".join(parts)

    def facts(self) -> dict[str, Any]:
        """Returns configuration, versions and results, and what of these cannot be read."""
        problems: list[str] = []
        config = self._yaml("config.yaml", problems)
        return {
            "name": self.folder.name,
            "folder": str(self.folder),
            "evaluation": self.is_evaluation,
            "config": config if isinstance(config, dict) else {},
            "command": self._command(problems),
            "versions": self._json("versions.json", problems),
            "summary": self._json("summary.json", problems),
            "results": self._json("results.json", problems),
            "problems": problems,
        }

    def _command(self, problems: list[str]) -> str:
        """Reads the command from ``config.yaml`` (training) or Hydra's record (evaluation)."""
        words = self._yaml(".hydra/overrides.yaml", problems)
        if isinstance(words, list):
            module = "evaluate" if self.is_evaluation else "train"
            return shlex.join(["python", "-m", f"reopold_agent.{module}", *map(str, words)])
        text = self._text("config.yaml", problems)
        first = text.partition("\n")[0]
        return first[2:] if first.startswith("# python ") else ""

    def _text(self, name: str, problems: list[str]) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            _once(problems, f"{name} cannot be read: {error}")
            return ""

    def _yaml(self, name: str, problems: list[str]) -> Any:
        try:
            return yaml.safe_load(self._text(name, problems))
        except (yaml.YAMLError, RecursionError) as error:
            _once(problems, f"{name} is damaged: {str(error).splitlines()[0]}")
            return None

    def _json(self, name: str, problems: list[str]) -> dict[str, Any] | None:
        text = self._text(name, problems)
        value = parse(text.encode("utf-8", "surrogatepass")) if text else None
        if text and value is None:
            _once(problems, f"{name} is damaged: it is not a JSON object")
        return value


def _once(problems: list[str], problem: str) -> None:
    if problem not in problems:
        problems.append(problem)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a row of metrics for curves; tables become ``key.part``, histograms are dropped."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and not any(isinstance(v, list | dict) for v in value.values()):
            flat |= {f"{key}.{part}": number for part, number in value.items()}
        elif not isinstance(value, list | dict):
            flat[key] = value
    return flat
