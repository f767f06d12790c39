"""Tables of a study's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from reopold_agent.study.analyse import difference, estimate, reach_over_seeds
from reopold_agent.study.claims import show, show_difference
from reopold_agent.study.collect import Results


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def final_table(results: Results, reference: str | None, *, ranked: bool = False) -> Table:
    """Returns final success of every setting, and its paired difference from a reference.

    Args:
        results: results of the study.
        reference: label of the setting to compare with, if any.
        ranked: whether the settings are in the order of their mean, the best first, instead of the
            study's.
    """
    header = ["setting", "seeds", "held-out success, T 1", "greedy", "train minutes"]
    if reference in results.records:
        header.append(f"less {results.title(str(reference))}")
    rows = []
    labels = list(results.records)
    if ranked:
        labels.sort(key=lambda label: -fmean(results.final_successes(label).values()))
    for label in labels:
        records = results.records[label]
        row = [
            results.title(label),
            str(len(records)),
            show(estimate(list(results.final_successes(label).values()))),
            show(estimate(list(results.final_successes(label, "greedy").values()))),
            f"{median(r.history.column('time/step').sum() for r in records.values()) / 60:.1f}",
        ]
        if reference in results.records:
            found = difference(
                results.final_successes(str(reference)), results.final_successes(label)
            )
            row.append("" if label == reference else show_difference(found))
        rows.append(row)
    for who, name in (("student", "student before training"), ("teacher", "teacher")):
        model = results.model(who)
        if model is not None:
            filled = [name, "", f"{model.avg:.3f} (avg@{model.samples})", "", ""]
            rows.append(filled + [""] * (len(header) - len(filled)))
    return Table("Final success", header, rows)


def probe_table(results: Results) -> Table | None:
    """Returns avg@k, pass@k and maj@k of the probed models."""
    rows: list[list[str]] = []
    ks: list[int] = []
    for who, name in (("student", "student before training"), ("teacher", "teacher")):
        model = results.model(who)
        if model is not None:
            ks = model.ks
            cells = [f"{model.pass_at(k):.3f}" for k in ks[1:]]
            rows.append([name, f"{model.avg:.3f}", *cells, f"{model.maj_at(ks[-1]):.3f}"])
    for label, records in results.records.items():
        probes = [record.probes[-1] for record in records.values() if record.probes]
        if not probes:
            continue
        ks = probes[0].ks
        cells = [show(estimate([probe.pass_at(k) for probe in probes])) for k in ks[1:]]
        average = show(estimate([probe.avg for probe in probes]))
        majority = show(estimate([probe.maj_at(ks[-1]) for probe in probes]))
        rows.append([results.title(label), average, *cells, majority])
    if not rows:
        return None
    header = ["model", f"avg@{ks[-1]}", *(f"pass@{k}" for k in ks[1:]), f"maj@{ks[-1]}"]
    return Table("Several samples per task, at the end of training", header, rows)


def reach_table(results: Results, target: str, labels: Sequence[str], *, episodes: bool) -> Table:
    """Returns when each setting reaches the final success of one of them."""
    ends = results.final_successes(target)
    goal = fmean(ends.values())
    unit = "episodes" if episodes else "steps"
    rows = []
    for label in labels:
        curves = results.curves(label, episodes=episodes)
        found = reach_over_seeds(curves, goal)
        whole = max(x for curve in curves.values() for x, _ in curve)
        reached = [value for value in found.per_seed.values() if value is not None]
        span = f"{min(reached):.0f} to {max(reached):.0f}" if reached else "-"
        rows.append(
            [
                results.title(label),
                f"{whole:.0f}",
                _number(found.of_mean),
                f"{_number(found.low)} to {_number(found.high)}" if len(curves) > 1 else "-",
                f"{found.reached} of {len(curves)}",
                _number(found.median),
                span,
            ]
        )
    header = [
        "setting",
        f"{unit} in all",
        "mean curve",
        "95 % interval",
        "seeds that get there",
        "median",
        "range of those",
    ]
    start = fmean(curve[0][1] for curve in results.curves(target).values())
    note = ""
    if goal <= start:
        note = (
            f"{results.title(target)} ends no higher than it began ({start:.3f}): everything is "
            "there from the start, and this table says nothing."
        )
    title = f"{unit.capitalize()} until {results.title(target)}'s final success, {goal:.3f}"
    return Table(title, header, rows, note)


def _number(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f}"
