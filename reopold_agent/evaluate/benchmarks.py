"""Benchmarks: where their rows are, and how they are rolled out and scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reopold_agent.config import build
from reopold_agent.data import load_tasks
from reopold_agent.data.archives import find_folder, folders_in, unzipped
from reopold_agent.data.checks import (
    NO_PICTURE,
    NO_QUESTION,
    BadRowsError,
    DataReport,
    RowError,
    checked_task,
)
from reopold_agent.data.hold_out import HELD_OUT_SHARE, check_part, in_part
from reopold_agent.data.loading import labelled_rows
from reopold_agent.data.pictures import PictureFolder, picture_columns, unread_columns
from reopold_agent.data.row_formats import COLUMNS, FORMATS
from reopold_agent.data.rows import data_folder, download, find_row_files, is_hub_id
from reopold_agent.errors import ConfigError, DataError, UnknownNameError
from reopold_agent.evaluate.words import how_to_add, shipped_benchmarks
from reopold_agent.judges import KINDS
from reopold_agent.types import Task, TaskSource

METRICS = ("accuracy", "anls", "rmse", "wemath", "hallusionbench")

EMBEDDED = ("demo", "arithmetic", "figures")
"""Formats without files: the package's own held-out tasks."""

_MOST_LEFT_OUT = 0.02
"""Share of rows that cannot be asked and may be left out: MATH-V has one of 3,040."""

OWN = "own"
"""Suite of the benchmarks that a user adds on the command line."""

_WITH_TOOLS = ("demo", "pixel_reasoner")
"""Formats whose questions are made for tools."""


@dataclass(frozen=True)
class Benchmark:
    """One entry of ``configs/benchmarks.yaml``.

    Attributes:
        name: value of ``benchmark=``.
        suite: name of the group of benchmarks that it belongs to; `OWN` by default.
        path: a local file, folder or zip archive, or a hub id; None for the embedded one.
        folder: part of ``path`` that holds this benchmark, where several share a data set; it may
            lie in a zip archive there.
        split: which of the folder's files, or several names, of which the first that is there
            counts, and null among them for the only file; None for all.
        where: values of columns, or lists of values, of which null stands for rows without the
            column; other rows are left to other benchmarks.
        collapse_repeats: whether rows that ask the same are one question.
        part: ``held_out`` for a fixed part of data without a test split, which training leaves
            out by the same rule (`reopold_agent.data.hold_out`); None for all rows.
        held_out_share: its share of the rows.
        format: a key of `reopold_agent.data.row_formats.FORMATS`, or one of `EMBEDDED`.
        play: ``agentic`` (tools, several turns) or ``single``; None means ``agentic`` for
            formats whose questions are made for tools.
        kind: how answers are graded where the row does not say; see `reopold_agent.judges`.
        metric: metric that is reported beside accuracy.
        samples: answers per question.
        limit: first rows only; None for all.
        revision: revision of a hub data set.
        pixels: size limits in place of the run's, or None.
        env_kwargs: settings of the environment that this benchmark needs.
        questions: how many questions the paper's benchmark has; None if unknown.
        note: what differs from the paper in any case.
    """

    name: str
    format: str
    suite: str = OWN
    play: str | None = None
    path: str | None = None
    folder: str | None = None
    split: str | list[Any] | None = None
    where: Mapping[str, Any] | None = None
    collapse_repeats: bool = False
    part: str | None = None
    held_out_share: float = HELD_OUT_SHARE
    kind: str = "auto"
    metric: str = "accuracy"
    samples: int = 1
    limit: int | None = None
    revision: str | None = None
    pixels: Mapping[str, Any] | None = None
    env_kwargs: Mapping[str, Any] | None = None
    questions: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.format not in (*EMBEDDED, *FORMATS):
            raise UnknownNameError("benchmark format", self.format, [*EMBEDDED, *FORMATS])
        if self.metric not in METRICS:
            raise UnknownNameError("metric", self.metric, METRICS)
        if self.play is None:
            play = "agentic" if self.format in _WITH_TOOLS else "single"
            object.__setattr__(self, "play", play)
        if self.play not in ("agentic", "single"):
            raise ConfigError(f"benchmarks.{self.name}.play is 'agentic' or 'single'")
        if self.kind not in KINDS:
            raise UnknownNameError("kind of answer", self.kind, KINDS)
        check_part(self.part, self.held_out_share)
        if self.samples < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"benchmarks.{self.name}: samples and limit must be at least 1")


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its rows.

    Attributes:
        benchmark: its settings.
        tasks: the questions that are asked.
        files: SHA-256 of each row file.
        left_out: the rows that cannot be asked, each as its file, number and reason.
        repeats: number of rows that repeat a question.
        blind: number of questions without a picture where others have one.
    """

    benchmark: Benchmark
    tasks: TaskSource
    files: Mapping[str, str]
    left_out: Sequence[str] = ()
    repeats: int = 0
    blind: int = 0


def select(
    entries: Mapping[str, Mapping[str, Any]], names: Sequence[str], suite: str | None
) -> list[Benchmark]:
    """Returns the benchmarks of a suite and those with the given names, each once.

    Without suite and names, the benchmarks that the user added are returned.

    Raises:
        ConfigError: a key of an entry is missing, unknown or of the wrong type.
        UnknownNameError: lists the known names and the closest match.
    """
    known = {name: _benchmark(name, entry) for name, entry in entries.items()}
    if suite is None and not names:
        shipped = shipped_benchmarks()
        chosen = [name for name in known if name not in shipped]
    else:
        chosen = [name for name, benchmark in known.items() if benchmark.suite == suite]
    if suite is not None and not chosen:
        raise UnknownNameError("suite", suite, {b.suite for b in known.values()})
    for name in names:
        if name not in known:
            raise UnknownNameError("benchmark", name, known)
    return [known[name] for name in dict.fromkeys([*chosen, *names])]


def _benchmark(name: str, entry: object) -> Benchmark:
    if not isinstance(entry, Mapping) or "format" not in entry:
        formats = ", ".join((*EMBEDDED, *FORMATS))
        raise ConfigError(
            f"the benchmark '{name}' has no format.\nGive one: {how_to_add(name)}. "
            f"Formats of rows: {formats}."
        )
    return build(Benchmark, {**entry, "name": name}, f"benchmarks.{name}.")


def load_benchmark(benchmark: Benchmark) -> LoadedBenchmark:
    """Reads a benchmark's rows; pictures are opened when they are needed.

    Raises:
        DataError: files are missing (names them and their source), or a row cannot be used.
    """
    if benchmark.format in EMBEDDED:
        size = benchmark.limit or 256
        spec = {"source": benchmark.format, "split": "eval", "size": size}
        tasks = _CachedTasks(load_tasks(spec))
        return LoadedBenchmark(benchmark, tasks, {"embedded": "seed 0"})
    root = _root(benchmark)
    folder = data_folder(root, benchmark.split)
    pictures = PictureFolder(folder)
    make = FORMATS[benchmark.format]
    rows: dict[object, Task] = {}
    repeats = 0
    report = DataReport(benchmark.format, str(root))
    try:
        files = find_row_files(root, benchmark.split)
    except DataError as error:
        raise DataError(
            f"benchmark {benchmark.name} ({benchmark.path}): {error}\n"
            f"Where its rows are is set by benchmarks.{benchmark.name}.path, folder and split."
        ) from error

    def task_of(row: Mapping[str, Any], number: int) -> Task:
        return checked_task(
            lambda: make(row, number, folder, pictures),
            row,
            COLUMNS[benchmark.format],
            f"format '{benchmark.format}'",
        )

    left_out: list[tuple[str, RowError]] = []
    filled: set[str] = set()
    for where, row in labelled_rows(files, report):
        if benchmark.limit is not None and len(rows) >= benchmark.limit:
            break
        if not (
            _is_where(row, benchmark.where or {})
            and in_part(row, benchmark.part, benchmark.held_out_share)
        ):
            continue
        report.rows += 1
        try:
            task = task_of(row, report.rows - 1)
        except DataError as error:
            if isinstance(error, RowError) and error.kind in (NO_QUESTION, NO_PICTURE):
                left_out.append((where, error))
            else:
                report.add(where, error)
            continue
        key = _asked(task) if benchmark.collapse_repeats else report.rows
        if key in rows:
            repeats += 1
        else:
            rows[key] = task
            report.check_references(where, task, benchmark.kind)
            columns = picture_columns(row)
            if task.images:
                filled |= {column for column, full in columns.items() if full}
            else:
                report.note_unread(unread_columns(row, by_name=True))
                if benchmark.metric != "hallusionbench":  # which asks many without a picture
                    report.note_blind(where, (name for name, full in columns.items() if not full))
    if len(left_out) > _MOST_LEFT_OUT * report.rows:
        for each in left_out:
            report.add(*each)
    report.blind = {name: found for name, found in report.blind.items() if name in filled}
    report.warn()
    if report.problems:
        # A score over only some of the rows would not be the benchmark's score.
        raise BadRowsError(
            f"benchmark {benchmark.name}: {report.rows - len(rows) - repeats} of {report.rows} "
            f"rows of {root} cannot be used:\n{report.table()}\n"
            f"Correct them. Is benchmarks.{benchmark.name}.format={benchmark.format} their format?",
            report,
        )
    if not rows:
        only = f" with {benchmark.where}" if benchmark.where else ""
        raise DataError(f"benchmark {benchmark.name}: no rows{only} in {root}")
    named = [f"{where}: {error}" for where, error in left_out]
    blind = max((problem.rows for problem in report.blind.values()), default=0)
    return LoadedBenchmark(benchmark, list(rows.values()), _hashes(files), named, repeats, blind)


def _is_where(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(
        row.get(name) in (value if isinstance(value, list) else [value])
        for name, value in where.items()
    )


def _asked(task: Task) -> tuple[object, ...]:
    return task.question, task.answers, task.images, task.metadata.get("system_message")


class _CachedTasks:
    """Tasks with a cache: each answer needs its task twice, and samples of a question are close."""

    def __init__(self, tasks: TaskSource) -> None:
        self._tasks = tasks
        self._get = lru_cache(maxsize=256)(tasks.__getitem__)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int, /) -> Task:
        return self._get(index)


def _root(benchmark: Benchmark) -> Path:
    if benchmark.path is None:
        raise ConfigError(f"set benchmarks.{benchmark.name}.path to a file, a folder or a hub id")
    local = Path(benchmark.path).expanduser()
    if local.exists():
        return _in_folder(local, benchmark)
    if is_hub_id(benchmark.path):
        try:
            return _in_folder(download(benchmark.path, benchmark.revision), benchmark)
        except DataError as error:
            raise DataError(
                f"benchmark {benchmark.name}: {error}".replace(
                    "data.train.path=data/mine (data.eval.path for the held-out rows)",
                    f"benchmarks.{benchmark.name}.path=data/mine",
                )
            ) from error
    raise DataError(
        f"benchmark {benchmark.name}: {local} does not exist.\n"
        + _SOURCES.get(local.name if local.suffix == ".parquet" else local.suffix, "")
        + f"Set benchmarks.{benchmark.name}.path to a file, a folder or a hub id."
    )


_SOURCES = {
    "valid.parquet": "Download LUFFY's (github.com/ElliottYan/LUFFY, data/valid.parquet) and set "
    "sources.luffy=FILE. ",
    ".zip": "NoisyRollout's is on the hub (xyliu6/noisyrollout_evaluation_data): set "
    "sources.noisyrollout=FILE. ",
    ".jsonl": "Qwen2.5-Math has such files (github.com/QwenLM/Qwen2.5-Math, evaluation/data). ",
}


def _in_folder(root: Path, benchmark: Benchmark) -> Path:
    """Returns the benchmark's own folder in a data set that several share; archives are unzipped.

    Raises:
        DataError: an archive cannot be unzipped, or does not hold the folder.
    """
    packed = root.is_file() and root.suffix == ".zip"
    if benchmark.folder is not None and (root.is_dir() or packed):
        found = find_folder(root, benchmark.folder)
        if found is not None:
            return found
        if packed:
            raise DataError(
                f"benchmark {benchmark.name}: {root} has no folder '{benchmark.folder}'.\n"
                f"Set benchmarks.{benchmark.name}.folder to one that it has "
                f"({', '.join(folders_in(root)[:8]) or 'none'}), or to null."
            )
    return unzipped(root) if packed else root


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """Returns the SHA-256 of each file, or one for all where each row has a folder of its own."""
    if len(files) > 1 and len({file.name for file in files}) == 1:
        digest = hashlib.sha256("".join(map(_sha256, files)).encode()).hexdigest()
        return {str(files[0].parents[1] / "*" / files[0].name): digest}
    return {str(file): _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
