"""Keeps a benchmark's figures and plots those of all runs; `all.sh` uses it.

    python benchmarks/step.py | python benchmarks/record.py step

The last line of the input is a JSON object of figures, also in objects, of which less is better.
They are added to ``results/NAME.json``, and those more than 10 % above the last ones are printed.
``results/index.html`` shows the figures of all files over their runs.
"""

from __future__ import annotations

import argparse
import datetime
import html
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reopold_agent.common.files import write_json_atomic, write_text_atomic
from reopold_agent.tracking.run_folder import versions

RESULTS = Path(__file__).parent / "results"
WORSE = 1.1
WIDTH, HEIGHT = 240, 60


def add(name: str, lines: Iterable[str], folder: Path) -> list[str]:
    """Adds a run's figures to its file; returns a sentence for each that is worse than the last.

    Raises:
        ValueError: the last line holds no figures.
    """
    figures = figures_of(name, ([line for line in lines if line.strip()] or [""])[-1])
    path = folder / f"{name}.json"
    runs = json.loads(path.read_text("utf-8")) if path.exists() else []
    before = runs[-1]["figures"] if runs else {}
    now = versions()
    runs.append(
        {
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "commit": (now["git"] or {}).get("commit"),
            "packages": now["packages"],
            "figures": figures,
        }
    )
    write_json_atomic(path, runs)
    return [
        f"WORSE: {name} {key} {before[key]:g} -> {value:g} ({value / before[key] - 1:+.0%})"
        for key, value in figures.items()
        if before.get(key) and value > WORSE * before[key]
    ]


def figures_of(name: str, line: str) -> dict[str, float]:
    """Returns the fractional numbers of a line of JSON, without counts, versions and the like."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the last line of {name} holds no figures: {line[:80]}")
    inner = {
        f"{key}/{part}": value
        for key, parts in found.items()
        if isinstance(parts, dict)
        for part, value in parts.items()
    }
    return {key: value for key, value in {**found, **inner}.items() if isinstance(value, float)}


def page(folder: Path) -> str:
    """Returns the page: a line for each figure of each file, over its runs."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        runs = json.loads(path.read_text("utf-8"))
        if not isinstance(runs, list):  # gpu.json is of another kind
            continue
        rows = []
        for key in runs[-1]["figures"]:
            values = [run["figures"][key] for run in runs if run["figures"].get(key) is not None]
            if values:
                cells = (key, f"{values[-1]:g}", f"{min(values):g} to {max(values):g}")
                told = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
                rows.append(f"<tr>{told}<td>{plot(values)}</td></tr>")
        last: dict[str, Any] = runs[-1]
        count = f"{len(runs)} run" + ("" if len(runs) == 1 else "s")
        about = f"{count}, the last {last['when']}, {last['machine']}, {last['commit']}"
        parts.append(
            f"<h2>{html.escape(path.stem)}</h2><p>{html.escape(about)}</p><table>"
            "<tr><th>figure</th><th>last</th><th>all</th><th>over the runs</th></tr>"
            + "".join(rows)
            + "</table>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmarks</title>'
        "<style>body{font-family:sans-serif;margin:2em}td,th{text-align:left;padding:0 1em}</style>"
        "<h1>Benchmarks</h1><p>Less is better in all of them. Plots begin at 0.</p>"
        + "\n".join(parts)
        + "</html>\n"
    )


def plot(values: list[float]) -> str:
    top = max([*values, 1e-9])
    across = WIDTH / max(1, len(values) - 1)
    points = [
        f"{across * number:.1f},{HEIGHT * (1 - value / top):.1f}"
        for number, value in enumerate(values)
    ]
    return (
        f'<svg viewBox="-4 -4 {WIDTH + 8} {HEIGHT + 8}" width="{WIDTH}" height="{HEIGHT}">'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#0072B2"/>'
        + "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*point.split(",")) for point in points)
        + "</svg>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the file in results/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for line in add(options.name, sys.stdin, options.results):
        print(line)
    write_text_atomic(options.results / "index.html", page(options.results))


if __name__ == "__main__":
    main()
