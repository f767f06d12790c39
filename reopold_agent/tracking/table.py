"""Shows runs as one Markdown table: ``python -m reopold_agent.tracking.table RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.errors import DataError

_HEADER = (
    "| seed | student before | greedy | tools | teacher | greedy | student after | greedy | tools "
    "| training |\n|---|---|---|---|---|---|---|---|---|---|"
)


def results_table(runs: Sequence[Path]) -> str:
    """Returns a table with one row per run, by seed.

    Columns: held-out success with its 95 % interval, greedy success, share of sampled episodes
    that call a tool, and seconds of training.

    Raises:
        DataError: a folder has no ``summary.json``, since the run has not finished.
    """
    summaries = sorted((_summary(run) for run in runs), key=lambda s: int(s["seed"]))
    return "\n".join([_HEADER, *(_row(summary) for summary in summaries)])


def _summary(run: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{run} has no summary.json; the run has not finished") from error
    return summary


def _row(summary: Mapping[str, Any]) -> str:
    before, teacher, after = (summary[who] or {} for who in ("before", "teacher", "after"))
    cells = [
        str(summary["seed"]),
        *(_success(before), _greedy(before), _number(before.get("tool_rate"))),
        *(_success(teacher), _greedy(teacher)),
        *(_success(after), _greedy(after), _number(after.get("tool_rate"))),
        f"{summary['train_seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _success(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "-"
    low, high = _number(figures["low"]), _number(figures["high"])
    return f"{_number(figures['success'])} ({low} to {high})"


def _greedy(figures: Mapping[str, Any]) -> str:
    return _number((figures.get("greedy") or {}).get("success"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    print(results_table(parser.parse_args().runs))


if __name__ == "__main__":
    main()
