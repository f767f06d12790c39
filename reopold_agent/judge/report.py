"""Shows a check in the terminal and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import reopold_agent
from reopold_agent.common.statistics import mcnemar_exact
from reopold_agent.common.terminal import is_terminal, visible, write_plain
from reopold_agent.judge.agreement import (
    Compared,
    Counts,
    by_kind,
    by_rule,
    by_source,
    count,
    repaired_and_broken,
    total,
)

RULES = "rules alone"
"""The way of grading that the others are compared with."""

Ways: TypeAlias = Mapping[str, Sequence[Compared]]
"""The same pairs with the verdicts of each way of grading; `RULES` comes first."""

_GROUPS = {"source": by_source, "kind": by_kind}

_LONGEST = 160
"""Most characters that are shown of a text: the last ones, where the answer is."""


def show(ways: Ways, judge: Mapping[str, Any], most: int | None, console: Console) -> None:
    """Prints tables, sentences about the judge, and disagreements.

    Args:
        ways: the pairs with their verdicts.
        judge: the judge's description, its ``counters``, and the number of ``responses`` for it.
        most: most disagreements to print; None for all.
        console: where to print.
    """
    if not is_terminal(console):
        console = Console(file=console.file, color_system=None, no_color=True, width=160)
    for way, compared in ways.items():
        for name, key in _GROUPS.items():
            rows = {**count(compared, key), "all": total(compared)}
            console.print(_table(f"{way}: {name}", rows, console))
    without = [each for each in ways[RULES] if not each.has_box]
    rows = {**count(without, by_rule), "all": total(without)}
    console.print(_table(f"{RULES}: found, without a box", rows, console))
    if len(ways) > 1:
        rows = {way: total(compared) for way, compared in ways.items()}
        console.print(_table("way of grading", rows, console))
    for line in (*_judge_lines(ways, judge), *_disagreement_lines(ways, most)):
        write_plain(console.file, line)


def as_values(ways: Ways, judge: Mapping[str, Any]) -> dict[str, Any]:
    """Returns counts, the judge's activity and all disagreements as plain values."""
    found: dict[str, dict[str, Any]] = {}
    for way, compared in ways.items():
        found[way] = _figures(total(compared))
        for name, key in _GROUPS.items():
            found[way][name] = {each: _figures(c) for each, c in count(compared, key).items()}
        if way != RULES:
            repaired, broken = repaired_and_broken(ways[RULES], compared)
            p_value = mcnemar_exact(repaired, broken)
            found[way] |= {"repaired": repaired, "broken": broken, "p_value": p_value}
    return {
        "reopold_agent": reopold_agent.__version__,
        "judge": dict(judge),
        "ways": found,
        "disagreements": [
            {
                **pair[RULES].case,
                "verdicts": {
                    way: {"outcome": each.outcome, **vars(each.verdict)}
                    for way, each in pair.items()
                },
            }
            for pair in _disagreements(ways)
        ],
    }


def _figures(counts: Counts) -> dict[str, Any]:
    low, high = counts.interval
    return {
        "pairs": counts.pairs,
        **vars(counts),
        "agreement": counts.share,
        "low": low,
        "high": high,
    }


def _table(heading: str, rows: Mapping[str, Counts], console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD if is_terminal(console) else box.ASCII)
    table.add_column(heading)
    for name in ("pairs", "agree", "wrongly decided", "undecided"):
        table.add_column(name, justify="right")
    table.add_column("agreement, 95 % interval", justify="right", no_wrap=True)
    for name, counts in rows.items():
        low, high = counts.interval
        figures = (counts.pairs, counts.agree, counts.wrong, counts.undecided)
        share = f"{counts.share:.1%} ({low:.1%} to {high:.1%})"
        table.add_row(Text(_line(name)), *map(str, figures), share)
    return table


def _judge_lines(ways: Ways, judge: Mapping[str, Any]) -> Iterator[str]:
    pairs = len(ways[RULES])
    if len(ways) == 1:
        yield (
            f"A judge would be asked about {judge['responses']} of {pairs} responses "
            "(judge=gemini asks Gemini)."
        )
        return
    for way, compared in ways.items():
        if way != RULES:
            repaired, broken = repaired_and_broken(ways[RULES], compared)
            yield (
                f"{way}: repairs {repaired} and breaks {broken} of {pairs} pairs, compared with "
                f"{RULES} (McNemar p = {mcnemar_exact(repaired, broken):.3g})."
            )
    counters = judge["counters"]
    yield (
        f"Judge {judge.get('name', '')} {judge.get('model', '')}: asked about "
        f"{judge['responses']} of {pairs} responses, {counters.get('decided', 0)} decided, "
        f"{counters.get('cached', 0)} from the cache, {counters.get('calls', 0)} calls, "
        f"{counters.get('input_tokens', 0)} tokens in and {counters.get('output_tokens', 0)} out."
    )
    for name in ("failures", "versions"):
        if counters.get(name):
            listed = ", ".join(f"{each} {number}" for each, number in counters[name].items())
            yield _line(f"{name}: {listed}")
    if "cost" in counters:
        yield _line(
            f"cost: about {counters['cost']['estimate']:.4f} {counters['cost']['currency']}"
        )


def _disagreements(ways: Ways) -> list[dict[str, Compared]]:
    """Returns the pairs on which a way of grading differs from the label, by way."""
    pairs = [dict(zip(ways, each, strict=True)) for each in zip(*ways.values(), strict=True)]
    return [pair for pair in pairs if not all(each.agrees for each in pair.values())]


def _disagreement_lines(ways: Ways, most: int | None) -> Iterator[str]:
    found = _disagreements(ways)
    shown = found[:most]
    for pair in shown:
        case = pair[RULES].case
        name = f"line {case['line']}" + (f", id {case['id']}" if "id" in case else "")
        yield _line(
            f"{name}: label {case['expected']}, gold {_short(case['gold'])}, "
            f"response {_short(case['pred'])}"
            + (f"; note: {_short(case['note'])}" if case.get("note") else "")
        )
        for way, each in pair.items():
            verdict = each.verdict
            extracted = "nothing" if verdict.extracted is None else _short(verdict.extracted)
            why = verdict.reason or verdict.how
            yield "  " + _line(f"{way}: {each.outcome}, extracted {extracted} ({why})")
    if len(shown) < len(found):
        yield f"... and {len(found) - len(shown)} more disagreements: disagreements=null lists all."


def _short(value: Any) -> str:
    text = str(value)
    return f"...{text[-_LONGEST:]}" if len(text) > _LONGEST else text


def _line(text: str) -> str:
    """Returns a text of a file or model as one line without control characters."""
    return " ".join(visible(text).split())
