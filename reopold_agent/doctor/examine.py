"""Reads the doctor's command line and runs its checks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from reopold_agent.cli.groups import check_once, prepare_groups
from reopold_agent.common.secrets import Redactor
from reopold_agent.common.terminal import is_terminal
from reopold_agent.config import TrainConfig
from reopold_agent.doctor import gpu, machine, packages, run
from reopold_agent.doctor.base import Check, Finding, run_checks
from reopold_agent.doctor.report import cleaned
from reopold_agent.errors import ConfigError
from reopold_agent.train.settings import compose_run


@dataclass(frozen=True)
class Examination:
    """What a command line asks the doctor to check.

    Attributes:
        words: arguments of the run.
        config: the configuration that they compose.
        judge: settings of the judge.
        folder: the run's folder, which need not exist.
        online: whether to ask the judge's service.
        seconds: time limit for all checks together.
    """

    words: tuple[str, ...]
    config: TrainConfig
    judge: dict[str, Any]
    folder: Path
    online: bool = False
    seconds: float = 300.0


def parse(words: Sequence[str]) -> Examination:
    """Reads a command line.

    Raises:
        ReopoldError: an argument is not a setting, or its value is wrong.
    """
    check_once(words)
    rest, judge = [], []
    folder, online, seconds = Path("runs"), False, 300.0
    for word in words:
        key, _, value = word.partition("=")
        if key == "judge" or key.startswith("judge."):
            judge.append(word)
        elif key == "online":
            if value not in ("true", "false"):
                raise ConfigError(f"online must be true or false, got '{value}'")
            online = value == "true"
        elif key == "seconds":
            try:
                seconds = float(value)
            except ValueError as error:
                raise ConfigError(f"seconds must be a number, got '{value}'") from error
        elif key == "hydra.run.dir":
            folder = Path(value)
        else:
            rest.append(word)
    return Examination(tuple(rest), compose_run(rest), _judge(judge), folder, online, seconds)


def checks_for(request: Examination) -> list[Check]:
    """Returns all checks in order."""
    config = request.config
    torch = gpu.TORCH_SECONDS
    return [
        Check("python", packages.python),
        Check("packages", packages.core),
        Check("extras", lambda: packages.extras(config)),
        Check("conflicts", packages.conflicts),
        Check("torch", lambda: gpu.torch_and_gpus(config), torch + 30),
        Check("torchvision", lambda: gpu.torchvision(config), torch + 10),
        Check(
            "flash-attn",
            lambda: packages.flash_attention(config, gpu.is_used(config)),
            torch + 70,
        ),
        Check("limits", lambda: machine.limits(config)),
        Check("clock", machine.clock),
        Check("ray", lambda: machine.ray_cluster(config)),
        Check(
            "disk", lambda: machine.disks(config, request.folder, run.downloads(config)), torch + 30
        ),
        Check("memory", lambda: machine.memory(request.words, config), torch + 30),
        Check("plugins", run.plugins, 60),
        Check("models", lambda: run.models(config), 120),
        Check("servers", lambda: run.servers(config), 60),
        Check("data", lambda: run.data(config), 30),
        Check("environment", lambda: run.environment(config), 120),
        Check("keys", lambda: run.keys(request.judge, config, request.online), 40),
    ]


def examine(request: Examination, console: Console | None = None) -> list[Finding]:
    """Runs the checks and returns their findings without secrets.

    Args:
        request: what to check.
        console: shows the current check, if it is a terminal.
    """
    redact = Redactor(os.environ)
    live = console is not None and is_terminal(console)
    status = console.status("") if console is not None and live else nullcontext()
    with status as spinner:
        found = run_checks(
            checks_for(request),
            request.seconds,
            lambda check: None if spinner is None else spinner.update(f"checking {check.area}"),
        )
    return cleaned(found, redact)


def _judge(words: Sequence[str]) -> dict[str, Any]:
    """Returns the judge's settings as `reopold_agent.evaluate` composes them."""
    prepare_groups(words, "evaluate")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            composed = compose("evaluate", list(words)).judge
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return {str(key): value for key, value in values.items()}
