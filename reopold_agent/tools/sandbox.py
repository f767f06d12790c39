"""Confines a tool's process: limits of the kernel that the process sets for itself.

Files by Landlock (Linux 5.13; documentation: https://docs.kernel.org/userspace-api/landlock.html),
through its system calls, since Python has no binding; it needs no privilege and covers all
children. Memory by ``RLIMIT_DATA``, which counts writable memory: ``RLIMIT_AS`` also counts
libraries and reserved addresses, which are gigabytes for PyTorch or CUDA.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from reopold_agent.common.processes import forbid_new_privileges
from reopold_agent.common.secrets import is_secret_name

OPEN_FILES = 256

FILE_BYTES = 256 << 20
"""Most bytes of a file that a tool writes."""

# The system: libraries, fonts, certificates, time zones; not all of /etc, /proc or /home.
_SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/fonts", "/etc/ssl",
    "/etc/pki", "/etc/ca-certificates", "/etc/localtime", "/etc/timezone", "/etc/mime.types",
    "/etc/magic", "/etc/alternatives", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/self",
    "/sys/devices/system/cpu", "/sys/fs/cgroup",
    "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scope", ctypes.c_uint64),
    )


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def environment(passed: Iterable[str], folder: str) -> dict[str, str]:
    """Returns this process's environment for a tool's: no secrets, one thread, another home.

    Args:
        passed: variables that are kept although their names look like a secret's.
        folder: the home and the folder for temporary files.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in passed or not is_secret_name(name)
    }
    threads = ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
    return {
        **kept,
        **{f"{name}_NUM_THREADS": "1" for name in threads},
        "HOME": folder,
        "TMPDIR": folder,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def limit_resources(*, may_write: bool) -> None:
    """Limits open files, file sizes and core dumps; without Landlock, forbids writing to files."""
    import resource

    _soft("RLIMIT_NOFILE", OPEN_FILES)
    _soft("RLIMIT_FSIZE", FILE_BYTES if may_write else 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(more: int | None) -> None:
    """Allows so many more bytes than this process uses now (None: no limit).

    An allocation beyond them raises MemoryError.
    """
    used = _status("VmData")
    if used is not None:  # on other systems than Linux, RLIMIT_DATA covers little
        _soft("RLIMIT_DATA", None if more is None else used + more)


def limit_cpu(seconds: float) -> None:
    """Has the kernel end this process after so many more seconds of processor time."""
    spent = sum(os.times()[:2])
    _soft("RLIMIT_CPU", int(spent + seconds) + 1)


def landlock_version() -> int:
    """Returns the version of the kernel's Landlock interface; 0 without Landlock."""
    if not sys.platform.startswith("linux"):
        return 0
    system = ctypes.CDLL(None, use_errno=True)
    return max(0, int(system.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def restrict(read: Iterable[str], write: str, *, network: bool) -> int:
    """Confines this single-threaded process and its children by Landlock, permanently.

    Args:
        read: files and folders that may be read and executed; missing ones are skipped.
        write: the only folder where everything is allowed.
        network: whether TCP is allowed (the kernel can forbid it from Linux 6.7 on).

    Returns:
        `landlock_version`; if 0, nothing is restricted.

    Raises:
        OSError: the kernel has Landlock but refuses the rules.
    """
    version = landlock_version()
    if not version:
        return 0
    system = ctypes.CDLL(None, use_errno=True)
    # Later kernels know more kinds of access; a kernel refuses those that it does not know.
    kinds = 16 if version >= 5 else 15 if version >= 3 else 14 if version >= 2 else 13
    attributes = _Ruleset(
        (1 << kinds) - 1,
        3 if version >= 4 and not network else 0,  # bind and connect, TCP
        3 if version >= 6 else 0,  # abstract sockets and signals to processes outside
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _checked(
        system.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    )
    try:
        for path in read:
            _allow(system, rules, path, _READING)
        _allow(system, rules, "/dev/null", _READING | _WRITE_FILE | _TRUNCATE)
        _allow(system, rules, write, attributes.files)
        forbid_new_privileges()
        _checked(system.syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)
    return version


def readable(folders: Iterable[str]) -> list[str]:
    """Returns the paths that Python needs to read, and ``folders``."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path]
    # Packages that pip installed with -e from where they lie, by setuptools' import hooks.
    hooks = [module for name, module in sys.modules.items() if name.startswith("__editable__")]
    for hook in hooks:
        python += getattr(hook, "MAPPING", {}).values()
    inside = [path for path in python if path and Path(path) != Path("/")]
    return [*_SYSTEM, str(Path(__file__).parents[1]), *inside, *folders]


def _allow(system: ctypes.CDLL, rules: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # this machine has no such folder
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= _OF_FILES
        # A kernel that handles fewer kinds of access refuses rules with the others.
        if landlock_version() < 3:
            access &= ~_TRUNCATE
        _checked(system.syscall(_ADD_RULE, rules, 1, ctypes.byref(_PathRule(access, place)), 0))
    finally:
        os.close(place)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result


def _soft(name: str, value: int | None) -> None:
    """Sets a soft limit, at most as high as the hard limit (None: as high as that)."""
    import resource

    which = getattr(resource, name)
    _, hard = resource.getrlimit(which)
    if value is None or hard != resource.RLIM_INFINITY:
        value = hard if value is None else min(value, hard)
    resource.setrlimit(which, (value, hard))


def _status(key: str) -> int | None:
    """Returns a value of /proc/self/status in bytes; None if there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((each for each in text.splitlines() if each.startswith(f"{key}:")), None)
    return None if line is None else int(line.split()[1]) * 1024
