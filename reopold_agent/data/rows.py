"""Rows from files: parquet, json and jsonl, or the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from reopold_agent.data.checks import RowError
from reopold_agent.errors import DataError, MissingExtraError

_SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv")

MAX_LINE_BYTES = 100_000_000
"""A longer line of a jsonl file, or field of a tsv file, is refused: it would fill the memory."""


def find_row_files(path: Path, split: str | None) -> list[Path]:
    """The row files of a path: itself, or those in the folder (and its ``data`` folder).

    In a folder, files whose name contains the split's are preferred; without such files all are
    taken if their names mention no split at all.

    Raises:
        DataError: there are none.
    """
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{path} is not one of {', '.join(_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise DataError(f"the data path {path} does not exist")
    files = sorted(
        file
        for folder in (path, path / "data")
        if folder.is_dir()
        for file in folder.iterdir()
        if file.suffix in _SUFFIXES and file.is_file()
    )
    if split is not None:
        named = [file for file in files if split in file.stem.split("-")[0].split("_")]
        if named:
            return named
        others = ("train", "test", "validation", "valid", "val", "dev", "eval")
        if any(o in file.stem.split("-")[0].split("_") for file in files for o in others):
            raise DataError(
                f"no file for the split '{split}' in {path}; there are "
                + ", ".join(file.name for file in files)
            )
    if not files:
        raise DataError(f"no rows in {path}: expected *.parquet, *.jsonl or *.json there")
    return files


def read_rows(
    file: Path,
    without: Collection[str] = (),
    *,
    bad_line: Callable[[str, RowError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of one file, in order.

    Args:
        file: parquet, json, jsonl or tsv.
        without: columns of a parquet file that are not read at all.
        bad_line: called with "NAME, line N" and the error for a line of a jsonl file that is no
            object, which is then left out; None raises instead.

    Raises:
        DataError: names file and line.
    """
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, without)
    elif file.suffix == ".tsv":
        yield from _tsv_rows(file)
    elif file.suffix == ".jsonl":
        # Bytes, so that a wrong encoding is named by its line.
        with file.open("rb") as handle:
            for number, line in _lines(handle):
                try:
                    row = _row(line)
                except RowError as error:
                    if bad_line is None:
                        raise DataError(f"{file}, line {number}: {error}") from error
                    bad_line(f"{file.name}, line {number}", error)
                    continue
                yield row
    else:
        yield from _json_rows(file)


def _parquet_rows(file: Path, without: Collection[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    read = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name not in without]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            rows = batch.to_pylist()
            yield from rows
            read += len(rows)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        where = f" after row {read - 1}" if read else ""
        raise DataError(f"cannot read {file}{where}: {error}") from error


def _tsv_rows(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # pictures in base64 are longer than csv's own limit
    read = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            for row in csv.DictReader(handle, delimiter="\t"):
                # Fields more or fewer than the head's come with the key or the value None.
                yield {key: value for key, value in row.items() if key and value is not None}
                read += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file} at row {read}: {error}") from error


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of lines that are not blank; one that is too long comes cut."""
    number = 0
    while line := handle.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = handle.readline(MAX_LINE_BYTES + 1)
        if line.strip():
            yield number, line


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} must hold a list of objects")
    yield from rows


def _row(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise RowError("unreadable line", f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError("unreadable line", str(error)) from error
    if not isinstance(row, dict):
        raise RowError("unreadable line", f"expected an object, got {type(row).__name__}")
    return row


def download(repository: str, revision: str | None) -> Path:
    """A dataset of the hub as a local folder (cached by huggingface_hub).

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        DataError: it cannot be downloaded; says how to use a local copy.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", f"the dataset '{repository}'") from error
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's client raises many kinds, all meaning "not had"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise DataError(
            f"the dataset '{repository}' is neither a folder here nor could it be downloaded "
            f"({type(error).__name__}: {reason}).\nDownload it where there is a network:\n"
            f"  hf download {repository} --repo-type dataset --local-dir data/mine\n"
            "and set data.train.path=data/mine (data.eval.path for the held-out rows)"
        ) from error


def read_folders(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of folders that hold one ``data.json`` each (InterGPS), by name; in order of number.

    Raises:
        DataError: names the file.
    """
    for file in sorted(root.glob("*/data.json"), key=lambda file: (len(file.parent.name), file)):
        try:
            row = _row(file.read_bytes())
        except (OSError, RowError) as error:
            raise DataError(f"cannot read {file}: {error}") from error
        yield str(file.relative_to(root)), {"id": file.parent.name, **row}
