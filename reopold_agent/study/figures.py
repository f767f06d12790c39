"""Figures of a study, in the style of a run's own plots (`reopold_agent.tracking.plots`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reopold_agent.study.analyse import Estimate, band, estimate
from reopold_agent.study.collect import ProbeResult, Results
from reopold_agent.tracking.history import History
from reopold_agent.tracking.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PHASES,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
)

STYLES: dict[str, tuple[str, str, str]] = {
    "rkl": (VERMILION, "--", "s"),
    "rkl_sg": (ORANGE, "-.", "^"),
    "rkl_sg_clip": (SKY, "--", "v"),
    "rkl_sg_clip_entropy": (GREEN, "-.", "D"),
    "reopold": (BLUE, "-", "o"),
    "skew_rkl": (VERMILION, "--", "s"),
    "gkd": (GREY, ":", "P"),
    "gkd-top-5": (GREY, "--", "X"),
    "sft": ("#222222", ":", "x"),
    "grpo": (PURPLE, "-", "p"),
}
"""Colour, line and marker by setting or family. Colour is never the only difference."""

_RAMP = ("#08306b", "#2171b5", "#6baed6", "#fd8d3c", "#a63603", "#444444")
_DASHES = ("-", "--", "-.", ":", (0, (1, 1)), (0, (5, 1)))


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def styled(draw: Callable[..., Figure | None], *arguments: Any, **settings: Any) -> Figure | None:
    """Draws in the common style without changing the style of the process."""
    with matplotlib.rc_context(STYLE):
        return draw(*arguments, **settings)


def success_figure(
    results: Results, labels: Sequence[str], *, episodes: bool = False, log: bool = False
) -> Figure | None:
    """Draws held-out success over steps or episodes: mean over seeds with its interval."""
    labels = [label for label in labels if label in results.records]
    if not labels:
        return None
    figure, axes = _single_panel(7.6, 4.4)
    for place, label in enumerate(labels):
        points = band(list(results.curves(label, episodes=episodes).values()))
        _band(axes, points, results.title(label), _style(label, place))
    teacher = results.model("teacher")
    if teacher is not None:
        axes.axhline(teacher.avg, color="black", lw=1, ls=(0, (1, 2)), label="teacher")
    axes.set_title("Held-out success, mean over seeds")
    axes.set_ylabel("share of tasks solved, T 1")
    axes.set_xlabel("episodes rolled out" if episodes else "steps done")
    if log:
        axes.set_xscale("symlog", linthresh=100)
        axes.set_xlim(left=-5)  # room for the marks at 0, and no tick at -100
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    _legend_right(axes)
    return figure


def series_figure(
    results: Results, labels: Sequence[str], key: str, title: str, unit: str, *, share: bool = False
) -> Figure | None:
    """Draws a metric of training, averaged over seeds, with its interval."""
    found = {label: _series(results, label, key) for label in labels}
    found = {label: curves for label, curves in found.items() if curves}
    if not found:
        return None
    figure, axes = _single_panel(7.6, 3.8)
    for place, (label, curves) in enumerate(found.items()):
        _band(axes, band(curves), results.title(label), _style(label, place), marks=False)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("steps done")
    axes.set_ylim(bottom=0)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    _legend_right(axes)
    return figure


def histogram_figure(results: Results, label: str) -> Figure | None:
    """Draws rewards of single tokens at the start and the end of training (paper, figure 4)."""
    windows: dict[str, list[list[dict[str, Any]]]] = {}
    for record in results.records.get(label, {}).values():
        for name, rows in record.history.windows("reward/histogram"):
            windows.setdefault(name, []).append(rows)
    if not windows:
        return None
    figure, axes = _single_panel(7.6, 3.8)
    used: list[float] = []
    for (name, runs), colour in zip(windows.items(), (GREY, BLUE), strict=False):
        edges, counts = History.histogram([row for rows in runs for row in rows], _HISTOGRAM)
        full = np.flatnonzero(counts)
        used += [float(edges[full[0]]), float(edges[full[-1] + 1])]
        shares = counts / counts.sum()
        filled = colour == GREY
        axes.stairs(shares, edges, color=colour, lw=1.6, label=name)
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25 if filled else 0.0)
    axes.set_yscale("log")
    axes.set_xlim(min(used) - 0.5, max(*used, 1.0) + 0.5)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_title(f"Reward per token, {results.title(label)}, all seeds")
    axes.set_xlabel("R = log-prob of teacher - log-prob of student, nats")
    axes.set_ylabel("share of tokens per bin (log)")
    axes.legend(loc="upper left")
    return figure


def decile_figure(results: Results, labels: Sequence[str]) -> Figure | None:
    """Mean |R| by decile of the student's entropy in the first steps (paper, figure 5)."""
    found = {label: decile_means(results, label) for label in labels}
    found = {label: values for label, values in found.items() if values}
    if not found:
        return None
    figure, axes = _single_panel(7.6, 3.8)
    width = 0.8 / len(found)
    for place, (label, values) in enumerate(found.items()):
        means = [value.mean for value in values]
        x = np.arange(1, len(means) + 1) + (place - (len(found) - 1) / 2) * width
        colour = _style(label, place)[0]
        low = [v.mean - (v.mean if v.low is None else v.low) for v in values]
        high = [(v.mean if v.high is None else v.high) - v.mean for v in values]
        style: dict[str, Any] = {"elinewidth": 0.8, "ecolor": "black"}
        axes.bar(x, means, width, color=colour, label=results.title(label), edgecolor="white")
        axes.errorbar(x, means, [low, high], fmt="none", **style)
    axes.set_xticks(range(1, 11))
    axes.set_title("Size of the reward by entropy, first tenth of training")
    axes.set_xlabel("decile of the student's entropy (10: most uncertain)")
    axes.set_ylabel("mean |R|, nats")
    axes.legend(loc="upper left")
    return figure


def exploration_figure(results: Results, labels: Sequence[str]) -> Figure | None:
    """Draws entropy, avg@k and pass@k over training (paper, figure 6)."""
    labels = [label for label in labels if _series(results, label, "entropy/mean")]
    if not labels:
        return None
    probed = [label for label in labels if _probe_points(results, label)]
    figure = Figure(figsize=(10.5 if probed else 7.6, 3.8), dpi=120, layout="constrained")
    panels: list[Axes] = figure.subplots(1, 3 if probed else 1, squeeze=False)[0].tolist()
    for place, label in enumerate(labels):
        look = _style(label, place)
        curves = _series(results, label, "entropy/mean")
        _band(panels[0], band(curves), results.title(label), look, marks=False)
    panels[0].set_title("Entropy of the student")
    panels[0].set_ylabel("nats per token")
    panels[0].set_ylim(bottom=0)
    start, teacher = results.model("student"), results.model("teacher")
    for axes, name in zip(panels[1:], ("avg", "pass"), strict=False):
        k = 0
        for place, label in enumerate(labels):
            points = _probe_points(results, label)
            if not points:
                continue
            k = next(iter(points.values()))[0].samples
            curve = [
                (float(step), estimate([probe_value(probe, name) for probe in probes]))
                for step, probes in sorted(points.items())
            ]
            if start is not None:
                first = probe_value(start, name)
                curve = [(0.0, Estimate(first, first, first, 1)), *curve]
            _band(axes, curve, results.title(label), _style(label, place))
        if teacher is not None:
            axes.axhline(probe_value(teacher, name), color="black", lw=1, ls=(0, (1, 2)))
        axes.set_title(f"{name}@{k}")
    for axes in panels:
        axes.set_xlabel("steps done")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure


def time_figure(results: Results, labels: Sequence[str]) -> Figure | None:
    """Draws the share of each part in the time of a step, by setting (paper, figure 14)."""
    labels = [label for label in labels if label in results.records]
    if not labels:
        return None
    figure, axes = _single_panel(7.6, 0.9 + 0.42 * len(labels))
    for place, label in enumerate(reversed(labels)):
        shares = mean_time_shares(results, label)
        left = 0.0
        for key, name, colour in PHASES:
            share = shares.get(key, 0.0)  # which parts there are depends on engine.ahead
            if not share:
                continue
            named = name if place == 0 else None
            axes.barh(place, share, left=left, color=colour, edgecolor="white", label=named)
            if share >= 0.07:
                ink = "white" if colour in (BLUE, GREEN, VERMILION) else "black"
                at = left + share / 2
                axes.text(at, place, f"{100 * share:.0f} %", color=ink, ha="center", va="center")
            left += share
    axes.set_yticks(range(len(labels)), [results.title(label) for label in reversed(labels)])
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Parts of a training step's time")
    _legend_right(axes)
    return figure


def sensitivity_figure(results: Results, xlabel: str, *, log: bool = False) -> Figure | None:
    """Draws final success against a setting's value, one line per family (paper, figure 12)."""
    families: dict[str, list[tuple[float, Estimate]]] = {}
    for label in results.records:
        setting = results.setting(label)
        if setting.value is not None:
            point = (setting.value, estimate(list(results.final_successes(label).values())))
            families.setdefault(setting.family, []).append(point)
    if not families:
        return None
    figure, axes = _single_panel(6.4, 4.0)
    for place, (family, points) in enumerate(families.items()):
        colour, dashes, marker = _style(family, place)
        xs = [x for x, _ in points]
        low = [e.mean - (e.mean if e.low is None else e.low) for _, e in points]
        high = [(e.mean if e.high is None else e.high) - e.mean for _, e in points]
        name = _family_title(results, family)
        style: dict[str, Any] = {"color": colour, "ls": dashes, "marker": marker, "capsize": 3}
        axes.errorbar(xs, [e.mean for _, e in points], [low, high], label=name, **style)
    if log:
        axes.set_xscale("log")
    ticks = sorted({x for points in families.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_title("Final held-out success, mean over seeds")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("share of tasks solved, T 1")
    axes.legend()
    return figure


def scaling_figure(results: Results, labels: Sequence[str]) -> Figure | None:
    """Draws pass@k and maj@k against seconds of k parallel answers (paper, figures 1b and 13)."""
    figure = Figure(figsize=(9.4, 4.0), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = False
    for axes, name in zip(panels, ("pass", "maj"), strict=True):
        for place, label in enumerate([*labels, "teacher"]):
            seconds = results.latency(label)
            points = scaling_points(results, label, name)
            ks = [k for k in points if k in seconds]
            if not ks:
                continue
            drawn = True
            title = "teacher" if label == "teacher" else results.title(label)
            look = ("black", ":", "*") if label == "teacher" else _style(label, place)
            _band(axes, [(seconds[k], points[k]) for k in ks], title, look)
            for k in ks:
                at = (seconds[k], points[k].mean)
                axes.annotate(f"k {k}", at, (3, -9), textcoords="offset points", fontsize=7)
        axes.set_title(f"{name}@k")
        axes.set_xlabel("seconds per question, k answers in parallel")
    panels[0].set_ylabel("share of tasks")
    if not drawn:
        return None
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure


# What figures and reports share


def probe_value(probe: ProbeResult, name: str) -> float:
    """Returns ``avg`` or ``pass`` at k, the number of samples of a probe."""
    return probe.avg if name == "avg" else probe.pass_at(probe.samples)


def scaling_points(results: Results, label: str, name: str) -> dict[int, Estimate]:
    """Returns pass@k or maj@k by k at the end of training, over seeds if not the teacher's."""
    if label == "teacher":
        teacher = results.model("teacher")
        probes = [] if teacher is None else [teacher]
    else:
        records = results.records.get(label, {}).values()
        probes = [record.probes[-1] for record in records if record.probes]
    if not probes:
        return {}
    return {
        k: estimate([p.pass_at(k) if name == "pass" else p.maj_at(k) for p in probes])
        for k in probes[0].ks
    }


def decile_means(results: Results, label: str) -> list[Estimate]:
    """Returns mean |R| by entropy decile over the first tenth of training, over seeds."""
    per_seed = []
    for record in results.records.get(label, {}).values():
        windows = record.history.windows("reward/abs_by_entropy_decile")
        if windows:
            per_seed.append(History.mean_list(windows[0][1], "reward/abs_by_entropy_decile"))
    return [estimate(list(column)) for column in zip(*per_seed, strict=True)]


def mean_time_shares(results: Results, label: str) -> dict[str, float]:
    """Returns the share of each part in a step's time, averaged over seeds."""
    runs = [record.time_shares() for record in results.records[label].values()]
    return {part: sum(run[part] for run in runs) / len(runs) for part in runs[0]}


_HISTOGRAM = "reward/histogram"


def _series(results: Results, label: str, key: str) -> list[list[tuple[float, float]]]:
    curves = []
    for record in results.records.get(label, {}).values():
        x, y = record.history.series(key)
        if y.size:
            curves.append(list(zip(x.tolist(), y.tolist(), strict=True)))
    return curves


def _probe_points(results: Results, label: str) -> Mapping[int, list[ProbeResult]]:
    points: dict[int, list[ProbeResult]] = {}
    for record in results.records.get(label, {}).values():
        for probe in record.probes:
            points.setdefault(probe.step, []).append(probe)
    return points


def _band(
    axes: Axes,
    points: Sequence[tuple[float, Estimate]],
    label: str,
    look: tuple[str, Any, str],
    *,
    marks: bool = True,
) -> None:
    colour, dashes, marker = look
    xs = [x for x, _ in points]
    low = [e.mean if e.low is None else e.low for _, e in points]
    high = [e.mean if e.high is None else e.high for _, e in points]
    axes.fill_between(xs, low, high, color=colour, alpha=0.13, lw=0)
    style: dict[str, Any] = {"color": colour, "ls": dashes, "lw": 1.8, "ms": 4.5}
    axes.plot(xs, [e.mean for _, e in points], label=label, marker=marker if marks else "", **style)


def _style(label: str, place: int) -> tuple[str, Any, str]:
    if label in STYLES:
        return STYLES[label]
    return _RAMP[place % len(_RAMP)], _DASHES[place % len(_DASHES)], "osv^Dx"[place % 6]


def _family_title(results: Results, family: str) -> str:
    titles = [s.title for s in results.study.settings if s.family == family]
    return titles[0].rpartition(",")[0] or family


def _single_panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(min_n_ticks=1, steps=[1, 2, 5, 10]))
    return figure, axes


def _legend_right(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
