"""Measures this process's memory limits."""

from __future__ import annotations

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
