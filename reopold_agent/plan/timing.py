"""Estimates FLOPs and seconds of a step, by part."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from reopold_agent.plan import flops
from reopold_agent.plan.hardware import Rates
from reopold_agent.plan.workload import PictureLoad, Workload
from reopold_agent.policies.architecture import Architecture

SCHEDULES = ("local", "pools", "shared")
"""``local``: one GPU does each part in turn. ``pools``: student and teacher have separate GPUs, and
the teacher scores during the rollout (our verl engine). ``shared``: all GPUs do each part in turn
(as in the paper, where the teacher has a share of the step's time)."""

SYNC_SECONDS = 3.0
SYNC_BANDWIDTH = 2.5e9
"""Weight sync: seconds of start and end, and bytes/s from shards to a server (gathering in float32,
conversion, copies between processes, loading). Assumed so that a 3B student takes 6 s, in the
middle of the 5 to 8 s of an audit by reading; the first run on GPUs should replace them."""

SWITCH_SECONDS = 0.5
"""Seconds in which a server falls asleep or wakes, without copies (assumed)."""

HOST_BANDWIDTH = 20e9
"""Bytes/s per GPU between its memory and the host's pinned memory (assumed: PCIe 4 x16)."""

_QUANTILES = 64
"""Number of response lengths that represent a step: attention needs the mean of their squares."""


@dataclass(frozen=True)
class Training:
    """How the trainer computes.

    Attributes:
        checkpointing: whether activations are recomputed in the backward pass.
        lora: whether only adapters are trained, without gradients of the weights.
        recompute_old: whether a separate pass computes the log-probs of the sampling policy.
        padding: share of the update's computed tokens that is padding.
        old_padding: the same for that separate pass.
    """

    checkpointing: bool
    lora: bool
    recompute_old: bool
    padding: float = 0.0
    old_padding: float = 0.0


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step.

    Attributes:
        teacher: scoring, also by an objective's reference model, as in a run's ``time/teacher``.
        vision: the vision towers' share of all.
    """

    prompt: float
    decode: float
    teacher: float
    old_logp: float
    update: float
    vision: float

    @property
    def total(self) -> float:
        """FLOPs of the whole step."""
        parts = (f.name for f in fields(self) if f.name != "vision")
        return float(sum(getattr(self, name) for name in parts))


def step_flops(
    student: Architecture,
    teacher: Architecture | None,
    work: Workload,
    how: Training,
    reference: Architecture | None = None,
) -> StepFlops:
    """Counts the FLOPs of a step.

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
    passed = _whole(student, work, lengths, all_logits=False)
    seen = _seen(student, work)
    passes = (2 if how.lora else 3) + how.checkpointing
    # Logits are computed for the student's tokens only, and once more for the backward pass.
    update = passes * (passed.layers / (1 - how.padding) + seen) + 4 * passed.logits
    old = passed.layers / (1 - how.old_padding) + passed.logits + seen
    old *= how.recompute_old
    taught, taught_seen = 0.0, 0.0
    if teacher is not None:
        other = _whole(teacher, work, lengths, all_logits=True)
        taught_seen = _seen(teacher, work)
        taught = other.layers + other.logits + taught_seen
    if reference is not None:  # by the passes of the old log-probs
        other = _whole(reference, work, lengths, all_logits=False)
        reference_seen = _seen(reference, work)
        taught += other.layers / (1 - how.old_padding) + other.logits + reference_seen
        taught_seen += reference_seen
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
    """Counts FLOPs of a forward pass over all whole episodes, without the vision tower."""
    start = work.prompt + work.observation
    layers = statistics.fmean(flops.text_forward(model.text, start + n, 0) for n in lengths)
    tokens = work.length if all_logits else work.response
    return _Whole(work.episodes * layers, work.episodes * flops.logits_forward(model.text, tokens))


def _seen(model: Architecture, work: Workload) -> float:
    """Returns the FLOPs in which a model's vision tower reads all pictures of a step's episodes."""
    pictures = (work.prompt_pictures, work.observation_pictures)
    return work.episodes * sum(_vision(model, each) for each in pictures)


def _vision(model: Architecture, pictures: PictureLoad) -> float:
    if model.vision is None or not pictures.count:
        return 0.0
    return pictures.count * flops.vision_forward(model.vision, [pictures.tokens])


@dataclass(frozen=True)
class Server:
    """A replica of the generating server.

    Attributes:
        gpus: number of GPUs that share its weights and its cache (tensor parallel).
        slots: sequences that it generates at once.
    """

    gpus: int
    slots: int


@dataclass(frozen=True)
class Layout:
    """Division of the GPUs between student and teacher.

    Attributes:
        student: GPUs that train the student.
        rollout: GPUs that only generate; 0 where the student's servers are on those that train.
        wider: the roles whose servers could have more of the role's GPUs each.
    """

    schedule: str
    gpus: int
    student: int
    teacher: int
    rollout: int
    student_server: Server
    teacher_server_gpus: int
    wider: frozenset[str] = frozenset()

    @property
    def generating(self) -> int:
        """GPUs of the student's servers."""
        return self.rollout or self.student


def decode_seconds(
    model: Architecture,
    responses: Sequence[float],
    start: float,
    server: Server,
    rates: Rates,
    weight_bytes: int = 2,
) -> float:
    """Estimates the seconds in which one server generates responses of these lengths.

    Every iteration gives each running sequence one token. It takes as long as the slower of
    reading (weights, and the cache of the running sequences) and computing, plus a fixed time. A
    sequence that ends makes room for the next; at the end few run, which is the long tail.

    Args:
        model: the generating model.
        responses: lengths in tokens, in order of their start.
        start: tokens before the response.
        server: the replica.
        rates: rates of the GPU.
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
    """Reorders lengths so that long and short ones mix, as in a random order."""
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
        ahead: the next step's episodes are generated while this one is trained on (other GPUs).
        switch: servers fall asleep and wake, and what is offloaded comes back.
    """

    generate: float
    teacher: float
    old_logp: float
    update: float
    sync: float
    overlap: bool
    switch: float = 0.0
    ahead: bool = False

    @property
    def total(self) -> float:
        """The step."""
        first = max(self.generate, self.teacher)
        if not self.overlap:
            first = self.generate + self.teacher
        trained = self.old_logp + self.update
        both = max(first, trained) if self.ahead else first + trained
        return both + self.sync + self.switch

    def share(self, part: str) -> float:
        """A part's share of the step."""
        return float(getattr(self, part)) / self.total
