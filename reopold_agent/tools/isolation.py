"""Which tools run in worker processes, and what they may do there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from reopold_agent.config import ToolsConfig
from reopold_agent.errors import ConfigError
from reopold_agent.tools.base import Tool

Mode = Literal["none", "plugins", "process"]


@dataclass(frozen=True)
class Isolation:
    """Which tools run in worker processes, and what these may do; see docs/tools.md.

    Attributes:
        mode: ``none``: all tools on threads; ``plugins``: tools of other packages than this one
            in processes; ``process``: all tools in processes.
        memory_mb: memory that a process may use beyond what it uses after importing the tool, MiB.
        workers: most processes, each for one call at a time; None: one per processor, but 2 to 8.
        read: files and folders that tools may read, besides what Python itself needs.
        network: whether tools may use TCP.
        environment: variables that tools may see although their names look like a secret's.

    Raises:
        ConfigError: an invalid value, or the system cannot fork.
    """

    mode: Mode = "none"
    memory_mb: int = 1024
    workers: int | None = None
    read: tuple[str, ...] = ()
    network: bool = False
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(
                f"the isolation of tools must be none, plugins or process, got '{self.mode}'"
            )
        ToolsConfig(self.mode, self.memory_mb, self.workers)  # it checks the bounds
        if self.mode != "none" and not hasattr(os, "fork"):
            raise ConfigError("tools in processes need Linux or macOS; use tools.isolation=none")

    def covers(self, tool: Tool) -> bool:
        """Whether the tool runs in a process."""
        if tool.runner is not None:
            return False
        own = tool.function.__module__.split(".")[0] == __name__.split(".")[0]
        return self.mode == "process" or (self.mode == "plugins" and not own)
