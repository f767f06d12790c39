"""Tells weights apart by their content, at little cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_WHOLE = 16 * 2**20
"""Files up to this size are read whole, bytes."""

_BLOCK = 4096
"""Bytes that are read at the start and in the middle of each tensor of a larger file."""


def weights_digest(folder: Path) -> str | None:
    """Returns a SHA-256 that other weights have not; None without files that can be read.

    It covers sizes, headers and two blocks of each tensor, so that 15 GB take a moment. Paths,
    names and times do not count: a copy has the digest of its original.

    Args:
        folder: a checkpoint with safetensors files.
    """
    digest = hashlib.sha256()
    try:
        files = _weight_files(folder)
        for file in files:
            size = file.stat().st_size
            digest.update(f"{size}\n".encode())
            with file.open("rb") as stream:
                for start, length in _blocks(stream, size):
                    stream.seek(start)
                    digest.update(stream.read(length))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: loading them says why
    return digest.hexdigest() if files else None


def indexed_files(folder: Path) -> list[Path]:
    """Returns the files of weights that a checkpoint's index names; none without an index.

    Raises:
        OSError, ValueError: the index cannot be read, or is none.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it has no weight_map") from error
    return [folder / name for name in sorted(names)]


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers loads; others may lie beside them."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    return indexed_files(folder) or sorted(folder.glob("*.safetensors"))


def _blocks(stream: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yields start and length of the parts to read."""
    if size <= _WHOLE:
        yield 0, size
        return
    data = 8 + int.from_bytes(stream.read(8), "little")
    if data > size:
        raise ValueError("the header is cut off")
    header = json.loads(stream.read(data - 8))
    yield 0, data
    tensors = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
    for start, end in sorted(tensors):
        yield data + start, min(_BLOCK, end - start)
        middle = (start + end) // 2
        yield data + middle, min(_BLOCK, end - middle)
