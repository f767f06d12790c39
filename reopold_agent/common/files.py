"""Writes values as strict JSON, and files so that a kill never leaves a partial one."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reopold_agent.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space",
    errno.EDQUOT: "Your quota is used up: free some space",
    errno.EFBIG: "A limit on file sizes forbids it (ulimit -f): raise it",
    errno.EROFS: "The file system is read-only: make it writable, or choose another hydra.run.dir",
    errno.EACCES: "You may not write there: check the permissions, or choose another hydra.run.dir",
    errno.EPERM: "You may not write there: check the permissions, or choose another hydra.run.dir",
}


def to_json(value: Any) -> Any:
    """Converts any value to one that strict JSON can represent; never raises.

    NaN and the infinities become null: JSON cannot represent them, and the non-standard ``NaN``
    that Python would write breaks JavaScript, jq, DuckDB and pandas' own fast reader. NumPy and
    torch scalars and arrays become numbers and lists, enums their value, dataclasses and mappings
    objects with string keys, sets sorted lists, and anything else its ``str``.
    """
    if isinstance(value, Enum):
        return to_json(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_json(item) for item in value), key=str)
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    # torch is not imported here; its tensors have NumPy's method.
    plain = getattr(value, "tolist", None)
    if callable(plain) and not isinstance(value, np.generic | type):
        return to_json(plain())
    return str(value)


def cache_folder() -> Path:
    """Returns this program's folder for files that can be made again, one per user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reopold-agent"


def _key(key: Any) -> str:
    return str(key.value if isinstance(key, Enum) else key)


def dump_json(value: Any, *, indent: int | None = None) -> bytes:
    """Returns strict JSON as UTF-8, after `to_json`; without ``indent`` on one line."""
    plain = to_json(value)
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent)
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: legal in JSON only as an escape
        return json.dumps(plain, allow_nan=False, indent=indent).encode("ascii")


def cannot_write(path: Path, error: OSError) -> StorageError:
    """Returns the error to raise when the system refuses to write ``path``."""
    advice = _ADVICE.get(error.errno or 0, "Check the disk")
    storage_error = StorageError(
        f"cannot write {path}: {error.strerror or error}\n"
        f"{advice}; the same command then continues from what is saved."
    )
    storage_error.errno = error.errno
    return storage_error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds advice to errors of the system while the block writes ``path``.

    Raises:
        StorageError: in place of any other OSError of the block.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces ``target`` when the block succeeds.

    A kill leaves the old folder, the new one, or (for a moment, where there was an old one) none,
    but never a partial one. `remove_leftovers` deletes temporary folders of a killed process.

    Raises:
        StorageError: it cannot be written; ``target`` is unchanged.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    with writing(target):
        try:
            for folder in (temporary, old):
                shutil.rmtree(folder, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            flush_tree(temporary)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            flush_folder(target.parent)
        finally:
            for folder in (temporary, old):
                shutil.rmtree(folder, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder; a kill in between leaves nothing under its name."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(*folders: Path) -> None:
    """Removes temporary files of killed processes; the caller holds the run folder's lock."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def flush_tree(folder: Path) -> None:
    """Flushes a folder, with all files and folders below it, to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Flushes a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Yields an empty file that replaces ``path`` when the block succeeds: atomically, so readers
    and kills see the old or the new content.

    The temporary file is in the same folder, since a rename cannot cross file systems. With
    ``flush`` it is flushed to disk before the rename, so that not even a power cut leaves an empty
    file.

    Raises:
        StorageError: it cannot be written; the old content stays, and no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                if flush:
                    os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Replaces a file with these bytes, as `replaced_file` does.

    Raises:
        StorageError: it cannot be written; the old content stays, and no temporary file.
    """
    with replaced_file(path, flush=flush) as stream:
        stream.write(data)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replaces a file atomically with text as UTF-8."""
    write_bytes_atomic(Path(path), text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Replaces a file atomically with indented, strict JSON (see `to_json`)."""
    write_bytes_atomic(Path(path), dump_json(value, indent=2) + b"\n")
