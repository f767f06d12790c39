"""Compares expressions with math-verify, in child processes that can be killed.

Computer algebra hangs on some short expressions. Such an expression costs its time limit and one
process; the next request gets a new one. Processes start when they are first needed, at most one
per waiting thread, and end with the program, even if that is killed: their input then ends, and a
process that hangs in a computation reaches its limit of processor time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reopold_agent
from reopold_agent.common.bounded import DeadlineError
from reopold_agent.common.processes import ChildProcess, ProcessPool
from reopold_agent.errors import ReopoldError
from reopold_agent.judges.numbers import Precision

LONGEST = 1000
"""Characters. A longer text is not a final answer, and parsing takes more than linear time."""

_START_SECONDS = 120.0
_CACHE_SIZE = 20_000


class MathWorkerError(ReopoldError, RuntimeError):
    """The process cannot be started; the message says why."""


@dataclass(frozen=True)
class MathOptions:
    """How expressions are compared.

    Attributes:
        precision: decimals to round to where one side is a decimal (`numbers.rounded`); None for
            exact equality.
        strict: whether names of variables matter and sets differ from tuples.
    """

    precision: Precision | None = None
    strict: bool = True


class MathPool(ProcessPool["_MathProcess"]):
    """Processes that compare expressions.

    Args:
        size: most processes at a time.
        cpu_seconds: processor time after which a process gives an expression up.
        wall_seconds: time after which a process that does not answer is killed.
    """

    def __init__(
        self, size: int | None = None, *, cpu_seconds: float = 3.0, wall_seconds: float = 10.0
    ) -> None:
        super().__init__(_MathProcess, size or max(1, min(4, os.cpu_count() or 1)))
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds

    def equal(self, gold: str, answer: str, options: MathOptions | None = None) -> bool:
        """Whether math-verify takes ``answer`` for ``gold``; False if that takes too long.

        Raises:
            MathWorkerError: no process can be started.
        """
        chosen = options or MathOptions()
        request = {
            "gold": gold,
            "answer": answer,
            "precision": chosen.precision,
            "strict": chosen.strict,
            "cpu_seconds": self._cpu_seconds,
        }
        try:
            with self.lend() as process:
                return bool(process.ask(request, self._wall_seconds).get("equal"))
        except (DeadlineError, EOFError):
            return False


class _MathProcess(ChildProcess):
    """One process that runs `reopold_agent.judges.math_worker`; both sides send JSON lines."""

    def __init__(self) -> None:
        root = str(Path(reopold_agent.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))

        def start(theirs: socket.socket) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-m", "reopold_agent.judges.math_worker"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )

        try:
            super().__init__(start)
        except OSError as error:
            raise MathWorkerError(f"the process that compares expressions: {error}") from error
        self._buffer = memoryview(bytearray(1 << 12))
        self._deadline = time.monotonic() + _START_SECONDS
        try:
            self._receive_line()
        except (DeadlineError, EOFError):
            code = self._process.poll()
            self.stop()
            raise MathWorkerError(
                "the process that compares expressions did not start "
                f"({'no answer' if code is None else f'exit status {code}'}); try: "
                f"{sys.executable} -m reopold_agent.judges.math_worker"
            ) from None
        except BaseException:
            self.stop()
            raise

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the reply.

        Raises:
            DeadlineError: no reply within ``seconds``.
            EOFError: the process has ended.
        """
        self._deadline = time.monotonic() + seconds
        self._send(json.dumps(request).encode() + b"\n")
        reply: dict[str, Any] = json.loads(self._receive_line())
        return reply

    def _receive_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += self._buffer[: self._receive(self._buffer)]
        return line


POOL = MathPool()
"""The shared pool of this process."""

_cache: OrderedDict[tuple[str, str, MathOptions], bool] = OrderedDict()
_cache_lock = threading.Lock()


def same_expression(gold: str, answer: str, options: MathOptions | None = None) -> bool:
    """Calls `MathPool.equal` of the shared pool and caches the results.

    A pair that took too long is cached too: many samples of one question give the same answer.
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
    """Ends the child processes of this process; the next comparison starts new ones."""
    POOL.close()


def _after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
