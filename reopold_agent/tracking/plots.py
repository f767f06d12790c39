"""Draws a run from its ``metrics.jsonl``: ``python -m reopold_agent.tracking.plots RUN``.

Figures are made without pyplot, so no figure, backend or setting of the process changes.
Colours are Okabe and Ito's, distinct for colour-blind readers; important lines also differ
by style or marker. All axes count steps done: ``s`` steps have trained the student that played
training step ``s``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reopold_agent.common.files import write_bytes_atomic
from reopold_agent.errors import ReopoldError
from reopold_agent.tracking.history import History, number
from reopold_agent.tracking.metrics import read_metrics

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#666666"

PHASES = (
    ("generate", "student generates", BLUE),
    ("environment", "environment, tools", SKY),
    ("wait", "waiting for episodes", BLUE),
    ("teacher", "teacher scores", ORANGE),
    ("old_logp", "old log-probs", PURPLE),
    ("update", "update", GREEN),
    ("sync", "weight sync", VERMILION),
    ("other", "other", "#BBBBBB"),
)
"""Parts of a step: key after ``time/``, label, colour; from the bottom of the stack."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
"""Settings for `matplotlib.rc_context`."""


def make_plots(run_dir: str | Path) -> list[Path]:
    """Draws ``RUN/plots/*.png`` from ``RUN/metrics.jsonl`` so far.

    Args:
        run_dir: the run folder.

    Returns:
        The files written: ``success.png``, ``reward_histogram.png``, ``entropy_and_masks.png``
        and ``time.png``, except those without recorded data.

    Raises:
        reopold_agent.errors.DataError: there is no metrics file, or it is damaged.
    """
    run = Path(run_dir)
    history = History(read_metrics(run / "metrics.jsonl"))
    drawings: tuple[tuple[str, Callable[[History], Figure | None]], ...] = (
        ("success.png", success_figure),
        ("reward_histogram.png", reward_figure),
        ("entropy_and_masks.png", entropy_figure),
        ("time.png", time_figure),
    )
    folder = run / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name, draw in drawings:
            figure = draw(history)
            if figure is not None:
                drawn = io.BytesIO()
                figure.savefig(drawn, format="png")  # by Agg, without pyplot
                write_bytes_atomic(folder / name, drawn.getvalue())
                written.append(folder / name)
    return written


def success_figure(history: History) -> Figure | None:
    """Draws success in training and on held-out tasks, and the tool-call rate, over the updates."""
    if not (history.has("rollout/success") or history.evaluations):
        return None
    figure = Figure(figsize=(8.4, 6.4), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(2.6, 1))
    top = figure.add_subplot(grid[0])
    bottom = figure.add_subplot(grid[1], sharex=top)
    sampled = history.evaluation_rows("student", "sampled")
    greedy = history.evaluation_rows("student", "greedy")
    style: dict[str, Any]
    if sampled:
        steps, low, high = [row["step"] for row in sampled], *_bounds(sampled)
        top.fill_between(steps, low, high, color=BLUE, alpha=0.18, lw=0)
        top.vlines(steps, low, high, color=BLUE, lw=1.2, alpha=0.7)  # shows a single point too
        values = [row["success"] for row in sampled]
        label = "held-out, sampled, 95 % interval"
        top.plot(steps, values, "o-", color=BLUE, lw=2, ms=5, zorder=4, label=label)
    for env, (dashes, colour) in zip(_environments(sampled), itertools.cycle(_OF_ENVIRONMENTS)):
        key = f"env/{env}/success"
        points = [(row["step"], row[key]) for row in sampled if row.get(key) is not None]
        label = f"held-out, sampled, {env}"
        top.plot(*zip(*points, strict=True), ls=dashes, color=colour, lw=1.4, label=label)
    if greedy:
        values = [row["success"] for row in greedy]
        style = {"color": GREEN, "lw": 1.4, "ms": 5, "mfc": "white", "zorder": 3}
        top.plot([r["step"] for r in greedy], values, "D--", label="held-out, greedy", **style)
    _dots_and_mean(top, history, "rollout/success", "training episodes")
    references = (
        ("teacher", history.evaluation_rows("teacher", "sampled"), PURPLE, "-."),
        ("student before", history.evaluation_rows("student", "sampled", until=0), GREY, ":"),
    )
    for label, rows, colour, dashes in references:
        if rows:
            value, low, high = rows[-1]["success"], *_bounds(rows[-1:])
            top.axhline(value, color=colour, ls=dashes, lw=1.6, label=f"{label} {value:.2f}")
            top.axhspan(low[0], high[0], color=colour, alpha=0.1, lw=0)
    _finish(top, "Success", "share of episodes solved", share=True)
    _mark_switch(top, history, label=True)

    rows = [row for row in sampled if number(row.get("tool_rate")) is not None]
    if rows:
        values = [row["tool_rate"] for row in rows]
        style = {"color": BLUE, "lw": 1.6, "ms": 4, "zorder": 4}
        bottom.plot([row["step"] for row in rows], values, "o-", label="held-out, sampled", **style)
    _dots_and_mean(bottom, history, "rollout/tool_rate", "training")
    _line(bottom, history, "rollout/tool_errors", VERMILION, "--", "failed calls, of all calls")
    _finish(bottom, "Episodes that call a tool", "share", share=True, steps=True)
    _mark_switch(bottom, history)
    end = max(history.last_step, 1.0)
    top.set_xlim(-0.02 * end, 1.02 * end)
    top.tick_params(labelbottom=False)
    for axes in (top, bottom):
        _legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


_OF_ENVIRONMENTS = (("--", SKY), ("-.", VERMILION), (":", PURPLE), ("--", "#F0E442"))
"""Line styles and colours of a mixture's environments."""


def _environments(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the environments of a mixture in rows of evaluations; none for a run of one."""
    keys = (key for row in rows for key in row)
    parts = (key.removeprefix("env/").removesuffix("/success") for key in keys if _of_env(key))
    return list(dict.fromkeys(parts))


def _of_env(key: str) -> bool:
    return key.startswith("env/") and key.endswith("/success")


def reward_figure(history: History) -> Figure | None:
    """Draws the distribution of the per-token reward at the start and the end (paper, figure 4)."""
    windows = history.windows("reward/histogram")
    if not windows and not history.has("reward/mean"):
        return None
    figure = Figure(figsize=(10, 4.8), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    left = figure.add_subplot(grid[:, 0])
    mean, below = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    floor = history.last("reward/floor")
    used: list[float] = []
    for (label, rows), colour, filled in zip(windows, (GREY, BLUE), (True, False), strict=False):
        edges, counts = History.histogram(rows, "reward/histogram")
        share = History.mean(rows, "reward/below_floor")
        note = "" if share is None else f", {100 * share:.1f} % of tokens below the floor"
        left.stairs(counts, edges, color=colour, lw=1.6, label=f"{label}{note}")
        if filled:
            left.stairs(counts, edges, color=colour, fill=True, alpha=0.25)
        full = np.flatnonzero(counts)
        if full.size:
            used += [float(edges[full[0]]), float(edges[full[-1] + 1])]
    if used:
        left.set_yscale("log")
        left.set_ylim(bottom=0.7, top=left.get_ylim()[1] * 8)  # room for the legend
        left.set_xlim(min(used) - 0.5, max(max(used), 1.0) + 0.5)
        if floor is not None:
            left.axvline(floor, color=VERMILION, ls="--", lw=1.6, label=f"floor {floor:.2f}")
        _legend(left, loc="upper left")
    _finish(left, "Reward per token, first and last steps", "tokens per bin (log scale)")
    left.set_xlabel("reward R = log-prob of teacher - log-prob of student, nats")

    _line(mean, history, "reward/mean", BLUE, "-", "R")
    _line(mean, history, "reward/clipped_mean", ORANGE, "--", "R clipped at the floor")
    _finish(mean, "Mean reward", "nats", steps=True)
    _legend(mean, loc="best")
    _line(below, history, "reward/below_floor", VERMILION, "-", "")
    _finish(below, "Tokens below the floor", "share of tokens", steps=True)
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter(_percent)
    for axes in (mean, below):
        _mark_switch(axes, history)
    return figure


def entropy_figure(history: History) -> Figure | None:
    """Draws entropy, |reward| by entropy, masks and PPO's clip (paper, figures 5, 6, 11)."""
    keys = ("entropy/mean", "mask/kept_share", "reward/abs_by_entropy_decile")
    if not any(history.has(key) for key in keys):
        return None
    figure = Figure(figsize=(10, 7.2), dpi=130, layout="constrained")
    (entropy, decile), (kept, ratio) = figure.subplots(2, 2)
    low, high = (history.series("entropy/percentiles", part) for part in ("10", "90"))
    if low[1].size and low[1].size == high[1].size:
        band = {"color": BLUE, "alpha": 0.15, "lw": 0, "label": "10 % to 90 % of tokens"}
        entropy.fill_between(low[0], low[1], high[1], **band)
    _line(entropy, history, "entropy/mean", BLUE, "-", "mean")
    _line(entropy, history, "entropy/percentiles", BLUE, ":", "median", part="50")
    _line(entropy, history, "entropy/percentiles", SKY, "-", "99th percentile", part="99")
    _line(entropy, history, "entropy/threshold", VERMILION, "--", "threshold of the mask")
    _finish(entropy, "Entropy of the student", "nats", steps=True)
    entropy.set_ylim(0, entropy.get_ylim()[1] * 1.4)  # room for the legend
    _legend(entropy, loc="upper right", ncols=2)

    windows = history.windows("reward/abs_by_entropy_decile")
    width = 0.8 / max(1, len(windows))
    for i, (label, rows) in enumerate(windows):
        values = History.mean_list(rows, "reward/abs_by_entropy_decile")
        places = np.arange(1, len(values) + 1) + (i - (len(windows) - 1) / 2) * width
        decile.bar(places, values, width, color=(GREY, BLUE)[i], label=label)
        decile.set_xticks(range(1, len(values) + 1))
    _finish(decile, "Size of the reward by entropy", "mean |R|, nats")
    decile.set_ylim(0, decile.get_ylim()[1] * 1.2)
    _legend(decile, loc="upper left")
    decile.set_xlabel("decile of the student's entropy (10: most uncertain)")

    _line(kept, history, "mask/kept_share", BLUE, "-", "kept by the loss", lw=4, alpha=0.45)
    label = "exploration mask: R above the floor"
    _line(kept, history, "mask/exploration_share", ORANGE, "--", label)
    label = "refinement mask: highest entropy"
    _line(kept, history, "mask/refinement_share", GREEN, "-.", label)
    _finish(kept, "Tokens that each mask keeps", "share of tokens", share=True, steps=True)
    _legend(kept, loc="center right")

    _line(ratio, history, "ratio/ppo_clip_share", PURPLE, "-", "")
    _finish(ratio, "Tokens that a PPO clip of 0.2 would cut", "share of tokens", steps=True)
    _, y = history.series("ratio/ppo_clip_share")
    ratio.set_ylim(0, max(0.002, float(y.max(initial=0.0)) * 1.15))
    ratio.yaxis.set_major_formatter(_percent)
    for axes in (entropy, kept, ratio):
        _mark_switch(axes, history)
    return figure


def step_parts(history: History) -> list[tuple[str, str, str]]:
    """Returns those of `PHASES` that make up the run's steps.

    Episodes that are generated ahead are so beside the other parts, so that only the wait for them
    is one.
    """
    others = ("generate", "environment") if history.has("time/wait") else ("wait",)
    return [part for part in PHASES if part[0] not in others]


def time_figure(history: History) -> Figure | None:
    """Draws seconds of each part of a step, and their shares of the run (paper, figure 14)."""
    parts = [part for part in step_parts(history) if history.has(f"time/{part[0]}")]
    if not parts:
        return None
    seconds = np.stack([history.column(f"time/{key}") for key, _, _ in parts])
    total = float(seconds.sum())
    shares = seconds.sum(axis=1) / (total or 1.0)
    figure = Figure(figsize=(8.4, 5.6), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(2.8, 1))
    top, bottom = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    base, left = np.zeros(len(history.steps)), 0.0
    for (_, label, colour), values, share in zip(parts, seconds, shares, strict=True):
        named = f"{label}, {100 * share:.1f} %"
        top.bar(history.steps, values, 1.0, bottom=base, color=colour, label=named, lw=0)
        bottom.barh(0, share, left=left, color=colour, height=0.6, edgecolor="white", lw=0.8)
        if share >= 0.06:
            ink = "white" if colour in (BLUE, GREEN, VERMILION) else "black"
            middle = left + share / 2
            bottom.text(middle, 0, f"{100 * share:.0f} %", color=ink, ha="center", va="center")
        base, left = base + values, left + share
    if history.has("time/wait"):
        meanwhile = history.column("time/generate") + history.column("time/environment")
        label = "its episodes, generated before"
        top.plot(history.steps, meanwhile, "--", color="black", lw=1.4, label=label)
    _finish(top, "Time of a training step", "seconds", steps=True)
    top.set_xlim(history.steps[0] - 0.5, history.steps[-1] + 0.5)
    handles, labels = top.get_legend_handles_labels()  # reversed: as the stack, top to bottom
    top.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    bottom.set_xlim(0, 1)
    bottom.set_yticks([])
    bottom.grid(False)
    bottom.spines["left"].set_visible(False)
    bottom.xaxis.set_major_formatter(_percent)
    bottom.set_title("Shares of all training steps")
    bottom.set_xlabel(f"share of {total:,.1f} s in {len(history.steps)} steps")
    return figure


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.4g} %"


def _line(
    axes: Axes,
    history: History,
    key: str,
    colour: str,
    dashes: str,
    label: str,
    *,
    part: str | None = None,
    lw: float = 1.8,
    alpha: float = 1.0,
) -> None:
    """Draws a series, if recorded. Few points get markers, without which one would be invisible."""
    x, y = history.series(key, part)
    if y.size:
        marker = "o" if y.size <= 3 else ""
        axes.plot(
            x, y, color=colour, ls=dashes, lw=lw, alpha=alpha, label=label, marker=marker, ms=5
        )


def _dots_and_mean(axes: Axes, history: History, key: str, label: str) -> None:
    """Draws a faint dot per step and a centred mean over about a tenth of the run."""
    x, y = history.series(key)
    if y.size == 0:
        return
    half = min(12, y.size // 20)
    sums = np.cumsum(np.insert(y, 0, 0.0))
    at = np.arange(y.size)
    starts, stops = np.maximum(at - half, 0), np.minimum(at + half + 1, y.size)
    mean = (sums[stops] - sums[starts]) / (stops - starts)
    note = f", mean of {2 * half + 1} steps" if half else ""
    axes.plot(x, y, ".", color=ORANGE, ms=5 if half else 9, alpha=0.45 if half else 1.0)
    axes.plot(x, mean, color=ORANGE, lw=1.6, label=f"{label}{note}")


def _bounds(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    low = [row["success"] if number(row.get("low")) is None else row["low"] for row in rows]
    high = [row["success"] if number(row.get("high")) is None else row["high"] for row in rows]
    return low, high


def _finish(axes: Axes, title: str, unit: str, *, share: bool = False, steps: bool = False) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_axisbelow(True)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
    if share:
        axes.set_ylim(-0.02, 1.03)
    if steps:
        axes.set_xlabel("steps done")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # matplotlib warns about a legend of nothing
        axes.legend(**where)


def _mark_switch(axes: Axes, history: History, *, label: bool = False) -> None:
    """Marks where the refinement phase begins."""
    if history.switch_step is None:
        return
    axes.axvline(history.switch_step, color="black", ls=(0, (1, 2)), lw=1.2)
    if label:
        axes.annotate(
            "refinement",
            (history.switch_step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the plots of run folders and prints the files' paths."""
    parser = argparse.ArgumentParser(
        prog="python -m reopold_agent.tracking.plots",
        description="Draws the plots of a run from its metrics.jsonl.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="run folder")
    for run in parser.parse_args(arguments).run:
        try:
            for path in make_plots(run):
                print(path)
        except ReopoldError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
