"""From a specification to tasks; checked as a whole before training starts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from reopold_agent.data.formats import PictureFolder, pixel_reasoner_task, verl_task
from reopold_agent.data.rows import download, find_row_files, read_rows
from reopold_agent.errors import ConfigError, DataError, UnknownNameError
from reopold_agent.types import Task, TaskSource

_log = logging.getLogger(__name__)


def load_tasks(spec: Mapping[str, Any]) -> TaskSource:
    """The tasks that a specification describes; equal specifications share one object.

    Args:
        spec: ``source`` and its settings:

            * ``demo``: ``split`` (train, eval), ``size``, ``seed``, ``video_share`` ... of
              `reopold_agent.demo.tasks.DemoTasks`;
            * ``pixel_reasoner``: ``path`` (local folder, row file, or hub id), ``split``;
            * ``verl``: ``path`` (parquet file or folder), ``split``;

            for the last two also ``revision`` (hub), ``limit`` (first rows only) and
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


def _pixel_reasoner(
    path: str,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    on_bad_row: str = "fail",
) -> TaskSource:
    root = _local(path, revision)
    pictures = PictureFolder(root if root.is_dir() else root.parent)
    return _read(
        root, split, limit, on_bad_row, lambda row, n: pixel_reasoner_task(row, n, pictures)
    )


def _verl(
    path: str,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    on_bad_row: str = "fail",
) -> TaskSource:
    root = _local(path, revision)
    folder = root if root.is_dir() else root.parent
    return _read(root, split, limit, on_bad_row, lambda row, n: verl_task(row, n, folder))


_SOURCES: dict[str, Callable[..., TaskSource]] = {
    "demo": _demo,
    "pixel_reasoner": _pixel_reasoner,
    "verl": _verl,
}


def _local(path: str, revision: str | None) -> Path:
    local = Path(path).expanduser()
    if local.exists():
        return local
    looks_like_hub = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if looks_like_hub and local.suffix not in (".parquet", ".json", ".jsonl"):
        return download(path, revision)
    raise DataError(f"the data path {local} does not exist")


def _read(
    root: Path,
    split: str | None,
    limit: int | None,
    on_bad_row: str,
    make: Callable[[Mapping[str, Any], int], Task],
) -> Sequence[Task]:
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row is 'fail' or 'skip', got '{on_bad_row}'")
    tasks: list[Task] = []
    bad: list[str] = []
    seen: dict[str, int] = {}
    for file in find_row_files(root, split):
        for number, row in enumerate(read_rows(file)):
            if limit is not None and len(tasks) >= limit:
                break
            try:
                task = make(row, number)
            except DataError as error:
                bad.append(f"{file.name}, row {number}: {error}")
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
