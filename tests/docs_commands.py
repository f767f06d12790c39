"""Checks commands without starting them; runs as a separate process.

Standard input is a JSON list of [place, words]; standard output a JSON list of [place, command,
what is wrong]. Configurations are composed and checked by the commands' own functions, plans are
made, options parsed by the commands' own parsers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from packaging.requirements import Requirement

from reopold_agent.cli.commands import module_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
HYDRA_FLAGS = ("--help", "--cfg", "job", "-m", "--multirun")


class ParsedError(Exception):
    """Raised once a parser has accepted all options, to stop there."""


def check(words: Sequence[str]) -> None:
    """Raises an error if a command is invalid."""
    program, *rest = words
    if program == "pip":
        return check_pip(rest)
    if program.startswith("python") and rest[:1] == ["-m"]:
        module, arguments = rest[1], rest[2:]
        if module.split(".")[0] != "reopold_agent":
            return None
        return check_module(module, arguments)
    if program.startswith("python"):
        script = next((word for word in rest if word.endswith(".py")), None)
        if script is not None and not (ROOT / script).is_file():
            raise FileNotFoundError(script)
        return None
    if program.startswith("reopold-"):
        entry = PROJECT["scripts"][program].partition(":")[0]
        return check_module(entry, rest)
    name = rest[0] if rest else "--help"
    if name.startswith("-") or name == "completion":
        return ends_well("reopold_agent.cli.__main__", rest)
    return check_module(module_of(name).removesuffix(".__main__"), rest[1:])


def check_pip(words: Sequence[str]) -> None:
    """Checks that the extras and folders of a command exist."""
    if words[:1] != ["install"]:
        return
    for word in words[1:]:
        if re.match(r"\.|examples/|reopold-agent\b", word):
            path, _, extras = word.rstrip("]").partition("[")
            if (
                not path.startswith("reopold-agent")
                and not (ROOT / path / "pyproject.toml").exists()
            ):
                raise FileNotFoundError(f"{path} is no project")
            for extra in filter(None, extras.split(",")):
                PROJECT["optional-dependencies"][extra.strip()]
        elif re.match(r"[a-zA-Z]", word) and "/" not in word:
            Requirement(word)


def check_module(module: str, words: Sequence[str]) -> None:
    """Checks the command with its own parser."""
    words = [substituted(word) for word in words]
    if "--config-dir" in words:  # a folder of the reader's: what follows may be options in it
        words = words[: words.index("--config-dir")]
    if {"-m", "--multirun"} & set(words):  # each value is a run; the first stands for all
        words = [re.sub(r"^([\w.]+=[^\[{,]+),.*", r"\1", word) for word in words]
    flags = [word for word in words if word in HYDRA_FLAGS]
    settings = [word for word in words if word not in HYDRA_FLAGS]
    special: dict[str, Callable[[list[str]], Any]] = {
        "reopold_agent.train": check_train,
        "reopold_agent.evaluate": check_evaluate,
        "reopold_agent.judge": check_judge,
        "reopold_agent.serve": check_serve,
        "reopold_agent.study": check_study,
        "reopold_agent.plan": check_plan,
        "reopold_agent.play": check_play,
        "reopold_agent.doctor": check_doctor,
        "reopold_agent.preflight": check_preflight,
    }
    if module not in special:
        options_only(module, words)
    elif not (flags and not settings and module != "reopold_agent.train"):
        special[module](settings)


def substituted(word: str) -> str:
    """Variables of the shell, which stand for numbers or names in our pages (not Hydra's)."""
    return re.sub(r"\$(?!\{)(\w+)", "1", word)


def check_train(words: list[str]) -> None:
    from reopold_agent.objectives import make_objective
    from reopold_agent.train.settings import compose_run

    config = compose_run([word for word in words if not word.startswith("hydra.")])
    settings = dict(config.objective)
    make_objective(settings.pop("name"), settings)


def composed(name: str, words: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return compose(name, [word for word in words if not word.startswith("hydra.")])


def check_evaluate(words: list[str]) -> None:
    from reopold_agent.evaluate.benchmarks import select
    from reopold_agent.evaluate.run import load_config
    from reopold_agent.evaluate.words import prepared_words

    config, _ = load_config(composed("evaluate", prepared_words(words)))
    select(config.benchmarks, config.benchmark, config.suite)


def check_judge(words: list[str]) -> None:
    from reopold_agent.cli.hydra import plain_values
    from reopold_agent.config import build
    from reopold_agent.judge.__main__ import CheckConfig, prepared_words

    build(CheckConfig, plain_values(composed("judge", prepared_words(words))))


def check_serve(words: list[str]) -> None:
    from reopold_agent.cli.hydra import plain_values
    from reopold_agent.config import build
    from reopold_agent.serve.serving import ServeConfig

    ours = [re.sub(r"^model=", "checkpoint=", word) for word in words]
    build(ServeConfig, plain_values(composed("serve", ours)))


def check_study(words: list[str]) -> None:
    from reopold_agent.study.options import parse

    parse(words)


def check_plan(words: list[str]) -> None:
    from reopold_agent.plan.compose import paper_plans, plan_run

    settings = [w for w in words if not w.startswith(("-", "measured="))]
    if set(words) - set(settings) - {"--json", "--paper"} and not any(
        w.startswith("measured=") for w in words
    ):
        raise ValueError(f"unknown options among {words}")
    if "--paper" in words:
        assert len(paper_plans()) == 5
    else:
        assert plan_run(settings).gpu_hours > 0


def check_play(words: list[str]) -> None:
    from reopold_agent.play.options import split_words
    from reopold_agent.train.settings import compose_run

    compose_run(split_words(words)[1])


def check_doctor(words: list[str]) -> None:
    from reopold_agent.doctor.examine import parse

    if [word for word in words if word.startswith("-") and word != "--json"]:
        raise ValueError(f"unknown options among {words}")
    parse([word for word in words if word != "--json"])


def check_preflight(words: list[str]) -> None:
    from reopold_agent.preflight.__main__ import parse
    from reopold_agent.train.settings import compose_run

    compose_run(parse([word for word in words if word != "--json"])[1])


def ends_well(module: str, words: Sequence[str]) -> None:
    """Runs a command that prints something and ends."""
    with mock.patch.object(sys, "argv", [module, *words]):
        status = importlib.import_module(module).main()
    if status:
        raise ValueError(f"it ends with status {status}")


def options_only(module: str, words: Sequence[str]) -> None:
    """Runs a command up to where its parser has taken all options."""
    found = importlib.util.find_spec(module)
    if found is None:
        raise ModuleNotFoundError(module)
    if found.submodule_search_locations is not None:
        module = f"{module}.__main__"
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        raise ParsedError

    main = importlib.import_module(module).main
    with (
        mock.patch.object(sys, "argv", [module, *words]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
    ):
        try:
            main()
        except ParsedError:
            return
        except SystemExit as error:
            if error.code not in (0, None):
                raise ValueError(f"it ends with status {error.code}") from error
            return
    raise ValueError("it did not parse its options with argparse")


def run() -> None:
    """Standard input to standard output."""
    wrong = []
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a command prints is not the answer
    for place, words in json.load(sys.stdin):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            wrong.append([place, shlex.join(words), f"{type(error).__name__}: {error}"])
    json.dump(wrong, results)
    results.close()


if __name__ == "__main__":
    run()
