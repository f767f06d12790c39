"""Reading rows from parquet, json, jsonl, tsv and csv files, local or from the hub."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reopold_agent.data.checks import RowError
from reopold_agent.errors import DataError, MissingExtraError

_log = logging.getLogger(__name__)

_SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv", ".csv")
"""In a folder with others, csv files hold no rows: they list labels, figures and the like."""

_HELD_OUT = frozenset(
    {"test", "testmini", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
    | {"heldout", "holdout"}
)

_TRAIN = frozenset({"train", "training"})

_NO_SPLIT = re.compile("retriev|latest|contest|interval|medieval|device|(?<![a-z])valu")
"""Parts of names in which the letters of a split are no split."""

_SHARD = re.compile(r"-\d+(-of-\d+.*)?$")
"""End of the names of files that together hold a split, as the hub writes them."""

_NUMBERED = re.compile(r"-(\d+)-of-(\d+)")
"""Number of a file and of all that hold the split; counted from 0, by some writers from 1."""

_METADATA = frozenset(
    f"{name}.json"
    for name in ("readme", "dataset_info", "dataset_infos", "dataset_dict", "state", "croissant")
)
"""Files that lie beside rows and hold none, in small letters."""

_ONE_ROW = "data.json"
"""Name of the file with the one row of a folder (InterGPS's Geometry3K)."""

_LONGEST_INDEX = 64
"""A longer "image" of VLMEvalKit's tsv files is a picture, not the index of another row."""

MAX_LINE_BYTES = 100_000_000
"""Longer lines of jsonl files and fields of tsv files are refused: they would fill the memory."""


def find_row_files(path: Path, split: str | Sequence[str | None] | None) -> list[Path]:
    """Returns the row files of a path: the file itself, or those in the folder and its ``data``.

    A folder with folders of one ``data.json`` each has a row in each of them (see `data_folder`).
    Of other folders, only files named after the split are taken: it is a word of their names, in
    capitals or not, between ``_``, ``-`` and ``.``. As on the hub, files whose names mention no
    split hold the training rows; and where there are no such files, a folder that is named like the
    split holds its rows. Where files of one name repeat the rows in several formats, as
    MathVista's and MathVerse's do, the first of parquet, jsonl, json and tsv is taken. A csv file
    is taken only where there is none of these.

    Args:
        path: a file or a folder.
        split: name of the split, or of the files without their suffix; or several names, of which
            the first that is there counts, and None among them for the only file. None for all
            files.

    Raises:
        DataError: there are no such files, none of the split, or it is not clear which; the message
            says what to set.
    """
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{path} is not one of {', '.join(_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise DataError(f"the data path {path} does not exist")
    folders = data_folder(path, split).glob(f"*/{_ONE_ROW}")
    single = sorted(folders, key=lambda file: (len(file.parent.name), file))  # 9 before 10
    if single:
        return single
    names = [split] if isinstance(split, str) else list(split or [])
    files, inside = _candidates(path, names)
    if split is None:
        return _one_format(_only_split(path, files, inside))
    for name in names:
        if name is not None:
            found = _of_split(name, path, files, inside)
        else:
            found = files if len({_name(file) for file in files}) == 1 else []
        if found:
            return _one_format(found)
    splits = " or ".join(name for name in names if name is not None)
    alone = len({_splits(file) for file in files}) <= 1 and not inside
    raise DataError(
        (f"no file for the split '{splits}' in {path}" if splits else f"several files in {path}")
        + f"; there are {_names([*files, *inside])}.\nName the file itself as the path"
        + (", or set split=null to take all files." if alone else ".")
    )


def _candidates(path: Path, names: Sequence[str | None]) -> tuple[list[Path], list[Path]]:
    """Returns the row files of a folder, and those in its folders that are named like splits.

    Args:
        path: the folder.
        names: names of splits besides the usual ones.

    Raises:
        DataError: there are none.
    """
    places = (path, path / "data")
    files = sorted(file for place in places for file in _row_files(place))
    known = {*_HELD_OUT, *_TRAIN, *(_joined(name.lower()) for name in names if name)}
    parts = sorted(
        folder
        for place in places
        if place.is_dir()
        for folder in place.iterdir()
        if _joined(folder.name.lower()) in known
    )
    inside = [file for folder in parts for file in _row_files(folder)]
    if not files and not inside:
        raise DataError(_no_rows(path))
    if any(file.suffix != ".csv" for file in [*files, *inside]):
        files, inside = ([f for f in some if f.suffix != ".csv"] for some in (files, inside))
    return files, inside


def _only_split(path: Path, files: list[Path], inside: list[Path]) -> list[Path]:
    """Returns all files of a folder, or else of its folders, as `_candidates` gives them.

    Raises:
        DataError: they are of several splits.
    """
    if not files:
        if len({_joined(file.parent.name.lower()) for file in inside}) > 1:
            raise DataError(_several(path, inside))
        return inside
    mentioned = {_splits(file) for file in files}
    if len(mentioned) > 1:
        raise DataError(_several(path, files))
    if mentioned == {_TRAIN} and not all(map(_is_doubtful, files)):
        _check_unnamed(files, path)
    return files


def _of_split(split: str, path: Path, files: list[Path], inside: list[Path]) -> list[Path]:
    """Returns the files of a split, and warns of those that may be too.

    Args:
        split: its name.
        path: the folder.
        files, inside: as `_candidates` gives them.

    Raises:
        DataError: it is not clear which files hold the training rows.
    """
    wanted = split.lower()
    exact = [file for file in files if wanted in (_name(file), file.stem.lower())]
    others = [f for f in files if f not in exact and _joined(wanted) in _words(f)]
    own = [f for f in inside if _joined(f.parent.name.lower()) == _joined(wanted)]
    named = exact or others
    if not named and wanted == "train":
        named = [file for file in files if not _HELD_OUT.intersection(_words(file))]
        _check_unnamed(named, path)
    named = named or own
    left_out = [file for file in [*others, *own] if file not in named]
    # "testmini" before "testmini_text_only" and "annot_testmini", which repeat its rows.
    if left_out and wanted != "testmini":
        _log.warning(
            "the split '%s' of %s is read from %s, without %s.\nTo use all of them, put them "
            "into a folder of their own and set split=null.",
            *(split, path, _names(named), _names(left_out)),
        )
    return named


def _row_files(folder: Path) -> list[Path]:
    """Returns the files of rows that lie directly in a folder; none if there is no such folder."""
    return sorted(filter(_is_rows, folder.iterdir())) if folder.is_dir() else []


def _is_rows(file: Path) -> bool:
    hidden = file.name.startswith(".") or file.name.lower() in _METADATA
    return file.suffix in _SUFFIXES and not hidden and file.is_file()


def _several(path: Path, files: Sequence[Path]) -> str:
    return (
        f"{path} has files of several splits: {_names(files)}.\nName the file itself as the path "
        "(as data.train.path=FILE), or set the split (as data.train.split=train)."
    )


def _no_rows(path: Path) -> str:
    """Returns what to do about a folder without files of rows."""
    wanted = ", ".join(f"*{suffix}" for suffix in _SUFFIXES)
    names = sorted(file.name for file in path.rglob("*") if file.is_file())
    advice = f"The path must name the folder that holds {wanted}, or such a file."
    if any(name.endswith(".arrow") for name in names):
        advice = (
            "It looks like a data set of `save_to_disk`; write it as parquet:\n  python -c 'import "
            f'datasets; datasets.load_from_disk("{path}").to_parquet("train.parquet")\''
        )
    elif inner := sorted({file.parent for file in path.rglob("*") if _is_rows(file)}):
        advice = f"Name the folder that holds the rows as the path, as {inner[0]}."
    elif packed := [name for name in names if name.endswith((".gz", ".zst", ".bz2", ".xz"))]:
        advice = f"Unpack {packed[0]} first."
    there = f"; there are {', '.join(names[:5])}" if names else ", which is empty"
    return f"no rows in {path}{there}{', ...' if len(names) > 5 else ''}.\n{advice}"


def data_folder(path: Path, split: str | Sequence[str | None] | None) -> Path:
    """Returns the folder that the pictures of the rows are relative to.

    It is the folder of a file, or the folder itself; and InterGPS's folder of the split, in which
    each row has a folder of its own.
    """
    if not path.is_dir():
        return path.parent
    names = [split] if isinstance(split, str) else split or []
    own = [path / name for name in names if name and any(path.glob(f"{name}/*/{_ONE_ROW}"))]
    return own[0] if own else path


def row_label(file: Path, number: int) -> str:
    """Returns the name of a file's row for messages; ``number`` counts the rows from 0."""
    if file.name == _ONE_ROW:
        return f"{file.parent.name}/{file.name}"
    return f"{file.name}, row {number}"


def _name(file: Path) -> str:
    """Returns the name of a file in small letters, without its suffix and its shard's number."""
    return _SHARD.sub("", file.stem.lower())


def _joined(name: str) -> str:
    return re.sub("(held|hold)[_.-]out", r"\1out", name)


def _words(file: Path) -> list[str]:
    return re.split(r"[_.-]", _joined(_name(file)))


def _splits(file: Path) -> frozenset[str]:
    """Returns the splits that a file's name mentions; without any, it holds training rows."""
    found = _HELD_OUT.intersection(_words(file))
    return found if found and _TRAIN.isdisjoint(_words(file)) else found | _TRAIN


def _is_doubtful(file: Path) -> bool:
    """Returns whether the letters of a held-out split are in a file's name."""
    name = _NO_SPLIT.sub(" ", _joined(_name(file)))
    return any(split in name for split in _HELD_OUT)


def _names(files: Sequence[Path]) -> str:
    """Returns the names of files, with the folder where this is named after a split."""
    names = _HELD_OUT | _TRAIN
    return ", ".join(
        str(Path(file.parent.name, file.name))
        if _joined(file.parent.name.lower()) in names
        else file.name
        for file in files
    )


def _check_unnamed(files: Sequence[Path], path: Path) -> None:
    """Checks that training rows may be taken from files whose names mention no held-out split.

    Raises:
        DataError: there are several, and one may hold another split: ``mytest.jsonl``.
    """
    doubtful = [file for file in files if _is_doubtful(file)]
    if doubtful and len({_name(file) for file in files}) > 1:
        raise DataError(
            f"{path}: {_names(doubtful)} may hold another split; there are {_names(files)}.\n"
            "Name the file itself as the path (as data.train.path=FILE), or its name as the split "
            "(as data.train.split=NAME)."
        )


def _one_format(files: list[Path]) -> list[Path]:
    """Returns the files without those that repeat the rows of another one in another format."""
    formats: dict[str, set[str]] = {}
    for file in files:
        formats.setdefault(_name(file), set()).add(file.suffix)
    best = {name: min(found, key=_SUFFIXES.index) for name, found in formats.items()}
    chosen = [file for file in files if file.suffix == best[_name(file)]]
    _check_shards(chosen)
    return chosen


def _check_shards(files: Sequence[Path]) -> None:
    """Checks that numbered files are complete, and are there once.

    Raises:
        DataError: a download that was not finished lacks some, or a folder has two conversions.
    """
    numbers: dict[tuple[Path, str], dict[int, set[int]]] = {}
    for file in files:
        if found := _NUMBERED.search(file.stem):
            totals = numbers.setdefault((file.parent, _name(file)), {})
            totals.setdefault(int(found[2]), set()).add(int(found[1]))
    for (folder, name), totals in numbers.items():
        if len(totals) > 1:
            counts = " and ".join(map(str, sorted(totals)))
            raise DataError(
                f"{folder} has the rows of '{name}' twice, in {counts} files.\n"
                "Remove those of one conversion."
            )
        ((total, there),) = totals.items()
        lacking = min(set(range(total)) - there, set(range(1, total + 1)) - there, key=len)
        if lacking:
            first = f"{name}-{min(lacking):05d}-of-{total:05d}"
            raise DataError(
                f"{folder} has {len(there)} of the {total} files of '{name}': {first} is missing.\n"
                "Complete the download, or name one file as the path to use it alone."
            )


def read_rows(
    file: Path,
    without: Collection[str] = (),
    *,
    bad_line: Callable[[str, RowError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one file, in order.

    Args:
        file: parquet, json, jsonl, tsv or csv.
        without: columns of a parquet file that are not read at all.
        bad_line: called with "NAME, line N" and the error for each line of a jsonl file that is
            not an object, and of a tsv or csv file that has more or fewer fields than the header;
            the line is then skipped. None raises the error instead.

    Raises:
        DataError: the file cannot be read; the message names the file and the line.
    """

    def refuse(number: int, error: RowError) -> None:
        if bad_line is None:
            raise DataError(f"{file}, line {number}: {error}") from error
        bad_line(f"{file.name}, line {number}", error)

    if file.suffix == ".parquet":
        yield from _parquet_rows(file, without)
    elif file.suffix in (".tsv", ".csv"):
        yield from _table_rows(file, "\t" if file.suffix == ".tsv" else ",", refuse)
    elif file.suffix == ".json" and not _is_lines(file):
        yield from _json_rows(file)
    else:
        # Read as bytes, so that a wrong encoding is reported with its line.
        with file.open("rb") as handle:
            for number, line in _lines(handle):
                try:
                    row = _row(line)
                except RowError as error:
                    refuse(number, error)
                    continue
                yield row


def _is_lines(file: Path) -> bool:
    """Returns whether a json file has an object in each line, as the hub's loader reads too."""
    try:
        with file.open("rb") as handle:
            lines = [line for _, (_, line) in zip(range(2), _lines(handle), strict=False)]
    except OSError:
        return False  # the reader says why
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def fills_with_nulls(file: Path) -> bool:
    """Returns whether objects in the file's rows have nulls that nobody wrote.

    In parquet all objects of a column have the same keys: where one row has a key and another has
    not, `read_rows` yields it with the value None.
    """
    return file.suffix == ".parquet"


def _parquet_rows(file: Path, without: Collection[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    read = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name not in without]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            rows = batch.to_pylist()
            for field in batch.schema:
                if _is_narrow(field.type):
                    for row in rows:
                        row[field.name] = _shortest(row[field.name], field.type)
            yield from rows
            read += len(rows)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        where = f" after row {read - 1}" if read else ""
        raise DataError(f"cannot read {file}{where}: {error}") from error


def _is_narrow(kind: Any) -> bool:
    """Returns whether a type of parquet is, or holds, floats of less than 64 bits."""
    if kind.num_fields:
        return any(_is_narrow(kind.field(i).type) for i in range(kind.num_fields))
    return str(kind) in _NARROW


def _shortest(value: Any, kind: Any) -> Any:
    """Returns a value with its narrow floats as their shortest decimals: 0.1 as float32 is 0.1.

    Read as 64 bits, as pyarrow does, it would be 0.10000000149011612, which nobody wrote.
    """
    if value is None or not _is_narrow(kind):
        return value
    if isinstance(value, dict):
        return {name: _shortest(each, kind.field(name).type) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortest(each, kind.field(0).type) for each in value]
    if isinstance(value, tuple):  # an entry of a map
        return tuple(_shortest(each, kind.field(i).type) for i, each in enumerate(value))
    return float(str(_NARROW[str(kind)](value)))


_NARROW = {"halffloat": np.float16, "float": np.float32}


def _table_rows(
    file: Path, delimiter: str, refuse: Callable[[int, RowError], None]
) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # pictures in base64 are longer than csv's own limit
    named = "comma" if delimiter == "," else "tab"
    rows: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter=delimiter, strict=True)
            header = next(filter(None, reader), [])
            for fields in filter(None, reader):
                if len(fields) == len(header):
                    cells = zip(header, fields, strict=True)
                    rows.append({key: value for key, value in cells if key})
                    continue
                # Which text a delimiter cuts, or which one is missing, cannot be known.
                message = (
                    f"{len(fields)} fields, the header has {len(header)}; a text with a {named} or "
                    "a line's end must be in double quotes"
                )
                refuse(reader.line_num, RowError("unreadable line", message))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file} at row {len(rows)}: {error}") from error
    # VLMEvalKit stores a picture once: other rows with it have the index of its row as "image".
    pictures = {row.get("index", "").removesuffix(".0"): row.get("image") for row in rows}
    for row in rows:
        shown = row.get("image")
        if shown and len(shown) <= _LONGEST_INDEX:
            row["image"] = pictures.get(shown.removesuffix(".0")) or shown
        _empty_nothing(row)
        yield row


_NOTHING = frozenset({"nan", "none", "null"})
"""Words for an empty cell in files that were written from texts of Python's values."""

_OPTION = re.compile(r"(?:(?:option|choice)[_ -]?)?([a-j])", re.IGNORECASE)


def _empty_nothing(row: dict[str, Any]) -> None:
    """Empties the question, the hint and the last options of a tsv or csv row if they say none.

    An option between others stays, as does one that is the answer, or without which one option
    would be left: it may really read "None".
    """
    for name in ("question", "hint"):
        if str(row.get(name)).strip().lower() in _NOTHING and name in row:
            row[name] = ""
    answer = str(row.get("answer")).strip().strip("().").upper()
    options = {m[1].upper(): name for name in row if (m := _OPTION.fullmatch(name))}
    filled = [letter for letter in sorted(options) if row[options[letter]].strip()]
    kept = list(filled)
    while kept and kept[-1] != answer and row[options[kept[-1]]].strip().lower() in _NOTHING:
        kept.pop()
    if len(kept) != 1:
        row.update({options[letter]: "" for letter in filled[len(kept) :]})


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields number (from 1) and bytes of non-blank lines; lines that are too long are cut."""
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
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"id": key, **row} for key, row in rows.items()]  # as MathVista's annotations
    elif isinstance(rows, dict) and file.name == _ONE_ROW:
        rows = [{"id": file.parent.name, **rows}]
    elif isinstance(rows, dict):  # as InfographicVQA's and DocVQA's own files, under "data"
        lists = [value for value in rows.values() if isinstance(value, list) and value]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{file} must hold a list of objects, one object of objects by id, or an object in "
            "each line"
        )
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


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there may name a data set of the hub, ``owner/name``."""
    return (
        path.count("/") == 1
        and not path.startswith((".", "/", "~"))
        and not path.endswith(("/", ".zip", ".tar", ".gz", ".tgz", *_SUFFIXES))
    )


def local_or_downloaded(path: str, revision: str | None) -> Path:
    """Returns the file or folder at a path, or that of the hub's data set which it names.

    Raises:
        MissingExtraError: as `download`.
        DataError: there is neither.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if is_hub_id(path):
        return download(path, revision)
    raise DataError(f"the data path {local} does not exist")


def download(repository: str, revision: str | None) -> Path:
    """Downloads a data set of the hub into huggingface_hub's cache and returns its folder.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        DataError: it cannot be downloaded; the message says how to use a local copy.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", f"the dataset '{repository}'") from error
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's client raises many kinds, all meaning "not available"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise DataError(
            f"the dataset '{repository}' is not a local folder and could not be downloaded "
            f"({type(error).__name__}: {reason}).\nDownload it where there is a network:\n"
            f"  hf download {repository} --repo-type dataset --local-dir data/mine\n"
            "and set data.train.path=data/mine (data.eval.path for the held-out rows)"
        ) from error
