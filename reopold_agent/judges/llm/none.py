"""No judge: rules only, and a count of the rows that a judge would have been asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import Any

from typing_extensions import Self

from reopold_agent.judges.llm.base import Counters, Equal, Extract, How, JudgeReply, JudgeRequest


class NoJudge:
    """Decides nothing. Implements `Judge`.

    Args:
        wanted: the judge that was asked for, if it is its key that is missing.
        reason: why there is none, for the result.
    """

    def __init__(self, wanted: str | None = None, reason: str = "judge=none") -> None:
        self.wanted, self.reason = wanted, reason
        self._counters, self._lock = Counters(), Lock()

    @property
    def name(self) -> str:
        """See `Judge`."""
        return "none"

    def extract(
        self, question: str, response: str, *, kind: str = "auto", options: Sequence[str] = ()
    ) -> JudgeReply:
        """See `Judge`."""
        return self.ask(Extract(question, response, kind, tuple(options)))

    def equal(self, question: str, extracted: str, answer: str) -> JudgeReply:
        """See `Judge`."""
        return self.ask(Equal(question, extracted, answer))

    def ask(self, request: JudgeRequest) -> JudgeReply:
        """Counts a request."""
        with self._lock:
            self._counters.requests += 1
            self._counters.would_ask += 1
            self._counters.undecided += 1
        return JudgeReply(None, How.NO_JUDGE, error=self.reason, id=request.id)

    def run(
        self, requests: Iterable[JudgeRequest], *, ordered: bool = False
    ) -> Iterator[JudgeReply]:
        """See `Judge`."""
        return map(self.ask, requests)

    def counters(self) -> dict[str, Any]:
        """See `Judge`."""
        with self._lock:
            return dataclasses.asdict(self._counters)

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"name": "none", "wanted": self.wanted, "reason": self.reason}

    def close(self) -> None:
        """See `Judge`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
