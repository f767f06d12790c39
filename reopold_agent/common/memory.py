"""Measures memory: of processes, and what is left for this one; gives memory back."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Limits of a container."""

LARGE = 2**24
"""Number of weights from which a CPU takes time to save memory."""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)")
"""Of a mapping in ``/proc/PID/smaps``: bounds, permissions, the file's inode (0: none) and path."""


def usable_memory() -> float | None:
    """Returns the bytes of memory that are free for this process; None if unknown."""
    free: float | None = None
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        most = (CGROUP / "memory.max").read_text("utf-8").strip()
        used = (CGROUP / "memory.current").read_text("utf-8").strip()
    except (OSError, StopIteration):
        return free
    return free if most == "max" else min(free, float(most) - float(used))


def resident_bytes(pid: int) -> int:
    """Returns the bytes of memory that a process has, shared ones included; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text("utf-8").split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def share_bytes(pid: int) -> int:
    """Returns the bytes of a process, those that it shares divided among the sharers (PSS)."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            line = next(each for each in file if each.startswith("Pss:"))
            return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resident_bytes(pid)


def return_freed_memory() -> None:
    """Gives the system what the C library keeps of freed memory; does nothing without glibc.

    It keeps blocks of up to 32 MiB, such as the activations of a pass, if a small one that is in
    use lies between them and the heap's end.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def discard_pages(address: int, size: int) -> None:
    """Gives memory whose content is needed no more back to the system before it is freed.

    Of a mapped file, for example, freeing one part frees nothing. The content becomes undefined.
    Pages that are not wholly inside are kept. Does nothing except on Linux.

    Args:
        address: first byte.
        size: number of bytes.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start, end = -(-address // page) * page, (address + size) // page * page
    if end > start:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def release_unchanged(parts: Iterable[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Gives back the memory of mapped files that nothing has written since they were mapped.

    The next use reads it again: from the system's cache of files while that has room. Memory that
    belongs to no file, or to one of which any page was written, stays. Does nothing except on
    Linux.

    Args:
        parts: first byte and number of bytes of each part, such as a weight.

    Returns:
        The files whose memory was given back, with size and time of change (ns): what is read
        again is only as before while these are.
    """
    try:
        unchanged = _unchanged_mappings(Path("/proc/self/smaps").read_text("utf-8"))
    except OSError:
        return {}
    files: dict[str, tuple[int, int]] = {}
    for address, size in parts:
        for start, end, path in unchanged:
            if start <= address and address + size <= end:
                if path not in files:
                    found = os.stat(path)
                    files[path] = found.st_size, found.st_mtime_ns
                discard_pages(address, size)
    return files


def _unchanged_mappings(smaps: str) -> list[tuple[int, int, str]]:
    """Returns the private mappings of files without a page of their own: bounds and the file.

    Without files that were removed, or replaced by others, since they were mapped.
    """
    found: list[tuple[int, int, str]] = []
    mapping: tuple[int, int, str] | None = None
    for line in smaps.splitlines():
        header = _MAPPING.match(line)
        if header is not None:
            low, high, permissions, inode, path = header.groups()
            mapping = None
            if permissions.endswith("p") and inode != "0" and os.path.exists(path):
                mapping = int(low, 16), int(high, 16), path
        elif mapping is not None and line.split() == ["Anonymous:", "0", "kB"]:
            found.append(mapping)
    return found
