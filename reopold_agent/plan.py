"""Plans a run before it is started: ``python -m reopold_agent.plan recipe=paper_agentic gpus=8``.

Memory per GPU, tokens, FLOPs and seconds of a step, GPU-hours, and what does not fit. Words that
``python -m reopold_agent.train`` takes are taken here too, and these (docs/plan.md):

  gpus=8            GPUs in all; null: as the engine says
  gpu=h100_80gb     which
  mfu=0.4           share of peak FLOP/s that is achieved
  bandwidth=0.8     share of peak memory bandwidth that decoding achieves
  overhead=0.02     seconds of a decoding iteration besides
  prompt=, pictures=, response=, observation=
                    mean text tokens of a prompt, pictures in it, tokens of a response and of what
                    tools return
  schedule=shared   all GPUs do everything in turn, as in the paper; pools: our verl engine
  measured=RUN      rates and, for the same environment, lengths from a run that was made
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from reopold_agent.command import errors_for_people
from reopold_agent.config import TrainConfig, build
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.hydra_groups import prepare_groups
from reopold_agent.planning.architecture import Architecture, find_architecture
from reopold_agent.planning.estimate import Plan, make_plan
from reopold_agent.planning.hardware import Gpu, Rates, assumed_rates, find_gpu
from reopold_agent.planning.measured import measured_rates
from reopold_agent.planning.paper import PAPER_RUNS
from reopold_agent.planning.report import as_values, print_paper, print_plan
from reopold_agent.planning.workload import Workload, assumed_workload
from reopold_agent.train import load_config
from reopold_agent.user_errors import explain, program

_NUMBERS = ("mfu", "bandwidth", "overhead", "prompt", "pictures", "response", "observation")
_WORDS = ("gpu", "schedule", "measured")
_NODE = 8
"""GPUs of a machine, for ``gpus=`` of more than that."""


def compose_run(words: Sequence[str]) -> TrainConfig:
    """What ``python -m reopold_agent.train`` composes from these words.

    Raises:
        ConfigError: a word is no setting.
        UnknownNameError: a group has no such option.
    """
    prepare_groups(words)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            return load_config(compose("train", list(words)))[0]
    except (HydraException, OmegaConfBaseException) as error:
        told = explain(error, "train")
        assert told is not None  # all errors of Hydra are explained
        raise ConfigError("\n".join(told)) from error


def split_words(words: Sequence[str]) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """The plan's numbers (``gpus`` among them), its words, and the run's.

    Raises:
        ConfigError: not a number where one is needed.
    """
    numbers: dict[str, float] = {}
    names: dict[str, str] = {}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "gpus" or key in _NUMBERS:
            if key == "gpus" and value == "null":
                continue
            try:
                numbers[key] = float(value)
            except ValueError as error:
                raise ConfigError(f"{key} must be a number, got '{value}'") from error
            if numbers[key] < 0 or (key == "gpus" and not _whole(numbers[key])):
                raise ConfigError(f"{key}={value} makes no sense")
        elif key in _WORDS:
            names[key] = value
        else:
            rest.append(word)
    return numbers, names, rest


def _whole(count: float) -> bool:
    return count >= 1 and count == int(count)


def plan_run(words: Sequence[str], gpu: Gpu | None = None) -> Plan:
    """The plan for a command line.

    Args:
        words: as of the command.
        gpu: in place of the one that the words name.

    Raises:
        ConfigError: a setting is wrong, or a checkpoint's shapes are not known.
        DataError: ``measured`` is not the folder of a run.
    """
    numbers, names, rest = split_words(words)
    config = compose_run(rest)
    if "gpus" in numbers and config.engine.name == "verl":
        chosen = {word.partition("=")[0] for word in rest}
        config = compose_run([*rest, *_division(config, int(numbers["gpus"]), chosen)])
    elif numbers.get("gpus", 1) != 1:
        raise ConfigError("engine=local uses one GPU; for more: engine=verl")
    student, teacher = _models(config)
    gpu = find_gpu(names.get("gpu", "h100_80gb")) if gpu is None else gpu
    rates = assumed_rates(
        gpu, numbers.get("mfu"), numbers.get("bandwidth"), numbers.get("overhead")
    )
    given = {key: numbers[key] for key in _NUMBERS[3:] if key in numbers}
    work = assumed_workload(config, student.vision is not None, given)
    if "measured" in names:
        rates, measured = _measure(Path(names["measured"]), names, rates)
        if measured.config.env.name == config.env.name and not given:
            work = _as_measured(work, measured.work)
    return make_plan(config, student, teacher, work, gpu, rates, names.get("schedule"))


def paper_plans() -> dict[str, Plan]:
    """The plans of the paper's runs as the paper made them: all GPUs do everything in turn. The
    rollout's share of their memory is not said; VerlTool's recipe has 0.8."""
    words = ["schedule=shared", "engine.student_server.memory_share=0.8"]
    return {name: plan_run([f"recipe={name}", *words]) for name in PAPER_RUNS}


def _division(config: TrainConfig, gpus: int, chosen: set[str]) -> list[str]:
    """Words that give the engine so many GPUs; the teacher keeps its share unless it was chosen.

    Raises:
        ConfigError: more than a machine's, and no multiple of it.
    """
    nodes, each = 1, gpus
    if gpus > _NODE:
        nodes, each = gpus // _NODE, _NODE
        if gpus % _NODE:
            raise ConfigError(f"gpus={gpus} are no whole machines of {_NODE}; see engine.nodes")
    words = [f"engine.nodes={nodes}", f"engine.gpus_per_node={each}"]
    if "engine.teacher_gpus_per_node" not in chosen:
        share = config.engine.teacher_gpus_per_node / config.engine.gpus_per_node
        step = config.engine.teacher_server.tensor_parallel
        teacher = max(1, round(share * each / step)) * step if share else 0
        words.append(f"engine.teacher_gpus_per_node={teacher}")
    return words


def _models(config: TrainConfig) -> tuple[Architecture, Architecture | None]:
    student = find_architecture(config.model.student.path)
    taught = config.model.teacher is not None and config.objective["name"] != "grpo"
    if not taught or config.model.teacher is None:
        return student, None
    return student, find_architecture(config.model.teacher.path)


def _measure(run: Path, names: Mapping[str, str], rates: Rates) -> tuple[Rates, Plan]:
    try:
        values: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{run} has no config.yaml; is it the folder of a run?") from error
    config = build(TrainConfig, values)
    gpu = find_gpu(names.get("gpu", "h100_80gb"))
    return measured_rates(run, config, *_models(config), gpu, rates)


def _as_measured(work: Workload, measured: Workload) -> Workload:
    """The measured lengths in place of the assumed ones."""
    return Workload(
        prompts=work.prompts,
        samples=work.samples,
        prompt_text=measured.prompt_text,
        prompt_pictures=measured.prompt_pictures,
        response=min(measured.response, work.response_max),
        response_max=work.response_max,
        observation_text=measured.observation_text,
        observation_pictures=measured.observation_pictures,
        sources=measured.sources,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog=program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="plain values instead of tables")
    parser.add_argument("--paper", action="store_true", help="compare with the paper's GPU-hours")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with errors_for_people(config="train"):
        if options.paper:
            print_paper(paper_plans(), console)
            return 0
        plan = plan_run(options.words)
        if options.json:
            print(json.dumps(as_values(plan), indent=2))
        else:
            print_plan(plan, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
