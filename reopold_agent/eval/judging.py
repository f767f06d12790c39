"""Asking a judge about the answers that the rules could not find.

The judge extracts; the same rules then grade what it found. Its replies are kept beside the
responses, so an interrupted evaluation asks nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.eval.play import Row
from reopold_agent.judges import grade
from reopold_agent.judges.llm import Extract, Judge
from reopold_agent.tracking.metrics import JsonLines, read_json_lines


def judge_rows(rows: Sequence[Row], judge: Judge, judged: Path) -> list[Row]:
    """Rows with the judge's findings merged in.

    Args:
        rows: as `play_benchmark` gives them.
        judge: whom to ask; one that stands for "no judge" only counts.
        judged: JSON lines of replies; read first, then appended to.

    Raises:
        JudgeError: nothing can be asked of this judge; what it said so far is kept.
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
                "asked": not reply.undecided,
            }
            if reply.extracted is not None:
                row = waiting[reply.id]
                boxed = f"\\boxed{{{reply.extracted}}}"
                verdict = grade(boxed, list(row["answers"]), row["kind"], options=row["options"])
                entry |= {"correct": verdict.correct, "rule": verdict.how}
            if not reply.undecided:  # what failed now may be asked again later
                writer.write(entry)
            known[reply.id] = entry
    return [merged_row(row, known.get(row_key(row))) for row in rows]


def merged_row(row: Row, reply: Mapping[str, Any] | None) -> Row:
    """The row with the judge's finding, if there is one."""
    if reply is None:
        return row
    merged = {**row, "judge": {k: reply[k] for k in ("how", "said", "error", "judge")}}
    if reply["extracted"] is None:
        # The judge read it and found no answer: that is decided, and wrong.
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
    """By which ``judged.jsonl`` names a row."""
    return f"{row['benchmark']}/{row['index']}/{row['sample']}"


def read_replies(judged: Path) -> dict[str, Mapping[str, Any]]:
    """What the judge said so far, by `row_key`."""
    if not judged.is_file():
        return {}
    return {entry["key"]: entry for entry in read_json_lines(judged)}
