"""Makes plans from command lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reopold_agent.cli.groups import check_once, key_of
from reopold_agent.config import TrainConfig, build, only_for_verl
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.plan.estimate import Plan, make_plan
from reopold_agent.plan.hardware import Gpu, Rates, assumed_rates, find_gpu
from reopold_agent.plan.measured import measured_rates
from reopold_agent.plan.paper import PAPER_RUNS
from reopold_agent.plan.workload import Workload, assumed_workload
from reopold_agent.policies.architecture import Architecture, find_architecture
from reopold_agent.tracking.run_folder import run_settings
from reopold_agent.train.settings import compose_run
from reopold_agent.train.verl.supported import (
    check_objective,
    check_settings,
    rollout_gpus,
    student_gpus,
    teacher_gpus,
)

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
        (_LORA, "model.student.dtype=bfloat16", "optimizer.lr=1e-5"),
        "an adapter is trained in place of all weights",
    ),
    (("engine=local",), "one process on one GPU does everything"),
    (("policy=server",), "the teacher is on another machine (policy.teacher.urls=[...])"),
)
"""Settings that take less memory, and what each costs, in the order in which they are tried."""

RECIPE_GPUS: Mapping[str, str] = {"agentic_1x48gb": "l40s", "agentic_1x24gb": "rtx_4090"}
"""GPUs of the recipes that are for another than `_GPU`."""

_GPU = "h100_80gb"

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
        ConfigError: a setting is wrong or not supported, or a checkpoint's shapes are not known.
        DataError: ``measured`` is not the folder of a run.
    """
    numbers, names, rest = split_words(words)
    config = compose_run(rest)
    check_hardware(words, config)
    if config.engine.name == "verl":
        _check_supported(config)
    names.setdefault("gpu", RECIPE_GPUS.get(recipe_of(rest), _GPU))
    if "gpus" in numbers and config.engine.name == "verl":
        return _plan_for_gpus(config, rest, numbers, names, gpu)
    return _plan(config, numbers, names, gpu)


def recipe_of(words: Sequence[str]) -> str:
    """Returns the recipe that a command line names; "" without one."""
    return next((word.partition("=")[2] for word in words if word.startswith("recipe=")), "")


def check_hardware(words: Sequence[str], config: TrainConfig) -> None:
    """Checks ``gpu`` and ``gpus`` of a command line.

    Args:
        words: arguments ``key=value`` of the command.
        config: the run's.

    Raises:
        ConfigError: no GPU is known by that name, the engine cannot use so many, they are no whole
            machines, or their number is given twice.
    """
    numbers, names, rest = split_words(words)
    if "gpu" in names:
        find_gpu(names["gpu"])
    gpus = int(numbers.get("gpus", 1))
    if config.engine.name != "verl" and gpus != 1:
        raise ConfigError("engine=local uses one GPU; for more: engine=verl")
    if gpus > _NODE and gpus % _NODE:
        raise ConfigError(
            f"gpus={gpus} is not a multiple of {_NODE}, the GPUs of a machine; see engine.nodes"
        )
    given = {key_of(word): word for word in rest}
    twice = [given[key] for key in ("engine.nodes", "engine.gpus_per_node") if key in given]
    if config.engine.name == "verl" and "gpus" in numbers and twice:
        raise ConfigError(f"both gpus= and {twice[0]} say how many GPUs there are.\nLeave one out.")


def _plan_for_gpus(
    config: TrainConfig,
    rest: Sequence[str],
    numbers: Mapping[str, float],
    names: Mapping[str, str],
    gpu: Gpu | None,
) -> Plan:
    """Plans a run of ``engine=verl`` on a number of GPUs, if need be with settings that fit."""
    gpus = int(numbers["gpus"])
    asked = _division(config, gpus, {key_of(word) for word in rest})
    as_asked = compose_run([*rest, *asked])
    shown, first = "as it is", None
    if _divides(as_asked):
        first = _plan(as_asked, numbers, names, gpu)
        if first.fits:
            changed = as_asked.engine != config.engine
            return replace(first, changes=tuple(asked)) if changed else first
    tried: dict[str, None] = {}
    for words, costs in _proposals(config, rest, gpus, "schedule" in names):
        proposed = compose_run([*rest, *words])
        if proposed.engine.name == "verl" and not _divides(proposed):
            continue
        tried |= dict.fromkeys(words)
        made = _plan(proposed, numbers, names, gpu)
        if made.fits:
            return replace(made, changes=tuple(words), costs=tuple(costs))
        if first is None:  # the engine refuses the run as it is
            shown, first = f"with {' '.join(words)}", made
    if first is None:
        first = _plan(as_asked, numbers, names, gpu)  # or the engine's refusal
    listed = ", ".join(word for word in tried if word not in asked) or "none is left to try"
    told = f"none of the settings that a plan tries fits ({listed}); the run {shown}:"
    return replace(first, warnings=(told, *first.warnings))


def _proposals(
    config: TrainConfig, rest: Sequence[str], gpus: int, scheduled: bool
) -> Iterator[tuple[list[str], list[str]]]:
    """Yields settings that may fit, with what they cost, the cheapest first.

    Args:
        config: the run as it is.
        rest: its words, which stay as they are.
        gpus: number of GPUs; fewer are proposed where these cannot divide a mini-batch.
        scheduled: a schedule was given, which ``engine=local`` does not have.
    """
    chosen = {key_of(word) for word in rest}
    counts = [gpus]
    if gpus < _NODE and _rows(config) % gpus:
        counts += [count for count in range(gpus - 1, 0, -1) if _rows(config) % count == 0]
    local = next(i for i, (words, _) in enumerate(_SMALLER) if words[0] == "engine=local")
    changes: dict[str, str] = {}
    for count in counts:
        changes = {}
        division = {key_of(word): word for word in _division(config, count, chosen)}
        idle = [f"GPUs without work: {gpus - count} of {gpus}"] if count < gpus else []
        costs = []
        for words, cost in (((), ""), *_SMALLER[:local]):
            if words and key_of(words[0]) in chosen:
                continue
            changes |= {key_of(word): word for word in words if key_of(word) not in chosen}
            costs += [cost] if cost else []
            given = division | changes
            lower = _lower_parallel(compose_run([*rest, *given.values()]), chosen)
            narrow = ["a server's weights are on fewer GPUs"] if lower else []
            yield [*given.values(), *lower], [*idle, *costs, *narrow]
    if scheduled or any(key == "engine" or only_for_verl(key) for key in chosen):
        return
    changes = {key: word for key, word in changes.items() if not only_for_verl(key)}
    costs = [cost for words, cost in _SMALLER[:local] if key_of(words[0]) in changes]
    for words, cost in _SMALLER[local:]:
        changes |= {key_of(word): word for word in words if key_of(word) not in chosen}
        costs.append(cost)
        yield list(changes.values()), list(costs)


def _rows(config: TrainConfig) -> int:
    """Returns the episodes of a mini-batch, which verl divides evenly among the student's GPUs."""
    return config.batch.mini_batch * config.batch.samples


def _divides(config: TrainConfig) -> bool:
    """Returns whether the engine takes the division of the GPUs."""
    try:
        students = student_gpus(config.engine, _taught(config))
    except ConfigError:
        return False
    return _rows(config) % (config.engine.nodes * students) == 0


def _lower_parallel(config: TrainConfig, chosen: set[str]) -> list[str]:
    """Returns settings with which servers take no more GPUs than they have."""
    engine = config.engine
    both = teacher_gpus(engine)
    students = engine.gpus_per_node - (engine.teacher_gpus_per_node if _taught(config) else 0)
    students = rollout_gpus(engine, students)
    words = []
    for name, gpus in (("student_server", students), ("teacher_server", both)):
        have = getattr(engine, name).tensor_parallel
        given = any(key.startswith(f"engine.{name}") for key in chosen)
        if gpus > 0 and gpus % have and not given:
            words.append(f"engine.{name}.tensor_parallel={math.gcd(have, gpus)}")
    return words


def _check_supported(config: TrainConfig) -> None:
    """Refuses what ``engine=verl`` refuses, apart from the division of the GPUs.

    Raises:
        ConfigError: names the setting and the way out.
    """
    name = config.objective["name"]
    if name != "reopold":  # the default, which it takes
        from reopold_agent.objectives import make_objective  # loads PyTorch

        check_objective(name, make_objective(name, config.objective))
    check_settings(config)


def _plan(
    config: TrainConfig, numbers: Mapping[str, float], names: Mapping[str, str], gpu: Gpu | None
) -> Plan:
    student, teacher = _models(config)
    gpu = find_gpu(names["gpu"]) if gpu is None else gpu
    rates = assumed_rates(
        gpu, numbers.get("mfu"), numbers.get("bandwidth"), numbers.get("overhead")
    )
    given = {key: numbers[key] for key in NUMBERS[3:] if key in numbers}
    pixels_per_token = student.vision.pixels_per_token if student.vision else None
    work = assumed_workload(config, pixels_per_token, given)
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
    """Returns settings that divide the GPUs; the teacher keeps its share unless it was chosen."""
    nodes, each = (gpus // _NODE, _NODE) if gpus > _NODE else (1, gpus)
    words = [f"engine.nodes={nodes}", f"engine.gpus_per_node={each}"]
    if "engine.teacher_gpus_per_node" not in chosen:
        wanted = config.engine.teacher_gpus_per_node / config.engine.gpus_per_node * each
        step = config.engine.teacher_server.tensor_parallel
        counts = [
            count
            for count in range(step, each if wanted else 0, step)
            if (students := each - count - config.engine.rollout_gpus_per_node) > 0
            and _rows(config) % (nodes * students) == 0
        ]
        # Without such a count they share.
        teacher = min(counts, key=lambda count: abs(count - wanted), default=0)
        words.append(f"engine.teacher_gpus_per_node={teacher}")
    return words


def _taught(config: TrainConfig) -> bool:
    return bool(config.model.all_teachers) and config.objective["name"] != "grpo"


def _models(config: TrainConfig) -> tuple[Architecture, Architecture | None]:
    student = find_architecture(config.model.student.path)
    if not _taught(config):
        return student, None
    # Of several, the largest: each server holds one, and each episode is scored by one.
    teachers = [find_architecture(each.path) for each in config.model.all_teachers.values()]
    return student, max(teachers, key=lambda each: each.parameters)


def _measure(run: Path, names: Mapping[str, str], rates: Rates) -> tuple[Rates, Plan]:
    try:
        values = run_settings(run)
    except OSError as error:
        raise DataError(f"{run} has no config.yaml; is it the folder of a run?") from error
    config = build(TrainConfig, values)
    gpu = find_gpu(names["gpu"])
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
