"""Makes plans from command lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from reopold_agent.cli.groups import check_once
from reopold_agent.config import TrainConfig, build, only_for_verl
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.plan.estimate import Plan, make_plan
from reopold_agent.plan.hardware import Gpu, Rates, assumed_rates, find_gpu
from reopold_agent.plan.measured import measured_rates
from reopold_agent.plan.paper import PAPER_RUNS
from reopold_agent.plan.workload import Workload, assumed_workload
from reopold_agent.policies.architecture import Architecture, find_architecture
from reopold_agent.train.settings import compose_run

NUMBERS = ("mfu", "bandwidth", "overhead", "prompt", "pictures", "response", "observation")
WORDS = ("gpu", "schedule", "measured")
_LORA = "model.student.lora={r: 32, lora_alpha: 64, target_modules: all-linear}"
_SMALLER: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("engine.teacher_gpus_per_node=0",),
        "student's servers, teacher's servers and trainer take turns on the same GPUs",
    ),
    (("engine.offload=true",), "the trainer's state moves to the CPU and back in each step"),
    (("engine.max_prompt_tokens=4096",), "tasks with longer prompts are left out"),
    (
        ("engine=local", _LORA, "model.student.dtype=bfloat16", "optimizer.lr=1e-5"),
        "an adapter is trained in place of all weights, and one process on one GPU does everything",
    ),
    (("policy=server",), "the teacher is on another machine (policy.teacher.urls=[...])"),
)
"""Settings that take less memory, and what each costs, in the order in which they are tried."""

_NODE = 8
"""GPUs of a machine; a larger ``gpus=`` means several machines."""


def split_words(words: Sequence[str]) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """Splits a command line into the plan's numbers, its other settings, and the run's settings.

    Raises:
        ConfigError: a value is not a number where one is needed, or a setting is given twice.
    """
    check_once(words)
    numbers: dict[str, float] = {}
    names: dict[str, str] = {}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "gpus" or key in NUMBERS:
            if key == "gpus" and value == "null":
                continue
            try:
                numbers[key] = float(value)
            except ValueError as error:
                raise ConfigError(f"{key} must be a number, got '{value}'") from error
            if numbers[key] < 0 or (key == "gpus" and not _whole(numbers[key])):
                raise ConfigError(f"{key}={value} makes no sense")
        elif key in WORDS:
            names[key] = value
        else:
            rest.append(word)
    return numbers, names, rest


def _whole(count: float) -> bool:
    return count >= 1 and count == int(count)


def plan_run(words: Sequence[str], gpu: Gpu | None = None) -> Plan:
    """Makes the plan of a command line.

    Args:
        words: arguments ``key=value`` of the command.
        gpu: the GPU, in place of the one in ``words``.

    Raises:
        ConfigError: a setting is wrong, or a checkpoint's shapes are not known.
        DataError: ``measured`` is not the folder of a run.
    """
    numbers, names, rest = split_words(words)
    config = compose_run(rest)
    check_hardware(words, config)
    if "gpus" in numbers and config.engine.name == "verl":
        return _plan_for_gpus(config, rest, numbers, names, gpu)
    return _plan(config, numbers, names, gpu)


def check_hardware(words: Sequence[str], config: TrainConfig) -> None:
    """Checks ``gpu`` and ``gpus`` of a command line.

    Args:
        words: arguments ``key=value`` of the command.
        config: the run's.

    Raises:
        ConfigError: no GPU is known by that name, or the engine cannot use so many.
    """
    numbers, names, _ = split_words(words)
    if "gpu" in names:
        find_gpu(names["gpu"])
    if config.engine.name != "verl" and numbers.get("gpus", 1) != 1:
        raise ConfigError("engine=local uses one GPU; for more: engine=verl")


def _plan_for_gpus(
    config: TrainConfig,
    rest: Sequence[str],
    numbers: Mapping[str, float],
    names: Mapping[str, str],
    gpu: Gpu | None,
) -> Plan:
    """Plans a run of ``engine=verl`` on a number of GPUs, if need be with settings that fit."""
    chosen = {_key(word): word for word in rest}
    for key in ("engine.nodes", "engine.gpus_per_node"):
        if key in chosen:
            raise ConfigError(
                f"both gpus= and {chosen[key]} say how many GPUs there are.\nLeave one out."
            )
    gpus = int(numbers["gpus"])
    division = _division(config, gpus, set(chosen))
    first = _plan(compose_run([*rest, *division]), numbers, names, gpu)
    changes: dict[str, str] = {}
    costs: list[str] = []
    for words, cost in _SMALLER if not first.fits else ():
        if words[0] == "engine=local":  # which has no settings of several GPUs or servers
            mine = any(only_for_verl(key) or key == "engine" for key in chosen)
            if mine or "schedule" in names:
                break
            division, costs = [], costs[-1:]
            changes = {key: word for key, word in changes.items() if not only_for_verl(key)}
        changes |= {_key(word): word for word in words if _key(word) not in chosen}
        costs.append(cost)
        given = {_key(word): word for word in division} | changes
        made = _plan(compose_run([*rest, *given.values()]), numbers, names, gpu)
        if made.fits:
            return replace(made, changes=tuple(given.values()), costs=tuple(costs))
    return first


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _plan(
    config: TrainConfig, numbers: Mapping[str, float], names: Mapping[str, str], gpu: Gpu | None
) -> Plan:
    student, teacher = _models(config)
    gpu = find_gpu(names.get("gpu", "h100_80gb")) if gpu is None else gpu
    rates = assumed_rates(
        gpu, numbers.get("mfu"), numbers.get("bandwidth"), numbers.get("overhead")
    )
    given = {key: numbers[key] for key in NUMBERS[3:] if key in numbers}
    work = assumed_workload(config, student.vision is not None, given)
    if "measured" in names:
        rates, measured = _measure(Path(names["measured"]), names, rates)
        if measured.config.env.name == config.env.name and not given:
            work = _as_measured(work, measured.work)
    return make_plan(config, student, teacher, work, gpu, rates, names.get("schedule"))


def paper_plans() -> dict[str, Plan]:
    """Plans the paper's runs with its schedule, in which all GPUs do each part in turn.

    The paper does not state the rollout's share of memory; 0.8 is from VerlTool's recipe.
    """
    words = ["schedule=shared", "engine.student_server.memory_share=0.8"]
    return {name: plan_run([f"recipe={name}", *words]) for name in PAPER_RUNS}


def _division(config: TrainConfig, gpus: int, chosen: set[str]) -> list[str]:
    """Returns settings that divide the GPUs; the teacher keeps its share unless it was chosen.

    Raises:
        ConfigError: more than one machine, but not a multiple.
    """
    nodes, each = 1, gpus
    if gpus > _NODE:
        nodes, each = gpus // _NODE, _NODE
        if gpus % _NODE:
            raise ConfigError(
                f"gpus={gpus} is not a multiple of {_NODE}, the GPUs of a machine; see engine.nodes"
            )
    words = [f"engine.nodes={nodes}", f"engine.gpus_per_node={each}"]
    if "engine.teacher_gpus_per_node" not in chosen:
        share = config.engine.teacher_gpus_per_node / config.engine.gpus_per_node
        step = config.engine.teacher_server.tensor_parallel
        teacher = max(1, round(share * each / step)) * step if share else 0
        teacher = teacher if teacher < each else 0  # none is left: they share
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
    """Replaces assumed lengths by measured ones."""
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
