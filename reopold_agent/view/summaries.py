"""Summarises rows for the page's list; accepts rows of older versions and other programs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from reopold_agent.tracking.trajectories import token_means

Row = Mapping[str, Any]

CLIP = 600
"""How many characters of a question and an answer the list keeps and searches."""

_CONTROL = re.compile(r"<\|(?:vision_start|vision_end|image_pad|video_pad)\|>(?:\*\d+)?")


def train_summary(row: Row) -> dict[str, Any]:
    """Summarises a row of ``trajectories.jsonl``."""
    turns = _list(row.get("turns"))
    calls = [_dict(turn).get("tool_call") for turn in turns]
    stop = _text(row.get("stop_reason"))
    names = ("kind", "step", "who", "env", "index", "sample")
    return {
        "key": "/".join(str(row.get(k, "")) for k in names if k != "env" or row.get(k)),
        "kind": _text(row.get("kind")),
        "step": _number(row.get("step")),
        "who": _text(row.get("who")),
        "env": _text(row.get("env")),
        "index": _number(row.get("index")),
        "sample": _number(row.get("sample")),
        "id": _text(row.get("task_id")),
        "verdict": _verdict(row.get("success")),
        "reward": _number(row.get("reward")),
        "stop": stop,
        "error": _text(_dict(row.get("info")).get("error")),
        "tokens": _number(row.get("response_tokens")),
        "seconds": _number(row.get("seconds")),
        "turns": len(turns),
        **_tools(calls),
        **_token_means(row),
        "question": _question(row),
        "answer": _end(_dict(turns[-1]).get("text")) if turns else "",
    }


def evaluation_summary(row: Row) -> dict[str, Any]:
    """Summarises a row of ``responses.jsonl`` with the judge's verdict merged in."""
    turns = _list(row.get("turns"))
    judge = _dict(row.get("judge"))
    return {
        "key": "/".join(str(row.get(k, "")) for k in ("benchmark", "index", "sample")),
        "kind": "answer",
        "benchmark": _text(row.get("benchmark")),
        "category": _text(row.get("category")),
        "index": _number(row.get("index")),
        "sample": _number(row.get("sample")),
        "id": _text(row.get("id")),
        "verdict": "undecided" if row.get("undecided") is True else _verdict(row.get("correct")),
        "how": _text(row.get("how")),
        "judge": _text(judge.get("judge")) if judge else "",
        "stop": _text(row.get("stop")),
        "error": _text(row.get("error")),
        "tokens": _number(row.get("tokens")),
        "seconds": _number(row.get("seconds")),
        "turns": len(turns),
        **_tools([_dict(turn).get("tool") for turn in turns]),
        "question": _text(row.get("question"))[:CLIP],
        "answer": _end(row.get("response")),
        "extracted": _text(row.get("extracted"))[:CLIP],
    }


def _tools(calls: list[Any]) -> dict[str, int]:
    made = [_dict(call) for call in calls if call is not None]
    return {"tools": len(made), "tool_errors": sum(call.get("ok") is False for call in made)}


def _token_means(row: Row) -> dict[str, float | None]:
    given = _dict(row.get("token_means")) or token_means(row)  # earlier versions did not write them
    return {name: _number(given.get(name)) for name in ("ratio", "entropy", "kept")}


def _question(row: Row) -> str:
    prompt = _text(row.get("prompt"))
    words = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    return _CONTROL.sub("", words).strip()[:CLIP]


def _verdict(value: Any) -> str:
    if not isinstance(value, bool):
        return "unknown"
    return "right" if value else "wrong"


def _end(value: Any) -> str:
    # The answer is at the end of the text.
    return _text(value)[-CLIP:]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
