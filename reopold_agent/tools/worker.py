"""The process that runs tools: started by `reopold_agent.tools.processes`, never by hand.

It forks once. The child runs the tools, confined by `reopold_agent.tools.sandbox`; the parent
only waits, and ends everything the child has started as soon as the child, or the process that
wants its results, is gone. The one lifeline is a pipe: anything on it, or its end, means "stop".

Requests and replies are frames (`reopold_agent.tools.wire`)::

    {"load": ADDRESS}                                    -> {"loaded": true} or {"error": TEXT}
    {"call": ADDRESS, "arguments", "state", "seconds"}   -> {"picture": KEY}*, then the outcome

A picture is sent when the tool first looks at it, and kept for later calls.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from reopold_agent.errors import ToolError, ToolResultError
from reopold_agent.tools import sandbox
from reopold_agent.tools.base import TOOLS, EpisodeState, Tool, ToolResult, message_of, usable
from reopold_agent.tools.wire import frame, plain, read_frame
from reopold_agent.types import Task

LOST = 100
"""Exit status of the waiting process when whoever wants the results is gone."""

MAX_TRACEBACK = 20_000


def main() -> None:
    """Runs tools until told to stop. The settings are one JSON object on the command line."""
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to handle
    sandbox.adopt_orphans()
    owner = os.getppid()
    # So that the pipe tells at once when the child ends.
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child:
        os.close(settings["socket"])
        _watch(child, settings["lifeline"], woken, owner, settings["folder"])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in (woken, waker, settings["lifeline"]):
        os.close(each)
    status = 1
    try:
        _serve(settings)
        status = 0
    finally:
        # Not sys.exit: what a tool registered to run at exit could hang.
        if status:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


# The process that waits


def _watch(child: int, lifeline: int, woken: int, owner: int, folder: str) -> None:
    """Waits for an end, makes it everyone's, and exits with how the child ended."""
    status = LOST
    while True:
        ready, _, _ = select.select([lifeline, woken], [], [], 1.0)
        if woken in ready:
            os.read(woken, 4096)
        # A child of whoever owns the pipe may hold it open too; a new parent says it all the same.
        if lifeline in ready or os.getppid() != owner:
            break
        done, how = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(how)
            status = code if code >= 0 else 128 - code
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _end_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


def _end_descendants() -> None:
    """Ends children, and theirs as this process inherits them, until there are none."""
    for _ in range(2000):
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        select.select([], [], [], 0.002)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # no Linux: the process group is all that can be ended
        return []


# The process that runs the tools


def _serve(settings: Mapping[str, Any]) -> None:
    os.setpgid(0, 0)
    sandbox.follow_parent()  # Ray, for one, kills the children of a worker that it ends
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel shall end this process and no other
    read = sandbox.readable(settings["read"])
    version = 0
    if settings["landlock"]:
        version = sandbox.restrict(read, settings["folder"], network=settings["network"])
    sandbox.limit_resources(may_write=version > 0)
    link = _Link(socket.socket(fileno=settings["socket"]))
    link.send({"ready": True, "pid": os.getpid(), "landlock": version})
    functions: dict[str, Callable[..., ToolResult]] = {}
    while True:
        try:
            request = link.receive()[0]
        except EOFError:
            return
        if "load" in request:
            sandbox.limit_memory(None)  # what a tool imports is its developer's choice
            link.send(_load(request["load"], functions))
            sandbox.limit_memory(settings["memory"])
        else:
            function = functions[json.dumps(request["call"])]
            sandbox.limit_cpu(request["seconds"] * (os.cpu_count() or 1) + 5)
            link.send(*_run(function, request, link))
        sys.stdout.flush()
        sys.stderr.flush()


def _load(address: Any, functions: dict[str, Callable[..., ToolResult]]) -> dict[str, Any]:
    try:
        functions[json.dumps(address)] = find(address)
    except BaseException as error:  # a module's own code, which may do anything
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {message_of(error)}"}
    return {"loaded": True}


def find(address: Mapping[str, str]) -> Callable[..., ToolResult]:
    """The function at an address that `reopold_agent.tools.isolation.address_of` made.

    Raises:
        Exception: it cannot be imported, or is not there.
    """
    if "registered" in address:
        return TOOLS.get(address["registered"]).function
    thing: Any = importlib.import_module(address["module"])
    for name in address["name"].split("."):
        thing = getattr(thing, name)
    function: Callable[..., ToolResult] = thing.function if isinstance(thing, Tool) else thing
    return function


def _run(
    function: Callable[..., ToolResult], request: Mapping[str, Any], link: _Link
) -> tuple[dict[str, Any], tuple[Image.Image, ...]]:
    """The outcome of a call, as `reopold_agent.tools.processes` reads it."""
    link.forget(request["forget"])
    state = _state(request["state"], link)
    try:
        result = usable(function(state, **request["arguments"]))
        outcome: dict[str, Any] = {
            "text": result.text,
            "regions": [[r.image, *map(float, r.box)] for r in result.regions],
        }
        pictures = result.images
    except ToolError as error:
        outcome, pictures = {"tool_error": message_of(error)}, ()
    except ToolResultError as error:
        outcome, pictures = {"result_error": message_of(error)}, ()
    except BaseException as error:
        details = traceback.format_exc()[-MAX_TRACEBACK:]
        outcome, pictures = {"raised": type(error).__name__, "details": details}, ()
    try:
        extra = plain(state.extra, "state.extra")
    except (ValueError, RecursionError) as error:
        return {"result_error": message_of(error)}, ()
    return {**outcome, "extra": extra}, pictures


def _state(sent: Mapping[str, Any], link: _Link) -> EpisodeState:
    images: list[Image.Image] = [
        _LazyImage(link, key, (width, height)) for key, width, height in sent["images"]
    ]
    fields = dict(sent["task"])
    shown = tuple(_Shown(image) for image in images[: fields.pop("images")])
    task = Task(**{**fields, "answers": tuple(fields["answers"])}, images=shown)
    return EpisodeState(task, images, sent["frames"], sent["options"], sent["extra"])


@dataclass(frozen=True)
class _Shown:
    """A task's picture, which was opened already."""

    image: Image.Image

    def open(self) -> Image.Image:
        return self.image.copy()


class _LazyImage(Image.Image):
    """A picture whose pixels come when they are first needed, as those of a file do in Pillow."""

    def __init__(self, link: _Link, key: int, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size = "RGB", size
        self._link: _Link | None = link
        self._key = key

    def load(self) -> Any:
        """See Pillow."""
        if self._link is not None:
            link, self._link = self._link, None
            self.im = link.picture(self._key).im
            # Drawing on it then makes a copy first: the next call gets the picture as it was.
            self.readonly = 1
        return super().load()


class _Link:
    """Frames to and from the process that wants the results, and the pictures it sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pictures: dict[int, Image.Image] = {}

    def send(self, message: dict[str, Any], pictures: tuple[Image.Image, ...] = ()) -> None:
        for piece in frame(message, pictures):
            self._connection.sendall(piece)

    def receive(self) -> tuple[dict[str, Any], tuple[Image.Image, ...]]:
        return read_frame(self._read)

    def picture(self, key: int) -> Image.Image:
        if key not in self._pictures:
            self.send({"picture": key})
            (self._pictures[key],) = self.receive()[1]
        return self._pictures[key]

    def forget(self, keys: list[int]) -> None:
        for key in keys:
            self._pictures.pop(key, None)

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            more = self._connection.recv_into(view[got:])
            if not more:
                raise EOFError
            got += more
        return data
