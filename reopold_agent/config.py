"""A run's configuration, typed. Hydra composes it; this module checks and holds it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from reopold_agent.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class EnvConfig:
    """Which environment.

    Attributes:
        name: as after ``env=``.
        id: Gymnasium's.
        kwargs: go to `gymnasium.make`.
        takes_data: the run's ``data`` section goes there too (key ``data``).
    """

    name: str
    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    takes_data: bool = False


@dataclass(frozen=True)
class DataChecks:
    """What is done about doubtful rows and pictures, before training starts.

    Attributes:
        duplicates: rows whose id occurred before: ``keep`` (and report), ``skip`` or ``fail``.
        pictures: which pictures are opened to see whether they can be: ``none``, ``sample`` (of 64
            tasks) or ``all``.
        allow_urls: download pictures that rows name by an http(s) URL.
        allow_private_urls: also from this machine and its own network.
        url_max_bytes, url_seconds: limits of one such picture.
    """

    duplicates: str = "keep"
    pictures: str = "none"
    allow_urls: bool = False
    allow_private_urls: bool = False
    url_max_bytes: int = 50_000_000
    url_seconds: float = 30.0

    def __post_init__(self) -> None:
        _one_of("data.checks.duplicates", self.duplicates, ("keep", "skip", "fail"))
        _one_of("data.checks.pictures", self.pictures, ("none", "sample", "all"))
        _positive(self, "data.checks", "url_max_bytes", "url_seconds")


@dataclass(frozen=True)
class DataConfig:
    """Where tasks come from, one specification per split; see `reopold_agent.data.load_tasks`.

    Attributes:
        train, eval: what is trained on, and what is held out.
        demonstrations: an expert's recorded conversations, for ``objective=sft
            objective.source=recorded`` (see `reopold_agent.data.demonstrations`).
        env_kwargs: settings of the environment that belong to this data.
        checks: of rows and pictures.
    """

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    demonstrations: dict[str, Any] | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    checks: DataChecks = field(default_factory=DataChecks)

    def specification(self, split: str) -> dict[str, Any] | None:
        """What `reopold_agent.data.load_tasks` is given for ``train`` or ``eval``; None without."""
        spec: dict[str, Any] | None = getattr(self, split)
        if spec is None or self.checks == DataChecks():
            return spec
        return {**spec, "checks": asdict(self.checks)}


@dataclass(frozen=True)
class PixelConfig:
    """Size limits of a picture after the resize, in pixels (784 per token).

    Attributes:
        min_pixels, max_pixels: height x width.
    """

    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class PixelsConfig:
    """Limits of pictures' sizes.

    Attributes:
        prompt: of the question's pictures.
        observation: of those that tools return.
    """

    prompt: PixelConfig
    observation: PixelConfig


@dataclass(frozen=True)
class BatchConfig:
    """What one step rolls out and how it is split into updates.

    Attributes:
        prompts: tasks per step.
        samples: episodes per task (the group).
        mini_batch: tasks per update; ``prompts / mini_batch`` updates per step.
    """

    prompts: int = 128
    samples: int = 8
    mini_batch: int = 64

    def __post_init__(self) -> None:
        _positive(self, "batch", "prompts", "samples", "mini_batch")
        if self.prompts % self.mini_batch:
            raise ConfigError(
                f"batch.mini_batch={self.mini_batch} does not divide batch.prompts={self.prompts}"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """Budgets of one episode; see `reopold_agent.rollout.runner.RolloutLimits`.

    Attributes:
        max_response_tokens: everything after the prompt: turns, observations, separators.
        max_turn_tokens: one assistant turn.
        max_turns: assistant turns, the answer included.
        env_seconds: wall-clock bound on one ``reset`` or ``step`` of an environment.
        concurrency: episodes in flight at once.
        stop_at_tool_call: a turn ends with its first tool call.
    """

    max_response_tokens: int = 8192
    max_turn_tokens: int = 4096
    max_turns: int = 2
    env_seconds: float = 120.0
    concurrency: int = 64
    stop_at_tool_call: bool = True

    def __post_init__(self) -> None:
        names = ("max_response_tokens", "max_turn_tokens", "max_turns", "concurrency")
        _positive(self, "rollout", *names, "env_seconds")


@dataclass(frozen=True)
class SamplingConfig:
    """How episodes are sampled.

    Attributes:
        temperature, top_p: at anything but 1 the recorded log-probs are not those of the
            distribution that was sampled from.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _not_negative(self, "sampling", "temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class ToolsConfig:
    """Where tools run and what they may do; docs/tools.md, `reopold_agent.tools.Isolation`.

    Attributes:
        isolation: ``none``: on threads; ``plugins``: other packages' tools in worker processes;
            ``process``: all tools; ``auto``: ``plugins`` with ``engine=verl``, else ``none``.
        memory_mb: of a worker process, beyond what it has once the tool is imported.
        workers: processes at most, per process that plays episodes; null: one per processor, from
            2 to 8.
        read: files and folders that tools in processes may read, beside Python's and the data's.
        network: whether they may use TCP.
        environment: variables that they may see although the name sounds like a secret's.
    """

    isolation: str = "auto"
    memory_mb: int = 1024
    workers: int | None = None
    read: list[str] = field(default_factory=list)
    network: bool = False
    environment: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _one_of("tools.isolation", self.isolation, ("auto", "none", "plugins", "process"))
        if self.memory_mb < 16:
            raise ConfigError(f"tools.memory_mb must be at least 16, got {self.memory_mb}")
        if self.workers is not None:
            _positive(self, "tools", "workers")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: learning rate.
        beta1, beta2, eps, weight_decay: AdamW's.
        warmup_steps: updates over which the rate rises from 0; afterwards it is constant.
        max_grad_norm: longer gradients are cut to this norm.
    """

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "optimizer", "lr", "eps", "max_grad_norm")
        _not_negative(self, "optimizer", "weight_decay", "warmup_steps")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out success.

    Attributes:
        tasks: episodes before and after training, sampled and greedy each.
        every: steps between points of the curve; 0 for none.
        curve_tasks: sampled episodes per point of the curve.
        teacher: also evaluate the teacher, once.
        max_turns: assistant turns (the paper trains with 2 and evaluates with 5).
    """

    tasks: int = 256
    every: int = 10
    curve_tasks: int = 128
    teacher: bool = True
    max_turns: int = 5

    def __post_init__(self) -> None:
        _positive(self, "evaluation", "tasks", "curve_tasks", "max_turns")
        _not_negative(self, "evaluation", "every")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run.

    Attributes:
        every: steps between two; 0 for one at the end and on Ctrl-C only.
        keep: how many, the newest.
    """

    every: int = 20
    keep: int = 2

    def __post_init__(self) -> None:
        _positive(self, "checkpoint", "keep")
        _not_negative(self, "checkpoint", "every")


@dataclass(frozen=True)
class LoggingConfig:
    """Which trajectories are written out.

    Attributes:
        trajectories: of a step.
        every: steps between two that are written.
    """

    trajectories: int = 4
    every: int = 1

    def __post_init__(self) -> None:
        _not_negative(self, "logging", "trajectories", "every")


@dataclass(frozen=True)
class ServerConfig:
    """vLLM servers of one model (``engine=verl``).

    Attributes:
        tensor_parallel: GPUs of one server; there are as many servers as the GPUs allow.
        memory_share: of each GPU's memory.
        max_sequences: requests that one server works on at once.
        eager: do without CUDA graphs (slower, starts sooner).
    """

    tensor_parallel: int = 1
    memory_share: float = 0.5
    max_sequences: int = 256
    eager: bool = False

    def __post_init__(self) -> None:
        _positive(self, "engine server", "tensor_parallel", "max_sequences")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(
                f"a server's memory_share must lie in (0, 1], got {self.memory_share}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """Who trains: ``local`` (one process) or ``verl`` (Ray, FSDP, vLLM servers).

    Attributes:
        name: ``local`` or ``verl``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (the last for ``local`` only).
        precision: ``auto`` (bfloat16 on a GPU, else float32), ``float32`` or ``bfloat16``.
        threads: CPU threads of PyTorch; null leaves its default.
        max_tokens_per_pass: rows x tokens of one forward pass without gradient.
        max_tokens_per_micro_batch: the same with gradient. Neither changes any result.
        old_logp: ``rollout`` uses the log-probs that came with the samples, ``recompute`` runs
            the model once more before the update, ``auto`` recomputes unless in float32.

    The others are for ``verl``:
        nodes, gpus_per_node: machines, and GPUs of each for student and teacher together.
        teacher_gpus_per_node: of those, the teacher's.
        student_server, teacher_server: their vLLM servers.
        rollout_workers: processes that play episodes, each ``rollout.concurrency`` at once.
        max_prompt_tokens: longest prompt; null takes 8,192 or what the models' context leaves.
        ray_address: of a running cluster; null takes ``RAY_ADDRESS``, else starts one here.
        attention: ``sdpa``, or ``flash_attention_2``, which packs sequences without padding.
        offload: keep weights, gradients and optimizer on the CPU between uses.
        overrides: verl's own settings by dotted key, applied last.
    """

    name: str = "local"
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    max_tokens_per_pass: int = 16384
    max_tokens_per_micro_batch: int = 8192
    old_logp: str = "auto"
    nodes: int = 1
    gpus_per_node: int = 1
    teacher_gpus_per_node: int = 0
    student_server: ServerConfig = field(default_factory=ServerConfig)
    teacher_server: ServerConfig = field(default_factory=ServerConfig)
    rollout_workers: int = 1
    max_prompt_tokens: int | None = None
    ray_address: str | None = None
    attention: str = "sdpa"
    offload: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("engine.name", self.name, ("local", "verl"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(
                f"engine.device must be auto, cpu, cuda or cuda:N, got '{self.device}'"
            )
        _positive(self, "engine", "max_tokens_per_pass", "max_tokens_per_micro_batch")
        if self.threads is not None:
            _positive(self, "engine", "threads")
        _one_of("engine.precision", self.precision, ("auto", "float32", "bfloat16"))
        _one_of("engine.old_logp", self.old_logp, ("auto", "rollout", "recompute"))
        _one_of("engine.attention", self.attention, ("sdpa", "flash_attention_2"))
        _positive(self, "engine", "nodes", "gpus_per_node", "rollout_workers")
        _not_negative(self, "engine", "teacher_gpus_per_node")
        if self.max_prompt_tokens is not None:
            _positive(self, "engine", "max_prompt_tokens")


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint; see `reopold_agent.policies.loading.ModelSpec`.

    Attributes:
        path: a folder, a hub id ``org/name``, or ``demo:NAME`` of the embedded ones.
        revision: branch, tag or commit on the hub.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa`` or ``eager``.
        trust_remote_code: run code that comes with the checkpoint.
        lora: settings of `peft.LoraConfig`; null trains all weights.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    lora: dict[str, Any] | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _one_of("model dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _one_of("model attention", self.attention, ("sdpa", "eager"))


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """A checkpoint that teaches; with ``follow`` its weights then follow the student's.

    Attributes:
        follow: after every ``follow_every`` steps the teacher becomes ``follow * teacher +
            (1 - follow) * student``: an average of the student's past (self-distillation), with
            0 its state of that moment. None: the teacher stays as it is.
    """

    follow: float | None = None
    follow_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "model.teacher", "follow_every")
        if self.follow is None:
            return
        if not 0 <= self.follow < 1:
            raise ConfigError(f"model.teacher.follow must lie in [0, 1), got {self.follow}")
        if self.dtype != "float32":
            raise ConfigError(
                "model.teacher.follow needs model.teacher.dtype=float32: in half precision the "
                "small changes of an average would be lost"
            )


@dataclass(frozen=True)
class ModelsConfig:
    """Student and teacher. Objectives that need no teacher (grpo, sft on recorded conversations)
    do without one: ``model.teacher=null evaluation.teacher=false``."""

    student: ModelConfig
    teacher: TeacherConfig | None = None

    def __post_init__(self) -> None:
        following = self.teacher is not None and self.teacher.follow is not None
        if following and self.student.lora is not None:
            raise ConfigError(
                "model.teacher.follow averages all weights; it cannot follow a LoRA adapter"
            )


@dataclass(frozen=True)
class PolicyConfig:
    """Who generates and who scores, by role: ``name`` and the settings of that kind of policy
    (``transformers``, ``vllm``, ``server`` or a plugin's; `reopold_agent.policies.registry`).

    Attributes:
        student, teacher: of that role.
    """

    student: dict[str, Any] = field(default_factory=lambda: {"name": "transformers"})
    teacher: dict[str, Any] = field(default_factory=lambda: {"name": "transformers"})

    def __post_init__(self) -> None:
        for role in ("student", "teacher"):
            if not isinstance(getattr(self, role).get("name"), str):
                raise ConfigError(f"policy.{role}.name must be set; policy=transformers does so")


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a training run.

    ``objective`` holds ``name`` and the settings of that objective, which
    `reopold_agent.objectives.make_objective` checks: a plugin's may have any. ``tracking`` holds
    each tracker's settings by its name (`reopold_agent.tracking.trackers`). ``on_nonfinite`` says
    what to do about numbers that are NaN or infinite: ``fail``, or ``skip`` what cannot be used.

    Attributes:
        seed: of everything that is drawn.
        steps: of the run.
        resume: ``auto`` continues the run in the folder if there is one, ``never`` refuses,
            ``must`` requires one.
    """

    env: EnvConfig
    data: DataConfig
    pixels: PixelsConfig
    model: ModelsConfig
    objective: dict[str, Any]
    engine: EngineConfig
    batch: BatchConfig
    rollout: RolloutConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    seed: int
    steps: int
    resume: str = "auto"
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    tracking: dict[str, Any] = field(default_factory=dict)
    on_nonfinite: str = "fail"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        _one_of("resume", self.resume, ("auto", "never", "must"))
        _one_of("on_nonfinite", self.on_nonfinite, ("fail", "skip"))
        if not isinstance(self.objective.get("name"), str):
            raise ConfigError("objective.name must be set; objective=reopold selects one")


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Makes a configuration dataclass from nested mappings.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type; names the key.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f" Did you mean '{where}{close[0]}'?" if close else ""
            raise ConfigError(f"unknown setting '{where}{key}'.{hint}")
    arguments: dict[str, Any] = {}
    for name, spec in known.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}{name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(f"the setting '{where}{name}' is missing")
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        # Messages of objectives begin with their setting, whose key is longer here.
        told = str(error).split(" ", 1)[0] in known
        raise ConfigError(f"{where if told else ''}{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = getattr(hint, "__args__", ())
    origin = next((o for o in options if o is not type(None)), hint) if _is_optional(hint) else hint
    if value is None:
        if _is_optional(hint):
            return None
        if not is_dataclass(origin):
            raise ConfigError(f"'{where}' must be set")
    if is_dataclass(origin) and isinstance(origin, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{where}' must be a group of settings, got {value!r}")
        return build(origin, value, f"{where}.")
    wanted = getattr(origin, "__origin__", origin)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"'{where}' must be a finite number, got {value}")
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"'{where}' must be {wanted.__name__}, got {value!r}")
    return value


def _is_optional(hint: Any) -> bool:
    return type(None) in getattr(hint, "__args__", ())


def _positive(owner: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ConfigError(f"{where}.{name} must be positive, got {getattr(owner, name)}")


def _not_negative(owner: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 0:
            raise ConfigError(f"{where}.{name} must not be negative, got {getattr(owner, name)}")


def _one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"{where} must be one of {', '.join(allowed)}; got '{value}'.{hint}")


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Sequence[str]
) -> list[str]:
    """Lines ``key: saved -> current`` for settings that differ, except in the sections ``free``."""
    old, new = _flatten(saved), _flatten(current)
    return [
        f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}"
        for key in sorted({*old, *new})
        if key.split(".")[0] not in free and old.get(key) != new.get(key)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
