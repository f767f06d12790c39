"""Makes a plan from the configuration of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from reopold_agent.config import ModelConfig, ServerConfig, TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.plan.advice import warnings_for
from reopold_agent.plan.hardware import Gpu, Rates
from reopold_agent.plan.memory import (
    PROCESS_RESERVE,
    SLEEPING_SERVER,
    SYNC_BUCKET,
    GpuMemory,
    TrainerMemory,
    cache_sequences,
    server_cache,
)
from reopold_agent.plan.passes import Pass, divide, padding_share
from reopold_agent.plan.timing import (
    HOST_BANDWIDTH,
    SCHEDULES,
    SWITCH_SECONDS,
    SYNC_BANDWIDTH,
    SYNC_SECONDS,
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
from reopold_agent.policies.architecture import Architecture, find_architecture
from reopold_agent.rollout.lengths import episode_limit
from reopold_agent.train.teachers import run_teachers
from reopold_agent.train.verl.supported import check_tensor_parallel, student_gpus

_TEACHER_TOKENS = 4096
"""Tokens of one pass of the teacher's servers (`engines.verl.compose`)."""


@dataclass(frozen=True)
class Plan:
    """Estimated needs of a run; FLOPs and seconds are per step.

    Attributes:
        padding: share of the update's computed tokens that is padding.
        changes: settings that were changed so that the run fits, the GPUs' division among them.
        costs: what they cost.
    """

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
    padding: float = 0.0
    changes: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every phase fits, every server can start and mini-batches can be divided."""
        roles = all(role.peak[1] <= self.gpu.memory for role in self.memory)
        fatal = ("cannot start", "verl refuses this")
        return roles and not any(text in line for line in self.warnings for text in fatal)

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
    schedule = schedule or _own_schedule(config, teacher is not None)
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}; got '{schedule}'")
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    if config.engine.name == "verl":
        student_gpus(config.engine, teacher is not None)
        check_tensor_parallel(config.engine, models.items())
    half = _compute_bytes(config) == 2
    counts = _gpu_counts(config, schedule, teacher is not None)
    generating = counts[3] or counts[1]
    server, room = _student_server(config, schedule, generating, student, work, gpu)
    if schedule != "local" and teacher is not None:
        settings = config.engine.teacher_server
        share = teacher_share(config, schedule)
        cache = server_cache(teacher, share * gpu.memory, settings.tensor_parallel)
        longest = _longest(config, work)
        room["teacher"] = cache_sequences(teacher, cache, longest, settings.tensor_parallel)
    wider = frozenset(
        role
        for (role, model), gpus in zip(models.items(), (generating, counts[2]), strict=False)
        if _can_widen(config, role, model, gpus // config.engine.nodes)
    )
    teacher_server = config.engine.teacher_server.tensor_parallel
    layout = Layout(schedule, *counts, server, teacher_server, wider)
    how = Training(
        checkpointing=config.model.student.gradient_checkpointing,
        lora=config.model.student.lora is not None,
        recompute_old=config.engine.old_logp == "recompute"
        or config.engine.ahead > 0
        or (config.engine.old_logp == "auto" and half),
        padding=padding_share(_passes(config, work, layout, updating=True)),
        old_padding=padding_share(_passes(config, work, layout, updating=False)),
    )
    reference = _reference(config, student)
    counted = step_flops(student, teacher, work, how, reference)
    seconds = _seconds(config, counted, student, teacher, work, layout, rates)
    memory = _memory(config, layout, student, teacher, reference, work, gpu, server)
    warnings = warnings_for(config, layout, memory, seconds, gpu, room, how.padding, rates)
    return Plan(
        *(config, gpu, rates, layout, student, teacher, work, counted, seconds, memory, warnings),
        how.padding,
    )


def _can_widen(config: TrainConfig, role: str, model: Architecture, gpus: int) -> bool:
    """Returns whether a server can have more of the GPUs that its role has on a node."""
    more = range(getattr(config.engine, f"{role}_server").tensor_parallel + 1, gpus + 1)
    return any(gpus % count == 0 and model.undivided(count) is None for count in more)


def _own_schedule(config: TrainConfig, taught: bool) -> str:
    """Returns the schedule of the run's own engine."""
    if config.engine.name != "verl":
        return "local"
    return "shared" if taught and config.engine.shares_gpus else "pools"


def is_packed(config: TrainConfig) -> bool:
    """Returns whether rows are packed on a GPU, where this is the default."""
    return config.engine.packed is not False


def teacher_share(config: TrainConfig, schedule: str) -> float:
    """Returns the share of a GPU's memory that a server of the teacher may use."""
    own = config.engine.teacher_server.memory_share
    return min(own, config.engine.student_server.memory_share) if schedule == "shared" else own


def _compute_bytes(config: TrainConfig) -> int:
    return 4 if config.engine.precision == "float32" else 2


def _gpu_counts(config: TrainConfig, schedule: str, taught: bool) -> tuple[int, int, int, int]:
    """Returns the first numbers of a `Layout`: all GPUs, student's, teacher's, rollout's."""
    engine = config.engine
    if schedule == "local":
        return 1, 1, int(taught), 0
    total = engine.nodes * engine.gpus_per_node
    if schedule == "shared":
        return total, total, total if taught else 0, 0
    teachers = engine.nodes * engine.teacher_gpus_per_node if taught else 0
    rollouts = engine.nodes * engine.rollout_gpus_per_node
    students = total - teachers - rollouts
    if students < 1 or (taught and teachers < 1):
        raise ConfigError(
            f"of {total} GPUs the teacher gets {teachers}, and {rollouts} only generate: both need "
            "some, and the student; see engine.teacher_gpus_per_node, engine.rollout_gpus_per_node"
        )
    return total, students, teachers, rollouts


def _student_server(
    config: TrainConfig,
    schedule: str,
    generating: int,
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
    replicas = generating // gpus
    cache = server_cache(student, settings.memory_share * gpu.memory, gpus)
    holds = cache_sequences(student, cache, work.length, gpus)
    wanted = math.ceil(work.episodes / replicas)
    allowed = math.ceil(in_flight * config.engine.rollout_workers / replicas)
    slots = max(1, min(settings.max_sequences, holds, wanted, allowed))
    room = {"cache": cache, "holds": holds, "wanted": wanted, "allowed": allowed}
    return Server(gpus, slots), room


def _seconds(
    config: TrainConfig,
    counted: StepFlops,
    student: Architecture,
    teacher: Architecture | None,
    work: Workload,
    layout: Layout,
    rates: Rates,
) -> StepSeconds:
    score, width = rates.score.value, _compute_bytes(config)
    replicas = max(1, layout.generating // layout.student_server.gpus)
    each = math.ceil(work.episodes / replicas)
    decode = decode_seconds(
        student,
        spread(work.responses(each)),
        work.prompt + work.observation,
        layout.student_server,
        rates,
        width,
    )
    sync = switch = 0.0
    if layout.schedule != "local":
        sync = SYNC_SECONDS + width * student.parameters / SYNC_BANDWIDTH
        switch = 0.0 if config.engine.ahead or layout.rollout else 2 * SWITCH_SECONDS
        if layout.schedule == "shared" and teacher is not None:
            copied = 2 * teacher.parameters / layout.teacher_server_gpus
            switch += 2 * (SWITCH_SECONDS + copied / HOST_BANDWIDTH)
        if config.engine.offload:
            trainer = trainer_memory(config, layout, student)
            state = sum(replace(trainer, offload=False).resident(student).values())
            switch += 2 * state / HOST_BANDWIDTH
    return StepSeconds(
        generate=decode + counted.prompt / (score * layout.generating),
        teacher=counted.teacher / (score * layout.teacher) if layout.teacher else 0.0,
        old_logp=counted.old_logp / (score * layout.student),
        update=counted.update / (rates.train.value * layout.student),
        sync=sync,
        overlap=layout.schedule == "pools",
        ahead=layout.rollout > 0 and config.engine.ahead > 0,
        switch=switch,
    )


def _passes(config: TrainConfig, work: Workload, layout: Layout, *, updating: bool) -> list[Pass]:
    """Returns the micro-batches of one GPU, of a mini-batch's update or of the old log-probs."""
    engine, batch = config.engine, config.batch
    prompts = batch.mini_batch if updating else batch.prompts
    count = max(1, prompts * batch.samples // layout.student)
    budget = engine.max_tokens_per_micro_batch if updating else engine.max_tokens_per_pass
    start = work.prompt + work.observation
    lengths = [start + length for length in work.responses(count)]
    return divide(lengths, budget, packed=is_packed(config), by_rows=layout.schedule == "local")


def largest_pass(config: TrainConfig, work: Workload, layout: Layout, *, updating: bool) -> Pass:
    """Returns the micro-batch that needs the most memory: a full one, or the longest episode."""
    engine = config.engine
    budget = engine.max_tokens_per_micro_batch if updating else engine.max_tokens_per_pass
    longest = _longest(config, work)
    passes = _passes(config, work, layout, updating=updating)
    found = max(passes, key=lambda each: each.computed)
    if found.packed:
        full = min(float(budget), sum(each.tokens for each in passes))
        return replace(found, longest=longest, tokens=max(longest, full))
    if found.computed >= longest:
        return found
    return Pass(1, longest, longest, packed=False)


def trainer_memory(config: TrainConfig, layout: Layout, student: Architecture) -> TrainerMemory:
    """Returns how a run's trainer divides memory and computes."""
    engine, spec = config.engine, config.model.student
    local = layout.schedule == "local"
    adapts = spec.lora is not None
    trained = _adapter_parameters(spec.lora, student) if spec.lora else student.parameters
    return TrainerMemory(
        ranks=1 if local else layout.student,
        sharded=not local,
        compute_bytes=_compute_bytes(config),
        master_bytes=4 if spec.dtype == "float32" or not (local or adapts) else 2,
        trained=trained,
        adapters=adapts,
        checkpointing=spec.gradient_checkpointing,
        dense_mask=not is_packed(config),
        offload=engine.offload and not local,
    )


def _memory(
    config: TrainConfig,
    layout: Layout,
    student: Architecture,
    teacher: Architecture | None,
    reference: Architecture | None,
    work: Workload,
    gpu: Gpu,
    server: Server,
) -> tuple[GpuMemory, ...]:
    """Returns the memory of one GPU per role."""
    local = layout.schedule == "local"
    trainer = trainer_memory(config, layout, student)
    base = {"process": PROCESS_RESERVE}
    resident = {**base, **trainer.resident(student)}
    passes = {
        name: largest_pass(config, work, layout, updating=updating)
        for name, updating in (("old log-probs", False), ("update", True))
    }
    shown = work.picture_share
    old, largest = passes["old log-probs"], passes["update"]
    scoring = {**base, **trainer.scoring(student, old, shown * old.tokens)}
    update = {**base, **trainer.updating(student, largest, shown * largest.tokens)}
    if local:
        phases = {"old log-probs": scoring, "update": update}
        own = config.policy.student
        if own["name"] == "vllm":
            awake = _server_parts(student, own["gpu_memory_utilization"] * gpu.memory, 1)
            beside = {"sleeping servers": SLEEPING_SERVER} if own["sleep"] else awake
            phases = {name: {**beside, **parts} for name, parts in phases.items()}
            phases = {"rollout": {**resident, **awake}, **phases}
        else:
            cache = student.text.kv_bytes(_compute_bytes(config)) * work.length * server.slots
            rollout = {"KV cache": cache}
            if config.engine.ahead:  # another copy generates while the trainer computes
                rollout["sampler"] = trainer.copied(student)
                phases = {name: {**parts, **rollout} for name, parts in phases.items()}
            phases = {"rollout": {**resident, **rollout}, **phases}
        if reference is not None:
            scored = trainer.scoring(reference, old, shown * old.tokens)
            # Frozen weights are cast anew for each use, so that no copy of them stays.
            passing = {name: scored[name] for name in ("activations", "head")}
            beside = {name: held for name, held in phases["update"].items() if name not in update}
            phases["reference"] = {**beside, **resident, **passing}
            held = {"reference": _weights(config.model.student, reference, 1)}
            phases = {name: {**parts, **held} for name, parts in phases.items()}
        here = [each for each in run_teachers(config) if each.policy["name"] != "server"]
        if teacher is None or not here:
            return (GpuMemory("student", 1, phases),)
        held = {"teacher": sum(_weights(each.model, teacher, len(here)) for each in here)}
        both = {name: {**parts, **held} for name, parts in phases.items()}
        return (GpuMemory("student and teacher", 1, both),)
    shares = layout.schedule == "shared" and teacher is not None
    share = config.engine.student_server.memory_share
    awake = _server_parts(student, share * gpu.memory, server.gpus)
    asleep = {"sleeping servers": SLEEPING_SERVER * (1 + shares)}
    loading = {"server weights": awake["server weights"]}
    if config.engine.ahead:  # they generate while the trainer computes, and never sleep
        asleep = loading = awake
    if layout.rollout:
        asleep = loading = {}
    beside = {"sleeping servers": SLEEPING_SERVER} if shares else {}
    phases = {
        "rollout": {**resident, **beside, **awake},
        "old log-probs": {**asleep, **scoring},
        "update": {**asleep, **update},
        "sync": {
            **resident,
            **beside,
            **loading,
            # the tensor that is gathered, and the bucket that the server reads
            "buffers": trainer.master_bytes * student.text.vocab * student.text.hidden
            + SYNC_BUCKET * (2 if layout.rollout else 1),
        },
    }
    servers: tuple[GpuMemory, ...] = ()
    if layout.rollout:
        del phases["rollout"]
        # Of two buckets one is filled while the other is read.
        alone = {**base, **awake, "buffers": 2 * SYNC_BUCKET}
        servers = (GpuMemory("rollout", layout.rollout, {"rollout": alone}),)
    if trainer.adapters and trainer.offload:  # merging needs all weights at once
        phases["sync"] |= trainer.weights(student)
    if teacher is None:
        return (GpuMemory("student", layout.student, phases), *servers)
    budget = teacher_share(config, layout.schedule) * gpu.memory
    scores = {
        **_server_parts(teacher, budget, layout.teacher_server_gpus),
        # float32 logits of a pass and their log-softmax, beside the server's budget
        "prompt log-probs": 2.0 * 4 * _TEACHER_TOKENS * teacher.text.vocab,
    }
    if shares:
        phases["teacher"] = {**resident, **beside, **scores}
        return (GpuMemory("student and teacher", layout.gpus, phases),)
    return (
        GpuMemory("student", layout.student, phases),
        *servers,
        GpuMemory("teacher", layout.teacher, {"score": {**base, **scores}}),
    )


def _server_parts(model: Architecture, budget: float, gpus: int) -> dict[str, float]:
    weights = 2 * model.parameters / gpus
    return {
        "server weights": weights,
        "server cache and room": max(0.0, budget - weights),
    }


def _weights(spec: ModelConfig, largest: Architecture, teachers: int) -> float:
    """Returns the bytes of a teacher's weights; ``largest`` are the shapes of the largest."""
    size = largest if teachers == 1 else find_architecture(spec.path)
    return float((4 if spec.dtype == "float32" else 2) * size.parameters)


def _reference(config: TrainConfig, student: Architecture) -> Architecture | None:
    """Returns the shapes of the objective's reference model, by default the starting student's."""
    if config.objective["name"] != "exopd":
        return None
    path = config.objective.get("reference")
    return student if path is None else find_architecture(path)


def _longest(config: TrainConfig, work: Workload) -> float:
    """Returns the tokens of the longest episode, of which a pass holds at least one."""
    limit = episode_limit(config, None)
    if limit is not None:
        return float(limit)
    return work.prompt + work.observation + config.rollout.max_response_tokens


def _adapter_parameters(lora: Mapping[str, object], model: Architecture) -> float:
    """Counts parameters of LoRA on all matrices of the decoder: rank x (inputs + outputs)."""
    rank = lora.get("r", 8)
    if not isinstance(rank, int):
        raise ConfigError(f"model.student.lora.r must be an integer, got {rank!r}")
    text = model.text
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    sides = 2 * (text.hidden + queries) + 2 * (text.hidden + keys) + 3 * (text.hidden + text.mlp)
    return float(rank * sides * text.layers)
