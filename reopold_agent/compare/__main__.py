"""Compares evaluations: ``python -m reopold_agent.compare RUN [RUN ...] [--paper agentic]``.

Prints one row per run and, for the first two, a paired test on their shared questions.
``--paper`` adds the results of the paper below, marked as such.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from reopold_agent.cli.hydra import report_errors
from reopold_agent.cli.messages import program
from reopold_agent.compare.tables import comparison_table, load_results, paired_lines
from reopold_agent.evaluate.paper import PAPER_JUDGE, PAPER_TABLES
from reopold_agent.evaluate.report import differences_lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog=program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished evaluations")
    parser.add_argument("--paper", choices=sorted(PAPER_TABLES), help="add a table of the paper")
    options = parser.parse_args(argv)
    console = Console()
    with report_errors():
        results = load_results(options.runs)
        header, rows = comparison_table([r.name for r in options.runs], results, options.paper)
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII)
        for name in header:
            table.add_column(name, justify="right" if name else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print("Accuracy in percent; [95 % interval] of this project's runs.", markup=False)
        for run, result in zip(options.runs, results, strict=True):
            notes = [] if "seconds" in result else ["it is not finished: its command continues it."]
            if options.paper is not None:
                notes += differences_lines(result["benchmarks"])
            for note in notes:
                console.print(f"{run.name}: {note}", highlight=False, soft_wrap=True, markup=False)
        if options.paper in ("agentic", "visual"):
            console.print(PAPER_JUDGE, highlight=False, soft_wrap=True, markup=False)
        if len(options.runs) > 1:
            shared = [b for b in results[0]["benchmarks"] if b in results[1]["benchmarks"]]
            for line in paired_lines(options.runs[0], options.runs[1], shared):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
