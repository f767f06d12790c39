"""Worker processes for tools, from the side that asks them, and which tools run in them.

A few processes serve all episodes of a rollout's process. One that hangs, ends, or takes more
than it may is ended with everything it started, and a new one takes its place. What a process
sends is not trusted (`reopold_agent.tools.wire`).
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from reopold_agent.common.bounded import DeadlineError, RaisedError
from reopold_agent.common.processes import ProcessPool
from reopold_agent.errors import (
    ConfigError,
    ToolError,
    ToolProcessError,
    ToolResultError,
    ToolTimeoutError,
)
from reopold_agent.tools.base import (
    TOOLS,
    EpisodeState,
    Tool,
    ToolResult,
    ToolRunner,
    checked,
    on_thread,
)
from reopold_agent.tools.isolation import Isolation
from reopold_agent.tools.process import ToolProcess
from reopold_agent.tools.wire import PictureKeys, WireError, as_list, plain
from reopold_agent.types import Region

_log = logging.getLogger(__name__)


class ToolProcesses(ProcessPool[ToolProcess]):
    """A bounded set of worker processes that runs tools (a `ToolRunner`).

    Args:
        isolation: what they may do.
        landlock: False does without Landlock, as on a kernel that has none.
    """

    def __init__(self, isolation: Isolation, *, landlock: bool = True) -> None:
        super().__init__(
            lambda: ToolProcess(isolation, landlock=landlock),
            isolation.workers or min(8, max(2, os.cpu_count() or 1)),
        )
        self._keys = PictureKeys()
        self._addresses: dict[int, tuple[Tool, dict[str, str]]] = {}
        self._dropped: set[str] = set()

    def __call__(
        self, tool: Tool, state: EpisodeState, arguments: dict[str, Any], seconds: float, /
    ) -> ToolResult:
        """Runs the tool in a process; raises as `ToolRunner` does.

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
            "takes_state": tool.takes_state,
        }
        try:
            with self.lend(seconds, lambda process: process.held_bytes(pictures)) as process:
                process.load(request["call"])
                message, images = process.call(request, pictures, seconds)
        except DeadlineError:
            raise ToolTimeoutError(
                f"No process for tools was free within {seconds:g} seconds."
            ) from None
        except WireError as error:
            raise ToolProcessError(f"its process sent an invalid message ({error})") from error
        return _result(message, images, state)

    def check(self, tools: Sequence[Tool], options: Mapping[str, Mapping[str, Any]]) -> None:
        """Imports the tools in a process, each once.

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
        try:
            with self.lend() as process:
                for tool in new:
                    process.load(address_of(tool))
        except (ToolError, ToolProcessError, WireError) as error:
            raise ConfigError(
                f"the tool '{tool.name}' cannot run in a worker process: {error}. "
                "tools.read names folders that it may read; tools.isolation=none does without "
                "processes"
            ) from error
        for tool in new:
            self._address(tool)

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
            "sizes": [asdict(state.sizes), state.overview_side, state.side],
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
    """Returns the pool for these settings, which all environments of this process share."""
    # A fork gets a new one: another thread may have held a lock of its parent's.
    with _shared_lock:
        place = os.getpid(), isolation
        if place not in _shared:
            _shared[place] = ToolProcesses(isolation)
        return _shared[place]


def runners_for(
    tools: Sequence[Tool], isolation: Isolation, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, ToolRunner]:
    """Returns what runs each tool, by the name that the tool is shown under.

    Starts a first process and imports there every tool that needs one, so that a tool that cannot
    work there is refused before the first episode.

    Args:
        tools: of one environment.
        isolation: the settings.
        options: the tools' settings, which are sent to a process.

    Raises:
        ConfigError: a tool cannot be found or imported by a process, or its options are not
            plain values.
    """
    isolated = [tool for tool in tools if isolation.covers(tool)]
    runners: dict[str, ToolRunner] = {tool.name: tool.runner or on_thread for tool in tools}
    if isolated:
        processes = shared(isolation)
        processes.check(isolated, options)
        runners.update({tool.name: processes for tool in isolated})
    return runners


def address_of(tool: Tool) -> dict[str, str]:
    """Returns how another process finds the tool's function: by module and name, or by registry.

    Raises:
        ConfigError: it cannot be found; it is, for example, a lambda or defined in a function.
    """
    function = tool.function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module not in (None, "__main__") and name is not None and "<" not in name:
        try:
            thing: Any = importlib.import_module(module)
            for part in name.split("."):
                thing = getattr(thing, part)
        except (ImportError, AttributeError):
            thing = None
        if thing is function or (isinstance(thing, Tool) and thing.function is function):
            return {"module": module, "name": name}
    for known in (tool.name, *tool.aliases):
        if known in TOOLS and TOOLS.get(known).function is function and module != "__main__":
            return {"registered": known}
    raise ConfigError(
        f"the tool '{tool.name}' cannot run in a worker process: its function "
        f"{module}.{name} cannot be imported there. Define it at the top level of a module, or "
        "set tools.isolation=none"
    )


def _result(
    message: Mapping[str, Any], images: tuple[Image.Image, ...], state: EpisodeState
) -> ToolResult:
    """Returns or raises the outcome that a process sent, as if the tool had run here.

    Raises:
        ToolError, ToolResultError, RaisedError: the tool raised or returned something invalid.
        ToolProcessError: the message is not an outcome.
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
        images = _pictures(as_list(message.get("known")), images, state)
    except WireError as error:
        raise ToolProcessError(f"its process sent no result ({error})") from error
    done, reward, success = (message.get(name) for name in ("done", "reward", "success"))
    return checked(
        ToolResult(
            text, images, regions, bool(done), reward, success if success is None else bool(success)
        )
    )


def _pictures(
    known: list[Any], sent: tuple[Image.Image, ...], state: EpisodeState
) -> tuple[Image.Image, ...]:
    """Returns a result's pictures: the episode's own by number, for 0 the next that was sent."""
    if not all(type(each) is int and 0 <= each <= len(state.images) for each in known):
        raise WireError("an invalid number of a picture")
    if known.count(0) != len(sent):
        raise WireError("pictures are missing")
    new = iter(sent)
    return tuple(state.images[each - 1] if each else next(new) for each in known)


def _region(value: object) -> Region:
    number, *box = as_list(value) or [None]
    fine = all(type(side) is float and math.isfinite(side) for side in box)
    if type(number) is not int or len(box) != 4 or not fine:
        raise WireError("an invalid region")
    return Region(number, (box[0], box[1], box[2], box[3]))


def _unwrapped(value: Any) -> Any:
    """Converts mappings, tuples and NumPy numbers to what JSON has instead."""
    if isinstance(value, Mapping):
        return {key: _unwrapped(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrapped(each) for each in value]
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value
