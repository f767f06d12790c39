"""Keeps vLLM's engine processes from outliving the process that started them.

vLLM's engine runs in a process of its own, which goes on, with all its memory, when its parent is
killed by SIGKILL (by hand, or by the kernel for want of memory). vLLM calls the entry points of
the group ``vllm.general_plugins`` in each of its processes; this package's is `follow_parent`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

SWITCH = "REOPOLD_VLLM_FOLLOWS_PARENT"
"""Set to 1 by the engines: other users of vLLM in the same environment are not concerned."""

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Asks the kernel to kill this child process when its parent ends (Linux)."""
    child = multiprocessing.parent_process() is not None
    if child and os.environ.get(SWITCH) == "1" and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
