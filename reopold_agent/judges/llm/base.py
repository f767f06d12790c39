"""The types that all judges share: requests to a judge and its replies.

A judge reads prose. It is asked only where the rules found no answer, and in extraction it never
sees the ground truth: `Extract` has no field for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

from typing_extensions import Self

from reopold_agent.common.compat import StrEnum

_NO_COUNT = frozenset({"none", "null", "nil", "nothing", "no answer", "no count", "n/a", "nan"})
"""What judges write instead of null; the prompt asks for counts in digits."""


@dataclass(frozen=True)
class Extract:
    """A request: which answer does this response give?

    Attributes:
        kind: the form of the answer ("option", "yes_no", "count", "number", "text", "math",
            "list" or "auto"), a hint for the judge; unknown kinds count as "auto".
        options: the texts of a multiple-choice question's options, in order.
        id: comes back with the reply.
    """

    question: str
    response: str
    kind: str = "auto"
    options: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Equal:
    """A request of the optional equality mode: do these two answers mean the same?"""

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
    """There is no judge (no key); the row is only counted."""
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
    """All attempts failed: rate limits, server errors or timeouts."""
    BUDGET = "budget"
    """The budget of calls is used up."""


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply.

    Attributes:
        extracted: the answer that the response gives, in the judge's words; None if it gives none
            or if the row is undecided.
        how: how the reply came about.
        equal: the verdict of an `Equal` request; None if undecided or for an `Extract`.
        cached: whether nothing was sent, because the reply came from the cache or from an equal
            request at the same time.
        input_tokens: tokens of the prompt; 0 if cached.
        output_tokens: tokens of the reply, thoughts included; 0 if cached.
        error: why the row is undecided.
        said: the text of the judge's reply, for the record.
        id: the id of the request.
        version: the model that answered, as the provider names it; empty if it does not.
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
    version: str = ""

    @property
    def tokens(self) -> int:
        """The sum of input and output tokens."""
        return self.input_tokens + self.output_tokens

    @property
    def undecided(self) -> bool:
        """Whether the judge gave no usable reply."""
        return self.how not in (How.JUDGE, How.NO_ANSWER)

    def of_kind(self, kind: str) -> Self:
        """Returns the reply to a question of a kind: a count of "none" is no answer, not 0."""
        said = (self.extracted or "").strip(" .").casefold()
        if kind != "count" or said not in _NO_COUNT:
            return self
        return replace(self, extracted=None, how=How.NO_ANSWER)


class ProseJudge(Protocol):
    """A judge that reads prose, as evaluation uses it. Methods may be called from several threads.

    A subclass implements the methods that have no body here.
    """

    @property
    def name(self) -> str:
        """The judge and its model, for records."""
        ...

    def ask(self, request: JudgeRequest) -> JudgeReply:
        """Answers one request; the reply says what went wrong with this row, if anything.

        Raises:
            JudgeError: this judge cannot answer any request (refused key, unknown model,
                endpoint down for many rows); the message says what to do.
        """
        ...

    def extract(
        self, question: str, response: str, *, kind: str = "auto", options: Sequence[str] = ()
    ) -> JudgeReply:
        """Asks for the answer that a response gives; raises as `ask`."""
        return self.ask(Extract(question, response, kind, tuple(options)))

    def equal(self, question: str, extracted: str, answer: str) -> JudgeReply:
        """Asks whether an extracted answer means the same as an acceptable one; raises as `ask`."""
        return self.ask(Equal(question, extracted, answer))

    def run(
        self, requests: Iterable[JudgeRequest], *, ordered: bool = False
    ) -> Iterator[JudgeReply]:
        """Answers many requests; reads them only a little ahead of the replies that are taken.

        Args:
            requests: their ``id`` comes back in the replies.
            ordered: whether replies come in the order of the requests, or as they arrive.
        """
        ...

    def counters(self) -> dict[str, Any]:
        """Returns the number of requests and their cost so far, for ``results.json``."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns settings and versions for ``results.json``, without secrets."""
        ...

    def close(self) -> None:
        """Releases connections and the cache. The judge is not used afterwards."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Prompt:
    """A prompt for a backend: instructions, delimited data, and the field of the JSON reply."""

    system: str
    user: str
    field: Literal["answer", "equal"]

    @property
    def characters(self) -> int:
        """The length in characters, from which tokens are estimated."""
        return len(self.system) + len(self.user)


@dataclass(frozen=True)
class Completion:
    """A backend's reply: its text, not yet validated; ``version`` is the model that answered."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    version: str = ""


class Backend(Protocol):
    """A way to ask a model; a new provider implements only this.

    `reopold_agent.judges.llm.LlmJudge` adds limits, retries, cache and validation.
    """

    @property
    def name(self) -> str:
        """The provider's name, such as "gemini"."""
        ...

    @property
    def model(self) -> str:
        """The provider's name of the model."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Returns the settings that influence a reply as JSON values; part of the cache's key."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Returns further facts to record, such as the SDK's version, without secrets."""
        ...

    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        """Sends one prompt; may be called from several threads.

        Raises:
            TransientError: another attempt may succeed.
            UndecidedError: this prompt gets no usable reply.
            JudgeError: no prompt will get a usable reply.
        """
        ...

    def close(self) -> None:
        """Releases connections."""
        ...


@dataclass(frozen=True)
class Price:
    """The price per million tokens. The user gives it; none is built in, since prices change."""

    input_per_million: float = 0.0
    output_per_million: float = 0.0
    currency: str = "USD"

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """Returns the cost of these tokens."""
        return (
            input_tokens * self.input_per_million + output_tokens * self.output_per_million
        ) / 1e6


@dataclass
class Counters:
    """The activity of a judge. ``calls`` counts attempts, since a provider counts each of them."""

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
    versions: dict[str, int] = field(default_factory=dict)
    """Replies by the model that gave them, cached ones too."""

    def answered_by(self, version: str) -> None:
        """Counts one reply of a model."""
        self.versions[version] = self.versions.get(version, 0) + 1

    def fail(self, kind: str) -> None:
        """Counts one failed attempt."""
        self.failures[kind] = self.failures.get(kind, 0) + 1
