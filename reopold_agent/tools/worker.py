"""The process that runs tools; `reopold_agent.tools.process` starts it.

It forks once. The child runs the tools, confined by `reopold_agent.tools.sandbox`. The parent is
its guard: it only waits, and ends everything that the child has started as soon as the child or
the process that asks for results has ended. The lifeline is a pipe from the latter: any byte, or
its end, means "stop".

Requests and replies are frames (`reopold_agent.tools.wire`)::

    {"load": ADDRESS}                       -> {"loaded": true} or {"error": TEXT}
    {"call": ADDRESS, "arguments", "state", "takes_state", "seconds"}
                                            -> {"picture": KEY}*, then the outcome

A picture is sent when a tool first reads it, and kept for later calls.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from typing_extensions import override

from reopold_agent.common.guard import guard_pipe, watch
from reopold_agent.common.pixels import PixelLimits, ShownSizes
from reopold_agent.common.processes import adopt_orphans, die_with_parent
from reopold_agent.errors import ToolError, ToolResultError
from reopold_agent.tools import sandbox
from reopold_agent.tools.base import TOOLS, EpisodeState, Tool, ToolResult, message_of, usable
from reopold_agent.tools.wire import frame, plain, read_frame
from reopold_agent.types import Task

MAX_TRACEBACK = 20_000


def main() -> None:
    """Runs tools until told to stop. The command line holds the settings as one JSON object."""
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to handle
    adopt_orphans()
    with guard_pipe() as woken:
        owner = os.getppid()
        child = os.fork()
        if child:
            os.close(settings["socket"])
            status = watch(child, settings["lifeline"], woken, owner)
            shutil.rmtree(settings["folder"], ignore_errors=True)
            os._exit(status)
    os.close(settings["lifeline"])
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


# The process that runs the tools


def _serve(settings: Mapping[str, Any]) -> None:
    os.setpgid(0, 0)
    die_with_parent()  # Ray, for example, kills only the direct children of a worker that it ends
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the kernel ends this process first
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
    """Returns the function at an address that `reopold_agent.tools.processes.address_of` made.

    Raises:
        Exception: the module cannot be imported or has no such function.
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
    """Runs a call and returns its outcome for `reopold_agent.tools.processes`."""
    link.forget(request["forget"])
    state = _state(request["state"], link)
    given = list(state.images)
    first = (state,) if request["takes_state"] else ()
    try:
        result = usable(function(*first, **request["arguments"]), given)
        numbers = {id(image): n for n, image in enumerate(given, 1) if image.readonly}
        outcome: dict[str, Any] = {
            "text": result.text,
            "known": [numbers.get(id(image), 0) for image in result.images],
            "regions": [[r.image, *map(float, r.box)] for r in result.regions],
            "done": bool(result.done),
            "reward": None if result.reward is None else float(result.reward),
            "success": None if result.success is None else bool(result.success),
        }
        pictures = tuple(image for image in result.images if id(image) not in numbers)
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
    sizes, overview_side, side = sent["sizes"]
    limits = {k: PixelLimits(**sizes[k]) for k in ("prompt", "observation") if sizes[k] is not None}
    return EpisodeState(
        task,
        images,
        sent["frames"],
        sent["options"],
        sent["extra"],
        ShownSizes(**limits, factor=sizes["factor"]),
        overview_side,
        side,
    )


@dataclass(frozen=True)
class _Shown:
    """A picture of a task that has been opened already."""

    image: Image.Image

    def open(self) -> Image.Image:
        return self.image.copy()


class _LazyImage(Image.Image):
    """A picture whose pixels are fetched when they are first needed, like those of a file."""

    def __init__(self, link: _Link, key: int, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size = "RGB", size
        # Pillow copies before it draws, and the copy is not read-only: the next call gets the
        # picture unchanged, and a result that is this picture need not be sent back.
        self.readonly = 1
        self._link: _Link | None = link
        self._key = key

    @override
    def load(self) -> Any:
        if self._link is not None:
            link, self._link = self._link, None
            self.im = link.picture(self._key).im
        return super().load()


class _Link:
    """The connection to the process that asks for results, and the pictures that it sent."""

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
