"""Child processes that answer requests, are killed at a deadline and never outlive their parent.

`ChildProcess` is one of them and `ProcessPool` a bounded set. Both are used for tools
(`reopold_agent.tools.process`) and for computer algebra (`reopold_agent.judges.math`).

vLLM imports this module in each of its processes (entry point ``vllm.general_plugins``, function
`follow_parent`), so it imports little.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from reopold_agent.common.bounded import DeadlineError

SWITCH = "REOPOLD_VLLM_FOLLOWS_PARENT"
"""The engines set it to 1. Without it, other users of vLLM in this environment are unaffected."""

_TICK = 0.1
"""Seconds between two looks at a process that is waited for."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38


class ChildProcess:
    """A child process that is asked over a socket; one thread asks at a time.

    A subclass sets ``_deadline`` (`time.monotonic`) before each request. Once a request has
    failed, the process may still answer it later, so it must be stopped and replaced;
    `ProcessPool.lend` does that.

    Args:
        start: starts the process with its end of the socket pair, which is closed here afterwards.

    Attributes:
        pid: of the process.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, start: Callable[[socket.socket], subprocess.Popen[Any]]) -> None:
        self._socket, theirs = socket.socketpair()
        try:
            self._process = start(theirs)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._deadline = math.inf

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def fit(self) -> bool:
        """Whether it can take another request after one that it has answered."""
        return True

    def stop(self) -> None:
        """Kills the process and waits for its end."""
        self._process.kill()
        self._process.wait()
        self._close()

    def forget(self) -> None:
        """In a fork: closes the copies of its files; it remains the child of the fork's parent."""
        self._close()
        self._process.returncode = 0  # or Popen would wait for a process that is not its child

    def _send(self, data: bytes) -> None:
        """Sends all bytes.

        Raises:
            DeadlineError: the time is up.
            Exception: the process has ended; see `_ended`.
        """
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT)
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._ended() from None

    def _receive(self, view: memoryview) -> int:
        """Receives at least one byte into ``view`` and returns how many; raises as `_send` does."""
        while True:
            self._wait(select.POLLIN)
            try:
                got = self._socket.recv_into(view)
            except BlockingIOError:
                continue
            except OSError:
                got = 0
            if not got:
                raise self._ended()
            return got

    def _wait(self, event: int) -> None:
        """Waits until the socket is ready."""
        try:
            self._poll.register(self._socket, event)
        except ValueError:  # another thread has stopped the process and closed the socket
            raise self._ended() from None
        while True:
            now = time.monotonic()
            if now >= self._deadline:
                raise DeadlineError("a child process did not answer in time")
            self._watch(now)
            if not self.alive:  # a descendant may still hold the other end of the socket
                raise self._ended()
            limit = min(_TICK, self._deadline - now)
            ready = {number for number, _ in self._poll.poll(1000 * limit + 1)}
            self._meanwhile(ready)
            if self._socket.fileno() in ready:
                return

    def _watch(self, now: float) -> None:
        """Looks at the process while it is waited for; a subclass may raise here."""

    def _meanwhile(self, ready: set[int]) -> None:
        """Serves other files that a subclass has registered, given the numbers of ready ones."""

    def _ended(self) -> Exception:
        """Returns the error to raise for a process that has ended."""
        return EOFError("a child process has ended")

    def _close(self) -> None:
        self._socket.close()


P = TypeVar("P", bound=ChildProcess)


class ProcessPool(Generic[P]):
    """A bounded set of child processes for several threads.

    Processes start when they are needed. All end with `close`, with the program, and (by means of
    their own) when the program is killed. A fork of this process starts processes of its own.

    Args:
        start: starts a process.
        size: most processes at a time.
    """

    def __init__(self, start: Callable[[], P], size: int) -> None:
        self.size = size
        self._start = start
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._slots = threading.Semaphore(self.size)
        self._lock = threading.Lock()
        self._all: set[P] = set()
        self._idle: list[P] = []

    @contextlib.contextmanager
    def lend(
        self, seconds: float | None = None, score: Callable[[P], float] | None = None
    ) -> Iterator[P]:
        """Lends a process to the block and stops it if the block raises or it is no longer fit.

        Args:
            seconds: limit of the wait for a free process; None: none.
            score: of the idle processes, the one with the highest score is taken; by default the
                one that was used last.

        Raises:
            DeadlineError: no process was free in that time.
            Exception: a process could not be started.
        """
        if not self._slots.acquire(timeout=seconds):
            raise DeadlineError(f"no process was free within {seconds:g} seconds")
        try:
            process, keep = self._take(score), False
            try:
                yield process
                keep = process.fit()
            finally:
                # Also on KeyboardInterrupt: a late reply must not answer another request.
                self._give_back(process, keep)
        finally:
            self._slots.release()

    def pids(self) -> list[int]:
        """Returns the ids of the living processes."""
        with self._lock:
            return [process.pid for process in self._all if process.alive]

    def close(self) -> None:
        """Ends all processes. The pool can be used again and then starts new ones."""
        with self._lock:
            processes, self._all, self._idle = list(self._all), set(), []
        for process in processes:
            process.stop()

    def _take(self, score: Callable[[P], float] | None) -> P:
        while True:
            with self._lock:
                if not self._idle:
                    break
                chosen = max(self._idle, key=score) if score else self._idle[-1]
                self._idle.remove(chosen)
            if chosen.alive:
                return chosen
            self._give_back(chosen, keep=False)
        process = self._start()
        with self._lock:
            self._all.add(process)
        return process

    def _give_back(self, process: P, keep: bool) -> None:
        with self._lock:
            if keep and process in self._all:
                self._idle.append(process)
                return
            self._all.discard(process)
        process.stop()

    def _forget(self) -> None:
        """In a fork: leaves the processes to the parent; another thread may have held the locks."""
        processes = list(self._all)
        self._reset()
        for process in processes:
            process.forget()


_pools: weakref.WeakSet[ProcessPool[Any]] = weakref.WeakSet()


def _close_pools() -> None:
    for pool in list(_pools):
        pool.close()


def _forget_pools() -> None:
    for pool in list(_pools):
        pool._forget()


atexit.register(_close_pools)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


# What the kernel does and says; on other systems than Linux these functions have no effect


def follow_parent() -> None:
    """Ends vLLM's engine process with the process that started it, if the switch is set.

    The engine would otherwise go on, with all its memory, when its parent is killed by SIGKILL (by
    hand, or by the kernel when memory runs out).
    """
    if multiprocessing.parent_process() is not None and os.environ.get(SWITCH) == "1":
        die_with_parent()


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends.

    So it is only for children of a thread that lives as long as its process: not for those of a
    pool, which any thread may start.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent has ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """Keeps this process and its children from gaining rights by ``execve``.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        system = ctypes.CDLL(None, use_errno=True)
        if system.prctl(option, value, 0, 0, 0) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl: {os.strerror(number)}")


def descendants(pid: int) -> Iterator[int]:
    """Yields the ids of a process's children, their children and so on."""
    left = [pid]
    while left:
        parent = left.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    for child in map(int, file.read().split()):
                        left.append(child)
                        yield child
