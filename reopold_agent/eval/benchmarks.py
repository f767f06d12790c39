"""Benchmarks: which rows, how they are played, how they are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reopold_agent.data import load_tasks
from reopold_agent.data.checks import BadRowsError, DataReport, RowError, checked_task
from reopold_agent.data.formats import PictureFolder
from reopold_agent.data.row_formats import COLUMNS, FORMATS
from reopold_agent.data.rows import download, find_row_files, read_rows
from reopold_agent.errors import ConfigError, DataError, UnknownNameError
from reopold_agent.types import Task, TaskSource

METRICS = ("accuracy", "anls", "rmse", "wemath", "hallusionbench")


EMBEDDED = ("demo", "arithmetic", "figures")
"""Formats without files: the package's own held-out tasks."""


@dataclass(frozen=True)
class Benchmark:
    """One entry of ``configs/benchmarks.yaml``.

    Attributes:
        name: as on the command line.
        suite: a name for several benchmarks.
        path: a local file or folder, or a hub id; None for the embedded one.
        folder: part of ``path`` that holds this benchmark, where several share a data set.
        split: which of the folder's files; None for all.
        format: a key of `reopold_agent.data.row_formats.FORMATS`, or one of `EMBEDDED`.
        play: ``agentic`` (tools, several turns) or ``single``.
        kind: how answers are graded where the row does not say; see `reopold_agent.judges`.
        metric: what is reported beside accuracy.
        samples: answers per question.
        limit: first rows only; None for all.
        revision: of a hub data set.
        pixels: size limits that replace the run's, or None.
        env_kwargs: settings of the environment that this benchmark needs.
    """

    name: str
    suite: str
    format: str
    play: str
    path: str | None = None
    folder: str | None = None
    split: str | None = None
    kind: str = "auto"
    metric: str = "accuracy"
    samples: int = 1
    limit: int | None = None
    revision: str | None = None
    pixels: Mapping[str, Any] | None = None
    env_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.format not in (*EMBEDDED, *FORMATS):
            raise UnknownNameError("benchmark format", self.format, [*EMBEDDED, *FORMATS])
        if self.metric not in METRICS:
            raise UnknownNameError("metric", self.metric, METRICS)
        if self.play not in ("agentic", "single"):
            raise ConfigError(f"benchmarks.{self.name}.play is 'agentic' or 'single'")
        if self.samples < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"benchmarks.{self.name}: samples and limit must be at least 1")


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its rows. ``files`` maps each row file to its SHA-256."""

    benchmark: Benchmark
    tasks: TaskSource
    files: Mapping[str, str]
    bad_rows: Sequence[str] = ()


def select(
    entries: Mapping[str, Mapping[str, Any]], names: Sequence[str], suite: str | None
) -> list[Benchmark]:
    """The benchmarks of the given names, or of a suite.

    Raises:
        UnknownNameError: lists what exists and the closest match.
    """
    known = {name: Benchmark(name=name, **dict(entry)) for name, entry in entries.items()}
    if suite is not None:
        chosen = [b for b in known.values() if b.suite == suite]
        if not chosen:
            raise UnknownNameError("suite", suite, {b.suite for b in known.values()})
        return chosen
    for name in names:
        if name not in known:
            raise UnknownNameError("benchmark", name, known)
    return [known[name] for name in names]


def load_benchmark(benchmark: Benchmark) -> LoadedBenchmark:
    """Reads a benchmark's rows; pictures are opened when they are needed.

    Raises:
        DataError: files are missing (says which, and where to get them) or no row is usable.
    """
    if benchmark.format in EMBEDDED:
        size = benchmark.limit or 256
        spec = {"source": benchmark.format, "split": "eval", "size": size}
        tasks = _Remembered(load_tasks(spec))
        return LoadedBenchmark(benchmark, tasks, {"embedded": "seed 0"})
    root = _root(benchmark)
    if benchmark.folder is not None and root.is_dir() and (root / benchmark.folder).exists():
        root = root / benchmark.folder
    folder = root if root.is_dir() else root.parent
    pictures = PictureFolder(folder)
    make = FORMATS[benchmark.format]
    rows: list[Task] = []
    report = DataReport(benchmark.format, str(root))
    files = find_row_files(root, benchmark.split)

    def bad_line(where: str, error: RowError) -> None:
        report.rows += 1
        report.add(where, error)

    def task_of(row: Mapping[str, Any], number: int) -> Task:
        return checked_task(
            lambda: make(row, number, folder, pictures),
            row,
            COLUMNS[benchmark.format],
            f"format '{benchmark.format}'",
        )

    for file in files:
        for number, row in enumerate(read_rows(file, bad_line=bad_line)):
            if benchmark.limit is not None and len(rows) >= benchmark.limit:
                break
            report.rows += 1
            try:
                rows.append(task_of(row, number))
            except DataError as error:
                report.add(f"{file.name}, row {number}", error)
    if report.problems:
        # A score over a part of the rows is not the benchmark's score.
        raise BadRowsError(
            f"benchmark {benchmark.name}: {report.rows - len(rows)} of {report.rows} rows of "
            f"{root} cannot be used:\n{report.table()}\n"
            f"Mend them, or set benchmarks.{benchmark.name}.limit.",
            report,
        )
    if not rows:
        raise DataError(f"benchmark {benchmark.name}: no rows in {root}")
    return LoadedBenchmark(benchmark, rows, {str(f): _sha256(f) for f in files})


class _Remembered:
    """Tasks that are made when asked for, kept for a while: an answer is asked for its task twice,
    and the samples of a question come close together."""

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
        return local
    hub = benchmark.path.count("/") == 1 and not local.suffix and benchmark.path[0] not in "./~"
    if hub:
        try:
            return download(benchmark.path, benchmark.revision)
        except DataError as error:
            raise DataError(
                f"benchmark {benchmark.name}: {error}".replace(
                    "data.train.path=data/mine (data.eval.path for the held-out rows)",
                    f"benchmarks.{benchmark.name}.path=data/mine",
                )
            ) from error
    raise DataError(
        f"benchmark {benchmark.name}: {local} does not exist. It is a file of "
        f"{_SOURCES.get(benchmark.suite, 'the benchmark')}; download it and set "
        f"benchmarks.{benchmark.name}.path"
    )


_SOURCES = {
    "math": "Qwen2.5-Math (github.com/QwenLM/Qwen2.5-Math, evaluation/data/<name>/test.jsonl)",
    "math_luffy": "LUFFY (github.com/ElliottYan/LUFFY, data/valid.parquet)",
}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
