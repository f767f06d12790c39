"""Prints the summary at the end of a run: success, files, and the next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reopold_agent.common.files import write_json_atomic
from reopold_agent.common.terminal import duration, is_terminal
from reopold_agent.tracking.progress import show

__all__ = ["print_summary", "write_json_atomic"]

_ROWS = (("before", "student before"), ("teacher", "teacher"), ("after", "student after"))
_FILES = (
    ("summary.json", "these numbers"),
    ("plots/success.png", "success over the steps; more plots beside it"),
    ("metrics.jsonl", "every number of every step"),
    ("trajectories.jsonl", "sampled episodes, token by token; pictures/ beside it"),
    ("final", "the trained student, in Hugging Face's format"),
    ("config.yaml", "the whole configuration"),
)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a table of before, teacher and after, the run's files, and the next commands.

    Columns: held-out success sampled as in training (at temperature 1, say) with its interval,
    greedy success, share of (sampled) episodes that call a tool, number of tasks. It fits 60
    columns.

    Args:
        summary: content of ``summary.json``; missing values show as "-" or are left out.
        console: output; standard output by default. Without a terminal the output is plain
            ASCII without escape codes.
    """
    console = console or Console()
    pretty = is_terminal(console)
    if not pretty:
        # A console of its own: FORCE_COLOR or a narrow default width must not spoil a log file.
        console = Console(
            file=console.file, force_terminal=False, color_system=None, no_color=True, width=100
        )

    def line(text: str = "", style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True, highlight=False)

    line()
    line(_headline(summary), "bold")
    if any(_part(summary, name) for name, _ in _ROWS):
        console.print(_table(summary, pretty))
    run = summary.get("run")
    if run:
        line(f"In {run}:")
        for name, what in _FILES:
            if (Path(str(run)) / name).exists():
                line(f"  {name:<20} {what}")
    if summary.get("note"):
        line(str(summary["note"]))
    commands = summary.get("next")
    if isinstance(commands, str):
        commands = [commands]
    if commands:
        line("Next:")
        for command in commands:
            line(f"  {command}", "cyan")


def _headline(summary: Mapping[str, Any]) -> str:
    start, end = (show(_part(summary, name).get("success")) for name in ("before", "after"))
    teacher = show(_part(summary, "teacher").get("success"))
    parts = [f"Held-out success {start} -> {end} (teacher {teacher})"]
    if not any(_part(summary, name) for name, _ in _ROWS):
        parts = ["Trained without held-out evaluation"]
    elif summary.get("steps") == 0:
        parts = [f"Held-out success {start} (teacher {teacher}), not trained"]
    if summary.get("env"):
        parts.append(str(summary["env"]))
    if summary.get("steps"):
        training = duration(summary.get("train_seconds"))
        parts.append(f"{show(summary['steps'], '.0f')} steps in {training}")
    if summary.get("seconds"):
        parts.append(f"{duration(summary['seconds'])} in all")
    if summary.get("seed") is not None:
        parts.append(f"seed {summary['seed']}")
    return ", ".join(parts)


def _table(summary: Mapping[str, Any], pretty: bool) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD if pretty else box.ASCII,
        padding=(0, 1, 0, 0) if pretty else (0, 1),
        header_style="bold",
    )
    # Short headings and no wrapping: rich drops columns that do not fit, and 60 must do.
    table.add_column("", no_wrap=True)
    for heading in (
        f"T {show(summary.get('temperature', 1.0), 'g')}",
        "95 % interval",
        "greedy",
        "tools",
        "n",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: Sequence[tuple[str, str]] = _ROWS
    if summary.get("steps") == 0:
        rows = (("before", "student"), ("teacher", "teacher"))
    parts = [(name, label, _part(summary, name)) for name, label in rows]
    for env in _part(parts[0][2], "envs"):
        of_env = [(name, _part(_part(part, "envs"), env)) for name, _, part in parts]
        parts += [(name, f"{env} {name}", part) for name, part in of_env if part]
    for name, label, part in parts:
        if not part:  # not evaluated
            continue
        greedy = _part(part, "greedy")
        table.add_row(
            label,
            show(part.get("success")),
            f"{show(part.get('low'))} to {show(part.get('high'))}",
            show(greedy.get("success")),
            show(part.get("tool_rate")),
            show(part.get("n"), ".0f"),
            style="green" if name == "after" else "",
        )
    return table


def _part(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = of.get(name)
    return part if isinstance(part, Mapping) else {}
