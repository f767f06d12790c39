"""Asks a judge for the answers that the rules could not extract.

The judge extracts an answer, and the same rules then grade it. Its replies are saved beside the
responses, so that an interrupted evaluation does not ask twice. Those of another judge are set
aside, since the results name one judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.common.files import dump_json, write_bytes_atomic
from reopold_agent.evaluate.answers import Row
from reopold_agent.judges import grade
from reopold_agent.judges.llm import Extract, ProseJudge
from reopold_agent.judges.llm.prompts import VERSION
from reopold_agent.tracking.metrics import JsonLines, read_json_lines

SET_ASIDE = "judged_before.jsonl"
"""File beside ``judged.jsonl`` with the replies of judges that were replaced by another."""


def judge_rows(rows: Sequence[Row], judge: ProseJudge, judged: Path) -> list[Row]:
    """Returns the rows with the judge's replies merged in.

    Args:
        rows: from `answer_questions`.
        judge: the judge; `judge=none` only counts the questions.
        judged: file of JSON lines with replies, which is read first and then appended to. Replies
            of a judge with another name or other settings move to `SET_ASIDE`, from which they
            come back with their judge.

    Raises:
        JudgeError: the judge cannot be used; the replies so far are saved.
    """
    settings = _deciding_settings(judge)
    known = _in_force(rows, judge, settings, judged)
    waiting = {row_key(row): row for row in rows if row["undecided"] and row_key(row) not in known}
    requests = [
        Extract(row["question"], row["response"], row["kind"], tuple(row.get("options", ())), key)
        for key, row in waiting.items()
    ]
    with JsonLines(judged) as writer:
        for reply in judge.run(requests):
            reply = reply.of_kind(waiting[reply.id]["kind"])
            entry: dict[str, Any] = {
                "key": reply.id,
                "extracted": reply.extracted,
                "how": str(reply.how),
                "said": reply.said,
                "error": reply.error,
                "judge": judge.name,
                "settings": settings,
                "version": reply.version,
                "asked": not reply.undecided,
            }
            if reply.extracted is not None:
                row = waiting[reply.id]
                boxed = f"\\boxed{{{reply.extracted}}}"
                verdict = grade(
                    boxed,
                    list(row["answers"]),
                    row["kind"],
                    options=row["options"],
                    precision=row.get("precision"),
                )
                entry |= {"correct": verdict.correct, "rule": verdict.how}
            if not reply.undecided:  # a request that failed may be sent again later
                writer.write(entry)
            known[reply.id] = entry
    return [merged_row(row, known.get(row_key(row))) for row in rows]


def _deciding_settings(judge: ProseJudge) -> str:
    """Returns a digest of what a judge's replies depend on, as the cache of replies knows it."""
    told = judge.describe()
    whole = [VERSION, judge.name, told.get("settings"), told.get("longest_response")]
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_force(
    rows: Sequence[Row], judge: ProseJudge, settings: str, judged: Path
) -> dict[str, Mapping[str, Any]]:
    """Returns the judge's own saved replies on the rows; those of others are set aside."""
    # A judge whose key is missing this time has not been replaced by another.
    wanted = judge.describe().get("wanted")

    def own(entry: Mapping[str, Any]) -> bool:
        if wanted is not None or "settings" not in entry:  # of an earlier version
            return bool(entry.get("judge") == (wanted or judge.name))
        return bool(entry["settings"] == settings)

    aside = judged.with_name(SET_ASIDE)
    saved, before = (read_json_lines(f) if f.is_file() else [] for f in (judged, aside))
    keys = {row_key(row) for row in rows}
    known: dict[str, Mapping[str, Any]]
    known = {each["key"]: each for each in [*before, *saved] if each["key"] in keys and own(each)}
    kept = [each for each in saved if each["key"] not in keys]
    others = [each for each in saved if each["key"] in keys and not own(each)]
    if others or known.keys() - {each["key"] for each in saved}:
        # In this order, so that a kill between the two loses nothing.
        each_once = {(e["key"], e.get("judge"), e.get("settings")): e for e in [*before, *others]}
        _write_lines(aside, [*each_once.values()])
        _write_lines(judged, [*kept, *known.values()])
    return known


def _write_lines(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    write_bytes_atomic(file, b"".join(dump_json(entry) + b"\n" for entry in entries))


def merged_row(row: Row, reply: Mapping[str, Any] | None) -> Row:
    """Returns the row with the judge's reply merged in, if there is one."""
    if reply is None:
        return row
    merged = {
        **row,
        "judge": {k: reply.get(k) for k in ("how", "said", "error", "judge", "version")},
    }
    if reply["extracted"] is None:
        # The judge read it and found no answer: the verdict is that it is wrong.
        merged["undecided"] = not reply["asked"]
        merged["how"] = reply["how"] if reply["asked"] else row["how"]
        return merged
    return {
        **merged,
        "extracted": reply["extracted"],
        "correct": reply["correct"],
        "how": f"judge+{reply['rule']}",
        "undecided": False,
    }


def judge_name(rows: Sequence[Row], judge: ProseJudge) -> str:
    """Returns the judge that decided, for the results: of rows from `judge_rows`.

    That is ``judge``, unless it is one without a key and replies from earlier commands stand.
    """
    decided = {row["judge"]["judge"] for row in rows if "judge" in row and not row["undecided"]}
    return str(decided.pop()) if decided else judge.name


def row_key(row: Row) -> str:
    """Returns the key of a row in ``judged.jsonl``."""
    return f"{row['benchmark']}/{row['index']}/{row['sample']}"


def read_replies(judged: Path) -> dict[str, Mapping[str, Any]]:
    """Reads the saved replies, by `row_key`."""
    if not judged.is_file():
        return {}
    return {entry["key"]: entry for entry in read_json_lines(judged)}
