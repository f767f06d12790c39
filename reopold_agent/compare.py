"""Compares evaluations: ``python -m reopold_agent.compare RUN [RUN ...] [--paper agentic]``.

Prints one row per run and, for the first two, a paired test on the questions they share. With
``--paper`` the paper's own figures stand below, marked as the paper's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from reopold_agent.command import errors_for_people
from reopold_agent.errors import DataError
from reopold_agent.eval.metrics import paired_comparison
from reopold_agent.eval.paper import PAPER_TABLES
from reopold_agent.tracking.metrics import read_json_lines
from reopold_agent.user_errors import program


def load_results(run: Path) -> dict[str, Any]:
    """An evaluation's ``results.json``.

    Raises:
        DataError: there is none: not an evaluation, or it has not finished.
    """
    try:
        results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{run} has no results.json; is it a finished evaluation?") from error
    return results


def question_means(run: Path, benchmark: str) -> dict[str, float]:
    """Share of right answers per question id, judge's findings included."""
    judged: dict[str, Mapping[str, Any]] = {}
    if (run / "judged.jsonl").is_file():
        judged = {entry["key"]: entry for entry in read_json_lines(run / "judged.jsonl")}
    found: dict[str, list[bool]] = {}
    for row in read_json_lines(run / "responses.jsonl"):
        if row["benchmark"] == benchmark:
            key = f"{benchmark}/{row['index']}/{row['sample']}"
            entry = judged.get(key)
            correct = entry.get("correct", row["correct"]) if entry else row["correct"]
            found.setdefault(f"{row['index']}:{row['id']}", []).append(bool(correct))
    return {name: statistics.fmean(values) for name, values in found.items()}


def paired_lines(first: Path, second: Path, benchmarks: Sequence[str]) -> list[str]:
    """A sentence per benchmark that both runs have, on the questions that both answered."""
    lines = []
    for benchmark in benchmarks:
        a, b = question_means(first, benchmark), question_means(second, benchmark)
        shared = sorted(a.keys() & b.keys())
        if not shared:
            lines.append(f"{benchmark}: no shared questions")
            continue
        found = paired_comparison([a[q] for q in shared], [b[q] for q in shared])
        text = (
            f"{benchmark}: {second.name} - {first.name} = {found.difference:+.3f} "
            f"({found.low:+.3f} to {found.high:+.3f}, paired bootstrap over {len(shared)} questions"
        )
        if found.p_value is not None:
            text += f"; McNemar p = {found.p_value:.3g}"
        lines.append(text + ")")
    return lines


def comparison_table(
    names: Sequence[str], results: Sequence[Mapping[str, Any]], paper: str | None
) -> tuple[list[str], list[list[str]]]:
    """Header and cells, in percent: runs first, then the paper's rows, marked as such.

    Raises:
        DataError: no such table.
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
    ours = [
        [name, *(_cell(result["benchmarks"].get(b)) for b in benchmarks)]
        for name, result in zip(names, results, strict=True)
    ]
    return ["", *benchmarks], [*ours, *rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog=program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished evaluations")
    parser.add_argument("--paper", choices=sorted(PAPER_TABLES), help="add a table of the paper")
    options = parser.parse_args(argv)
    console = Console()
    with errors_for_people():
        results = [load_results(run) for run in options.runs]
        header, rows = comparison_table([r.name for r in options.runs], results, options.paper)
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII)
        for name in header:
            table.add_column(name, justify="right" if name else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print("Accuracy in percent; [95 % interval] of this project's runs.", markup=False)
        if len(options.runs) > 1:
            shared = [b for b in results[0]["benchmarks"] if b in results[1]["benchmarks"]]
            for line in paired_lines(options.runs[0], options.runs[1], shared):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    low, high = figures["low"] * 100, figures["high"] * 100
    return f"{figures['accuracy'] * 100:.1f} [{low:.1f}, {high:.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
