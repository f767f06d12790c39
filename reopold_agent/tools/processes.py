"""Worker processes for tools, from the side that wants the results.

A few processes serve all episodes of a rollout's process. One that hangs, ends, or takes more
than it may is ended with everything it started, and a new one takes its place. What it sends is
not trusted: `reopold_agent.tools.wire`.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from reopold_agent.errors import (
    ConfigError,
    ToolError,
    ToolProcessError,
    ToolResultError,
    ToolTimeoutError,
)
from reopold_agent.tools.base import EpisodeState, RaisedError, Tool, ToolResult, checked
from reopold_agent.tools.isolation import Isolation, address_of
from reopold_agent.tools.process import ToolProcess
from reopold_agent.tools.wire import PictureKeys, WireError, as_list, plain
from reopold_agent.types import Region

_log = logging.getLogger(__name__)


class ToolProcesses:
    """A bounded set of worker processes, started when they are needed; a `Runs`.

    Args:
        isolation: what they may do.
        landlock: False does without, as on a kernel that has none.
    """

    def __init__(self, isolation: Isolation, *, landlock: bool = True) -> None:
        self._isolation, self._landlock = isolation, landlock
        self.size = isolation.workers or min(8, max(2, os.cpu_count() or 1))
        self._slots = threading.Semaphore(self.size)
        self._lock = threading.Lock()
        self._all: set[ToolProcess] = set()
        self._idle: list[ToolProcess] = []
        self._keys = PictureKeys()
        self._addresses: dict[int, tuple[Tool, dict[str, str]]] = {}
        self._dropped: set[str] = set()

    def __call__(
        self, tool: Tool, state: EpisodeState, arguments: dict[str, Any], seconds: float, /
    ) -> ToolResult:
        """Runs the tool in a process; see `Runs`.

        Raises:
            ToolTimeoutError: also if no process was free in that time.
        """
        if seconds <= 0:
            raise ToolTimeoutError(f"The tool did not finish within {seconds:g} seconds.")
        pictures = {self._keys.of(image): image for image in state.images}
        request: dict[str, Any] = {
            "call": self._address(tool),
            "arguments": arguments,
            "seconds": seconds,
            "state": self._sent(state),
        }
        if not self._slots.acquire(timeout=seconds):
            raise ToolTimeoutError(f"No process for tools was free within {seconds:g} seconds.")
        process: ToolProcess | None = None
        healthy = False
        try:
            process = self._take(pictures)
            process.load(request["call"])
            message, images = process.call(request, pictures, seconds)
            healthy = process.fit()
        except WireError as error:
            raise ToolProcessError(f"its process and this one do not agree ({error})") from error
        finally:
            self._give_back(process, healthy=healthy)
            self._slots.release()
        return _result(message, images, state)

    def check(self, tools: Sequence[Tool], options: Mapping[str, Mapping[str, Any]]) -> None:
        """Imports the tools in a process, once.

        Raises:
            ConfigError: a tool cannot be found or imported there, options are not plain values,
                or no process can be started.
        """
        try:
            plain(_unwrapped(options), "tool_options")
        except ValueError as error:
            raise ConfigError(f"tools in processes need plain options: {error}") from error
        new = [tool for tool in tools if id(tool.function) not in self._addresses]
        for tool in new:
            address_of(tool)
        if not new:
            return
        with self._slots:
            process: ToolProcess | None = None
            healthy = False
            try:
                process = self._take({})
                for tool in new:
                    process.load(address_of(tool))
                healthy = True
            except (ToolError, ToolProcessError, WireError) as error:
                raise ConfigError(
                    f"the tool '{tool.name}' cannot run in a worker process: {error}. "
                    "tools.read names folders that it may read; tools.isolation=none does without "
                    "processes"
                ) from error
            finally:
                self._give_back(process, healthy=healthy)
        for tool in new:
            self._address(tool)

    def pids(self) -> list[int]:
        """Of the processes that run tools."""
        with self._lock:
            return [process.pid for process in self._all]

    def close(self) -> None:
        """Ends all processes. Whoever calls a tool afterwards starts new ones."""
        with self._lock:
            processes, self._all, self._idle = list(self._all), set(), []
        for process in processes:
            process.stop()

    def _take(self, pictures: Mapping[int, Image.Image]) -> ToolProcess:
        """An idle process, best one that has the pictures, or a new one."""
        while True:
            with self._lock:
                if not self._idle:
                    break
                best = max(self._idle, key=lambda process: process.held_bytes(pictures))
                self._idle.remove(best)
            if best.alive:
                return best
            self._give_back(best, healthy=False)
        process = ToolProcess(self._isolation, landlock=self._landlock)
        with self._lock:
            self._all.add(process)
        return process

    def _give_back(self, process: ToolProcess | None, *, healthy: bool) -> None:
        if process is None:
            return
        with self._lock:
            if healthy and process in self._all:
                self._idle.append(process)
                return
            self._all.discard(process)
        process.stop()

    def _address(self, tool: Tool) -> dict[str, str]:
        # The tool is held, so that no other function gets its place in memory.
        known = self._addresses.get(id(tool.function))
        if known is None:
            known = self._addresses[id(tool.function)] = tool, address_of(tool)
        return known[1]

    def _sent(self, state: EpisodeState) -> dict[str, Any]:
        try:
            extra = plain(state.extra, "state.extra")
        except ValueError as error:
            raise ToolResultError(str(error)) from error
        task = state.task
        return {
            "task": {
                "id": task.id,
                "question": task.question,
                "answers": list(task.answers),
                "is_video": task.is_video,
                "metadata": self._plain_items(task.metadata),
                "images": min(len(task.images), len(state.images)),
            },
            "frames": state.frames,
            "options": _unwrapped(state.options),
            "extra": extra,
            "images": [[self._keys.of(image), *image.size] for image in state.images],
        }

    def _plain_items(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in metadata.items():
            try:
                kept[key] = plain(_unwrapped(value), f"metadata['{key}']")
            except ValueError as error:
                if key not in self._dropped:
                    self._dropped.add(key)
                    _log.warning("tools in processes do not see a task's %s", error)
        return kept


_shared: dict[tuple[int, Isolation], ToolProcesses] = {}
_shared_lock = threading.Lock()


def shared(isolation: Isolation) -> ToolProcesses:
    """The processes of this process with these settings: all its environments share them."""
    # By process too: one that was forked must not talk to its parent's.
    with _shared_lock:
        place = os.getpid(), isolation
        if place not in _shared:
            _shared[place] = ToolProcesses(isolation)
            atexit.register(_shared[place].close)
        return _shared[place]


def _result(
    message: Mapping[str, Any], images: tuple[Image.Image, ...], state: EpisodeState
) -> ToolResult:
    """The outcome that a process sent, as if the tool had run here.

    Raises:
        ToolError, ToolResultError, RaisedError: what happened there.
        ToolProcessError: what came is no outcome.
    """
    extra = message.get("extra")
    if isinstance(extra, dict):
        state.extra.clear()
        state.extra.update(extra)
    if "tool_error" in message:
        raise ToolError(str(message["tool_error"]))
    if "result_error" in message:
        raise ToolResultError(str(message["result_error"]))
    if "raised" in message:
        details = str(message.get("details"))
        if "PermissionError" in details:
            details += (
                "(A tool in a worker process reads only what tools.read allows, writes only to its "
                "own folder, and has no network without tools.network=true; docs/tools.md.)"
            )
        raise RaisedError(str(message["raised"])[:80], details)
    text = message.get("text")
    if not isinstance(text, str):
        raise ToolProcessError("its process sent no result")
    try:
        regions = tuple(_region(each) for each in as_list(message.get("regions")))
    except WireError as error:
        raise ToolProcessError(f"its process sent no result ({error})") from error
    return checked(ToolResult(text, images, regions))


def _region(value: object) -> Region:
    number, *box = as_list(value) or [None]
    fine = all(type(side) is float and math.isfinite(side) for side in box)
    if type(number) is not int or len(box) != 4 or not fine:
        raise WireError("a region that is none")
    return Region(number, (box[0], box[1], box[2], box[3]))


def _unwrapped(value: Any) -> Any:
    """Mappings, tuples and NumPy's numbers as what JSON has instead."""
    if isinstance(value, Mapping):
        return {key: _unwrapped(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrapped(each) for each in value]
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value
