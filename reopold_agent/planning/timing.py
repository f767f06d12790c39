"""FLOPs and seconds of one step, part by part."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from reopold_agent.planning import flops
from reopold_agent.planning.architecture import Architecture
from reopold_agent.planning.hardware import Rates
from reopold_agent.planning.workload import Pictures, Workload

SCHEDULES = ("local", "pools", "shared")
"""``local``: one GPU does all in turn. ``pools``: student and teacher have GPUs of their own, the
teacher scores during the rollout (our verl engine). ``shared``: all GPUs do all in turn (the
paper's: it gives the teacher a share of the step's time)."""

_QUANTILES = 64
"""Response lengths that stand for a step's: attention needs the mean of their squares."""


@dataclass(frozen=True)
class Training:
    """How the trainer computes.

    Attributes:
        checkpointing: activations are made again in the backward pass.
        lora: only adapters learn: no gradients of the weights.
        all_logits: the output embedding sees every token, not only the student's (verl).
        recompute_old: log-probs of the sampling policy in a pass of their own.
    """

    checkpointing: bool
    lora: bool
    all_logits: bool
    recompute_old: bool


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step. ``vision`` is the share of all that the vision towers take."""

    prompt: float
    decode: float
    teacher: float
    old_logp: float
    update: float
    vision: float

    @property
    def total(self) -> float:
        """All of the step."""
        parts = (f.name for f in fields(self) if f.name != "vision")
        return float(sum(getattr(self, name) for name in parts))


def step_flops(
    student: Architecture, teacher: Architecture | None, work: Workload, how: Training
) -> StepFlops:
    """FLOPs of a step.

    Prompts are computed once per group in the rollout (the servers cache prefixes), and once per
    episode everywhere else.
    """
    text, episodes = student.text, work.episodes
    lengths = work.responses(_QUANTILES)
    start = work.prompt + work.observation
    sights = work.prompts * _vision(student, work.prompt_pictures)
    observed = episodes * _vision(student, work.observation_pictures)
    prompt = work.prompts * flops.text_forward(text, work.prompt, 1)
    middle = work.prompt + work.response / 2
    if work.observation:
        prompt += episodes * flops.text_forward(text, middle + work.observation, 1, middle)
    decode = episodes * statistics.fmean(
        flops.text_forward(text, start + length, length, start) for length in lengths
    )
    passed = _whole(student, work, lengths, all_logits=how.all_logits)
    seen = episodes * (
        _vision(student, work.prompt_pictures) + _vision(student, work.observation_pictures)
    )
    passes = (2 if how.lora else 3) + how.checkpointing
    # verl keeps the logits for the backward pass; our own loss makes them again.
    head = 3 if how.all_logits else 4
    update = passes * (passed.layers + seen) + head * passed.logits
    old = (passed.layers + passed.logits + seen) if how.recompute_old else 0.0
    taught, taught_seen = 0.0, 0.0
    if teacher is not None:
        other = _whole(teacher, work, lengths, all_logits=True)
        taught_seen = episodes * (
            _vision(teacher, work.prompt_pictures) + _vision(teacher, work.observation_pictures)
        )
        taught = other.layers + other.logits + taught_seen
    vision = sights + observed + taught_seen + seen * (passes + how.recompute_old)
    counted = StepFlops(prompt + sights + observed, decode, taught, old, update, 0.0)
    return StepFlops(
        **{f.name: getattr(counted, f.name) for f in fields(counted) if f.name != "vision"},
        vision=vision / counted.total,
    )


@dataclass(frozen=True)
class _Whole:
    layers: float
    logits: float


def _whole(
    model: Architecture, work: Workload, lengths: Sequence[float], *, all_logits: bool
) -> _Whole:
    """One forward pass over all whole episodes, without the vision tower."""
    start = work.prompt + work.observation
    layers = statistics.fmean(flops.text_forward(model.text, start + n, 0) for n in lengths)
    tokens = work.length if all_logits else work.response
    return _Whole(work.episodes * layers, work.episodes * flops.logits_forward(model.text, tokens))


def _vision(model: Architecture, pictures: Pictures) -> float:
    if model.vision is None or not pictures.count:
        return 0.0
    return pictures.count * flops.vision_forward(model.vision, [pictures.tokens])


@dataclass(frozen=True)
class Server:
    """One replica that generates.

    Attributes:
        gpus: over which its weights and its cache are divided (tensor parallel).
        slots: sequences at once.
    """

    gpus: int
    slots: int


@dataclass(frozen=True)
class Layout:
    """Which GPUs do what."""

    schedule: str
    gpus: int
    student: int
    teacher: int
    student_server: Server
    teacher_server_gpus: int


def decode_seconds(
    model: Architecture,
    responses: Sequence[float],
    start: float,
    server: Server,
    rates: Rates,
    weight_bytes: int = 2,
) -> float:
    """Seconds in which one server generates responses of these lengths.

    Every iteration gives each running sequence one token. It reads the weights and the cache of
    the running sequences, or computes, whichever takes longer, and costs a fixed time besides. A
    sequence that ends makes room for the next; at the end few run, which is the long tail.

    Args:
        model: who generates.
        responses: lengths in tokens, in order of their start.
        start: tokens before the response.
        server: the replica.
        rates: what the GPU achieves.
        weight_bytes: bytes per weight and cached value.
    """
    text = model.text
    weights = text.parameters * weight_bytes / server.gpus
    per_token = text.kv_bytes(weight_bytes) / min(server.gpus, text.kv_heads)
    per_step = flops.layers_forward(text, 1) + flops.logits_forward(text, 1)
    waiting = list(reversed(responses))
    running: list[tuple[float, float]] = []  # the iteration of its end, the length
    now, seconds, context = 0.0, 0.0, 0.0
    while waiting or running:
        while waiting and len(running) < server.slots:
            length = waiting.pop()
            heapq.heappush(running, (now + length, length))
            context += start
        end, length = heapq.heappop(running)
        count, iterations = len(running) + 1, end - now
        middle = context + count * iterations / 2
        read = (weights + middle * per_token) / rates.bandwidth.value
        compute = count * per_step + flops.attention_forward(text, middle)
        compute /= rates.score.value * server.gpus
        seconds += iterations * (max(read, compute) + rates.iteration.value)
        context += count * iterations - start - length
        now = end
    return seconds


def spread(lengths: Sequence[float]) -> list[float]:
    """The same lengths in an order in which long and short alternate, as chance would have it."""
    count = len(lengths)
    stride = max(1, round(count * 0.6180339887))
    while math.gcd(stride, count) != 1:
        stride += 1
    return [lengths[(i * stride) % count] for i in range(count)]


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one step's parts.

    Attributes:
        overlap: the teacher scores while the student generates (its own GPUs).
    """

    generate: float
    teacher: float
    old_logp: float
    update: float
    sync: float
    overlap: bool

    @property
    def total(self) -> float:
        """The step."""
        first = max(self.generate, self.teacher)
        if not self.overlap:
            first = self.generate + self.teacher
        return first + self.old_logp + self.update + self.sync

    def share(self, part: str) -> float:
        """A part's share of the step."""
        return float(getattr(self, part)) / self.total
