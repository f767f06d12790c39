"""The typed configuration of a run. Hydra composes the values; this module validates them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from types import UnionType
from typing import Any, TypeVar, get_type_hints

from reopold_agent.errors import ConfigError, suggestion

T = TypeVar("T")


@dataclass(frozen=True)
class EnvConfig:
    """The environment.

    Attributes:
        name: the registered name; an option of one's own, ``env=mine``, may have that of another.
        id: Gymnasium id.
        kwargs: arguments of `gymnasium.make`.
        takes_data: whether the environment also gets the run's ``data`` section (as ``data``).
    """

    name: str
    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    takes_data: bool = False


@dataclass(frozen=True)
class DataChecks:
    """Checks of rows and pictures before training starts.

    Attributes:
        duplicates: what to do with rows whose id occurred before: ``keep`` (and report), ``skip``
            or ``fail``.
        pictures: which pictures to open as a test: ``none``, ``sample`` (of 64 tasks) or ``all``.
        allow_urls: download pictures that rows reference by an http(s) URL.
        allow_private_urls: also from this machine and its private network.
        url_max_bytes, url_seconds: limits per downloaded picture.
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


_SOURCE_SETTINGS: Mapping[str, Any] = {
    "source": str,
    "path": str,
    "split": str | list | None,
    "revision": str | None,
    "limit": int | None,
    "on_bad_row": str,
    "part": str | None,
    "solution": str | None,
    "size": int,
    "seed": int,
}


@dataclass(frozen=True)
class DataConfig:
    """Data sources, one specification per split; see `reopold_agent.data.load_tasks`.

    Attributes:
        train, eval: training and held-out tasks.
        demonstrations: an expert's recorded conversations, for ``objective=sft
            objective.source=recorded`` (see `reopold_agent.data.demonstrations`).
        env_kwargs: environment settings that belong to this data.
        checks: checks of rows and pictures.
        left_out: positions of tasks to leave out, by split; the checks before training fill it.
    """

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    demonstrations: dict[str, Any] | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    checks: DataChecks = field(default_factory=DataChecks)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in ("train", "eval", "demonstrations"):
            for key, value in (getattr(self, split) or {}).items():
                _check_source(f"data.{split}.{key}", key, value)

    def specification(self, split: str) -> dict[str, Any] | None:
        """Returns what is loaded for ``train``, ``eval`` or ``demonstrations``; None for no data.

        It is the argument of `reopold_agent.data.load_tasks`, or of `load_demonstrations`.
        """
        spec: dict[str, Any] | None = getattr(self, split)
        if spec is None or self.checks == DataChecks():
            return spec
        return {**spec, "checks": asdict(self.checks)}


@dataclass(frozen=True)
class PixelConfig:
    """Size limits of a picture after resizing (784 pixels per token).

    Attributes:
        min_pixels, max_pixels: bounds on height x width; for the pictures that exceed them see
            `reopold_agent.common.pixels.PixelLimits`.
    """

    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class PixelsConfig:
    """Size limits of all pictures.

    Attributes:
        prompt: limits for the question's pictures.
        observation: limits for pictures that tools return.
    """

    prompt: PixelConfig
    observation: PixelConfig

    def most(self, view: ViewPixels | None = None) -> int:
        """Returns the pixels of the largest picture that a model is shown.

        Args:
            view: the teacher's own limits, for the teacher.
        """
        shown = [self.prompt, self.observation]
        if view is not None:
            shown = [view.prompt or self.prompt, view.observation or self.observation]
        return max(limits.max_pixels for limits in shown)


@dataclass(frozen=True)
class BatchConfig:
    """Episodes per step and how they are split into updates.

    Attributes:
        prompts: tasks per step.
        samples: episodes per task (the group size).
        mini_batch: tasks per update.
    """

    prompts: int = 128
    samples: int = 8
    mini_batch: int = 64

    def __post_init__(self) -> None:
        _positive(self, "batch", "prompts", "samples", "mini_batch")
        if self.prompts % self.mini_batch:
            raise ConfigError(
                f"batch.mini_batch={self.mini_batch} does not divide batch.prompts={self.prompts}."
                f"\nSet batch.mini_batch={self.prompts} too, for one update per step, or another "
                "number of tasks that divides it."
            )

    @property
    def updates(self) -> int:
        """Number of updates per step."""
        return self.prompts // self.mini_batch


@dataclass(frozen=True)
class RolloutConfig:
    """Budgets of one episode; see `reopold_agent.rollout.runner.RolloutLimits`.

    Attributes:
        max_response_tokens: tokens after the prompt: turns, observations and separators.
        max_turn_tokens: tokens of one assistant turn.
        max_turns: assistant turns, including the answer.
        env_seconds: time limit of one ``reset`` or ``step`` of an environment.
        concurrency: episodes in flight at once.
        stop_at_tool_call: whether a turn ends with its first tool call.
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
        temperature, top_p: unless both are 1, the recorded log-probs are not those of the
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
    """Where tools run and what they may access; see `reopold_agent.tools.Isolation`.

    Attributes:
        isolation: which tools run in worker processes instead of threads: ``none``, ``plugins``
            (those of other packages), ``process`` (all), or ``auto``: ``plugins`` with
            ``engine=verl``, else ``none``.
        memory_mb: memory limit of a worker process, beyond what importing the tool takes.
        workers: most worker processes per process that plays episodes; null: one per CPU, but 2
            to 8.
        read: files and folders that these tools may read besides Python's and the data's.
        network: whether these tools may use TCP.
        environment: variables that these tools may see although their names look like secrets.
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


CONSTANT, COSINE = "constant", "cosine"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: learning rate.
        beta1, beta2, eps, weight_decay: parameters of AdamW.
        lr_scheduler_type: what the learning rate does after the warm-up: ``constant``, or
            ``cosine`` to fall to 0 at the end of the run, along half a cosine.
        warmup_steps: updates over which the learning rate rises from 0.
        max_grad_norm: gradients are clipped to this norm.
    """

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    lr_scheduler_type: str = CONSTANT
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _one_of("optimizer.lr_scheduler_type", self.lr_scheduler_type, (CONSTANT, COSINE))
        _positive(self, "optimizer", "lr", "eps", "max_grad_norm")
        _not_negative(self, "optimizer", "weight_decay", "warmup_steps")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out tasks.

    Attributes:
        tasks: tasks before and after training, played once sampled and once greedily; 0 leaves out
            every held-out evaluation, the curve's and the teacher's too.
        every: steps between points of the curve; 0 for no curve.
        curve_tasks: sampled episodes per point of the curve.
        teacher: whether to evaluate the teacher too, once.
        max_turns: assistant turns (the paper trains with 2 and evaluates with 5).
    """

    tasks: int = 256
    every: int = 10
    curve_tasks: int = 128
    teacher: bool = True
    max_turns: int = 5

    def __post_init__(self) -> None:
        _positive(self, "evaluation", "curve_tasks", "max_turns")
        if self.tasks < 0:
            raise ConfigError(
                f"evaluation.tasks must not be negative, got {self.tasks}.\n"
                "evaluation.tasks=0 leaves out the held-out evaluation."
            )
        _not_negative(self, "evaluation", "every")
        if self.tasks == 0:
            object.__setattr__(self, "every", 0)
            object.__setattr__(self, "teacher", False)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run.

    Attributes:
        every: steps between checkpoints; 0 saves only at the end and on Ctrl-C.
        keep: how many of the newest to keep.
    """

    every: int = 20
    keep: int = 2

    def __post_init__(self) -> None:
        _positive(self, "checkpoint", "keep")
        _not_negative(self, "checkpoint", "every")


@dataclass(frozen=True)
class LoggingConfig:
    """Which trajectories are written to ``trajectories.jsonl``.

    Attributes:
        trajectories: trajectories per logged step.
        every: steps between logged steps.
    """

    trajectories: int = 4
    every: int = 1

    def __post_init__(self) -> None:
        _not_negative(self, "logging", "trajectories", "every")


@dataclass(frozen=True)
class ServerConfig:
    """vLLM servers of one model (``engine=verl``).

    Attributes:
        tensor_parallel: GPUs per server; there are as many servers as the GPUs allow.
        memory_share: share of each GPU's memory.
        max_sequences: concurrent requests per server.
        eager: run without CUDA graphs (slower, but starts sooner).
        stall_seconds: a server that gives no request a token for so long has stopped. There is no
            limit on the time of a request, nor on its time in the queue.
    """

    tensor_parallel: int = 1
    memory_share: float = 0.5
    max_sequences: int = 256
    eager: bool = False
    stall_seconds: float = 600.0

    def check(self, name: str) -> None:
        """Checks the settings, which messages call those of ``name``."""
        _positive(self, name, "tensor_parallel", "max_sequences", "stall_seconds")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"{name}.memory_share must lie in (0, 1], got {self.memory_share}")


VERL_SETTINGS = (
    "nodes",
    "gpus_per_node",
    "teacher",
    "teacher_gpus_per_node",
    "rollout_gpus_per_node",
    "student_server",
    "teacher_server",
    "rollout_workers",
    "seeded_requests",
    "ray_address",
    "offload",
    "overrides",
)
"""The keys below ``engine.`` that ``engine=local`` does not have."""


def only_for_verl(key: str) -> bool:
    """Tells whether a dotted key belongs to `VERL_SETTINGS`."""
    section, _, name = key.partition(".")
    return section == "engine" and name.partition(".")[0] in VERL_SETTINGS


@dataclass(frozen=True)
class EngineConfig:
    """The training engine: ``local`` (one process) or ``verl`` (Ray, FSDP, vLLM servers).

    Attributes:
        name: ``local`` or ``verl``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (the last for ``local`` only).
        precision: ``auto`` (bfloat16 on a GPU, else float32), ``float32`` or ``bfloat16``.
        threads: CPU threads of PyTorch; null keeps its default.
        max_tokens_per_pass: tokens of one forward pass without gradient: the rows' own where they
            are packed, else rows x longest. Neither this nor the next setting changes any result.
        max_tokens_per_micro_batch: tokens of one forward pass with gradient, counted likewise.
        packed: compute rows one after the other in one sequence instead of padding them to the
            longest, in log-probs, update and teacher's scores; null: on a GPU, and on a CPU
            with ``attention=sdpa``.
        attention: kernel of packed rows: ``flash_attention_2`` (the package flash-attn), ``varlen``
            (PyTorch's own, from 2.11 on), ``sdpa`` (one call per row, on any device), or ``auto``:
            the first of these that is installed, on a CPU ``sdpa``. Padded rows, and generation,
            use ``model.student.attention`` and ``model.teacher.attention``.
        max_prompt_tokens: longest prompt; null means what the models' contexts leave beside
            ``rollout.max_response_tokens`` (with ``verl`` at most 8,192).
        old_logp: ``rollout`` uses the log-probs recorded while sampling, ``recompute`` runs the
            model once more before the update, ``auto`` recomputes unless in float32.
        compile: with ``local``, compile the norms and feed-forward networks of the models that this
            process computes with (``torch.compile``): less memory traffic after a minute's start.
            Rounding differs.
        ahead: 1 generates the episodes of the next step while this one is scored and updated, with
            weights that are one step old; 0 waits for the update. With ``verl`` the student's
            servers then share its GPUs' memory with the trainer at all times, unless
            ``rollout_gpus_per_node`` gives them others.

    The other attributes apply to ``verl`` only:
        nodes, gpus_per_node: machines, and GPUs per machine for student and teacher together.
        teacher: where the teacher's servers are. ``separate``: on GPUs of their own;
            ``shared``: on the student's, where they sleep while it generates and learns; null:
            ``separate`` if ``teacher_gpus_per_node`` is given, else ``shared``.
        teacher_gpus_per_node: how many of the GPUs serve the teacher alone.
        rollout_gpus_per_node: how many of the GPUs only generate (the student's servers), while
            the others train; 0: the servers are on the GPUs that train.
        student_server, teacher_server: settings of the vLLM servers.
        rollout_workers: processes that play episodes, each ``rollout.concurrency`` at once.
        seeded_requests: give each request to the servers a seed of its own, so that an episode that
            is repeated samples the same tokens; null: on a CPU. On a GPU vLLM would draw such
            requests' tokens one by one, about 2.5 ms a step of 256 sequences, and rounding
            differs between batches anyway.
        ray_address: address of a running cluster; null uses ``RAY_ADDRESS`` or else starts one
            on this machine.
        offload: keep weights, gradients and optimizer on the CPU between uses.
        overrides: verl settings by dotted key, applied last.
    """

    name: str = "local"
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    max_tokens_per_pass: int = 16384
    max_tokens_per_micro_batch: int = 8192
    max_prompt_tokens: int | None = None
    packed: bool | None = None
    attention: str = "auto"
    old_logp: str = "auto"
    compile: bool = False
    ahead: int = 0
    nodes: int = 1
    gpus_per_node: int = 1
    teacher: str | None = None
    teacher_gpus_per_node: int = 0
    rollout_gpus_per_node: int = 0
    student_server: ServerConfig = field(default_factory=ServerConfig)
    teacher_server: ServerConfig = field(default_factory=ServerConfig)
    rollout_workers: int = 1
    seeded_requests: bool | None = None
    ray_address: str | None = None
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
        if self.ahead not in (0, 1):
            raise ConfigError(
                f"engine.ahead is by how many steps generation is ahead, got {self.ahead}.\n"
                "Set 1 to generate the next step's episodes meanwhile, or 0 to wait."
            )
        kernels = ("auto", "sdpa", "flash_attention_2", "varlen")
        _one_of("engine.attention", self.attention, kernels)
        if self.packed is False and self.attention != "auto":
            raise ConfigError(
                f"engine.attention={self.attention} computes packed rows, and engine.packed=false "
                "pads them.\nLeave out one of the two; padded rows use model.student.attention."
            )
        _positive(self, "engine", "nodes", "gpus_per_node", "rollout_workers")
        self.student_server.check("engine.student_server")
        self.teacher_server.check("engine.teacher_server")
        _not_negative(self, "engine", "teacher_gpus_per_node", "rollout_gpus_per_node")
        if self.teacher is not None:
            _one_of("engine.teacher", self.teacher, ("shared", "separate"))
        if self.teacher == "shared" and self.teacher_gpus_per_node:
            raise ConfigError(
                "engine.teacher=shared uses the student's GPUs, but engine.teacher_gpus_per_node="
                f"{self.teacher_gpus_per_node} gives the teacher some of its own.\n"
                "Set engine.teacher_gpus_per_node=0, or engine.teacher=separate."
            )
        if self.teacher == "separate" and not self.teacher_gpus_per_node:
            raise ConfigError(
                "engine.teacher=separate needs GPUs of its own, but "
                "engine.teacher_gpus_per_node=0.\n"
                "Give their number, or set engine.teacher=shared."
            )
        if self.max_prompt_tokens is not None:
            _positive(self, "engine", "max_prompt_tokens")

    @property
    def shares_gpus(self) -> bool:
        """Whether the teacher's servers are on the student's GPUs."""
        return self.teacher_gpus_per_node == 0

    @property
    def teacher_memory_share(self) -> float:
        """The share of a GPU's memory for the teacher's server.

        On shared GPUs at most the student's, which leaves room for the trainer's state.
        """
        own = self.teacher_server.memory_share
        return min(own, self.student_server.memory_share) if self.shares_gpus else own


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint; see `reopold_agent.policies.loading.ModelSpec`.

    Attributes:
        path: a folder, a hub id ``org/name``, or ``demo:NAME`` for an embedded model.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa`` or ``eager``.
        trust_remote_code: whether to run code that the checkpoint contains.
        lora: arguments of `peft.LoraConfig`; null trains all weights.
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


SELF = "self"
"""As ``model.teacher.path``: the student's own checkpoint."""

HINT = "{hint}"
"""Stands for the hint in ``model.teacher.view.template``."""


@dataclass(frozen=True)
class ViewPixels:
    """Size limits of pictures as the teacher sees them.

    Attributes:
        prompt: limits for the question's pictures, which are then the originals, not those that
            the environment scaled down; null: as the student sees them.
        observation: limits for pictures that tools return; null: the student's.
    """

    prompt: PixelConfig | None = None
    observation: PixelConfig | None = None


@dataclass(frozen=True)
class ViewConfig:
    """How the teacher reads an episode that the student played, if not as the student did.

    Attributes:
        system: the teacher's own system message, before the descriptions of the tools; null: the
            student's.
        hint: what the teacher is told after the question: ``answer`` (of the task), ``solution``
            (of the column ``data.train.solution``), ``feedback`` (the environment's verdict on
            this very episode), ``environment`` (`ToolEnv.teacher_prompt`), or null.
        template: words around the hint, with ``{hint}`` for it; null: the hint's own.
        pixels: size limits of pictures.
    """

    system: str | None = None
    hint: str | None = None
    template: str | None = None
    pixels: ViewPixels = field(default_factory=ViewPixels)

    def __post_init__(self) -> None:
        where = "model.teacher.view"
        if self.hint is not None:
            allowed = ("answer", "solution", "feedback", "environment")
            _one_of(f"{where}.hint", self.hint, allowed)
        if self.template is None:
            return
        if self.hint is None:
            raise ConfigError(
                f"{where}.template stands around a hint, and {where}.hint is null.\n"
                f"Choose a hint, or put words that are always the same into {where}.system."
            )
        if HINT not in self.template:
            raise ConfigError(
                f"{where}.template has no {HINT}, so that the teacher would not read the hint.\n"
                "Write that where the hint should stand."
            )

    @property
    def empty(self) -> bool:
        """Whether the teacher reads just what the student read."""
        return self == ViewConfig()


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The teacher's checkpoint; with ``follow`` its weights follow the student's.

    ``path=self`` takes the student's own (with its revision and ``trust_remote_code``).

    Attributes:
        follow: after every ``follow_every`` steps the teacher becomes ``follow * teacher +
            (1 - follow) * student``: a moving average of the student (self-distillation); 0
            copies the student. None: the teacher does not change.
        follow_every: steps between these updates of the teacher.
        view: how it reads the student's episodes, if not as the student did.
        align: ``bytes`` for a teacher with another tokenizer (or chat template, or picture
            processor): it reads the student's words in its own tokens, and scores spans with the
            same bytes (`reopold_agent.policies.spans`). null: the teacher's token ids are the
            student's, which is checked.
    """

    follow: float | None = None
    follow_every: int = 1
    align: str | None = None
    view: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None:
            raise ConfigError(
                f"model.teacher.lora={self.lora}: only the student trains an adapter; a teacher's "
                "would have no effect.\nLeave lora out; merge an adapter that the teacher was "
                "trained with (peft's merge_and_unload), and give the whole model as "
                "model.teacher.path."
            )
        _positive(self, "model.teacher", "follow_every")
        if self.align is not None:
            _one_of("model.teacher.align", self.align, ("bytes",))
        if self.follow is None:
            return
        if self.align is not None:
            raise ConfigError(
                "model.teacher.follow makes the teacher from the student's weights, so that both "
                "have one vocabulary.\nSet model.teacher.align=null."
            )
        if not 0 <= self.follow < 1:
            raise ConfigError(f"model.teacher.follow must lie in [0, 1), got {self.follow}")
        if self.dtype != "float32":
            raise ConfigError(
                "model.teacher.follow needs model.teacher.dtype=float32: in half precision the "
                "small changes of an average would be lost"
            )


@dataclass(frozen=True)
class ModelsConfig:
    """Student and teacher.

    Objectives that need no teacher (grpo, sft on recorded conversations) run without one:
    ``model.teacher=null evaluation.teacher=false``.

    Attributes:
        student, teacher: the checkpoints.
        teachers: in place of ``teacher``, several by name: a path, or the settings of ``teacher``.
            The name is an environment's, or ``default`` for all others.
        teacher_key: column of the rows (and key of `reopold_agent.types.Task.metadata`) whose value
            is the name of the task's teacher in ``teachers``; a task without a value has that of
            its environment, or the ``default``. null: teachers are chosen by environment alone.
        chat_template: a shipped template's name or a Jinja file, in place of the student's own
            template; null keeps that. The teacher scores the same ids, whatever its template.
    """

    student: ModelConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, Any] | None = None
    teacher_key: str | None = None
    chat_template: str | None = None

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name; that of ``model.teacher`` alone is the `DEFAULT_TEACHER`."""
        if self.teachers is not None:
            return self.teachers
        return {} if self.teacher is None else {DEFAULT_TEACHER: self.teacher}

    def __post_init__(self) -> None:
        if self.teachers is not None:
            if self.teacher is not None:
                raise ConfigError(
                    "model.teachers gives each environment its teacher, and model.teacher gives "
                    f"all of them another one, {self.teacher.path}.\nSet one of the two to null."
                )
            made = {str(key): _teacher(str(key), value) for key, value in self.teachers.items()}
            for name, each in made.items():
                if each.follow is not None:
                    raise ConfigError(
                        f"model.teachers.{name}.follow: only model.teacher can follow the student, "
                        "alone.\nLeave out follow, or set model.teachers=null and model.teacher."
                    )
                made[name] = self._itself(each)
            object.__setattr__(self, "teachers", made or None)
        if self.teacher_key is not None and self.teachers is None:
            raise ConfigError(
                f"model.teacher_key={self.teacher_key} chooses among model.teachers, which is not "
                "set.\nSet model.teacher=null and model.teachers={NAME: PATH, ...}, or leave out "
                "model.teacher_key."
            )
        if self.teacher is None:
            return
        teacher = self._itself(self.teacher)
        object.__setattr__(self, "teacher", teacher)
        if teacher.follow is not None and self.student.lora is not None:
            raise ConfigError(
                "model.teacher.follow averages all weights; it cannot follow a LoRA adapter"
            )
        copied = teacher.follow == 0 and teacher.follow_every == 1  # whatever it started from
        if copied and teacher.view.empty:
            raise ConfigError(
                "model.teacher.follow=0 makes the teacher a copy of the student that reads what "
                "the student reads, so that every reward is 0.\nGive it model.teacher.view (a "
                "hint, say), or another model.teacher.follow."
            )

    def teacher_name(self, env: str, value: str = "") -> str | None:
        """Returns the name of a task's teacher in `all_teachers`; None if it has none there.

        Args:
            env: the task's environment.
            value: what the task has in the column ``teacher_key``; empty for nothing.
        """
        return teacher_name(self.all_teachers, env, value)

    def _itself(self, teacher: TeacherConfig) -> TeacherConfig:
        """Returns a teacher with the student's own checkpoint in place of `SELF`."""
        if teacher.path != SELF:
            return teacher
        own = self.student
        return replace(
            teacher,
            path=own.path,
            revision=own.revision,
            trust_remote_code=own.trust_remote_code,
        )

    @property
    def self_taught(self) -> list[str]:
        """Names of the teachers that start from the student's own checkpoint."""
        mine = self.student.path, self.student.revision
        return [n for n, each in self.all_teachers.items() if (each.path, each.revision) == mine]


DEFAULT_TEACHER = "default"
"""Name in ``model.teachers`` of the teacher of all that has none of its own."""


def teacher_name(names: Container[str], env: str, value: str = "") -> str | None:
    """Returns which of some names is that of a task's teacher; see `ModelsConfig.teacher_name`."""
    wanted = (value,) if value else (env, DEFAULT_TEACHER)
    return next((name for name in wanted if name in names), None)


def model_key(role: str, name: str) -> str:
    """Returns the key of a setting of a model: ``student``, ``teacher`` or ``teacher NAME``."""
    return f"model.{role.replace('teacher ', 'teachers.')}.{name}"


def group_word(key: str, values: Mapping[str, Any]) -> str:
    """Returns the word that sets a group as a whole, quoted for a shell, for advice in messages."""
    whole = str(dict(values)).replace("'", "")
    return f"'{key}={whole}'"


def _teacher(name: str, value: Any) -> TeacherConfig:
    """Returns a teacher of ``model.teachers``, given as a path or as settings."""
    if isinstance(value, TeacherConfig):  # `dataclasses.replace` gives what was made before
        return value
    where = f"model.teachers.{name}"
    values = {"path": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"'{where}' must be the path of one teacher, or a group of settings with path; got "
            f"{value!r}.\nSet {where}=PATH or '{where}={{path: PATH, ...}}', or leave it out "
            f"(~{where}, if model= brings it)."
        )
    own = {each.name for each in fields(TeacherConfig)} - {"path"}
    if own.issuperset(values):  # +model.teachers.NAME.align=bytes takes the place of a path
        whole = group_word(where, {"path": "PATH", **values})
        raise ConfigError(
            f"'{where}' has settings, but no path.\nGive all of them at once: {whole}."
        )
    made = _convert(TeacherConfig, values, where)
    assert isinstance(made, TeacherConfig)
    return made


@dataclass(frozen=True)
class PolicyConfig:
    """Which policy generates for the student and which scores for the teacher.

    Attributes:
        student, teacher: ``name`` of the kind of policy (``transformers``, ``vllm``, ``server``
            or a plugin's, see `reopold_agent.policies.registry`) and its settings.
        teachers: settings by the name of a teacher of ``model.teachers`` that differ from those of
            ``teacher``; all of them, if its ``name`` is another.
    """

    student: dict[str, Any] = field(default_factory=lambda: {"name": "transformers"})
    teacher: dict[str, Any] = field(default_factory=lambda: {"name": "transformers"})
    teachers: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for role in ("student", "teacher"):
            if not isinstance(getattr(self, role).get("name"), str):
                raise ConfigError(f"policy.{role}.name must be set, e.g. policy=transformers")
        for name, settings in (self.teachers or {}).items():
            if not isinstance(settings, Mapping):
                raise ConfigError(
                    f"'policy.teachers.{name}' must be a group of settings, got {settings!r}"
                )

    @property
    def names(self) -> set[str]:
        """The kinds of policies of all roles."""
        teachers = [self.of_teacher(name)["name"] for name in self.teachers or ()]
        return {self.student["name"], self.teacher["name"], *teachers}

    def of_teacher(self, name: str) -> dict[str, Any]:
        """Returns the settings of the teacher with this name."""
        own = dict((self.teachers or {}).get(name, {}))
        if own.get("name", self.teacher["name"]) != self.teacher["name"]:
            return own
        return {**self.teacher, **own}


@dataclass(frozen=True)
class MemberEvaluation:
    """The held-out evaluation's setting that belongs to an environment: `EvaluationConfig`'s."""

    max_turns: int = 5

    def __post_init__(self) -> None:
        _positive(self, "evaluation", "max_turns")


@dataclass(frozen=True)
class MemberConfig:
    """What an environment of a mixture has of its own, as a run of it alone would have it."""

    env: EnvConfig
    data: DataConfig
    pixels: PixelsConfig
    rollout: RolloutConfig
    evaluation: MemberEvaluation


LONGEST_CYCLE = 10_000
"""Most draws after which the order of a mixture's environments repeats."""


@dataclass(frozen=True)
class MixConfig:
    """Several environments that train one student: ``env=[NAME,NAME]``.

    Attributes:
        weights: share of each environment in the draws of tasks, up to a common factor.
        envs: settings of each environment. (`TrainConfig` has bounds over all of them.)
    """

    weights: dict[str, float]
    envs: dict[str, MemberConfig]

    def __post_init__(self) -> None:
        if len(self.envs) < 2 or set(self.weights) != set(self.envs):
            raise ConfigError("mix.weights must name the environments of mix.envs, two or more")
        for name, weight in self.weights.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise ConfigError(
                    f"mix.weights.{name} must be a positive number, got {weight}.\n"
                    f"To train without {name}, leave it out of env=[...]."
                )
        if (cycle := sum(whole_weights(self.weights).values())) > LONGEST_CYCLE:
            raise ConfigError(
                f"mix.weights gives exact shares only after {cycle:,} draws; at most "
                f"{LONGEST_CYCLE:,} are possible.\nRound them: {{a: 0.3, b: 0.7}} takes 10 draws."
            )


@dataclass(frozen=True)
class TrainConfig:
    """The complete configuration of a training run.

    Attributes:
        objective: ``name``, ``importance_cap`` (see `importance_cap`), ``outcome`` (see
            `OutcomeConfig`) and the settings of that objective, which
            `reopold_agent.objectives.make_objective` validates, since plugins define their own.
        seed: seed of all random numbers.
        steps: training steps; 0 only evaluates (``engine=local``).
        resume: ``auto`` continues the run in the folder if there is one, ``never`` refuses to,
            ``must`` requires one.
        tracking: each tracker's settings by its name (`reopold_agent.tracking.trackers`).
        on_nonfinite: what to do about NaN and infinite numbers: ``fail``, or ``skip`` what
            cannot be used.
        mix: the environments of a mixture (`members`). Then ``env`` has their names, ``data`` is
            empty, and ``pixels``, ``rollout`` and ``evaluation.max_turns`` are bounds over them.
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
    mix: MixConfig | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(
                f"steps must not be negative, got {self.steps}.\nsteps=0 only evaluates."
            )
        if self.steps == 0 and self.engine.name == "verl":
            raise ConfigError(
                "engine=verl cannot run without training steps.\nUse engine=local, or `reopold "
                f"evaluate {shlex.quote(self.env_word)} model=DIR`."
            )
        if self.steps == 0 and self.evaluation.tasks == 0:
            raise ConfigError(
                "steps=0 only evaluates, and evaluation.tasks=0 evaluates nothing.\n"
                "Set one of them to at least 1."
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must not be negative, and less than 2**63, got {self.seed}")
        _one_of("resume", self.resume, ("auto", "never", "must"))
        _one_of("on_nonfinite", self.on_nonfinite, ("fail", "skip"))
        if not isinstance(self.objective.get("name"), str):
            raise ConfigError("objective.name must be set, e.g. objective=reopold")
        importance_cap(self.objective)
        check_over(self.objective)
        if self.outcome.active and self.batch.samples < 2:
            raise ConfigError(
                "objective.outcome compares the episodes of one task, of which batch.samples=1 "
                "leaves one.\nSet batch.samples to at least 2 (8, say, with fewer batch.prompts "
                "and batch.mini_batch), or objective.outcome=0."
            )

    @property
    def updates(self) -> int:
        """Number of updates of the whole run, if none is skipped."""
        return self.steps * self.batch.updates

    def by_environment(self, key: str) -> bool:
        """Returns whether a setting of `OVER` takes each of several environments by itself."""
        return self.mix is not None and self.objective.get(key) == "environment"

    @property
    def outcome(self) -> OutcomeConfig:
        """How the environment's outcome counts beside the teacher."""
        return OutcomeConfig.of(self.objective)

    @property
    def importance_cap(self) -> float | None:
        """The largest importance weight of a token; None: no weights."""
        return importance_cap(self.objective)

    @property
    def weights(self) -> dict[str, float]:
        """The share of each environment in the draws of tasks, up to a common factor."""
        return {self.env.name: 1.0} if self.mix is None else self.mix.weights

    @property
    def env_word(self) -> str:
        """The word of a command line that chooses the run's environments."""
        names = ",".join(self.weights)
        return f"env={names}" if self.mix is None else f"env=[{names}]"

    def leaving_out(self, tasks: Mapping[str, dict[str, list[int]]]) -> TrainConfig:
        """Returns the run without some tasks, given by environment, split and position."""
        if self.mix is None:
            return replace(self, data=replace(self.data, left_out=tasks[self.env.name]))
        envs = {
            name: replace(member, data=replace(member.data, left_out=tasks[name]))
            for name, member in self.mix.envs.items()
        }
        return replace(self, mix=replace(self.mix, envs=envs))

    def max_turns(self, split: str) -> int:
        """Returns the assistant turns of an episode of a split."""
        return self.rollout.max_turns if split == "train" else self.evaluation.max_turns

    @property
    def members(self) -> dict[str, TrainConfig]:
        """The run as each of its environments alone has it, by name; this one if it has one."""
        if self.mix is None:
            return {self.env.name: self}
        return {
            name: replace(
                self,
                mix=None,
                env=member.env,
                data=member.data,
                pixels=member.pixels,
                rollout=replace(member.rollout, concurrency=self.rollout.concurrency),
                evaluation=replace(self.evaluation, max_turns=member.evaluation.max_turns),
            )
            for name, member in self.mix.envs.items()
        }

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose tasks the run uses."""
        return ("train", "eval") if self.evaluation.tasks else ("train",)


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Returns the smallest whole numbers in the proportion of positive weights.

    Weights count as they are written in decimals: 0.1 and 0.2 are 1 and 2.
    """
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    denominator = math.lcm(*(each.denominator for each in exact.values()))
    counts = {name: int(each * denominator) for name, each in exact.items()}
    common = math.gcd(*counts.values())
    return {name: count // common for name, count in counts.items()}


OVER = ("threshold_over", "normalise_over")
"""The keys below ``objective.`` that say whether environments are taken together (``batch``, the
default) or one by one (``environment``): for the entropy threshold, and for the loss's mean."""


@dataclass(frozen=True)
class OutcomeConfig:
    """How the outcome of episodes counts beside an objective's own token rewards.

    These are settings of every objective, ``objective.outcome`` and ``objective.outcome_*``;
    `reopold_agent.objectives.outcome` has the formula.

    Attributes:
        outcome: alpha, the weight of the outcome's advantage; 0 for none.
        outcome_end: alpha at the end of a schedule; None keeps ``outcome``.
        outcome_from: the last step, from 0, that still has ``outcome``.
        outcome_until: the first step that has ``outcome_end``; None takes the run's last step.
        outcome_curve: the way between them, ``linear`` or ``cosine`` (half a wave).
        outcome_tokens: the tokens on which the outcome acts: ``all`` that the student sampled, or
            those that the objective has ``kept``.
        outcome_normalise: divide advantages by the standard deviation of their group.
        outcome_mask: the episodes without the objective's own term: ``none``; each ``response``
            that succeeded; every episode of a ``group`` in which one succeeded.
    """

    outcome: float = 0.0
    outcome_end: float | None = None
    outcome_from: int = 0
    outcome_until: int | None = None
    outcome_curve: str = "linear"
    outcome_tokens: str = "all"
    outcome_normalise: bool = True
    outcome_mask: str = "none"

    def __post_init__(self) -> None:
        for name in ("outcome", "outcome_end", "outcome_from", "outcome_until"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"objective.{name} must not be negative, got {value:g}")
        _one_of("objective.outcome_curve", self.outcome_curve, ("linear", "cosine"))
        _one_of("objective.outcome_tokens", self.outcome_tokens, ("all", "kept"))
        _one_of("objective.outcome_mask", self.outcome_mask, ("none", "response", "group"))
        for name in ("outcome_from", "outcome_until", "outcome_curve"):
            self._check_used(name, "outcome_end", self.outcome_end is not None)
        for name in ("outcome_tokens", "outcome_normalise", "outcome_mask"):
            self._check_used(name, "outcome", self.active)
        if self.outcome_mask != "none" and self.outcome_tokens == "kept":
            raise ConfigError(
                f"objective.outcome_mask={self.outcome_mask} leaves some episodes only their "
                "outcome, which objective.outcome_tokens=kept takes from them.\n"
                "Set objective.outcome_tokens=all, or objective.outcome_mask=none."
            )
        if self.outcome_until is not None and self.outcome_until < self.outcome_from:
            raise ConfigError(
                f"objective.outcome_until={self.outcome_until} is before "
                f"objective.outcome_from={self.outcome_from}.\nSet a later step, or null for the "
                "run's last."
            )

    def _check_used(self, name: str, needed: str, given: bool) -> None:
        value = getattr(self, name)
        if not given and value != getattr(type(self), name):
            raise ConfigError(
                f"objective.{name}={value} has no effect without objective.{needed}.\n"
                f"Set objective.{needed} too, or leave objective.{name} out."
            )

    @classmethod
    def of(cls, objective: Mapping[str, Any]) -> OutcomeConfig:
        """Returns these settings among those below ``objective.``.

        Raises:
            ConfigError: one has the wrong type, is out of range or does nothing.
        """
        own = {each.name: objective[each.name] for each in fields(cls) if each.name in objective}
        return build(cls, own, "objective.")

    @property
    def active(self) -> bool:
        """Whether the outcome counts in any step."""
        return self.outcome > 0 or bool(self.outcome_end)

    def alpha(self, step: int) -> float:
        """Returns the outcome's weight in a step, counted from 0.

        Raises:
            ValueError: the schedule ends with the run, whose length was not filled in.
        """
        if self.outcome_end is None or step <= self.outcome_from:
            return self.outcome
        if self.outcome_until is None:
            raise ValueError("the schedule of the outcome needs outcome_until")
        if step >= self.outcome_until:
            return self.outcome_end
        way = (step - self.outcome_from) / (self.outcome_until - self.outcome_from)
        if self.outcome_curve == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.outcome + (self.outcome_end - self.outcome) * way


OUTCOME_DEFAULTS: Mapping[str, Any] = {each.name: each.default for each in fields(OutcomeConfig)}
"""The settings of `OutcomeConfig` without which a run is as before there were any."""

COMMON_SETTINGS = ("name", "importance_cap", *OVER, *OUTCOME_DEFAULTS)
"""The keys below ``objective.`` that are not fields of the objective's class."""

FILLED_SETTINGS = ("outcome_until",)
"""Those of `COMMON_SETTINGS` whose null is filled in when a run starts, as in a class's own."""


IMPORTANCE_CAP = 2.0
"""The default of ``objective.importance_cap``."""


def importance_cap(objective: Mapping[str, Any]) -> float | None:
    """Returns the setting that all objectives have, ``objective.importance_cap``: 2 by default.

    It is the largest weight of a token in truncated importance sampling
    (`reopold_agent.objectives.pieces.importance_weight`); None means no weights.

    Args:
        objective: the settings below ``objective.``.

    Raises:
        ConfigError: it is no number of at least 1.
    """
    where = "objective.importance_cap"
    value = objective.get("importance_cap", IMPORTANCE_CAP)
    cap: float | None = _convert(float | None, value, where)
    if cap is not None and cap < 1:
        raise ConfigError(
            f"{where} must be at least 1, the weight of a token that sampler and trainer agree "
            f"on, got {cap:g}.\nSet null for no weights."
        )
    return cap


def check_over(objective: Mapping[str, Any]) -> None:
    """Checks the settings `OVER` among those below ``objective.``.

    Raises:
        ConfigError: one is neither ``batch`` nor ``environment``.
    """
    for key in OVER:
        _one_of(f"objective.{key}", objective.get(key, "batch"), ("batch", "environment"))


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds a configuration dataclass from nested mappings.

    Args:
        kind: the dataclass.
        values: its settings.
        where: prefix of the keys in messages, such as ``batch.``.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    for key in values:
        if key not in known:
            hint = suggestion(str(key), known, prefix=where)
            raise ConfigError(f"unknown setting '{where}{key}'. {hint}".rstrip())
    arguments: dict[str, Any] = {}
    missing: list[str] = []
    for name, spec in known.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}{name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            missing.append(f"'{where}{name}'")
    if missing:
        many = len(missing) > 1
        named = f"settings {', '.join(missing)} are" if many else f"setting {missing[0]} is"
        raise ConfigError(f"the {named} missing")
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        # An objective's message begins with the setting's name; users know it by the longer key.
        names_setting = str(error).split(" ", 1)[0] in known
        raise ConfigError(f"{where if names_setting else ''}{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = getattr(hint, "__args__", ())
    union = _is_optional(hint) or isinstance(hint, UnionType)
    kinds = [each for each in options if each is not type(None)] if union else [hint]
    origin = kinds[0]
    if value is None:
        if _is_optional(hint):
            return None
        if not is_dataclass(origin):
            raise ConfigError(f"'{where}' must be set")
    if is_dataclass(origin) and isinstance(origin, type):
        if not isinstance(value, Mapping):
            told = f"'{where}' must be a group of settings, got {value!r}"
            if isinstance(value, str) and "path" in {each.name for each in fields(origin)}:
                told += f".\nFor a path write {group_word(where, {'path': value})}."
            raise ConfigError(told)
        return build(origin, value, f"{where}.")
    expected = tuple(getattr(each, "__origin__", each) for each in kinds)
    if expected == (dict,) and isinstance(value, Mapping):
        item = getattr(origin, "__args__", (Any, Any))[1]
        if is_dataclass(item):
            return {str(key): _convert(item, each, f"{where}.{key}") for key, each in value.items()}
    if expected == (float,) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"'{where}' must be a finite number, got {value}")
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        names = " or ".join(each.__name__ for each in expected)
        raise ConfigError(f"'{where}' must be {names}, got {value!r}")
    return value


def _check_source(where: str, key: str, value: Any) -> None:
    """Checks the type of a setting that several data sources have; other settings pass."""
    if key == "path" and isinstance(value, Sequence) and not isinstance(value, str):
        raise ConfigError(
            f"'{where}' takes one path, got {list(value)}.\n"
            "Put the files into one folder and give its path: all its files of rows are read."
        )
    if key in _SOURCE_SETTINGS:
        _convert(_SOURCE_SETTINGS[key], value, where)
    if key == "limit" and value is not None and value < 1:
        raise ConfigError(f"'{where}' must be positive or null, got {value}")


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
        told = f"{where} must be one of {', '.join(allowed)}; got '{value}'. "
        raise ConfigError((told + suggestion(value, allowed)).rstrip())


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Sequence[str]
) -> list[str]:
    """Lists settings that differ as ``key: saved -> current``.

    Args:
        saved, current: nested settings.
        free: sections and keys that may differ.
    """
    old, new = flatten(saved), flatten(current)
    return [
        f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}"
        for key in sorted({*old, *new})
        if not {key, key.split(".")[0]} & set(free) and old.get(key) != new.get(key)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by their dotted keys; an empty group stays as a value.

    Args:
        values: nested settings.
        prefix: of the keys.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
