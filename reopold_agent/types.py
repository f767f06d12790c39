"""The types of this project, and its vocabulary: read this file before the others.

What flows where::

    Task --env.reset--> Observation --chat--> prompt ids --policy--> student's tokens
      ^                                                                   |
      |                                               env.step(text), tools, images
      +---- one Trajectory per episode <----------------------------------+

A `Trajectory` is what every later stage reads: the teacher scores its ids, the objective
weighs its tokens, the engine trains on them, the files of a run record it.

Conventions that hold everywhere:

* Shapes are written as suffixes: ``_L`` one sequence, ``_BT`` batch x time.
* A value at index ``i`` of a trajectory belongs to the token ``ids[i]`` given ``ids[:i]``.
* Only tokens that the student sampled have ``loss_mask`` true. Prompts, observations, image
  placeholders and the separators that the chat template puts between turns never do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from reopold_agent.common.compat import StrEnum

if TYPE_CHECKING:
    from torch import Tensor  # would take seconds to import

Role: TypeAlias = Literal["system", "user", "assistant"]
IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
PixelArray: TypeAlias = npt.NDArray[np.uint8]

IMAGE_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands in an observation's text where an image goes (Unicode's own character for it)."""


class Observation(TypedDict):
    """What an environment shows: one user turn.

    ``text`` holds one `IMAGE_MARK` per image, in the order of ``images``; each image is an
    array of shape (height, width, 3), dtype uint8.
    """

    text: str
    images: tuple[PixelArray, ...]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``content`` mixes text and images in reading order."""

    role: Role
    content: tuple[str | EncodedImage, ...]


class ImageSource(Protocol):
    """A picture that is opened when it is needed (file, member of an archive, bytes, memory)."""

    def open(self) -> Image.Image:
        """Returns the picture as RGB with its EXIF rotation applied.

        Raises:
            reopold_agent.errors.DataError: missing or damaged; the message names the file.
        """
        ...


@dataclass(frozen=True)
class Task:
    """One question with its pictures.

    Attributes:
        id: its name.
        question: the user's words. An `IMAGE_MARK` stands where a picture goes, if here and in
            ``history`` there is one for each picture; otherwise the pictures come first.
        answers: the acceptable strings; none if the environment's state decides.
        images: pictures, or the frames of a video, in order.
        is_video: whether they are frames.
        metadata: how the answer is graded, and more.
        history: earlier turns of the conversation, the user's first.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    is_video: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[tuple[Role, str], ...] = ()

    def named_teacher(self, key: str) -> str:
        """Returns the name of its own teacher, at ``key`` in ``metadata``; empty for none."""
        value = self.metadata.get(key)
        return "" if value is None else str(value)


_image_keys = itertools.count()


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture after the one resize that student, teacher and trainer all share.

    Attributes:
        pixels: (height, width, 3) uint8, both sides multiples of patch x merge.
        grid: (t, h, w) in patches, as Qwen2.5-VL's ``image_grid_thw`` wants it.
        tokens: number of placeholder tokens, ``t * h * w / merge**2``.
        key: unique within the process; caches of derived arrays use it.
    """

    pixels: PixelArray
    grid: tuple[int, int, int]
    tokens: int
    key: int = field(default_factory=lambda: next(_image_keys))


class StopReason(StrEnum):
    """Why an episode ended."""

    ANSWER = "answer"
    """The environment terminated: the student answered, or a tool ended the episode."""
    MAX_TURNS = "max_turns"
    """The environment truncated the episode, at its turn budget unless ``info`` says otherwise."""
    MAX_TOKENS = "max_tokens"
    """The next tokens (a turn or an observation) would not fit the response budget."""
    TIME_LIMIT = "time_limit"
    """The episode used up its time for tools."""
    ENV_ERROR = "env_error"
    """The environment raised or hung; the episode is kept for the record, not trained on."""
    POLICY_ERROR = "policy_error"
    """The policy could not generate a turn, after retries; likewise."""


@dataclass(frozen=True)
class Region:
    """The part of an earlier picture that a tool showed, for viewers of the episode.

    Attributes:
        image: number of the picture, counted from 1 as the model counts.
        box: x1, y1, x2, y2 as shares of its width and height, each in [0, 1].
    """

    image: int
    box: tuple[float, float, float, float]


@dataclass
class ToolCall:
    """One tool call of the student and its result.

    ``error`` is the message that the model got; ``regions`` says where the returned pictures come
    from, one per picture or none at all.
    """

    name: str
    arguments: Mapping[str, Any]
    ok: bool
    error: str | None = None
    seconds: float = 0.0
    regions: tuple[Region, ...] = ()


@dataclass
class Turn:
    """One assistant turn: its tokens are ``ids[start:end]`` of the trajectory."""

    start: int
    end: int
    text: str
    finish: Literal["stop", "length"]
    tool_call: ToolCall | None = None
    observation: str = ""
    env_seconds: float = 0.0


@dataclass
class Trajectory:
    """One episode as tokens; see the module's conventions for alignment.

    Attributes:
        task_id: the task's id, as the environment's ``info["task_id"]`` gave it.
        index: position of the task in its split.
        sample: which of the group's samples of this task it is, from 0.
        ids: (L,) int64: prompt, then turns and observations in order.
        loss_mask: (L,) bool.
        logp: (L,) float32: log-prob under the policy that sampled, temperature 1, over the
            allowed vocabulary; 0 where ``loss_mask`` is false.
        entropy: (L,) float32, nats: entropy of that same distribution; 0 likewise.
        images: in the order of their placeholders in ``ids``.
        reward: the environment's outcome, for logs and reward-based objectives. Distillation
            never reads it.
        teacher_logp: (L,) float32 once scored, else None. With ``teacher_spans`` it is
            the reward of the token's span plus ``logp``.
        advantage: outcome compared with the group's, for objectives that need it, else None.
        env: name of the environment (after ``env=``) that the task belongs to; empty where a
            program plays one environment without naming it.
        reading: the episode in its teacher's form, if that is another one; else None.
        teacher: what the task says of its teacher (``model.teacher_key``); empty for nothing.
        prompt_digest: digest of the prompt's ids and pictures; empty for episodes that were not
            played, which nothing compares.
    """

    task_id: str
    index: int
    sample: int
    prompt_length: int
    ids: IntArray
    loss_mask: BoolArray
    logp: FloatArray
    entropy: FloatArray
    images: list[EncodedImage]
    turns: list[Turn]
    stop_reason: StopReason
    reward: float
    success: bool
    info: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    teacher_logp: FloatArray | None = None
    advantage: float | None = None
    env: str = ""
    reading: Reading | None = None
    teacher: str = ""
    prompt_digest: str = ""

    @property
    def group(self) -> tuple[str, int]:
        """The task, whose episodes in a step are a group: environment and index."""
        return self.env, self.index

    @property
    def for_teacher(self) -> Trajectory:
        """The episode in the form in which its teacher reads it."""
        return self if self.reading is None else self.reading.trajectory

    @property
    def teacher_spans(self) -> IntArray | None:
        """(L,) int64: the span of each token for a teacher with another tokenizer; None if each
        sampled token is a span. See `Reading`."""
        return None if self.reading is None else self.reading.student_spans

    def from_teacher(self, values: FloatArray) -> FloatArray:
        """Returns values at the tokens of `for_teacher` at this trajectory's own, (L,) float32."""
        return values if self.reading is None else self.reading.to_student(self, values)

    @property
    def trainable(self) -> bool:
        """Whether it can be trained on: no failure, and at least one token of the student."""
        failed = self.stop_reason in (StopReason.ENV_ERROR, StopReason.POLICY_ERROR)
        return not failed and self.response_tokens > 0

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The tool calls in order, failed ones included."""
        return [turn.tool_call for turn in self.turns if turn.tool_call is not None]

    @property
    def response_tokens(self) -> int:
        """Number of tokens that the student sampled."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, eq=False)
class Reading:
    """An episode as its teacher reads it: with another prompt, say, or other pixels.

    The student's sampled tokens are kept, in their order; what stands between them may differ.

    Attributes:
        trajectory: the episode in that form. Its ``loss_mask`` marks the student's tokens; nothing
            else of it was sampled.
        error: why the teacher cannot read it; None if it can.
        student_spans: (L,) int64: for a teacher with another tokenizer, the span that each token of
            the student belongs to, from 0; -1 for none. None: each sampled token is a span.
        teacher_spans: (M,) int64: the same of the teacher's tokens.
        decode: turns the teacher's ids into text, with control tokens; None if the student's
            tokenizer does.
    """

    trajectory: Trajectory
    error: str | None = None
    student_spans: IntArray | None = None
    teacher_spans: IntArray | None = None
    decode: Callable[[Sequence[int]], str] | None = None

    def to_student(self, student: Trajectory, values: FloatArray) -> FloatArray:
        """Returns the teacher's log-probs at the student's tokens, (L,) float32.

        In a span of several tokens of the student each gets what makes its reward that of the
        span under the student's recorded log-probs (`objectives.pieces.span_teacher_logp`). A
        sampled token without a span gets the student's own log-prob, a reward of 0. Other tokens
        get 0.

        Args:
            student: the episode as the student played it.
            values: (M,), log-probs of the ids of `trajectory`.
        """
        aligned = np.zeros(len(student.ids), dtype=np.float32)
        if self.student_spans is None or self.teacher_spans is None:
            aligned[student.loss_mask] = values[self.trajectory.loss_mask]
            return aligned
        count = span_count(self.student_spans)
        sampled = np.flatnonzero(student.loss_mask)
        spans_N = self.student_spans[sampled]
        aligned[sampled] = student.logp[sampled]
        inside = spans_N >= 0
        at, spans_K = sampled[inside], spans_N[inside]
        logp_K = student.logp[at].astype(np.float64)
        others_K = _span_sums(logp_K, spans_K, count)[spans_K] - logp_K
        asked = self.teacher_spans >= 0
        teacher = _span_sums(values[asked], self.teacher_spans[asked], count)
        aligned[at] = teacher[spans_K] - others_K
        return aligned


def span_count(spans: IntArray) -> int:
    """Returns the number of spans, given each token's: (L,) int64 from 0, -1 for none."""
    return int(spans.max(initial=-1)) + 1


def _span_sums(
    values: npt.NDArray[np.floating[Any]], spans: IntArray, count: int
) -> npt.NDArray[np.float64]:
    sums = np.zeros(count, np.float64)
    np.add.at(sums, spans, values)
    return sums


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Training uses temperature 1 and top_p 1: then the recorded log-probs are
    those of the distribution that was sampled from. ``temperature=0`` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


class TaskSource(Protocol):
    """A finite, ordered set of tasks."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Task: ...


@dataclass(frozen=True)
class TokenScores:
    """Log-prob and entropy of the student's tokens of one trajectory, aligned with its ids.

    ``states`` are the last hidden states at the tokens before them, (N, width), on the CPU, in the
    dtype of their product with the output embedding; None unless asked for.
    """

    logp: FloatArray
    entropy: FloatArray
    states: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """One turn to generate: continue ``ids`` (everything so far) of the sequence ``key``.

    ``seed`` fixes the random stream of the sequence, so that what it samples does not depend
    on which other sequences share the batch. The turn ends with the first of ``stop_ids``; None
    stands for the policy's own, which suit all requests unless environments with several rules
    are played at once.
    """

    key: int
    ids: Sequence[int]
    images: Sequence[EncodedImage]
    max_tokens: int
    seed: tuple[int, ...]
    stop_ids: frozenset[int] | None = None


@dataclass(frozen=True)
class Completion:
    """The sampled continuation of a `Request`; the three sequences have equal length.

    With ``error`` set there is no turn: the policy gave up, and ``error`` is the reason.
    """

    key: int
    ids: tuple[int, ...]
    logp: tuple[float, ...]
    entropy: tuple[float, ...]
    finish: Literal["stop", "length"]
    error: str | None = None
