"""A guard beside a child process: it ends everything that the child has started, also when the
process that wanted it is killed.

It is used by worker processes for tools, and as a program of its own (`main`) around a command that
knows nothing of it. The lifeline is a pipe from the process that wants the child: any byte, or its
end, means "stop".
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

from reopold_agent.common.processes import adopt_orphans, descendants, die_with_parent

LOST = 100
"""Exit status of a guard if the process that wants its child has ended or says to stop."""

NOT_STARTED = 127
"""Exit status of a command that cannot be started, as in a shell."""

GRACE_SECONDS = 1.0
"""Time for a command between the request to end and the kill."""


@contextlib.contextmanager
def guard_pipe() -> Iterator[int]:
    """Lends the end of a pipe that can be read once a child has ended; a fork leaves it too."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(woken)
        os.close(waker)


def watch(child: int, lifeline: int, woken: int, owner: int, grace: float = 0.0) -> int:
    """Waits until one side ends, ends the other, and returns the child's exit status.

    Args:
        child: leader of its process group.
        lifeline, woken: files to wait for.
        owner: the process that wants the child.
        grace: time that the child gets between SIGTERM and SIGKILL, seconds; 0: no SIGTERM.
    """
    status = LOST
    while True:
        ready, _, _ = select.select([lifeline, woken], [], [], 1.0)
        if woken in ready:
            os.read(woken, 4096)
        # A child of the pipe's owner may hold it open too, but a new parent shows its end as well.
        if lifeline in ready or os.getppid() != owner:
            if grace:
                _ask_to_end(child, grace)
            break
        done, how = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(how)
            status = code if code >= 0 else 128 - code
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _end_descendants()
    return status


def _ask_to_end(child: int, grace: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGTERM)
    until = time.monotonic() + grace
    while time.monotonic() < until:
        with contextlib.suppress(ChildProcessError):
            if not os.waitpid(child, os.WNOHANG)[0]:
                time.sleep(0.01)
                continue
        return


def _end_descendants() -> None:
    """Ends all descendants, which this process inherits, until no more are left."""
    for _ in range(2000):
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        select.select([], [], [], 0.002)


def main() -> None:
    """Runs a command with this process's standard files: ``LIFELINE COMMAND ARGS...``."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to handle
    adopt_orphans()
    owner = os.getppid()
    with guard_pipe() as woken:
        child = os.fork()
        if child:
            # Else the command's readers and writers would not see its end.
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            os._exit(watch(child, lifeline, woken, owner, GRACE_SECONDS))
    try:
        os.close(lifeline)
        os.setpgid(0, 0)
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(NOT_STARTED)
