"""Tables and paired tests over finished evaluations."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reopold_agent.errors import DataError
from reopold_agent.evaluate.metrics import paired_comparison
from reopold_agent.evaluate.paper import PAPER_TABLES
from reopold_agent.tracking.metrics import read_json_lines


def load_results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads the ``results.json`` of evaluations.

    Raises:
        DataError: a folder holds no finished evaluation; the message says what to do with a
            training run or with an evaluation that is not finished.
    """
    trained = [str(run) for run in runs if (run / "metrics.jsonl").is_file()]
    if trained:
        what = "is a training run" if len(trained) == 1 else "are training runs"
        view = ""
        if len(trained) == len(runs) > 1:
            view = f"`reopold view {' '.join(trained)}` shows their curves together. Or: "
        raise DataError(
            f"{', '.join(trained)} {what}; `compare` takes evaluations.\n{view}`reopold evaluate "
            f"env=NAME model={trained[0]} hydra.run.dir=FOLDER` evaluates a run's student; "
            "compare such folders."
        )
    return [_results(run) for run in runs]


def _results(run: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        advice = "Is it a finished evaluation? Give folders of `reopold evaluate`."
        if (run / "responses.jsonl").is_file():
            advice = f"It is not finished: its command, with hydra.run.dir={run}, continues it."
        raise DataError(f"{run} has no results.json\n{advice}") from error
    except ValueError as error:
        raise DataError(
            f"{run / 'results.json'} is damaged: {error}\nThe evaluation's command, with "
            f"hydra.run.dir={run}, writes it again from the answers."
        ) from error
    return results


@dataclass
class Asked:
    """A question of a finished evaluation, and which of its answers are right.

    Attributes:
        question: its words; None in rows that lack them.
        task_sha256: digest of the task with its pictures, which rows of earlier versions lack.
        correct: a value per sample.
    """

    question: str | None
    task_sha256: str | None
    correct: list[bool] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Share of right answers."""
        return statistics.fmean(self.correct)

    def is_same(self, other: Asked) -> bool:
        """Returns whether both ask the same, as far as both say it."""
        if self.task_sha256 is not None and other.task_sha256 is not None:
            return self.task_sha256 == other.task_sha256
        return None in (self.question, other.question) or self.question == other.question


def asked_questions(run: Path) -> dict[str, dict[str, Asked]]:
    """Returns the questions by benchmark and name, with the judge's replies merged in."""
    judged: dict[str, Mapping[str, Any]] = {}
    if (run / "judged.jsonl").is_file():
        judged = {entry["key"]: entry for entry in read_json_lines(run / "judged.jsonl")}
    found: dict[str, dict[str, Asked]] = {}
    for row in read_json_lines(run / "responses.jsonl"):
        entry = judged.get(f"{row['benchmark']}/{row['index']}/{row['sample']}")
        correct = entry.get("correct", row["correct"]) if entry else row["correct"]
        asked = found.setdefault(row["benchmark"], {}).setdefault(
            f"{row['index']}:{row['id']}", Asked(row.get("question"), row.get("task_sha256"))
        )
        asked.correct.append(bool(correct))
    return found


def paired_lines(first: Path, second: Path, benchmarks: Sequence[str]) -> list[str]:
    """Returns a sentence per benchmark that compares two runs on their shared questions.

    Questions are shared if number and id are the same, and what is asked: ids may be numbers of
    rows.
    """
    lines = []
    runs = [asked_questions(run) for run in (first, second)]
    for benchmark in benchmarks:
        a, b = (each.get(benchmark, {}) for each in runs)
        named = sorted(a.keys() & b.keys())
        shared = [q for q in named if a[q].is_same(b[q])]
        others = len(named) - len(shared)
        left_out = f"; {others} of the same id left out, whose tasks differ" if others else ""
        if not shared:
            lines.append(f"{benchmark}: no shared questions{left_out}")
            continue
        found = paired_comparison([a[q].mean for q in shared], [b[q].mean for q in shared])
        text = (
            f"{benchmark}: {second.name} - {first.name} = {found.difference:+.3f} "
            f"({found.low:+.3f} to {found.high:+.3f}, paired bootstrap over {len(shared)} questions"
        )
        if found.p_value is not None:
            text += f"; McNemar p = {found.p_value:.3g}"
        lines.append(f"{text}{left_out})")
    return lines


def comparison_table(
    names: Sequence[str], results: Sequence[Mapping[str, Any]], paper: str | None
) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells, in percent: runs first, then the paper's rows, marked as such.

    Raises:
        DataError: the paper has no such table.
    """
    benchmarks = list(dict.fromkeys(b for r in results for b in r["benchmarks"]))
    rows = []
    if paper is not None:
        if paper not in PAPER_TABLES:
            raise DataError(f"no table '{paper}' of the paper; there are {', '.join(PAPER_TABLES)}")
        columns, entries = PAPER_TABLES[paper]
        benchmarks = list(dict.fromkeys([*columns, *benchmarks]))
        rows = [
            [f"{label} (paper's)", *(_percent(values.get(b)) for b in benchmarks)]
            for label, values in entries.items()
        ]
    runs = [
        [name, *(_cell(result["benchmarks"].get(b), paper is not None) for b in benchmarks)]
        for name, result in zip(names, results, strict=True)
    ]
    return ["", *benchmarks], [*runs, *rows]


def _cell(figures: Mapping[str, Any] | None, as_paper: bool) -> str:
    """Returns accuracy and interval; beside the paper's, HallusionBench's of the paper's rows."""
    if figures is None:
        return "-"
    pictured = figures["extra"].get("aAcc_pictured")
    if as_paper and pictured is not None:
        return f"{pictured * 100:.1f} of {figures['extra']['pictured']} pictured"
    low, high = figures["low"] * 100, figures["high"] * 100
    return f"{figures['accuracy'] * 100:.1f} [{low:.1f}, {high:.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
