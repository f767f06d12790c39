"""The absence of a judge: only the rules decide, and the rows for a judge are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

from typing_extensions import override

from reopold_agent.judges.llm.base import Counters, How, JudgeReply, JudgeRequest, ProseJudge


class NoJudge(ProseJudge):
    """A judge that decides nothing and counts its requests.

    Args:
        wanted: the judge that the settings name, if only its key is missing.
        reason: why there is no judge, for the results.
    """

    def __init__(self, wanted: str | None = None, reason: str = "judge=none") -> None:
        self.wanted, self.reason = wanted, reason
        self._counters, self._lock = Counters(), Lock()

    @property
    @override
    def name(self) -> str:
        return "none"

    @override
    def ask(self, request: JudgeRequest) -> JudgeReply:
        with self._lock:
            self._counters.requests += 1
            self._counters.would_ask += 1
            self._counters.undecided += 1
        return JudgeReply(None, How.NO_JUDGE, error=self.reason, id=request.id)

    @override
    def run(
        self, requests: Iterable[JudgeRequest], *, ordered: bool = False
    ) -> Iterator[JudgeReply]:
        return map(self.ask, requests)

    @override
    def counters(self) -> dict[str, Any]:
        with self._lock:
            return dataclasses.asdict(self._counters)

    @override
    def describe(self) -> dict[str, Any]:
        return {"name": "none", "wanted": self.wanted, "reason": self.reason}

    @override
    def close(self) -> None:
        pass
