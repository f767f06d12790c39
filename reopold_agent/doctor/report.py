"""Prints findings as a table or JSON, without secrets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reopold_agent.common.secrets import Redactor
from reopold_agent.common.terminal import is_terminal, visible, write_plain
from reopold_agent.doctor.base import Finding

_STYLES = {"ok": "green", "info": "dim", "warning": "yellow", "problem": "bold red"}


def cleaned(findings: Sequence[Finding], redact: Redactor) -> list[Finding]:
    """Returns the findings without secrets, control characters and line breaks."""

    def line(text: str) -> str:
        return " ".join(visible(redact(text)).split())

    return [replace(f, text=line(f.text), advice=line(f.advice)) for f in findings]


def as_json(findings: Sequence[Finding], version: str) -> str:
    """Returns JSON with ``status`` (the worst), ``counts`` and ``findings``."""
    counts: Counter[str] = Counter(f.status for f in findings)
    worst = next((s for s in ("problem", "warning") if counts[s]), "ok")
    values = {
        "reopold_agent": version,
        "status": worst,
        "counts": {status: counts[status] for status in _STYLES},
        "findings": [asdict(f) for f in findings],
    }
    return json.dumps(values, indent=2)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints a table on a terminal; elsewhere one line per finding and one per advice."""
    if is_terminal(console):
        console.print(_table(findings))
    else:
        for each in findings:
            write_plain(console.file, f"{each.status:8}{each.area:14}{each.text}")
            if each.advice:
                write_plain(console.file, f"{'':8}{'':14}-> {each.advice}")
    counts = Counter(f.status for f in findings)
    words = [f"{counts['problem']} problems", f"{counts['warning']} warnings"]
    line = f"{', '.join(words)}, {len(findings)} findings"
    if is_terminal(console):
        worst = "problem" if counts["problem"] else "warning" if counts["warning"] else "ok"
        console.print(Text(line, _STYLES[worst]))
    else:
        write_plain(console.file, line)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("area", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding and advice", overflow="fold")
    last = ""
    for each in findings:
        style = _STYLES[each.status]
        found = Text(each.text, "dim" if each.status == "info" else "")
        if each.advice:
            found.append(f"\n\N{RIGHTWARDS ARROW} {each.advice}", "dim" if each.status == "info"
                         else "cyan")  # fmt: skip
        area = "" if each.area == last else each.area
        table.add_row(area, Text(each.status, style), found)
        last = each.area
    return table
