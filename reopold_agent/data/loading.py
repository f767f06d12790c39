"""From a specification to tasks; checked as a whole before training starts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from reopold_agent.config import DataChecks, build
from reopold_agent.data.checks import (
    DUPLICATE,
    BadRowsError,
    CheckedTasks,
    Columns,
    DataReport,
    RowError,
    check_pictures,
    checked_task,
)
from reopold_agent.data.formats import PictureFolder, pixel_reasoner_task, verl_task
from reopold_agent.data.row_formats import (
    COLUMNS,
    RowMaker,
    geometry3k_intergps,
    math_jsonl,
    parquet_pictures,
)
from reopold_agent.data.rows import download, find_row_files, read_folders, read_rows
from reopold_agent.data.urls import UrlRules
from reopold_agent.errors import ConfigError, DataError, UnknownNameError
from reopold_agent.types import Task, TaskSource

Row: TypeAlias = "Mapping[str, Any]"

_log = logging.getLogger(__name__)


def load_tasks(spec: Mapping[str, Any]) -> TaskSource:
    """The tasks that a specification describes; equal specifications share one object.

    Args:
        spec: ``source`` and its settings:

            * ``demo``: ``split`` (train, eval), ``size``, ``seed``, ``video_share`` ... of
              `reopold_agent.demo.tasks.DemoTasks`;
            * ``arithmetic``: ``split``, ``size``, ``seed``, ``operations`` of
              `reopold_agent.demo.arithmetic.tasks.ArithmeticTasks`;
            * ``figures``: ``split``, ``size``, ``seed``, ``kind`` of
              `reopold_agent.demo.figures.tasks.FigureTasks`;
            * ``pixel_reasoner``: ``path`` (local folder, row file, or hub id), ``split``;
            * ``verl``: ``path`` (parquet file or folder, or hub id), ``split``; LUFFY's
              Openr1-Math-46k-8192 too, whose expert's solutions (``target``) are not read;
            * ``math_jsonl``: Qwen2.5-Math's files (problem or question; answer, final_answer, or
              the box of a solution);
            * ``geometry3k``: hiyouga's and xyliu6's parquet files with pictures, whose choices
              have become free-form answers (NoisyRollout);
            * ``geometry3k_intergps``: the original, as a folder per problem; the chosen option
              becomes the answer likewise;

            for the last five also ``revision`` (hub), ``limit`` (first rows only),
            ``on_bad_row``: ``fail`` (default) or ``skip``, and ``checks``: settings of
            `reopold_agent.config.DataChecks`.

    Returns:
        The tasks; those from files are `reopold_agent.data.checks.CheckedTasks`, which hold the
        report of their rows.

    Raises:
        ConfigError: an unknown source or setting.
        DataError: files are missing, or rows are wrong (`BadRowsError`); the message counts and
            names them.
    """
    return _load(json.dumps(dict(spec), sort_keys=True, default=os.fspath))


@lru_cache(maxsize=16)
def _load(key: str) -> TaskSource:
    spec: dict[str, Any] = json.loads(key)
    source = spec.pop("source", None)
    if source is None:
        raise ConfigError("a data specification needs 'source'")
    if source not in _SOURCES:
        raise UnknownNameError("data source", str(source), _SOURCES)
    if source in EMBEDDED:
        spec.pop("checks", None)  # they are about files
    try:
        return _SOURCES[source](**spec)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ConfigError(f"data source '{source}': {error}") from error


def _demo(**settings: Any) -> TaskSource:
    from reopold_agent.demo.tasks import DemoTasks

    try:
        return DemoTasks(**settings)
    except ValueError as error:
        raise ConfigError(f"data source 'demo': {error}") from error


def _arithmetic(**settings: Any) -> TaskSource:
    from reopold_agent.demo.arithmetic.tasks import OPERATIONS, ArithmeticTasks

    operations = tuple(settings.pop("operations", OPERATIONS))
    try:
        return ArithmeticTasks(operations=operations, **settings)
    except ValueError as error:
        raise ConfigError(f"data source 'arithmetic': {error}") from error


def _figures(**settings: Any) -> TaskSource:
    from reopold_agent.demo.figures.tasks import FigureTasks

    try:
        return FigureTasks(**settings)
    except ValueError as error:
        raise ConfigError(f"data source 'figures': {error}") from error


def _rows(
    name: str, make: RowMaker, columns: Columns, without: Collection[str] = ()
) -> Callable[..., TaskSource]:
    """The source whose rows, which must have ``columns``, ``make`` turns into tasks."""

    def load(
        path: str,
        split: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
        on_bad_row: str = "fail",
        checks: Mapping[str, Any] | None = None,
    ) -> TaskSource:
        if on_bad_row not in ("fail", "skip"):
            raise ConfigError(f"on_bad_row is 'fail' or 'skip', got '{on_bad_row}'")
        chosen = build(DataChecks, checks or {}, "data.checks.")
        root = _local(path, revision)
        folder = root if root.is_dir() else root.parent
        if split is not None and any(root.glob(f"{split}/*/data.json")):
            folder = root / split
        pictures = PictureFolder(folder, _url_rules(chosen))
        report = DataReport(name, str(root))

        def task_of(row: Row, number: int) -> Task:
            return checked_task(
                lambda: make(row, number, folder, pictures), row, columns, f"source '{name}'"
            )

        rows = _numbered(root, folder, split, without, report)
        tasks = _read(rows, task_of, limit, chosen, report)
        _judge(report, on_bad_row, chosen)
        return CheckedTasks(tasks, report)

    return load


def _pixel_reasoner(row: Row, number: int, root: Path, pictures: PictureFolder) -> Task:
    return pixel_reasoner_task(row, number, pictures)


def _verl(row: Row, number: int, root: Path, pictures: PictureFolder) -> Task:
    return verl_task(row, number, pictures)


EMBEDDED = ("demo", "arithmetic", "figures")
"""Sources without files."""

_SOURCES: dict[str, Callable[..., TaskSource]] = {
    "demo": _demo,
    "arithmetic": _arithmetic,
    "figures": _figures,
    "pixel_reasoner": _rows("pixel_reasoner", _pixel_reasoner, COLUMNS["pixel_reasoner"]),
    "verl": _rows(
        "verl",
        _verl,
        COLUMNS["verl"],
        # LUFFY's columns with an expert's solutions: a gigabyte that nobody asks for here.
        without=("target", "target_lst", "target_ds_qwen_7b_probs"),
    ),
    "math_jsonl": _rows("math_jsonl", math_jsonl, COLUMNS["math_jsonl"]),
    "geometry3k": _rows("geometry3k", parquet_pictures, COLUMNS["parquet_pictures"]),
    "geometry3k_intergps": _rows(
        "geometry3k_intergps", geometry3k_intergps, COLUMNS["geometry3k_intergps"]
    ),
}


def _local(path: str, revision: str | None) -> Path:
    local = Path(path).expanduser()
    if local.exists():
        return local
    looks_like_hub = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if looks_like_hub and local.suffix not in (".parquet", ".json", ".jsonl"):
        return download(path, revision)
    raise DataError(f"the data path {local} does not exist")


def _url_rules(checks: DataChecks) -> UrlRules | None:
    if not checks.allow_urls:
        return None
    return UrlRules(checks.url_max_bytes, checks.url_seconds, checks.allow_private_urls)


def _numbered(
    root: Path, folder: Path, split: str | None, without: Collection[str], report: DataReport
) -> Iterator[tuple[str, Row]]:
    """Rows with the words that name them in a message; lines that are none go to the report."""

    def bad_line(where: str, error: RowError) -> None:
        report.rows += 1
        report.add(where, error)

    if folder.is_dir() and any(folder.glob("*/data.json")):
        yield from read_folders(folder)
        return
    for file in find_row_files(root, split):
        for number, row in enumerate(read_rows(file, without, bad_line=bad_line)):
            yield f"{file.name}, row {number}", row


def _read(
    rows: Iterator[tuple[str, Row]],
    make: Callable[[Row, int], Task],
    limit: int | None,
    checks: DataChecks,
    report: DataReport,
) -> list[Task]:
    """The rows that can be used, as tasks; the report takes the others."""
    found: list[tuple[str, Task]] = []
    first: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        if limit is not None and len(found) >= limit:
            break
        report.rows += 1
        try:
            task = make(row, number)
        except DataError as error:
            report.add(where, error)
            continue
        if task.id in first:
            report.add(where, RowError(DUPLICATE, f"the id '{task.id[:80]}' of {first[task.id]}"))
            if checks.duplicates != "keep":
                continue
        first.setdefault(task.id, where)
        found.append((where, task))
    bad = set[int]()
    if checks.pictures != "none":
        bad |= set(check_pictures(found, checks.pictures, report))
    tasks = [task for position, (_, task) in enumerate(found) if position not in bad]
    report.usable = len(tasks)
    return tasks


def _judge(report: DataReport, on_bad_row: str, checks: DataChecks) -> None:
    """Says what was found: in the log, or as an error where the settings ask for one.

    Raises:
        BadRowsError: likewise, or no row is left.
    """
    if not report.problems:
        if not report.usable:
            raise BadRowsError(f"no usable rows in {report.path}: it is empty", report)
        return
    lost = report.rows - report.usable
    told = f"{lost} of {report.rows} rows of {report.path} cannot be used"
    if DUPLICATE in report.problems and checks.duplicates == "keep":
        told += f"; {report.problems[DUPLICATE].rows} repeat an id and are kept"
    told += f":\n{report.table()}"
    advice = []
    if on_bad_row == "fail" and set(report.problems) - {DUPLICATE}:
        advice.append("leave them out with on_bad_row=skip")
    if checks.duplicates == "fail" and DUPLICATE in report.problems:
        advice.append("let ids repeat with data.checks.duplicates=keep")
    if advice:
        raise BadRowsError(f"{told}\nMend them, or {', or '.join(advice)}.", report)
    if not report.usable:
        raise BadRowsError(f"no usable rows in {report.path}; {told}", report)
    _log.warning("%s", told)
