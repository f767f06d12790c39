"""Writes a study's report: ``README.md``, ``numbers.json`` and figures."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reopold_agent.common.files import dump_json, write_bytes_atomic, write_text_atomic
from reopold_agent.errors import DataError
from reopold_agent.study.collect import Results
from reopold_agent.study.figures import save
from reopold_agent.study.grid import Run
from reopold_agent.study.pages import PAGES, Page
from reopold_agent.study.tables import Table
from reopold_agent.tracking.run_folder import versions

MARK = "<!-- made by reopold_agent.study from here on -->"
"""In the page over all studies: the text above it is written by hand."""

HOW = """
- One seed is one training run from the same embedded student; the seed draws the tasks' order and
  every sample. All seeds and settings play the same held-out tasks. Intervals therefore speak
  about other training runs on these tasks, not about other tasks.
- `x [a, b]` is a mean over seeds with its 95 % interval: bootstrap over seeds, its percentiles
  widened for their small number (Hesterberg 2015, section 5.3). With five seeds it nearly spans
  them all, so that a difference counts as decided only if all seeds agree.
- Differences are paired: second less first within a seed.
- "yes" and "no" mean that the whole interval lies on that side, with at least five seeds;
  everything else is "not decided". Claims are not corrected for their number.
- A curve *reaches* a target where, after averaging each inner point with its two neighbours, it
  first is at or above it; straight lines between points. "Mean curve" is that of all seeds.
- Success is of the last evaluation, after the last step; no step is chosen by its success.
"""


def write_report(runs: Sequence[Run], out: Path, command: Sequence[str]) -> Results:
    """Writes tables, figures and numbers of the finished runs.

    Raises:
        DataError: no run has finished.
    """
    results = Results(runs, out)
    if not results.records:
        raise DataError(f"no run in {out} has finished, so there is nothing to report")
    page = PAGES[results.study.report](results)
    for old in out.glob("*.png"):
        old.unlink()
    for name, _, figure in page.figures:
        save(figure, out / name)
    write_bytes_atomic(out / "numbers.json", dump_json(numbers(results, page, command)) + b"\n")
    write_text_atomic(out / "README.md", readme(results, page, command))
    return results


def numbers(results: Results, page: Page, command: Sequence[str]) -> dict[str, Any]:
    """Returns everything that the report is computed from."""
    return {
        "study": results.study.name,
        "command": _command(command),
        "made_with": _made_with(results),
        "missing": results.missing,
        "claims": [vars(claim) for claim in page.claims],
        "tables": [vars(table) for table in page.tables],
        "models": {
            who: model.numbers()
            for who in ("student", "teacher")
            if (model := results.model(who)) is not None
        },
        "latency_seconds": {
            name: seconds
            for name in (*results.records, "teacher")
            if (seconds := results.latency(name))
        },
        "runs": [
            record.numbers() for records in results.records.values() for record in records.values()
        ],
    }


def readme(results: Results, page: Page, command: Sequence[str]) -> str:
    """Returns the report as Markdown."""
    study = results.study
    lines = [f"# {study.title}", "", f"Mirrors {study.mirrors} of the paper on embedded tasks."]
    lines += ["", "```", _command(command), "```", ""]
    lines += [f"{line}  " for line in _setup(results)]
    if results.missing:
        lines += ["", f"**Incomplete**: without {', '.join(results.missing)}."]
    if page.claims:
        lines += ["", "## Does it hold here?", ""]
        header = ["the paper's claim", "here", "holds"]
        rows = [[c.claim, c.here, f"**{c.verdict}**"] for c in page.claims]
        lines += _markdown(Table("", header, rows))
    lines += [text for note in page.notes for text in ("", note)]
    for table in page.tables:
        lines += ["", f"## {table.title}", "", *_markdown(table)]
        lines += ["", table.note] if table.note else []
    if page.figures:
        lines += ["", "## Figures"]
    for name, caption, _ in page.figures:
        lines += ["", f"![{caption}]({name})", "", f"*{caption}.*"]
    lines += ["", "## How to read the numbers", HOW.strip()]
    lines += ["", "## Settings", "", "Words of `python -m reopold_agent.train`, common to all:"]
    lines += ["", "```", shlex.join(_shared_overrides(results)), "```", ""]
    rows = [
        [results.title(label), f"`{label}`", _specific_overrides(results, label)]
        for label in results.records
    ]
    lines += _markdown(Table("", ["setting", "label", "its own words"], rows))
    lines += ["", "`numbers.json` has every curve, every claim's numbers and each run's words."]
    return "\n".join(lines) + "\n"


def _command(words: Sequence[str]) -> str:
    """Returns the command that reproduces runs and report, without the options for copies."""
    return shlex.join(w for w in words if not w.startswith(("report=", "docs=")))


def copy_to(out: Path, docs: Path) -> Path:
    """Copies a report without its runs to ``docs/NAME`` and updates ``docs/README.md``."""
    target = docs / out.name
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    for path in [out / "README.md", out / "numbers.json", *sorted(out.glob("*.png"))]:
        shutil.copyfile(path, target / path.name)
    write_text_atomic(docs / "README.md", index(docs))
    return target


def index(docs: Path) -> str:
    """Returns a page over all studies in a folder: their claims and verdicts.

    Text above `MARK` stays.
    """
    page = docs / "README.md"
    written = page.read_text("utf-8").partition(MARK)[0] if page.is_file() else ""
    head = (
        written or "# Studies\n\nThe paper's claims on embedded tasks; see each study's page.\n\n"
    )
    lines = [head + MARK]
    for path in sorted(docs.glob("*/numbers.json")):
        found = json.loads(path.read_text("utf-8"))
        lines += ["", f"## [{path.parent.name}]({path.parent.name}/README.md)", ""]
        lines += [f"`{found['command']}`", ""]
        rows = [[c["claim"], f"**{c['verdict']}**"] for c in found["claims"]]
        lines += _markdown(Table("", ["the paper's claim", "holds here"], rows))
    return "\n".join(lines) + "\n"


def _setup(results: Results) -> list[str]:
    runs = sum(len(records) for records in results.records.values())
    seeds = sorted({seed for records in results.records.values() for seed in records})
    first = next(iter(next(iter(results.records.values())).values()))
    evaluations = first.history.evaluation_rows("student", "sampled")
    made = _made_with(results)
    commits = ", ".join(made["commits"]) or "unknown"
    return [
        f"{runs} runs: {len(results.records)} settings, seeds {', '.join(map(str, seeds))}.",
        f"Held-out tasks per evaluation: {evaluations[-1]['n']}, sampled at temperature 1.",
        f"Made on {made['platform']} with {made['cpu_count']} cores, one thread per run; "
        f"Python {made['python']}, PyTorch {made['torch']}; commit {commits}.",
    ]


def _made_with(results: Results) -> dict[str, Any]:
    """Returns commits, platform and versions with which the runs were made."""
    commits: dict[str, None] = {}
    for records in results.records.values():
        for record in records.values():
            path = record.run.folder / "versions.json"
            saved = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            for each in (saved, *saved.get("earlier", ())):
                git = each.get("git")
                if git:
                    changed = " with uncommitted changes" if git["dirty"] else ""
                    commit = git["commit"] or "none yet"  # a repository before its first commit
                    commits[f"{commit[:12]}{changed}"] = None
    here = versions()
    return {
        "commits": list(commits),
        "platform": here["platform"],
        "cpu_count": here["cpu_count"],
        "python": here["python"],
        "torch": here["packages"]["torch"],
    }


def _shared_overrides(results: Results) -> list[str]:
    """Returns the overrides that all runs share, in order, without the seed."""
    overrides = [
        record.run.overrides for records in results.records.values() for record in records.values()
    ]
    shared = set.intersection(*(set(each) for each in overrides))
    return [word for word in overrides[0] if word in shared and not word.startswith("seed=")]


def _specific_overrides(results: Results, label: str) -> str:
    record = next(iter(results.records[label].values()))
    shared = set(_shared_overrides(results))
    specific = [w for w in record.run.overrides if w not in shared and not w.startswith("seed=")]
    return f"`{shlex.join(specific)}`" if specific else "-"


def _markdown(table: Table) -> list[str]:
    lines = [f"| {' | '.join(table.header)} |", f"|{'---|' * len(table.header)}"]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
