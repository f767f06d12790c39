"""One worker process for tools, from the side that asks it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from reopold_agent.common.bounded import DeadlineError
from reopold_agent.common.guard import LOST
from reopold_agent.common.memory import resident_bytes, share_bytes
from reopold_agent.common.processes import ChildProcess, descendants
from reopold_agent.errors import ToolProcessError, ToolTimeoutError
from reopold_agent.tools import sandbox
from reopold_agent.tools.isolation import Isolation
from reopold_agent.tools.wire import WireError, frame, read_frame

_log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""Limit of starting a process, and of importing a tool in it; the limit of a call excludes both."""

MAX_PROCESSES = 64
"""A call that has more processes running at once is ended."""

MAX_THREADS, MAX_FILES = 64, 128
"""A process that has more of them after a call is replaced, since its tool leaks them."""

LOGGED_OUTPUT = 4000
"""Bytes of a call's output that are logged."""

_LOOK_SECONDS = 0.1
"""Between two looks at the memory of a running call."""

# With this process's import path, plugins are found where they are found here.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path']; "
    "from reopold_agent.tools.worker import main; main()"
)
_warned = {"landlock": False}


class ToolProcess(ChildProcess):
    """A confined process that runs one tool call at a time.

    It consists of two: a guard, which is the child of this process and only waits, and the guard's
    child, which runs the tools (`reopold_agent.tools.worker`). A third party's code runs there, so
    unlike other child processes it is confined, its memory and its descendants are watched, and
    what it prints and sends is bounded.

    Args:
        isolation: what it may do.
        landlock: whether to use Landlock if the kernel has it.

    Attributes:
        pid: of the process that runs the tools; until it has started, of the guard.

    Raises:
        ToolProcessError: it does not start.
    """

    def __init__(self, isolation: Isolation, *, landlock: bool) -> None:
        self._memory = isolation.memory_mb << 20
        self._folder = Path(tempfile.mkdtemp(prefix="reopold-tool-"))
        theirs_lifeline, lifeline = os.pipe()
        output, theirs_output = os.pipe()
        os.set_blocking(output, False)
        # As objects: a number could be another file's by the time it is used.
        self._lifeline, self._output = io.FileIO(lifeline, "w"), io.FileIO(output)

        def start(theirs: socket.socket) -> subprocess.Popen[bytes]:
            settings = {
                "path": [os.path.abspath(each) for each in sys.path if isinstance(each, str)],
                "socket": theirs.fileno(),
                "lifeline": theirs_lifeline,
                "folder": str(self._folder),
                "read": list(isolation.read),
                "network": isolation.network,
                "memory": self._memory,
                "landlock": landlock,
            }
            return subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=theirs_output,
                stderr=theirs_output,
                pass_fds=(theirs.fileno(), theirs_lifeline),
                env=sandbox.environment(isolation.environment, str(self._folder)),
                cwd=self._folder,
                start_new_session=True,
            )

        try:
            super().__init__(start)
        except OSError as error:
            self._lifeline.close()
            self._output.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ToolProcessError(f"a worker process cannot be started ({error})") from error
        finally:
            os.close(theirs_lifeline)
            os.close(theirs_output)
        self._poll.register(self._output, select.POLLIN)
        self._printed, self._print_count = bytearray(), 0
        self._loaded: set[str] = set()
        self._held: OrderedDict[int, int] = OrderedDict()  # picture -> bytes, oldest first
        self._base = self._base_share = 0
        self._look_at = math.inf  # time of the next look at memory; no call is running yet
        self._deadline = time.monotonic() + START_SECONDS
        try:
            hello = read_frame(self._read)[0]
            self.pid = int(hello["pid"])
        except DeadlineError:
            self.stop()
            raise ToolProcessError(f"no worker process within {START_SECONDS:g} s") from None
        except BaseException:
            self.stop()
            raise
        if not hello["landlock"] and not _warned["landlock"]:
            _warned["landlock"] = True
            _log.warning(
                "this kernel has no Landlock: tools in processes may read files and use the "
                "network; they cannot write to files"
            )

    def held_bytes(self, pictures: Mapping[int, Image.Image]) -> int:
        """Returns how much of these pictures it has already."""
        return sum(self._held.get(key, 0) for key in pictures)

    def load(self, address: Mapping[str, str]) -> None:
        """Has it import a tool unless it has already.

        Raises:
            ToolProcessError: the import fails.
        """
        name = json.dumps(address)
        if name in self._loaded:
            return
        self._deadline = time.monotonic() + START_SECONDS
        try:
            self._send_frame({"load": address})
            reply = read_frame(self._read)[0]
        except DeadlineError:
            raise ToolProcessError(f"its import took more than {START_SECONDS:g} s") from None
        finally:
            self._log_output("while it was imported")
        if reply.get("loaded") is not True:
            raise ToolProcessError(f"its import failed in a worker process ({reply.get('error')})")
        self._loaded.add(name)
        self._base, self._base_share = resident_bytes(self.pid), share_bytes(self.pid)

    def call(
        self, request: dict[str, Any], pictures: Mapping[int, Image.Image], seconds: float
    ) -> tuple[dict[str, Any], tuple[Image.Image, ...]]:
        """Sends a call and returns the reply; `reopold_agent.tools.worker` says what they hold.

        Args:
            request: the call.
            pictures: the episode's, by key; those that the tool looks at are sent.
            seconds: time limit of the whole call.

        Raises:
            ToolTimeoutError: the time is up.
            ToolProcessError: the process ended, or took too much.
            WireError: what it sent is not a frame.
        """
        forgotten = self._forget_pictures(self._memory // 8)
        now = time.monotonic()
        self._deadline, self._look_at = now + seconds, now + _LOOK_SECONDS
        try:
            self._send_frame({**request, "forget": forgotten})
            while True:
                message, images = read_frame(self._read)
                if "picture" not in message:
                    return message, images
                key = message["picture"]
                if type(key) is not int or key not in pictures:
                    raise WireError("a request for a picture that is not the episode's")
                self._send_frame({}, pictures[key])
                # Pillow keeps four bytes per RGB pixel.
                self._held[key] = 4 * pictures[key].width * pictures[key].height
        except DeadlineError:
            raise ToolTimeoutError(f"The tool did not finish within {seconds:g} seconds.") from None
        finally:
            self._look_at = math.inf
            for key in pictures:
                if key in self._held:
                    self._held.move_to_end(key)
            self._log_output(f"in a call of {request['call']}")

    @override
    def fit(self) -> bool:
        """Whether it is as good as new after a call; logs the reason if it is not."""
        reason = None
        if len(list(descendants(self._process.pid))) > 1:
            reason = "left processes running"
        elif resident_bytes(self.pid) - self._base > self._memory // 2:
            reason = "kept more than half of its memory"
        elif _entries(f"/proc/{self.pid}/fd") > MAX_FILES:
            reason = "left files open"
        elif _entries(f"/proc/{self.pid}/task") > MAX_THREADS:
            reason = "left threads running"
        elif _bytes_in(self._folder) > sandbox.FILE_BYTES:
            reason = "left large files"
        if reason is not None:
            _log.warning("a tool %s; its process is replaced", reason)
        return reason is None

    @override
    def stop(self) -> None:
        """Ends it with everything it started, and removes its folder."""
        # Closing the pipe is not enough: a fork of this process may hold it open too.
        with contextlib.suppress(OSError, ValueError):
            self._lifeline.write(b"x")
        self._close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            for group in (self.pid, self._process.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    # The stream

    def _send_frame(self, message: dict[str, Any], *pictures: Image.Image) -> None:
        for piece in frame(message, pictures):
            self._send(piece)

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            view = view[self._receive(view) :]
        return data

    @override
    def _watch(self, now: float) -> None:
        """Sums memory and processes of everything that the call has running.

        Raises:
            ToolProcessError: more than it may.
        """
        if now < self._look_at:
            return
        used, count = -self._base_share, 0
        for pid in descendants(self._process.pid):
            count += 1
            used += share_bytes(pid)
        if count > MAX_PROCESSES:
            raise ToolProcessError(f"it started more than {MAX_PROCESSES} processes")
        if used > self._memory:
            raise ToolProcessError(f"it used more than {self._memory >> 20} MB of memory")
        self._look_at = time.monotonic() + _LOOK_SECONDS

    @override
    def _meanwhile(self, ready: set[int]) -> None:
        if self._output.fileno() in ready:
            self._take_output()

    @override
    def _ended(self) -> ToolProcessError:
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return ToolProcessError("its process hung up")
        if status > 128:
            try:
                name = f" ({signal.Signals(status - 128).name})"
            except ValueError:
                name = ""
            return ToolProcessError(f"its process was killed by signal {status - 128}{name}")
        if status < 0 or status == LOST:
            return ToolProcessError("its process was killed")
        return ToolProcessError(f"it ended its process with status {status}")

    def _take_output(self) -> None:
        try:
            data = self._output.read(1 << 16) or b""
        except OSError:
            data = b""
        if not data:  # the tool has closed its standard output
            self._poll.unregister(self._output)
        self._print_count += len(data)
        self._printed += data[: LOGGED_OUTPUT - len(self._printed)]

    def _log_output(self, when: str) -> None:
        with contextlib.suppress(KeyError, ValueError):  # nothing more to come, or it was stopped
            if select.select([self._output], [], [], 0)[0]:
                self._take_output()
        if self._printed:
            more = self._print_count - len(self._printed)
            text = self._printed.decode("utf-8", "replace").rstrip()
            tail = f" ... and {more} bytes more" if more else ""
            _log.info("a tool printed %s:\n%s%s", when, text, tail)
            self._printed.clear()
            self._print_count = 0

    def _forget_pictures(self, most: int) -> list[int]:
        """Drops the pictures that were unused for longest; returns their keys."""
        gone = []
        while sum(self._held.values()) > most:
            gone.append(self._held.popitem(last=False)[0])
        return gone

    @override
    def _close(self) -> None:
        super()._close()
        self._lifeline.close()
        self._output.close()


# What the kernel says; 0 without /proc


def _entries(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
