"""What one asks a judge and what it says: the types that every judge shares.

A judge reads prose. It is asked only where the rules could not find an answer, and in extraction
it never sees the ground truth: `Extract` has no field for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

from typing_extensions import Self

from reopold_agent.compat import StrEnum


@dataclass(frozen=True)
class Extract:
    """Which answer does this response give?

    Attributes:
        kind: what form the answer has ("option", "yes_no", "count", "number", "text", "math",
            "list" or "auto"); a hint for the judge, an unknown one is as "auto".
        options: the options' texts, in order, where the question has some.
        id: comes back with the reply.
    """

    question: str
    response: str
    kind: str = "auto"
    options: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Equal:
    """Do these two answers to the question mean the same? Only in the optional equality mode."""

    question: str
    extracted: str
    answer: str
    id: str = ""


JudgeRequest: TypeAlias = Extract | Equal


class How(StrEnum):
    """How a reply came about. All but the first two leave the row undecided."""

    JUDGE = "judge"
    """The judge answered."""
    NO_ANSWER = "judge_no_answer"
    """The judge answered that the response states no answer."""
    NO_JUDGE = "no_judge"
    """There is no judge (no key); the row was counted."""
    BLOCKED = "blocked"
    """The provider's filters blocked the prompt or the reply."""
    EMPTY = "empty"
    """The reply had no text."""
    TRUNCATED = "truncated"
    """The reply stopped at its token limit."""
    MALFORMED = "malformed"
    """The reply did not have the required form."""
    TOO_LONG = "too_long"
    """The prompt does not fit the model."""
    UNAVAILABLE = "unavailable"
    """Rate limits, server errors or timeouts went on through all attempts."""
    BUDGET = "budget"
    """The budget of calls is used up."""


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply.

    Attributes:
        extracted: the answer that the response gives, in the judge's words; None if it gives none
            or nothing was decided.
        how: how the reply came about.
        equal: the verdict of an `Equal` request; None if undecided or for an `Extract`.
        cached: nothing was asked: the cache, or an equal request at the same time, had it.
        input_tokens: tokens that this reply cost now; 0 if cached.
        output_tokens: likewise, thoughts included.
        error: why nothing was decided.
        said: the judge's own words, for the record.
        id: the request's.
    """

    extracted: str | None
    how: How
    equal: bool | None = None
    cached: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    said: str = ""
    id: str = ""

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    @property
    def undecided(self) -> bool:
        """Whether the judge said nothing that one can use."""
        return self.how not in (How.JUDGE, How.NO_ANSWER)


class Judge(Protocol):
    """What evaluation uses. Methods may be called from several threads."""

    @property
    def name(self) -> str:
        """For records: the judge and its model."""
        ...

    def extract(
        self, question: str, response: str, *, kind: str = "auto", options: Sequence[str] = ()
    ) -> JudgeReply:
        """The answer that a response gives. What goes wrong with one row is in the reply.

        Raises:
            JudgeError: nothing can be asked of this judge (refused key, unknown model, endpoint
                down for many rows); the message says what to do.
        """
        ...

    def equal(self, question: str, extracted: str, answer: str) -> JudgeReply:
        """Whether an extracted answer means the same as an acceptable one."""
        ...

    def run(
        self, requests: Iterable[JudgeRequest], *, ordered: bool = False
    ) -> Iterator[JudgeReply]:
        """Asks many at once. ``requests`` is read as replies are taken, never far ahead.

        Args:
            requests: what to ask; their ``id`` comes back in the replies.
            ordered: replies in the order of the requests; otherwise as they come.
        """
        ...

    def counters(self) -> dict[str, Any]:
        """What has been asked and what it cost so far, for ``results.json``."""
        ...

    def describe(self) -> dict[str, Any]:
        """Settings and versions, for ``results.json``; no secret is among them."""
        ...

    def close(self) -> None:
        """Releases connections and the cache. The judge is not used afterwards."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True)
class Prompt:
    """What a backend sends: instructions, delimited data, and the one field of its JSON reply."""

    system: str
    user: str
    field: Literal["answer", "equal"]

    @property
    def characters(self) -> int:
        """Length, for the estimate of tokens."""
        return len(self.system) + len(self.user)


@dataclass(frozen=True)
class Completion:
    """A backend's reply: its text as it came, not yet validated."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


class Backend(Protocol):
    """One way to a model. This is all that a new provider has to write.

    Limits, retries, cache and validation are around it (`reopold_agent.judges.llm.LlmJudge`).
    """

    @property
    def name(self) -> str:
        """The provider: "gemini"."""
        ...

    @property
    def model(self) -> str:
        """The model as the provider names it."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """What influences a reply (temperature, limits): part of the cache's key. JSON values."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """More for the record that influences no reply (SDK's version). No secrets."""
        ...

    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        """Asks once; called from several threads.

        Raises:
            TransientError: worth another attempt.
            UndecidedError: this prompt gets no usable reply.
            JudgeError: no prompt will.
        """
        ...

    def close(self) -> None:
        """Releases connections."""
        ...


@dataclass(frozen=True)
class Price:
    """Money per million tokens, as the user knows it; prices change, none is built in."""

    input_per_million: float = 0.0
    output_per_million: float = 0.0
    currency: str = "USD"

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost."""
        return (
            input_tokens * self.input_per_million + output_tokens * self.output_per_million
        ) / 1e6


@dataclass
class Counters:
    """What a judge did. ``calls`` are attempts on the wire, each of which a provider counts."""

    requests: int = 0
    calls: int = 0
    cached: int = 0
    shared: int = 0
    retries: int = 0
    decided: int = 0
    undecided: int = 0
    would_ask: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Failed attempts by kind: "http_429", "timeout", "blocked", "malformed", ..."""

    def fail(self, kind: str) -> None:
        """Counts one failed attempt."""
        self.failures[kind] = self.failures.get(kind, 0) + 1
