"""Measures memory: of processes, and what is left for this one; gives memory back."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Limits of a container."""


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
