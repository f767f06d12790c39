"""What an evaluation shows: a table for the terminal and Markdown, and a page to look at answers.

The page is one file without any outside asset. Whatever a model or a question says is text in it:
rows travel as JSON and are put into the page by ``textContent``.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from reopold_agent.data.images import FileImage
from reopold_agent.errors import DataError
from reopold_agent.eval.play import Row
from reopold_agent.tracking.files import write_text_atomic
from reopold_agent.tracking.html import page_json, source_hash
from reopold_agent.tracking.progress import is_terminal

_log = logging.getLogger(__name__)

MAX_ROWS = 1000
"""Answers on the page; wrong and undecided ones first. All are in ``responses.jsonl``."""

THUMBNAIL = 384
"""Longer side of a picture on the page, pixels."""


def results_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table: a header, then a row per benchmark."""
    ks = sorted({int(k) for b in results["benchmarks"].values() for k in b["pass_at_k"]})
    ks = [k for k in ks if k > 1]
    header = ["benchmark", "n x k", "accuracy [95 %]"]
    header += [f"pass@{k}" for k in ks] + [f"maj@{k}" for k in ks]
    header += ["other", "tools", "undecided", "s/answer"]
    rows = [header]
    for name, figures in results["benchmarks"].items():
        other = [f"{key} {value:.3f}" for key, value in figures["extra"].items()]
        rows.append(
            [
                name,
                f"{figures['questions']} x {figures['samples']}",
                f"{figures['accuracy']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]",
                *(_number(figures["pass_at_k"].get(str(k))) for k in ks),
                *(_number(figures["maj_at_k"].get(str(k))) for k in ks),
                ", ".join(other) or "-",
                f"{figures['tool_rate']:.2f}",
                str(figures["undecided"]),
                f"{figures['seconds_per_answer']:.2f}",
            ]
        )
    return rows


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table and what the judge did."""
    console = console or Console()
    pretty = is_terminal(console)
    if not pretty:
        console = Console(file=console.file, color_system=None, no_color=True, width=160)
    header, *rows = results_rows(results)
    table = Table(box=box.SIMPLE_HEAD if pretty else box.ASCII)
    for name in header:
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(judge_line(results), highlight=False, soft_wrap=True)


def judge_line(results: Mapping[str, Any]) -> str:
    """One sentence about the judge."""
    judge = results["judge"]
    counters = judge["counters"]
    if counters.get("would_ask"):
        return (
            f"Graded by rules. A judge would have been asked about {counters['would_ask']} answers "
            "(judge=gemini and GEMINI_API_KEY ask it)."
        )
    if not counters.get("requests"):
        return "Graded by rules; no answer needed a judge."
    return (
        f"Judge {judge.get('name', '')}: {counters['requests']} answers asked about, "
        f"{counters.get('decided', 0)} decided, {counters.get('cached', 0)} from the cache, "
        f"{counters.get('calls', 0)} calls."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    header, *rows = results_rows(results)
    lines = [
        f"# Evaluation of {results['model']['path']}",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        judge_line(results),
        "",
        f"Seed {results['seed']}, {results['model']['dtype']}. Accuracy is the mean over all "
        "answers; intervals are bootstrapped over questions.",
    ]
    for name, figures in results["benchmarks"].items():
        if len(figures["categories"]) > 1:
            lines += ["", f"## {name}", "", "| category | n | accuracy |", "|---|---|---|"]
            lines += [
                f"| {category or '-'} | {part['answers']} | {part['accuracy']:.3f} |"
                for category, part in figures["categories"].items()
            ]
    return "\n".join(lines) + "\n"


def write_page(results: Mapping[str, Any], rows: Sequence[Row], folder: Path, target: Path) -> None:
    """Writes the page with filters for wrong and undecided answers.

    Args:
        results: as in ``results.json``.
        rows: all answers; at most `MAX_ROWS` are shown.
        folder: where the rows' pictures are.
        target: the HTML file.
    """
    chosen = sorted(rows, key=lambda r: (r["correct"], not r["undecided"]))[:MAX_ROWS]
    pictures: dict[str, str | None] = {}
    for row in chosen:
        for path in row["pictures"]:
            if path not in pictures:
                pictures[path] = _thumbnail(folder / path)  # null: the page shows its name
    data = {"results": results, "rows": chosen, "pictures": pictures, "all": len(rows)}
    page = (resources.files("reopold_agent.eval") / "report_page.html").read_text(encoding="utf-8")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    page = page.replace("@SCRIPT@", source_hash(script))
    write_text_atomic(target, page.replace("@DATA@", page_json(data)))


def _thumbnail(path: Path) -> str | None:
    try:
        image = FileImage(path).open()
    except DataError as error:  # deleted or damaged since; the answers matter more
        _log.warning("not on the page: %s", error)
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
