"""Makes a plan from the configuration of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from reopold_agent.config import ServerConfig, TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.plan.advice import warnings_for
from reopold_agent.plan.hardware import Gpu, Rates
from reopold_agent.plan.memory import (
    PROCESS_RESERVE,
    GpuMemory,
    TrainerMemory,
    cache_sequences,
    server_cache,
)
from reopold_agent.plan.timing import (
    SCHEDULES,
    Layout,
    Server,
    StepFlops,
    StepSeconds,
    Training,
    decode_seconds,
    spread,
    step_flops,
)
from reopold_agent.plan.workload import Workload
from reopold_agent.policies.architecture import Architecture

_TEACHER_TOKENS = 4096
"""Tokens of one pass of the teacher's servers (`engines.verl.compose`)."""

_SLICE = 2**25
"""Most logits that the local engine holds at once (`objectives.chunks.SLICE_ELEMENTS`)."""


@dataclass(frozen=True)
class Plan:
    """Estimated needs of a run; FLOPs and seconds are per step."""

    config: TrainConfig
    gpu: Gpu
    rates: Rates
    layout: Layout
    student: Architecture
    teacher: Architecture | None
    work: Workload
    flops: StepFlops
    seconds: StepSeconds
    memory: tuple[GpuMemory, ...]
    warnings: tuple[str, ...]

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps, without start, evaluations and checkpoints."""
        return self.seconds.total * self.config.steps * self.layout.gpus / 3600


def make_plan(
    config: TrainConfig,
    student: Architecture,
    teacher: Architecture | None,
    work: Workload,
    gpu: Gpu,
    rates: Rates,
    schedule: str | None = None,
) -> Plan:
    """Plans a run.

    Args:
        config: the run's configuration, including the engine's number of GPUs.
        student: shapes of the student.
        teacher: shapes of the teacher, or None if the objective needs none.
        work: episodes of a step.
        gpu: model of the GPUs.
        rates: rates that the GPUs achieve.
        schedule: one of `SCHEDULES`; None for the engine's own.

    Raises:
        ConfigError: the objective is not on-policy, or the GPUs cannot be divided.
    """
    if config.objective["name"] == "sft":
        raise ConfigError("a plan covers objectives on the student's own samples, not sft")
    shared = teacher is not None and config.engine.shares_gpus
    own = ("shared" if shared else "pools") if config.engine.name == "verl" else "local"
    schedule = schedule or own
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}; got '{schedule}'")
    half = _compute_bytes(config) == 2
    counts = _gpu_counts(config, schedule, teacher is not None)
    server, room = _student_server(config, schedule, counts, student, work, gpu)
    if schedule == "pools" and teacher is not None:
        settings = config.engine.teacher_server
        cache = server_cache(teacher, settings.memory_share * gpu.memory, settings.tensor_parallel)
        longest = _longest(config, work)
        room["teacher"] = cache_sequences(teacher, cache, longest, settings.tensor_parallel)
    layout = Layout(schedule, *counts, server, config.engine.teacher_server.tensor_parallel)
    how = Training(
        checkpointing=config.model.student.gradient_checkpointing,
        lora=config.model.student.lora is not None,
        all_logits=schedule != "local",
        recompute_old=config.engine.old_logp == "recompute"
        or (config.engine.old_logp == "auto" and half),
    )
    counted = step_flops(student, teacher, work, how)
    seconds = _seconds(counted, student, work, layout, gpu, rates, _compute_bytes(config))
    memory = _memory(config, layout, student, teacher, work, gpu, server)
    warnings = warnings_for(config, layout, memory, seconds, gpu, work, room)
    return Plan(
        *(config, gpu, rates, layout, student, teacher, work, counted, seconds, memory, warnings)
    )


def _compute_bytes(config: TrainConfig) -> int:
    return 4 if config.engine.precision == "float32" else 2


def _gpu_counts(config: TrainConfig, schedule: str, taught: bool) -> tuple[int, int, int]:
    """Returns the numbers of all GPUs, of the student's and of the teacher's."""
    engine = config.engine
    if schedule == "local":
        return 1, 1, int(taught)
    total = engine.nodes * engine.gpus_per_node
    if schedule == "shared":
        return total, total, total if taught else 0
    teachers = engine.nodes * engine.teacher_gpus_per_node if taught else 0
    students = total - teachers
    if students < 1 or (taught and teachers < 1):
        raise ConfigError(
            f"of {total} GPUs the teacher gets {teachers}: both need some; see "
            "engine.teacher_gpus_per_node"
        )
    for name, gpus, server in (
        ("student_server", students, engine.student_server),
        ("teacher_server", teachers, engine.teacher_server),
    ):
        if gpus % server.tensor_parallel:
            raise ConfigError(
                f"engine.{name}.tensor_parallel={server.tensor_parallel} does not divide its "
                f"{gpus} GPUs"
            )
    return total, students, teachers


def _student_server(
    config: TrainConfig,
    schedule: str,
    counts: tuple[int, int, int],
    student: Architecture,
    work: Workload,
    gpu: Gpu,
) -> tuple[Server, dict[str, float]]:
    """Returns a replica of the rollout's server, and the room in its cache."""
    in_flight = config.rollout.concurrency
    if schedule == "local":
        return Server(1, min(in_flight, work.episodes)), {}
    settings: ServerConfig = config.engine.student_server
    gpus = settings.tensor_parallel
    replicas = counts[1] // gpus
    cache = server_cache(student, settings.memory_share * gpu.memory, gpus)
    holds = cache_sequences(student, cache, work.length, gpus)
    wanted = math.ceil(work.episodes / replicas)
    allowed = math.ceil(in_flight * config.engine.rollout_workers / replicas)
    slots = max(1, min(settings.max_sequences, holds, wanted, allowed))
    room = {"cache": cache, "holds": holds, "wanted": wanted, "allowed": allowed}
    return Server(gpus, slots), room


def _seconds(
    counted: StepFlops,
    student: Architecture,
    work: Workload,
    layout: Layout,
    gpu: Gpu,
    rates: Rates,
    value_bytes: int,
) -> StepSeconds:
    score = rates.score.value
    replicas = max(1, layout.student // layout.student_server.gpus)
    each = math.ceil(work.episodes / replicas)
    decode = decode_seconds(
        student,
        spread(work.responses(each)),
        work.prompt + work.observation,
        layout.student_server,
        rates,
        value_bytes,
    )
    sync = 0.0
    if layout.schedule != "local":  # every replica gets all weights over the link, and loads them
        moved = value_bytes * student.parameters
        sync = moved / gpu.link + 2 * moved / rates.bandwidth.value
    return StepSeconds(
        generate=decode + counted.prompt / (score * layout.student),
        teacher=counted.teacher / (score * layout.teacher) if layout.teacher else 0.0,
        old_logp=counted.old_logp / (score * layout.student),
        update=counted.update / (rates.train.value * layout.student),
        sync=sync,
        overlap=layout.schedule == "pools",
    )


def _memory(
    config: TrainConfig,
    layout: Layout,
    student: Architecture,
    teacher: Architecture | None,
    work: Workload,
    gpu: Gpu,
    server: Server,
) -> tuple[GpuMemory, ...]:
    """Returns the memory of one GPU per role."""
    engine, spec = config.engine, config.model.student
    width = _compute_bytes(config)
    local = layout.schedule == "local"
    longest = _longest(config, work)
    tokens = (
        engine.max_tokens_per_micro_batch
        if local
        else max(engine.max_tokens_per_micro_batch, longest)
    )
    trainer = TrainerMemory(
        ranks=1 if local else layout.student,
        tokens=tokens,
        compute_bytes=width,
        master_bytes=4 if spec.dtype == "float32" else 2,
        checkpointing=spec.gradient_checkpointing,
        trained=_adapter_parameters(spec.lora, student) if spec.lora else student.parameters,
        logits=min(_SLICE, tokens * student.text.vocab) if local else tokens * student.text.vocab,
        offload=engine.offload and not local,
    )
    resident = {"process": PROCESS_RESERVE, **trainer.resident(student)}
    taught: dict[str, float] = {}
    elsewhere = local and config.policy.teacher["name"] == "server"
    if teacher is not None and layout.schedule != "pools" and not elsewhere:
        stored = 4 if config.model.teacher and config.model.teacher.dtype == "float32" else 2
        taught = {"teacher": stored * teacher.parameters / (1 if local else layout.teacher)}
    rollout = dict(resident)
    if local:
        cache = student.text.kv_bytes(width) * work.length * server.slots
        rollout["KV cache"] = cache
    else:
        budget = engine.student_server.memory_share * gpu.memory
        weights = 2 * student.parameters / server.gpus
        rollout["server weights"] = weights
        rollout["server cache and room"] = max(0.0, budget - weights)
    update = {"process": PROCESS_RESERVE, **trainer.updating(student, work)}
    phases = {"rollout": {**rollout, **taught}, "update": {**update, **taught}}
    roles = [GpuMemory("student", layout.student, phases)]
    if taught:
        roles = [GpuMemory("student and teacher", layout.gpus, phases)]
    elif teacher is not None:
        settings = engine.teacher_server
        weights = 2 * teacher.parameters / settings.tensor_parallel
        scoring = {
            "process": PROCESS_RESERVE,
            "server weights": weights,
            "server cache and room": max(0.0, settings.memory_share * gpu.memory - weights),
            # float32 logits of a pass and their log-softmax, beside the server's budget
            "prompt log-probs": 2 * 4 * _TEACHER_TOKENS * teacher.text.vocab,
        }
        roles.append(GpuMemory("teacher", layout.teacher, {"score": scoring}))
    return tuple(roles)


def _longest(config: TrainConfig, work: Workload) -> float:
    """Returns the tokens of the longest episode, of which a pass holds at least one.

    verl's own limit is higher (``max_prompt_tokens``), but memory depends on actual lengths.
    """
    return work.prompt + config.rollout.max_response_tokens


def _adapter_parameters(lora: Mapping[str, object], model: Architecture) -> float:
    """Counts parameters of LoRA on all matrices of the decoder: rank x (inputs + outputs)."""
    rank = lora.get("r", 8)
    if not isinstance(rank, int):
        raise ConfigError(f"model.student.lora.r must be an integer, got {rank!r}")
    text = model.text
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    sides = 2 * (text.hidden + queries) + 2 * (text.hidden + keys) + 3 * (text.hidden + text.mlp)
    return float(rank * sides * text.layers)
