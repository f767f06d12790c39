"""Zip archives of data that are unzipped by themselves, once per user, into a cache."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from filelock import FileLock

from reopold_agent.common.files import cache_folder, replaced_folder, writing
from reopold_agent.data.images import check_packing, safe_join
from reopold_agent.errors import DataError, StorageError

_DEPTH = 6
"""Number of leading parts of a member's path among which a folder is looked for."""


def find_folder(root: Path, name: str) -> Path | None:
    """Returns the folder ``name`` of a data set; its archives are unzipped if need be.

    Args:
        root: a folder, where ``name`` is looked for in it, in its folders and then in its zip
            archives; or a zip archive.
        name: a folder's name, or a path such as ``geometry3k/test``.

    Returns:
        The folder, or None if there is none.

    Raises:
        DataError: an archive that holds it cannot be unzipped.
    """
    if root.is_dir():
        for above in ("", "*/", "*/*/"):
            found = sorted(path for path in root.glob(above + name) if path.is_dir())
            if found:
                return found[0]
    archives = sorted(root.glob("*.zip")) if root.is_dir() else [root]
    for archive in archives:
        inner = _inside(archive, name)
        if inner is not None:
            return unzipped(archive).joinpath(*inner.parts)
    return None


def unzipped(archive: Path) -> Path:
    """Unzips an archive into the cache, unless it is there already, and returns the folder.

    The folder's name depends on the archive's path, size and time of change. A kill leaves no
    partial folder, and processes that start together unzip once.

    Raises:
        DataError: it is no zip archive, a member is damaged, leaves the folder or is packed in an
            unusual way, or the disk has too little space for it.
    """
    source = archive.resolve()
    stat = source.stat()
    key = hashlib.sha256(f"{source}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    target = cache_folder() / "unzipped" / f"{archive.stem}-{key[:16]}"
    if target.is_dir():
        return target
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.lock")):
                if not target.is_dir():
                    with replaced_folder(target) as folder:
                        _extract(archive, folder)
    except StorageError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"cannot unzip {archive}: {reason}.\nSet XDG_CACHE_HOME to a folder that you may write "
            "and that has space, or unzip it yourself and give its folder."
        ) from error
    return target


def folders_in(archive: Path) -> list[str]:
    """Returns the folders of an archive that hold files, shortest paths first, for messages."""
    with zipfile.ZipFile(archive) as opened:
        found = {str(_path(member).parent) for member in opened.namelist()} - {"."}
    return sorted(found, key=lambda path: (path.count("/"), path))


def _path(member: str) -> PurePosixPath:
    return PurePosixPath(member.replace("\\", "/"))  # old Windows programs write these


def _inside(archive: Path, name: str) -> PurePosixPath | None:
    """Returns the shortest path in an archive that ends in the folder ``name``."""
    wanted = PurePosixPath(name).parts
    found: set[tuple[str, ...]] = set()
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.namelist():
                parts = _path(member).parent.parts[:_DEPTH]
                for start in range(len(parts) - len(wanted) + 1):
                    if parts[start : start + len(wanted)] == wanted:
                        found.add(parts[: start + len(wanted)])
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the zip archive {archive}: {error}") from error
    return PurePosixPath(*min(found, key=lambda parts: (len(parts), parts))) if found else None


def _extract(archive: Path, folder: Path) -> None:
    """Unzips files only: a link in an archive could lead anywhere, so its text is written."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [info for info in opened.infolist() if not info.is_dir()]
            size, free = sum(info.file_size for info in members), shutil.disk_usage(folder).free
            if size > free:
                raise DataError(
                    f"{archive} needs {size / 1e9:.1f} GB unzipped; {folder.parent} has "
                    f"{free / 1e9:.1f}.\nFree some space, or set XDG_CACHE_HOME to a larger disk."
                )
            for info in members:
                path = safe_join(folder, str(_path(info.filename)))
                path.parent.mkdir(parents=True, exist_ok=True)
                check_packing(info, archive)
                with opened.open(info) as packed, path.open("wb") as file:
                    left = info.file_size  # a member may go on beyond the size that it states
                    while left and (data := packed.read(min(left, 1 << 20))):
                        file.write(data)
                        left -= len(data)
                    # At the end of the member its checksum is compared.
                    if left or packed.read(1):
                        raise zipfile.BadZipFile(f"{info.filename} has another size than it states")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"cannot unzip {archive}: {error}\nDownload it again.") from error
