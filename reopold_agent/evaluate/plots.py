"""Scaling curves of an evaluation as PNG (paper, figures 1b and 13)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reopold_agent.common.files import write_bytes_atomic

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def make_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes ``scaling-<benchmark>.png`` for every benchmark with several samples or latencies."""
    made = []
    for name, figures in results["benchmarks"].items():
        if len(figures["pass_at_k"]) < 2 and not figures["latency"]:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"scaling-{name}.png"
        figure = scaling_figure(name, figures)
        FigureCanvasAgg(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        write_bytes_atomic(target, drawn.getvalue())
        made.append(target)
    return made


def scaling_figure(name: str, figures: Mapping[str, Any]) -> Figure:
    """Draws pass@k, maj@k and avg@k over k (left), and share solved over seconds (right)."""
    panels = 2 if figures["latency"] else 1
    figure = Figure(figsize=(6.0 * panels, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _over_samples(axes[0], name, figures)
    if figures["latency"]:
        _over_seconds(axes[1], figures)
    return figure


def _over_samples(axes: Axes, name: str, figures: Mapping[str, Any]) -> None:
    for key, label, colour, marker in (
        ("pass_at_k", "pass@k", BLUE, "o"),
        ("maj_at_k", "maj@k", ORANGE, "s"),
    ):
        if not figures[key]:
            continue
        ks = [int(k) for k in figures[key]]
        axes.plot(ks, list(figures[key].values()), marker=marker, color=colour, label=label)
    axes.axhline(figures["accuracy"], color=GREEN, linestyle="--", label="avg (one answer)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="answers per question, k", ylabel="share of questions", ylim=(0, 1.02))
    axes.set_title(f"{name}, {figures['questions']} questions", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _over_seconds(axes: Axes, figures: Mapping[str, Any]) -> None:
    points = figures["latency"]
    seconds = [point["seconds"] for point in points]
    axes.plot(seconds, [point["solved"] for point in points], marker="o", color=BLUE)
    for point in points:
        axes.annotate(
            f"k={point['k']}",
            (point["seconds"], point["solved"]),
            textcoords="offset points",
            xytext=(4, -12),
        )
    axes.set(xlabel="seconds per question, k answers in parallel", ylim=(0, 1.02))
    axes.set_title(f"solved, {points[0]['questions']} questions", loc="left")
    axes.grid(alpha=0.3)
