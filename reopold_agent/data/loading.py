"""Loading the tasks that a specification describes; all rows are checked before training starts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
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
from reopold_agent.data.formats import (
    choice_task,
    pixel_reasoner_task,
    solution_of,
    teacher_of,
    verl_task,
)
from reopold_agent.data.hold_out import (
    HELD_OUT_SHARE,
    check_part,
    in_part,
    position,
    share_between,
)
from reopold_agent.data.pictures import PictureFolder, unread_columns
from reopold_agent.data.row_formats import (
    COLUMNS,
    RowMaker,
    geometry3k_intergps,
    math_jsonl,
    parquet_pictures,
    vlmevalkit,
)
from reopold_agent.data.rows import (
    data_folder,
    find_row_files,
    local_or_downloaded,
    read_rows,
    row_label,
)
from reopold_agent.data.urls import url_rules
from reopold_agent.errors import ConfigError, DataError, UnknownNameError
from reopold_agent.types import Task, TaskSource

Row: TypeAlias = "Mapping[str, Any]"

_log = logging.getLogger(__name__)


def load_tasks(spec: Mapping[str, Any]) -> TaskSource:
    """Loads the tasks that a specification describes; equal specifications share one object.

    Args:
        spec: ``source`` and its settings:

            * ``demo``: ``split`` (train, eval), ``size``, ``seed``, ``video_share`` ... of
              `reopold_agent.demo.tasks.DemoTasks`;
            * ``arithmetic``: ``split``, ``size``, ``seed``, ``operations`` of
              `reopold_agent.demo.arithmetic.tasks.ArithmeticTasks`;
            * ``figures``: ``split``, ``size``, ``seed``, ``kind`` of
              `reopold_agent.demo.figures.tasks.FigureTasks`;
            * ``pixel_reasoner``: ``path`` (local folder, row file, or hub id), ``split``;
            * ``verl``: ``path`` (parquet file or folder, or hub id), ``split``; also reads LUFFY's
              Openr1-Math-46k-8192, without the expert's solutions (``target``);
            * ``math_jsonl``: Qwen2.5-Math's files (problem or question; answer, final_answer, or
              the box of a solution);
            * ``geometry3k``: hiyouga's and xyliu6's parquet files with pictures, whose choices
              were turned into free-form answers (NoisyRollout);
            * ``geometry3k_intergps``: the original with one folder per problem; the text of the
              right option becomes the answer;
            * ``vlmevalkit``: VLMEvalKit's tsv files, with pictures in base64 and options in the
              columns A, B and so on;

            those from files also take ``revision`` (hub), ``limit`` (first rows only),
            ``on_bad_row``: ``fail`` (default) or ``skip``, ``checks``: settings of
            `reopold_agent.config.DataChecks`, and ``part``: ``train`` or ``held_out`` of data
            without a test split, with ``held_out_share`` (`reopold_agent.data.hold_out`), and
            ``solution``: a column with reference solutions, which become the tasks' metadata
            ``solution`` (``model.teacher.view.hint=solution``), and ``teacher``: a column that
            names the task's teacher, which becomes metadata of that name (``model.teacher_key``).

    Returns:
        The tasks. Those from files are `reopold_agent.data.checks.CheckedTasks`, with a report on
        their rows.

    Raises:
        ConfigError: the source or a setting is unknown.
        DataError: files are missing, or rows cannot be used (`BadRowsError`); the message counts
            and names them.
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
        for name in ("checks", "teacher"):  # embedded tasks have neither files nor columns
            spec.pop(name, None)
    try:
        return _SOURCES[source](**spec)
    except (TypeError, ValueError) as error:
        unknown_name = isinstance(error, TypeError) and "argument" in str(error)
        wrong_value = isinstance(error, ValueError) and source in EMBEDDED
        if not (unknown_name or wrong_value):
            raise
        raise ConfigError(f"data source '{source}': {error}") from error


# Imported when used: the embedded tasks need pictures or Pillow's fonts.
def _demo(**settings: Any) -> TaskSource:
    from reopold_agent.demo.tasks import DemoTasks

    return DemoTasks(**settings)


def _arithmetic(**settings: Any) -> TaskSource:
    from reopold_agent.demo.arithmetic.tasks import OPERATIONS, ArithmeticTasks

    return ArithmeticTasks(operations=tuple(settings.pop("operations", OPERATIONS)), **settings)


def _figures(**settings: Any) -> TaskSource:
    from reopold_agent.demo.figures.tasks import FigureTasks

    return FigureTasks(**settings)


def _rows(
    name: str, make: RowMaker, columns: Columns, without: Collection[str] = ()
) -> Callable[..., TaskSource]:
    """Returns the loader of a source whose rows have ``columns`` and become tasks by ``make``."""

    def load(
        path: str,
        split: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
        on_bad_row: str = "fail",
        checks: Mapping[str, Any] | None = None,
        part: str | None = None,
        held_out_share: float = HELD_OUT_SHARE,
        solution: str | None = None,
        teacher: str | None = None,
    ) -> TaskSource:
        if on_bad_row not in ("fail", "skip"):
            raise ConfigError(f"on_bad_row must be 'fail' or 'skip', got '{on_bad_row}'")
        check_part(part, held_out_share)
        chosen = build(DataChecks, checks or {}, "data.checks.")
        root = local_or_downloaded(path, revision)
        folder = data_folder(root, split)
        pictures = PictureFolder(folder, url_rules(chosen))
        report = DataReport(name, str(root))

        def task_of(row: Row, number: int) -> Task:
            task = checked_task(
                lambda: make(row, number, folder, pictures), row, columns, f"source '{name}'"
            )
            more: dict[str, str | None] = {}
            if solution is not None:
                more["solution"] = solution_of(row, solution)
            if teacher is not None:
                more[teacher] = teacher_of(row, teacher)
            return replace(task, metadata={**task.metadata, **more}) if more else task

        unread = [column for column in without if column not in (solution, teacher)]
        files = find_row_files(root, split)
        rows = labelled_rows(files, report, unread)
        others = 0

        def wanted(labelled: tuple[str, Row]) -> bool:
            nonlocal others
            inside = in_part(labelled[1], part, held_out_share)
            others += not inside
            return inside

        tasks = _read_tasks(filter(wanted, rows), task_of, limit, chosen, report)
        if others and not report.rows:
            again = labelled_rows(files, DataReport(name, str(root)), unread)
            share = share_between({position(row) for _, row in again})
            why, advice = "they all have the same first picture or, without one, question", "Give"
            if share is not None:
                why = f"held_out_share={held_out_share}, by a hash of each row"
                shares = (f"++data.{each}.held_out_share={share}" for each in ("train", "eval"))
                advice = f"Use a larger file, another share ({' '.join(shares)}), or give"
            raise BadRowsError(
                f"no usable rows in {root}: none of its {others} rows falls into part={part} "
                f"({why}).\n{advice} data.eval a file of its own, with part=null.",
                report,
            )
        _check_report(report, on_bad_row, chosen)
        return CheckedTasks(tasks, report)

    return load


def _pixel_reasoner(row: Row, number: int, root: Path, pictures: PictureFolder) -> Task:
    return pixel_reasoner_task(row, number, pictures)


def _verl(row: Row, number: int, root: Path, pictures: PictureFolder) -> Task:
    return choice_task(verl_task(row, number, pictures), row)


EMBEDDED = ("demo", "arithmetic", "figures")
"""Sources without files."""

DEFAULT_DATA: Mapping[str, Mapping[str, Any]] = {
    split: {"source": "demo", "split": split} for split in ("train", "eval")
}
"""Specifications for an environment that is given no data."""

_TOOL_OPTIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "demo": {
        # Padded, a cell would take in its neighbours. Sizes are as when the models were trained.
        "crop_image": {"padding": 0.0, "sizes": "original"},
        "select_frames": {"sizes": "original"},
    },
}


def suitable_tool_options(specs: Iterable[object]) -> Mapping[str, Mapping[str, Any]]:
    """Returns the settings of tools that suit the tasks of some specifications.

    Args:
        specs: of the splits of one environment. They must name one source; other values, such as
            tasks that are loaded already, suit the tools' own defaults.
    """
    given = [spec for spec in specs if spec is not None]  # an evaluation has no training tasks
    sources = {spec.get("source") if isinstance(spec, Mapping) else None for spec in given}
    return _TOOL_OPTIONS.get(str(sources.pop()), {}) if len(sources) == 1 else {}


_SOURCES: dict[str, Callable[..., TaskSource]] = {
    "demo": _demo,
    "arithmetic": _arithmetic,
    "figures": _figures,
    "pixel_reasoner": _rows("pixel_reasoner", _pixel_reasoner, COLUMNS["pixel_reasoner"]),
    "verl": _rows(
        "verl",
        _verl,
        COLUMNS["verl"],
        # LUFFY's columns with an expert's solutions: a gigabyte that is not used here.
        without=("target", "target_lst", "target_ds_qwen_7b_probs"),
    ),
    "math_jsonl": _rows("math_jsonl", math_jsonl, COLUMNS["math_jsonl"]),
    "geometry3k": _rows("geometry3k", parquet_pictures, COLUMNS["parquet_pictures"]),
    "geometry3k_intergps": _rows(
        "geometry3k_intergps", geometry3k_intergps, COLUMNS["geometry3k_intergps"]
    ),
    "vlmevalkit": _rows("vlmevalkit", vlmevalkit, COLUMNS["vlmevalkit"]),
}


def labelled_rows(
    files: Iterable[Path], report: DataReport, without: Collection[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Yields the rows of files with their labels for messages.

    Args:
        files: as from `find_row_files`.
        report: gets the lines that are no rows.
        without: columns of parquet files that are not read.

    Raises:
        DataError: a file cannot be read.
    """

    def bad_line(where: str, error: RowError) -> None:
        report.rows += 1
        report.add(where, error)

    for file in files:
        for number, row in enumerate(read_rows(file, without, bad_line=bad_line)):
            yield row_label(file, number), row


def _read_tasks(
    rows: Iterator[tuple[str, Row]],
    make: Callable[[Row, int], Task],
    limit: int | None,
    checks: DataChecks,
    report: DataReport,
) -> list[Task]:
    """Returns the tasks of all usable rows; the others are reported."""
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
        report.check_references(where, task)
        report.note_unread(unread_columns(row, by_name=not task.images))
    bad = set[int]()
    if checks.pictures != "none":
        bad |= set(check_pictures(found, checks.pictures, report))
    tasks = [task for position, (_, task) in enumerate(found) if position not in bad]
    report.usable = len(tasks)
    return tasks


def _check_report(report: DataReport, on_bad_row: str, checks: DataChecks) -> None:
    """Logs the problems of the rows, or raises them if the settings say so.

    Raises:
        BadRowsError: no row is usable, or the settings do not allow one of the problems.
    """
    report.warn()
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
        raise BadRowsError(f"{told}\nCorrect them, or {', or '.join(advice)}.", report)
    if not report.usable:
        raise BadRowsError(f"no usable rows in {report.path}; {told}", report)
    _log.warning("%s", told)
