"""Shows an evaluation: a table for the terminal and for Markdown, and an HTML page of answers.

The page is one file without external assets. Text of models and questions cannot become markup:
rows are stored as JSON and inserted by ``textContent``.
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

from reopold_agent.common.files import write_text_atomic
from reopold_agent.common.terminal import is_terminal
from reopold_agent.data.images import FileImage
from reopold_agent.errors import DataError
from reopold_agent.evaluate.answers import Row
from reopold_agent.tracking.html import page_json, source_hash

_log = logging.getLogger(__name__)

MAX_ROWS = 1000
"""Most answers on the page, wrong and undecided ones first. All are in ``responses.jsonl``."""

THUMBNAIL = 384
"""Longer side of a picture on the page, pixels."""


def results_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the table: a header, then a row per benchmark."""
    ks = sorted({int(k) for b in results["benchmarks"].values() for k in b["pass_at_k"]})
    ks = [k for k in ks if k > 1]
    header = ["benchmark", "n x k", "accuracy [95 %]"]
    header += [f"pass@{k}" for k in ks] + [f"maj@{k}" for k in ks]
    header += ["other", "tools", "undecided", "s/answer"]
    rows = [header]
    for name, figures in results["benchmarks"].items():
        other = [
            f"{key} {value}" if isinstance(value, int) else f"{key} {value:.3f}"
            for key, value in figures["extra"].items()
        ]
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
    """Prints the table and a sentence about the judge."""
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
    lines = [
        *failure_lines(results),
        *left_out_lines(results),
        *blind_lines(results),
        *_grading_lines(results),
    ]
    for line in [*kept_lines(results), *lines]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def environment_line(name: str, facts: Mapping[str, Any]) -> str:
    """Returns a sentence about how an environment's tasks are played; facts as in results."""
    env, budget, turns = facts["environment"], facts["budget"], facts["budget"]["max_turns"]
    data = env["data"] or {}
    source = data.get("path") or data.get("source") or "its own"
    return (
        f"{name}: env={env['name']} decides about success. Held-out tasks ({source}), "
        f"T {facts['sampling']['temperature']:g}, at most {turns} turn{'s' * (turns > 1)} and "
        f"{budget['max_tokens']} tokens."
    )


def kept_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence about results that earlier commands made in the folder."""
    now = results["judge"].get("name")
    told = []
    for name in results.get("kept", ()):
        judge = results["benchmarks"][name].get("judge", now)
        told.append(name if judge == now else f"{name} (judge={judge})")
    return [f"Kept from earlier commands with this folder: {', '.join(told)}."] if told else []


def failure_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns sentences for benchmarks and environments in which episodes failed, or were longer
    than the model's context."""
    lines = []
    for name, figures in results["benchmarks"].items():
        long, past = figures.get("prompts_too_long"), figures.get("past_context")
        if figures["errors"]:
            lines.append(
                f"{name}: {figures['errors']} of {figures['answers']} episodes failed and count as "
                + (
                    f"wrong, {long} of them with a prompt too long for the model; "
                    if long
                    else "wrong; "
                )
                + "responses.jsonl has their errors."
            )
        if past:
            lines.append(
                f"{name}: {past} of {figures['answers']} answers ran past the model's context "
                "(past_context in responses.jsonl); what they say there may be noise."
            )
    return lines


def left_out_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each benchmark with rows that cannot be asked."""
    return [
        f"{name}: {figures['questions']} questions were asked; {figures['left_out']} could not be: "
        + "; ".join(figures["left_out_rows"][:3])
        + ("; ..." if figures["left_out"] > 3 else ".")
        for name, figures in results["benchmarks"].items()
        if figures.get("left_out")
    ]


def blind_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each benchmark with questions whose picture is missing."""
    return [
        f"{name}: {figures['without_picture']} of {figures['questions']} questions were asked "
        "without a picture, where others have one."
        for name, figures in results["benchmarks"].items()
        if figures.get("without_picture")
    ]


def differences_lines(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each benchmark that is not asked or played as in the paper."""
    return [
        f"{name} differs from the paper: {'; '.join(facts['differences'])}."
        for name, facts in benchmarks.items()
        if facts.get("differences")
    ]


def _grading_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence about the judge, except if environments grade all answers."""
    by_rule = any("environment" not in each for each in results["benchmarks"].values())
    return [judge_line(results)] if by_rule else []


def judge_line(results: Mapping[str, Any]) -> str:
    """Returns a sentence about the judge."""
    judge = results["judge"]
    counters = judge["counters"]
    if counters.get("would_ask"):
        return (
            f"Graded by rules. A judge would have been asked about {counters['would_ask']} answers "
            "(judge=gemini and GEMINI_API_KEY ask it)."
        )
    if not counters.get("requests"):
        kept = results.get("kept", ())
        before = {n: each["judged"] for n, each in results["benchmarks"].items() if n not in kept}
        if any(before.values()):
            names = {
                results["benchmarks"][name]["judge"] for name, count in before.items() if count
            }
            return (
                f"Judge {', '.join(sorted(names))}: {sum(before.values())} answers asked about by "
                "earlier commands with this folder, none now."
            )
        return "Graded by rules; no answer needed a judge."
    return (
        f"Judge {judge.get('name', '')}: {counters['requests']} answers asked about, "
        f"{counters.get('decided', 0)} decided, {counters.get('cached', 0)} from the cache, "
        f"{counters.get('calls', 0)} calls."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the results as a Markdown page."""
    header, *rows = results_rows(results)
    found = results["benchmarks"].items()
    played = [environment_line(name, each) for name, each in found if "environment" in each]
    served = results["model"].get("served", {}).get("model", results["model"]["path"])
    told = "" if served == results["model"]["path"] else f", served as {served}"
    lines = [
        f"# Evaluation of {results['model']['path']}{told}",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "\n\n".join(
            [
                *kept_lines(results),
                *played,
                *failure_lines(results),
                *left_out_lines(results),
                *blind_lines(results),
                *differences_lines(results["benchmarks"]),
                *_grading_lines(results),
            ]
        ),
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
    page = (resources.files("reopold_agent.evaluate") / "report_page.html").read_text(
        encoding="utf-8"
    )
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
