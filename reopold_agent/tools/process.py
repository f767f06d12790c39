"""One worker process for tools: started, asked, watched and ended from here."""

from __future__ import annotations

import contextlib
import io
import json
import logging
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from reopold_agent.errors import ToolProcessError, ToolTimeoutError
from reopold_agent.tools import sandbox
from reopold_agent.tools.isolation import Isolation
from reopold_agent.tools.wire import WireError, frame, read_frame
from reopold_agent.tools.worker import LOST

_log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""For starting a process, and again for importing a tool in it; no call's limit counts these."""

MAX_PROCESSES = 64
"""That one call may have running at once."""

MAX_THREADS, MAX_FILES = 64, 128
"""A process that has more of them after a call is replaced: its tool leaks them."""

LOGGED_OUTPUT = 4000
"""Bytes of what a call prints that go to the log."""

_TICK = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

# The import path is this process's: plugins are found where they are found here.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path']; "
    "from reopold_agent.tools.worker import main; main()"
)
_told = {"landlock": False}


class ToolProcess:
    """A process that runs one call at a time.

    Args:
        isolation: what it may do.
        landlock: whether to use Landlock where there is one.

    Attributes:
        pid: of the process that runs the tools (its parent only waits).

    Raises:
        ToolProcessError: it does not start.
    """

    def __init__(self, isolation: Isolation, *, landlock: bool) -> None:
        self._memory = isolation.memory_mb << 20
        self._folder = Path(tempfile.mkdtemp(prefix="reopold-tool-"))
        self._socket, theirs = socket.socketpair()
        theirs_lifeline, lifeline = os.pipe()
        output, theirs_output = os.pipe()
        os.set_blocking(output, False)
        # As objects: a number might be another file's by the time that it is used late.
        self._lifeline, self._output = io.FileIO(lifeline, "w"), io.FileIO(output)
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
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=theirs_output,
                stderr=theirs_output,
                pass_fds=(theirs.fileno(), theirs_lifeline),
                env=sandbox.environment(isolation.environment, str(self._folder)),
                cwd=self._folder,
                start_new_session=True,
            )
        except OSError as error:
            self._close()
            raise ToolProcessError(f"a worker process cannot be started ({error})") from error
        finally:
            theirs.close()
            os.close(theirs_lifeline)
            os.close(theirs_output)
        self.pid = 0
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        self._printed, self._print_count = bytearray(), 0
        self._loaded: set[str] = set()
        self._held: OrderedDict[int, int] = OrderedDict()  # picture -> bytes, oldest first
        self._base = self._base_share = 0
        self._deadline = self._look_at = time.monotonic() + START_SECONDS
        self._watched = False
        try:
            hello = read_frame(self._read)[0]
            self.pid = int(hello["pid"])
        except ToolTimeoutError:
            self.stop()
            raise ToolProcessError(f"no worker process within {START_SECONDS:g} s") from None
        except BaseException:
            self.stop()
            raise
        if not hello["landlock"] and not _told["landlock"]:
            _told["landlock"] = True
            _log.warning(
                "this kernel has no Landlock: tools in processes may read files and use the "
                "network; they cannot write to files"
            )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._guard.poll() is None

    def held_bytes(self, pictures: Mapping[int, Image.Image]) -> int:
        """How much of these pictures it has already."""
        return sum(self._held.get(key, 0) for key in pictures)

    def load(self, address: Mapping[str, str]) -> None:
        """Has it import a tool, if it has not yet.

        Raises:
            ToolProcessError: it cannot.
        """
        name = json.dumps(address)
        if name in self._loaded:
            return
        self._deadline, self._watched = time.monotonic() + START_SECONDS, False
        try:
            self._send({"load": address})
            reply = read_frame(self._read)[0]
        except ToolTimeoutError:
            raise ToolProcessError(f"its import took more than {START_SECONDS:g} s") from None
        finally:
            self._log_output("while it was imported")
        if reply.get("loaded") is not True:
            raise ToolProcessError(f"its import failed in a worker process ({reply.get('error')})")
        self._loaded.add(name)
        self._base, self._base_share = _resident(self.pid), _share(self.pid)

    def call(
        self, request: dict[str, Any], pictures: Mapping[int, Image.Image], seconds: float
    ) -> tuple[dict[str, Any], tuple[Image.Image, ...]]:
        """Sends a call and returns the reply; see `reopold_agent.tools.worker`.

        Args:
            request: the call.
            pictures: the episode's, by key; those that the tool looks at are sent.
            seconds: for everything.

        Raises:
            ToolTimeoutError: the time is up.
            ToolProcessError: the process ended, or took too much.
            WireError: what it sent is no frame.
        """
        forgotten = self._forget(self._memory // 8)
        self._deadline, self._watched = time.monotonic() + seconds, True
        self._look_at = time.monotonic() + _TICK
        try:
            self._send({**request, "forget": forgotten})
            while True:
                message, images = read_frame(self._read)
                if "picture" not in message:
                    return message, images
                key = message["picture"]
                if type(key) is not int or key not in pictures:
                    raise WireError("a picture is wanted that is not the episode's")
                self._send({}, pictures[key])
                # Pillow keeps four bytes of an RGB pixel.
                self._held[key] = 4 * pictures[key].width * pictures[key].height
        except ToolTimeoutError:
            raise ToolTimeoutError(f"The tool did not finish within {seconds:g} seconds.") from None
        finally:
            for key in pictures:
                if key in self._held:
                    self._held.move_to_end(key)
            self._log_output(f"in a call of {request['call']}")

    def fit(self) -> bool:
        """Whether it is as good as new after a call; says in the log why not."""
        reason = None
        if len(list(_tree(self._guard.pid))) > 1:
            reason = "left processes running"
        elif _resident(self.pid) - self._base > self._memory // 2:
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

    def stop(self) -> None:
        """Ends it with everything it started, and removes its folder."""
        # A word, since a fork of this process may hold the pipe open too.
        with contextlib.suppress(OSError, ValueError):
            self._lifeline.write(b"x")
        self._close()
        try:
            self._guard.wait(5.0)
        except subprocess.TimeoutExpired:
            for group in (self.pid, self._guard.pid):
                if group:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(group, signal.SIGKILL)
            self._guard.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    # The stream

    def _send(self, message: dict[str, Any], *pictures: Image.Image) -> None:
        for piece in frame(message, pictures):
            view = memoryview(piece)
            while view:
                self._wait(select.POLLOUT)
                try:
                    view = view[self._socket.send(view) :]
                except BlockingIOError:
                    continue
                except OSError:
                    raise self._ended() from None

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            self._wait(select.POLLIN)
            try:
                more = self._socket.recv_into(view[got:])
            except BlockingIOError:
                continue
            except OSError:
                more = 0
            if not more:
                raise self._ended()
            got += more
        return data

    def _wait(self, event: int) -> None:
        """Until the socket is ready; takes what is printed, and looks at memory meanwhile."""
        self._poll.register(self._socket, event)
        while True:
            now = time.monotonic()
            if now >= self._deadline:
                raise ToolTimeoutError("The time is up.")
            if self._watched and now >= self._look_at:
                self._look()
                self._look_at = time.monotonic() + _TICK
            if not self.alive:  # a descendant may still hold the other end of the socket
                raise self._ended()
            limit = min(_TICK, self._deadline - now)
            ready = dict(self._poll.poll(1000 * limit + 1))
            if self._output.fileno() in ready:
                self._take_output()
            if self._socket.fileno() in ready:
                return

    def _look(self) -> None:
        """Sums memory and processes of everything that the call has running.

        Raises:
            ToolProcessError: more than it may.
        """
        used, count = -self._base_share, 0
        for pid in _tree(self._guard.pid):
            count += 1
            used += _share(pid)
        if count > MAX_PROCESSES:
            raise ToolProcessError(f"it started more than {MAX_PROCESSES} processes")
        if used > self._memory:
            raise ToolProcessError(f"it used more than {self._memory >> 20} MB of memory")

    def _ended(self) -> ToolProcessError:
        try:
            status = self._guard.wait(5.0)
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
        with contextlib.suppress(KeyError):  # nothing more to come
            if select.select([self._output], [], [], 0)[0]:
                self._take_output()
        if self._printed:
            more = self._print_count - len(self._printed)
            text = self._printed.decode("utf-8", "replace").rstrip()
            tail = f" ... and {more} bytes more" if more else ""
            _log.info("a tool printed %s:\n%s%s", when, text, tail)
            self._printed.clear()
            self._print_count = 0

    def _forget(self, most: int) -> list[int]:
        """Drops the pictures that were not used for longest; returns their keys."""
        gone = []
        while sum(self._held.values()) > most:
            gone.append(self._held.popitem(last=False)[0])
        return gone

    def _close(self) -> None:
        for end in (self._socket, self._lifeline, self._output):
            end.close()


# What the kernel says; nothing where there is no /proc


def _tree(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    left = [pid]
    while left:
        parent = left.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    for child in map(int, file.read().split()):
                        left.append(child)
                        yield child


def _resident(pid: int) -> int:
    """Bytes of memory that a process has, shared ones included."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


def _share(pid: int) -> int:
    """Bytes of memory of a process, those that it shares with others divided among them."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            line = next(each for each in file if each.startswith("Pss:"))
            return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return _resident(pid)


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
