"""Looks for what would stop a run: ``python -m reopold_agent.doctor recipe=paper_agentic``.

Versions, extras, GPUs, memory and disk against the chosen run, models, data, environment, plugins,
keys. Each finding is ok, info, a warning or a problem, and says what to do. Words that
``python -m reopold_agent.train`` takes are taken here too, and these (docs/doctor.md):

  judge=gemini      look at that judge's key as well (judge.NAME=VALUE: its settings)
  online=true       ask the judge's service whether it takes the key (it lists its models)
  seconds=300       for all checks together
  --json            for machines

Exit status: 0 without problems, 1 with some, 2 if the words are wrong. No key, token or password is
shown.
"""

from __future__ import annotations

import os
import sys
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

import reopold_agent
from reopold_agent.checks import gpu, machine, packages, run
from reopold_agent.checks.base import Check, Finding, run_checks
from reopold_agent.checks.report import as_json, cleaned, show
from reopold_agent.checks.secrets import Redactor
from reopold_agent.command import PROBLEMS, errors_for_people
from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.hydra_groups import prepare_groups
from reopold_agent.plan import compose_run
from reopold_agent.tracking.progress import is_terminal


@dataclass(frozen=True)
class Examined:
    """What a command line asks to look at.

    Attributes:
        words: of the run.
        config: that they compose.
        judge: the judge's settings.
        folder: the run's, or where it would be.
        online: whether the judge's service is asked.
        seconds: for everything.
    """

    words: tuple[str, ...]
    config: TrainConfig
    judge: dict[str, Any]
    folder: Path
    online: bool = False
    seconds: float = 300.0


def examined(words: Sequence[str]) -> Examined:
    """Reads a command line.

    Raises:
        ReopoldError: a word is no setting, or its value is wrong.
    """
    rest, judge = [], []
    folder, online, seconds = Path("runs"), False, 300.0
    for word in words:
        key, _, value = word.partition("=")
        if key == "judge" or key.startswith("judge."):
            judge.append(word)
        elif key == "online":
            if value not in ("true", "false"):
                raise ConfigError(f"online is true or false, got '{value}'")
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
    return Examined(tuple(rest), compose_run(rest), _judge(judge), folder, online, seconds)


def checks_of(asked: Examined) -> list[Check]:
    """Everything that is looked at, in order."""
    config = asked.config
    torch = gpu.TORCH_SECONDS
    return [
        Check("python", packages.python),
        Check("packages", packages.core),
        Check("extras", lambda: packages.extras(config)),
        Check("conflicts", packages.conflicts),
        Check("torch", lambda: gpu.torch_and_gpus(config), torch + 30),
        Check("torchvision", lambda: gpu.torchvision(config), torch + 10),
        Check("flash-attn", lambda: packages.flash_attention(config), 70),
        Check("limits", lambda: machine.limits(config)),
        Check("clock", machine.clock),
        Check("ray", lambda: machine.ray_cluster(config)),
        Check("disk", lambda: machine.disks(config, asked.folder, run.downloads(config)), 30),
        Check("memory", lambda: machine.memory(asked.words, config), torch + 30),
        Check("plugins", run.plugins, 60),
        Check("models", lambda: run.models(config), 120),
        Check("servers", lambda: run.servers(config), 60),
        Check("data", lambda: run.data(config), 30),
        Check("environment", lambda: run.environment(config), 120),
        Check("keys", lambda: run.keys(asked.judge, config, asked.online), 40),
    ]


def examine(asked: Examined, console: Console | None = None) -> list[Finding]:
    """Runs the checks; what they found is free of secrets.

    Args:
        asked: what to look at.
        console: shows what is being looked at, if it is a terminal.
    """
    redact = Redactor(os.environ)
    live = console is not None and is_terminal(console)
    status = console.status("") if console is not None and live else nullcontext()
    with status as spinner:
        found = run_checks(
            checks_of(asked),
            asked.seconds,
            lambda check: None if spinner is None else spinner.update(f"looking at {check.area}"),
        )
    return cleaned(found, redact)


def _judge(words: Sequence[str]) -> dict[str, Any]:
    """The judge's settings as `reopold_agent.evaluate` composes them."""
    prepare_groups(words, "evaluate")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            composed = compose("evaluate", list(words)).judge
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return {str(key): value for key, value in values.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    with errors_for_people():
        unknown = [w for w in words if w.startswith("-") and w != "--json"]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]}; there are --json and --help")
        asked = examined([word for word in words if word != "--json"])
        console = Console()
        found = examine(asked, None if "--json" in words else console)
        if "--json" in words:
            print(as_json(found, reopold_agent.__version__))
        else:
            show(found, console)
        return PROBLEMS if any(f.status == "problem" for f in found) else 0
    return 2  # never reached: errors end the process


if __name__ == "__main__":
    sys.exit(main())
