"""Reads the measurements of a study's finished runs from their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from reopold_agent.errors import DataError
from reopold_agent.evaluate.metrics import pass_at_k
from reopold_agent.study.grid import Run, Setting
from reopold_agent.study.run import finished
from reopold_agent.tracking.history import History, number
from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.tracking.plots import step_parts

SERIES = (
    "rollout/success",
    "rollout/episodes",
    "rollout/tool_rate",
    "rollout/response_tokens",
    "reward/mean",
    "reward/below_floor",
    "entropy/mean",
    "mask/kept_share",
    "ratio/ppo_clip_share",
    "grad_norm",
    "time/step",
)
"""Metrics of a training step that ``numbers.json`` keeps."""


class Record:
    """One finished run.

    Attributes:
        run: the run.
        history: rows of its metrics.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.history = History(read_metrics(run.folder))
        self._rows = self.history.evaluations

    @cached_property
    def steps(self) -> int:
        """Number of training steps."""
        return len(self.history.train)

    @cached_property
    def episodes(self) -> list[float]:
        """Cumulative episodes: ``episodes[s]`` have been rolled out before step s."""
        return [0.0, *accumulate(self.history.column("rollout/episodes").tolist())]

    @cached_property
    def curve(self) -> list[tuple[float, float]]:
        """Held-out success of sampled answers by step, from before training to the end."""
        rows = self.history.evaluation_rows("student", "sampled")
        return [(float(row["step"]), float(row["success"])) for row in rows]

    @property
    def episode_curve(self) -> list[tuple[float, float]]:
        """`curve` by episodes rolled out instead of steps."""
        return [(self.episodes[int(step)], success) for step, success in self.curve]

    def final_success(self, sampling: str = "sampled") -> float:
        """Returns held-out success after the last step."""
        rows = self.history.evaluation_rows("student", sampling)
        return float(rows[-1]["success"])

    def time_shares(self) -> dict[str, float]:
        """Returns the share of training time by part of a step."""
        parts = [part for part, _, _ in step_parts(self.history)]
        seconds = {part: float(self.history.column(f"time/{part}").sum()) for part in parts}
        whole = sum(seconds.values()) or 1.0
        return {part: value / whole for part, value in seconds.items()}

    def mean(self, key: str) -> float | None:
        """Returns the mean of a metric over all steps."""
        return History.mean(self.history.train, key)

    @cached_property
    def probes(self) -> list[ProbeResult]:
        """Results of the run's probe, by step."""
        return read_probe(self.run.probe)

    def numbers(self) -> dict[str, Any]:
        """Returns everything that figures and tables use, as plain values."""
        return {
            "setting": self.run.setting.label,
            "seed": self.run.seed,
            "words": list(self.run.overrides),
            "curve": [
                {
                    key: row.get(key)
                    for key in ("step", "sampling", "success", "low", "high", "n", "tool_rate")
                }
                for row in self._rows
                if row.get("who") == "student"
            ],
            "steps": {
                key: [_rounded(number(row.get(key))) for row in self.history.train]
                for key in SERIES
                if self.history.has(key)
            },
            "windows": [
                {
                    "steps": label,
                    "histogram": _histogram(rows),
                    "abs_by_entropy_decile": [
                        _rounded(v) for v in History.mean_list(rows, "reward/abs_by_entropy_decile")
                    ],
                }
                for label, rows in self.history.windows("reward/histogram")
            ],
            "time_shares": {k: _rounded(v) for k, v in self.time_shares().items()},
            "probes": [probe.numbers() for probe in self.probes],
        }


@dataclass(frozen=True)
class ProbeResult:
    """Several samples per task from one checkpoint of a model.

    Attributes:
        step: training steps before the checkpoint.
        correct: by task, 0 or 1 per sample.
        majority: by k, by task: share of groups of k samples whose most frequent answer is right.
        tokens: mean number per answer.
    """

    step: int
    correct: Sequence[Sequence[int]]
    majority: Mapping[int, Sequence[float]]
    tokens: float

    @property
    def samples(self) -> int:
        """Samples per task."""
        return len(self.correct[0])

    @property
    def avg(self) -> float:
        """Share of right answers (avg@k)."""
        return fmean(fmean(task) for task in self.correct)

    def pass_at(self, k: int) -> float:
        """Returns the unbiased chance that one of k answers is right, averaged over tasks."""
        return fmean(pass_at_k(len(task), sum(task), k) for task in self.correct)

    def maj_at(self, k: int) -> float:
        """Returns the chance that the most frequent of k answers is right, averaged over tasks."""
        return fmean(self.majority[k])

    @property
    def ks(self) -> list[int]:
        """Values of k: the powers of two up to the number of samples."""
        return sorted(self.majority)

    def numbers(self) -> dict[str, Any]:
        """Returns right answers by task and the metrics computed from them, as plain values."""
        return {
            "step": self.step,
            "tasks": len(self.correct),
            "samples": self.samples,
            "right_by_task": [sum(task) for task in self.correct],
            "avg": _rounded(self.avg),
            "pass_at_k": {str(k): _rounded(self.pass_at(k)) for k in self.ks},
            "maj_at_k": {str(k): _rounded(self.maj_at(k)) for k in self.ks},
            "tokens": _rounded(self.tokens),
        }


def read_probe(path: Path) -> list[ProbeResult]:
    """Reads a file of `reopold_agent.study.probe`; empty if there is none."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text("utf-8"))
    return [
        ProbeResult(
            int(point["step"]),
            point["correct"],
            {int(k): values for k, values in point["majority"].items()},
            float(point["tokens"]),
        )
        for point in found["points"]
    ]


def read_latency(path: Path) -> dict[int, float]:
    """Reads mean seconds per question by number of parallel answers; empty without a file."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    return {int(point["k"]): float(point["seconds"]) for point in found["latency"]}


class Results:
    """The finished runs of a study.

    Attributes:
        out: the study's folder.
        records: by setting, in the study's order, then by seed; settings without a finished run
            are left out.
        missing: names of unfinished runs.
    """

    def __init__(self, runs: Sequence[Run], out: Path) -> None:
        if not runs:
            raise DataError("a study needs at least one run")
        self.out, self.study = out, runs[0].study
        self.missing = [run.name for run in runs if not finished(run)]
        self.records: dict[str, dict[int, Record]] = {}
        for run in sorted(runs, key=lambda run: self.study.settings.index(run.setting)):
            if finished(run):
                self.records.setdefault(run.setting.label, {})[run.seed] = Record(run)

    def setting(self, label: str) -> Setting:
        """Returns the setting with this label."""
        return next(s for s in self.study.settings if s.label == label)

    def title(self, label: str) -> str:
        """Returns the name of a setting in tables and figures."""
        return self.setting(label).title

    def final_successes(self, label: str, sampling: str = "sampled") -> dict[int, float]:
        """Returns final success by seed; empty without runs."""
        return {seed: r.final_success(sampling) for seed, r in self.records.get(label, {}).items()}

    def curves(self, label: str, *, episodes: bool = False) -> dict[int, list[tuple[float, float]]]:
        """Returns success curves by seed, over steps or over episodes."""
        return {
            seed: record.episode_curve if episodes else record.curve
            for seed, record in self.records.get(label, {}).items()
        }

    def model(self, who: str) -> ProbeResult | None:
        """Returns the probe of the ``student`` before training or of the ``teacher``, if any."""
        found = read_probe(self.out / "models" / f"{who}.json")
        return found[0] if found else None

    def latency(self, name: str) -> dict[int, float]:
        """Returns the measured latency of a setting's model or of the ``teacher``."""
        return read_latency(self.out / "models" / f"latency-{name}.json")


def _histogram(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the counts between the outermost non-empty bins, and the left edge of the first."""
    edges, counts = History.histogram(rows, "reward/histogram")
    full = counts.nonzero()[0]
    if not full.size:
        return {"first_edge": 0.0, "width": 0.25, "counts": []}
    first, last = int(full[0]), int(full[-1])
    return {
        "first_edge": float(edges[first]),
        "width": float(edges[1] - edges[0]),
        "counts": [int(count) for count in counts[first : last + 1]],
    }


def _rounded(value: float | None) -> float | None:
    """Rounds to five significant digits, more than these measurements support."""
    return None if value is None else float(f"{value:.5g}")
