"""Expressions through math-verify, in worker processes that can be killed.

Computer algebra hangs on some short expressions. Here such an expression costs its time limit and
one worker; the next request gets a fresh one. Workers start when they are first needed, one per
thread that is waiting up to the pool's size, and end with the program, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reopold_agent
from reopold_agent.errors import ReopoldError

LONGEST = 1000
"""Characters; what is longer is no final answer, and parsing takes more than linear time."""

_START_SECONDS = 120.0
_CACHE_SIZE = 20_000


class MathWorkerError(ReopoldError, RuntimeError):
    """The worker cannot be started; the message says why."""


@dataclass(frozen=True)
class MathOptions:
    """How expressions are compared.

    Attributes:
        precision: decimals to round to where one side is a decimal; None for exact equality.
        strict: variables' names matter, and sets are not tuples.
        set_relation: an inequality may answer where a set is expected; the reverse always may.
    """

    precision: int | None = None
    strict: bool = True
    set_relation: bool = False


class MathPool:
    """Worker processes that compare expressions; may be used from several threads.

    Args:
        size: most workers at a time.
        cpu_seconds: processor time after which a worker gives an expression up.
        wall_seconds: time after which a worker that does not answer is killed.
    """

    def __init__(
        self, size: int | None = None, *, cpu_seconds: float = 3.0, wall_seconds: float = 10.0
    ) -> None:
        self.size = size or max(1, min(4, os.cpu_count() or 1))
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._idle: list[_Worker] = []
        self._slots = threading.Semaphore(self.size)
        self._lock = threading.Lock()
        self._all: set[_Worker] = set()

    def equal(self, gold: str, answer: str, options: MathOptions | None = None) -> bool:
        """Whether math-verify takes ``answer`` for ``gold``; False if it takes too long.

        Raises:
            MathWorkerError: no worker can be started.
        """
        chosen = options or MathOptions()
        request = {
            "gold": gold,
            "answer": answer,
            "precision": chosen.precision,
            "strict": chosen.strict,
            "set_relation": chosen.set_relation,
            "cpu_seconds": self._cpu_seconds,
        }
        with self._slots:
            worker = self._take()
            reply = None
            try:
                reply = worker.ask(request, self._wall_seconds)
            finally:
                # Also on KeyboardInterrupt: its late reply must not answer another question.
                self._give_back(worker, healthy=reply is not None)
        return bool(reply and reply.get("equal"))

    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        with self._lock:
            return [worker.pid for worker in self._all if worker.alive]

    def close(self) -> None:
        """Ends all workers. The pool may be used again and then starts new ones."""
        with self._lock:
            workers, self._all, self._idle = list(self._all), set(), []
        for worker in workers:
            worker.stop()

    def _take(self) -> _Worker:
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                break
            if worker.alive:
                return worker
            self._give_back(worker, healthy=False)
        worker = _Worker()
        with self._lock:
            self._all.add(worker)
        return worker

    def _give_back(self, worker: _Worker, *, healthy: bool) -> None:
        with self._lock:
            known = worker in self._all
            if known and healthy:
                self._idle.append(worker)
                return
            self._all.discard(worker)
        worker.stop()

    def _forget(self) -> None:
        """In a forked child: the workers are the parent's; only their pipes are let go."""
        for worker in list(self._all):
            worker.forget()
        self.__init__(  # type: ignore[misc]  # locks may have been held when the process forked
            self.size, cpu_seconds=self._cpu_seconds, wall_seconds=self._wall_seconds
        )


class _Worker:
    """One process and a thread that reads its replies (pipes have no timeout of their own)."""

    def __init__(self) -> None:
        root = str(Path(reopold_agent.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "reopold_agent.judges.math_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise MathWorkerError(f"the process that compares expressions: {error}") from error
        self._replies: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="math-worker", daemon=True)
        self._reader.start()
        if self._reply(_START_SECONDS) is None:
            code = self._process.poll()
            self.stop()
            raise MathWorkerError(
                "the process that compares expressions did not start "
                f"({'no answer' if code is None else f'exit status {code}'}); try: "
                f"{sys.executable} -m reopold_agent.judges.math_worker"
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has died
            return None
        return self._reply(seconds)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def forget(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    os.close(pipe.fileno())
        # Not this process's child: waiting for it, as Popen does when collected, would fail.
        self._process.returncode = 0

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                self._replies.put(line)
        self._replies.put(None)


POOL = MathPool()
"""The pool of this process."""

_cache: OrderedDict[tuple[str, str, MathOptions], bool] = OrderedDict()
_cache_lock = threading.Lock()


def same_expression(gold: str, answer: str, options: MathOptions | None = None) -> bool:
    """`MathPool.equal` of the process's pool, with a memory for pairs that come again.

    What took too long is remembered too: many samples of one question give the same answer.
    """
    if max(len(gold), len(answer)) > LONGEST or not gold.strip() or not answer.strip():
        return False
    key = (gold, answer, options or MathOptions())
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    equal = POOL.equal(*key)
    with _cache_lock:
        _cache[key] = equal
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return equal


def close_workers() -> None:
    """Ends the workers of this process; the next comparison starts new ones."""
    POOL.close()


def _after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()
    POOL._forget()


atexit.register(close_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
