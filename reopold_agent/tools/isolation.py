"""Where tools run: on threads of the rollout's process, or in worker processes of their own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reopold_agent.errors import ConfigError
from reopold_agent.tools.base import TOOLS, Runs, Tool, on_thread

Mode = Literal["none", "plugins", "process"]


@dataclass(frozen=True)
class Isolation:
    """Which tools run in worker processes, and what those may do; docs/tools.md.

    Attributes:
        mode: ``none``: all tools on threads; ``plugins``: tools of other packages than this one
            in processes; ``process``: all tools in processes.
        memory_mb: what a process may take beyond what it has once the tool is imported.
        workers: processes at most, each for one call at a time; None: one per processor, from 2
            to 8.
        read: files and folders that tools may read, beside what Python itself needs.
        network: whether tools may use TCP.
        environment: variables that tools may see although their names sound like a secret's.

    Raises:
        ConfigError: a value that cannot be.
    """

    mode: Mode = "none"
    memory_mb: int = 1024
    workers: int | None = None
    read: tuple[str, ...] = ()
    network: bool = False
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("none", "plugins", "process"):
            raise ConfigError(
                f"the isolation of tools is none, plugins or process, got '{self.mode}'"
            )
        if self.memory_mb < 16:
            raise ConfigError(f"tools need a memory_mb of at least 16, got {self.memory_mb}")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"tools need at least 1 of workers, got {self.workers}")
        if self.mode != "none" and not hasattr(os, "fork"):
            raise ConfigError("tools in processes need Linux or macOS; use tools.isolation=none")

    def covers(self, tool: Tool) -> bool:
        """Whether that tool runs in a process."""
        own = tool.function.__module__.split(".")[0] == __name__.split(".")[0]
        return self.mode == "process" or (self.mode == "plugins" and not own)


def runs(
    tools: Sequence[Tool], isolation: Isolation, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Runs]:
    """Where each tool runs, by the name it is shown by.

    A first process is started here, and every tool that needs one is imported in it, so that what
    cannot work is said before the first episode.

    Args:
        tools: of one environment.
        isolation: the settings.
        options: the tools' settings, which a process must be sent.

    Raises:
        ConfigError: a tool cannot be found or imported by a process, or its options are not
            plain values.
    """
    inside = [tool for tool in tools if isolation.covers(tool)]
    places: dict[str, Runs] = {tool.name: on_thread for tool in tools}
    if inside:
        from reopold_agent.tools.processes import shared

        processes = shared(isolation)
        processes.check(inside, options)
        places.update({tool.name: processes for tool in inside})
    return places


def address_of(tool: Tool) -> dict[str, str]:
    """How another process finds the tool's function: by module and name, or in the registry.

    Raises:
        ConfigError: it cannot; a lambda, say, or a function inside another.
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
