"""Asks a judge for the answers that the rules could not extract.

The judge extracts an answer, and the same rules then grade it. Its replies are saved beside the
responses, so that an interrupted evaluation does not ask twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.evaluate.answers import Row
from reopold_agent.judges import grade
from reopold_agent.judges.llm import Extract, ProseJudge
from reopold_agent.tracking.metrics import JsonLines, read_json_lines


def judge_rows(rows: Sequence[Row], judge: ProseJudge, judged: Path) -> list[Row]:
    """Returns the rows with the judge's replies merged in.

    Args:
        rows: from `answer_questions`.
        judge: the judge; `judge=none` only counts the questions.
        judged: file of JSON lines with replies, which is read first and then appended to.

    Raises:
        JudgeError: the judge cannot be used; the replies so far are saved.
    """
    known = read_replies(judged)
    waiting = {row_key(row): row for row in rows if row["undecided"] and row_key(row) not in known}
    requests = [
        Extract(row["question"], row["response"], row["kind"], tuple(row.get("options", ())), key)
        for key, row in waiting.items()
    ]
    with JsonLines(judged) as writer:
        for reply in judge.run(requests):
            entry: dict[str, Any] = {
                "key": reply.id,
                "extracted": reply.extracted,
                "how": str(reply.how),
                "said": reply.said,
                "error": reply.error,
                "judge": judge.name,
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


def row_key(row: Row) -> str:
    """Returns the key of a row in ``judged.jsonl``."""
    return f"{row['benchmark']}/{row['index']}/{row['sample']}"


def read_replies(judged: Path) -> dict[str, Mapping[str, Any]]:
    """Reads the saved replies, by `row_key`."""
    if not judged.is_file():
        return {}
    return {entry["key"]: entry for entry in read_json_lines(judged)}
