"""From a specification to tasks; checked as a whole before training starts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from reopold_agent.data.formats import PictureFolder, pixel_reasoner_task, verl_task
from reopold_agent.data.row_formats import (
    RowMaker,
    geometry3k_intergps,
    math_jsonl,
    parquet_pictures,
)
from reopold_agent.data.rows import download, find_row_files, read_folders, read_rows
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

            for the last five also ``revision`` (hub), ``limit`` (first rows only) and
            ``on_bad_row``: ``fail`` (default) or ``skip``.

    Raises:
        ConfigError: an unknown source or setting.
        DataError: files are missing or rows are wrong; the message counts and names them.
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


def _rows(make: RowMaker, without: Collection[str] = ()) -> Callable[..., TaskSource]:
    """The source whose rows ``make`` turns into tasks."""

    def load(
        path: str,
        split: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
        on_bad_row: str = "fail",
    ) -> TaskSource:
        root = _local(path, revision)
        folder = root if root.is_dir() else root.parent
        if split is not None and any(root.glob(f"{split}/*/data.json")):
            folder = root / split
        pictures = PictureFolder(folder)
        return _read(
            _numbered(root, folder, split, without),
            root,
            limit,
            on_bad_row,
            lambda row, number: make(row, number, folder, pictures),
        )

    return load


def _pixel_reasoner(row: Row, number: int, root: Path, pictures: PictureFolder) -> Task:
    return pixel_reasoner_task(row, number, pictures)


def _verl(row: Row, number: int, root: Path, pictures: PictureFolder) -> Task:
    return verl_task(row, number, root)


_SOURCES: dict[str, Callable[..., TaskSource]] = {
    "demo": _demo,
    "arithmetic": _arithmetic,
    "figures": _figures,
    "pixel_reasoner": _rows(_pixel_reasoner),
    # LUFFY's columns with an expert's solutions: a gigabyte that nobody asks for here.
    "verl": _rows(_verl, without=("target", "target_lst", "target_ds_qwen_7b_probs")),
    "math_jsonl": _rows(math_jsonl),
    "geometry3k": _rows(parquet_pictures),
    "geometry3k_intergps": _rows(geometry3k_intergps),
}


def _local(path: str, revision: str | None) -> Path:
    local = Path(path).expanduser()
    if local.exists():
        return local
    looks_like_hub = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if looks_like_hub and local.suffix not in (".parquet", ".json", ".jsonl"):
        return download(path, revision)
    raise DataError(f"the data path {local} does not exist")


def _numbered(
    root: Path, folder: Path, split: str | None, without: Collection[str]
) -> Iterator[tuple[str, Row]]:
    """Rows with the words that name them in a message."""
    if folder.is_dir() and any(folder.glob("*/data.json")):
        yield from read_folders(folder)
        return
    for file in find_row_files(root, split):
        for number, row in enumerate(read_rows(file, without)):
            yield f"{file.name}, row {number}", row


def _read(
    rows: Iterator[tuple[str, Row]],
    root: Path,
    limit: int | None,
    on_bad_row: str,
    make: Callable[[Row, int], Task],
) -> Sequence[Task]:
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row is 'fail' or 'skip', got '{on_bad_row}'")
    tasks: list[Task] = []
    bad: list[str] = []
    seen: dict[str, int] = {}
    for number, (name, row) in enumerate(rows):
        if limit is not None and len(tasks) >= limit:
            break
        try:
            task = make(row, number)
        except DataError as error:
            bad.append(f"{name}: {error}")
            continue
        seen[task.id] = seen.get(task.id, 0) + 1
        tasks.append(task)
    repeated = [name for name, count in seen.items() if count > 1]
    if repeated:
        _log.warning("%d ids occur more than once in %s, e.g. %s", len(repeated), root, repeated[0])
    if bad:
        shown = "\n  ".join(bad[:5])
        report = f"{len(bad)} of {len(bad) + len(tasks)} rows of {root} cannot be used:\n  {shown}"
        if on_bad_row == "fail":
            raise DataError(f"{report}\nMend them, or leave them out with on_bad_row=skip.")
        _log.warning("%s", report)
    if not tasks:
        raise DataError(f"no usable rows in {root}")
    return tasks
