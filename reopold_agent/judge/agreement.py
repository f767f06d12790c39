"""Labelled pairs, and the verdicts on them of the rules and of a judge.

A file of labelled pairs has one JSON object per line: ``pred`` (the response), ``gold`` (one answer
or a list of accepted ones) and ``expected`` (1 or 0), and optionally ``kind`` (one of `KINDS`),
``options``, ``question``, ``source``, ``id`` and ``note``. ``options`` holds the texts of a
question's options, as a list or by letter, or settings of the comparison that the label assumes
(``precision``, ``strict``; others are ignored).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reopold_agent.common.statistics import wilson_interval
from reopold_agent.errors import DataError
from reopold_agent.judges.boxed import boxes
from reopold_agent.judges.llm import Extract, JudgeReply, ProseJudge
from reopold_agent.judges.rules import KINDS, grade
from reopold_agent.judges.verdict import Verdict

SHIPPED = Path(__file__).with_name("labelled_answers.jsonl")
"""Pairs that were labelled by hand before the rules were mended for those on which they failed."""

_COLUMNS = (
    "A line is one JSON object; docs/judges.md names its columns: "
    '{"pred": "It is 7.", "gold": "7", "expected": 1}'
)


@dataclass(frozen=True)
class Compared:
    """A labelled pair and the verdict on it."""

    case: Mapping[str, Any]
    verdict: Verdict

    @property
    def agrees(self) -> bool:
        """Whether the verdict equals the label; an undecided response counts as wrong."""
        return self.verdict.correct == bool(self.case["expected"])

    @property
    def outcome(self) -> Literal["agree", "wrong", "undecided"]:
        """``agree``, or for a disagreement ``wrong`` (wrongly decided) or ``undecided``."""
        return "agree" if self.agrees else "undecided" if self.verdict.undecided else "wrong"

    @property
    def has_box(self) -> bool:
        """Whether the response has the format that the prompts ask for."""
        return bool(boxes(str(self.case["pred"])))


@dataclass
class Counts:
    """Outcomes of some pairs."""

    agree: int = 0
    wrong: int = 0
    undecided: int = 0

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.agree + self.wrong + self.undecided

    @property
    def share(self) -> float:
        """Share of pairs whose verdict equals the label; 0 without pairs."""
        return self.agree / max(1, self.pairs)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(self.agree, self.pairs)


def read_cases(path: Path) -> list[Mapping[str, Any]]:
    """Reads the labelled pairs of a file; adds the number of its ``line`` to each.

    Raises:
        DataError: the file cannot be read or holds no pairs, or a line is not a labelled pair.
    """
    try:
        # Not splitlines(), which also splits at U+2028 and others that a JSON string may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}\n"
            "Give a file of labelled pairs; without one the pairs that are shipped are used."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file in UTF-8\n{_COLUMNS}") from error
    cases: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            case = _parsed(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}\n{_COLUMNS}") from error
        cases.append({**case, "line": number})
    if not cases:
        raise DataError(f"{path} holds no labelled pairs\n{_COLUMNS}")
    return cases


def _parsed(line: str) -> dict[str, Any]:
    try:
        case = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(case, dict):
        raise ValueError("not a JSON object")
    lacking = [name for name in ("pred", "gold", "expected") if name not in case]
    if lacking:
        raise ValueError(f"a labelled pair needs {' and '.join(lacking)}")
    if not isinstance(case["pred"], str):
        raise ValueError("pred must be a text")
    if not isinstance(case["gold"], str) and not _are_texts(case["gold"]):
        raise ValueError("gold must be a text or a list of texts")
    if case["expected"] not in (0, 1):
        raise ValueError(f"expected must be 1 (right) or 0 (wrong), got {case['expected']!r}")
    if case.get("kind") not in (None, *KINDS):
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {case['kind']!r}")
    if not isinstance(case.get("question", ""), str):
        raise ValueError("question must be a text")
    options = case.get("options")
    if isinstance(options, dict) and _are_by_letter(options):
        options = [*options.values()]
    if not isinstance(options, dict | None) and not _are_texts(options):
        raise ValueError("options must be a list of texts, texts by letter, or settings by name")
    return case


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_by_letter(options: Mapping[str, Any]) -> bool:
    return all(len(key) == 1 for key in options)


def compare(cases: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """Grades each pair by rule, with the options that its label assumes."""
    return [Compared(case, _graded(case, case["pred"])) for case in cases]


def _graded(case: Mapping[str, Any], response: str) -> Verdict:
    given = case.get("options") or {}
    settings = given if isinstance(given, Mapping) and not _are_by_letter(given) else {}
    return grade(
        response,
        case["gold"],
        case.get("kind") or "auto",
        options=None if settings else given,
        precision=settings.get("precision"),
        strict=bool(settings.get("strict", True)),
    )


def extractions(compared: Sequence[Compared], *, everything: bool) -> list[Extract]:
    """Returns the requests to a judge, with the pair's position as their id.

    Args:
        compared: the pairs with the rules' verdicts.
        everything: whether to ask about every response, or only about those that the rules leave
            undecided, as evaluation does.
    """
    return [
        Extract(
            each.case.get("question", ""),
            each.case["pred"],
            each.case.get("kind") or "auto",
            _option_texts(each.case.get("options")),
            str(position),
        )
        for position, each in enumerate(compared)
        if everything or each.verdict.undecided
    ]


def _option_texts(options: Any) -> tuple[str, ...]:
    if isinstance(options, Mapping):
        return tuple(options[key] for key in sorted(options)) if _are_by_letter(options) else ()
    return tuple(options or ())


def ask(judge: ProseJudge, requests: Iterable[Extract]) -> dict[int, JudgeReply]:
    """Returns the judge's replies by position of the pair.

    Raises:
        JudgeError: the judge cannot be used; the replies so far are in its cache.
    """
    return {int(reply.id): reply for reply in judge.run(requests)}


def by_judge(compared: Sequence[Compared], replies: Mapping[int, JudgeReply]) -> list[Compared]:
    """Returns the pairs with a verdict on the answer that the judge extracted, where it replied.

    Where the judge failed, the response is undecided.
    """
    return [
        replace(each, verdict=_judged(each.case, replies[i])) if i in replies else each
        for i, each in enumerate(compared)
    ]


def _judged(case: Mapping[str, Any], reply: JudgeReply) -> Verdict:
    reply = reply.of_kind(case.get("kind") or "auto")
    if reply.undecided:
        return Verdict(False, None, str(reply.how), True, reply.error or "")
    if reply.extracted is None:
        return Verdict(False, None, str(reply.how))
    verdict = _graded(case, f"\\boxed{{{reply.extracted}}}")
    return Verdict(verdict.correct, reply.extracted, f"judge+{verdict.how}")


def count(compared: Iterable[Compared], key: Callable[[Compared], str]) -> dict[str, Counts]:
    """Counts the outcomes by ``key`` of each pair, most pairs first."""
    counts: dict[str, Counts] = {}
    for each in compared:
        row = counts.setdefault(key(each), Counts())
        setattr(row, each.outcome, getattr(row, each.outcome) + 1)
    return dict(sorted(counts.items(), key=lambda item: (-item[1].pairs, item[0])))


def total(compared: Iterable[Compared]) -> Counts:
    """Counts the outcomes of all pairs."""
    return count(compared, lambda _: "all").get("all", Counts())


def by_source(each: Compared) -> str:
    """Returns the source of a pair."""
    return str(each.case.get("source") or "no source")


def by_kind(each: Compared) -> str:
    """Returns the kind of a pair's answer."""
    return str(each.case.get("kind") or "auto")


def by_rule(each: Compared) -> str:
    """Returns where the answer was found ("stated"), or "undecided"."""
    return each.verdict.how.partition(":")[0] or "undecided"


def repaired_and_broken(before: Sequence[Compared], after: Sequence[Compared]) -> tuple[int, int]:
    """Returns how many pairs agree only after, and how many only before."""
    pairs = list(zip(before, after, strict=True))
    repaired = sum(new.agrees and not old.agrees for old, new in pairs)
    return repaired, sum(old.agrees and not new.agrees for old, new in pairs)
