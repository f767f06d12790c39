"""Rates and lengths measured in a finished run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.errors import DataError
from reopold_agent.plan.estimate import Plan, make_plan
from reopold_agent.plan.hardware import Gpu, Rate, Rates
from reopold_agent.plan.workload import measured_workload
from reopold_agent.policies.architecture import Architecture
from reopold_agent.tracking.metrics import read_json_lines, read_metrics

TRAJECTORIES = 2000
"""Enough for means of lengths; a long run has many gigabytes of them."""


def read_run(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads training rows and at most `TRAJECTORIES` recorded trajectories of a run.

    The first step is left out if there are several, since it warms up.

    Raises:
        DataError: it is not the folder of a run, or has no finished step.
    """
    rows = [row for row in read_metrics(run) if row.get("kind") == "train"]
    if not rows:
        raise DataError(f"{run} has no finished training step to measure")
    return rows[1:] or rows, read_json_lines(run / "trajectories.jsonl", TRAJECTORIES)


def measured_rates(
    run: Path,
    config: TrainConfig,
    student: Architecture,
    teacher: Architecture | None,
    gpu: Gpu,
    assumed: Rates,
) -> tuple[Rates, Plan]:
    """Returns the rates of a run, and its plan with these rates.

    FLOP/s are counted FLOPs over measured seconds. The seconds of an iteration are the rest of the
    generation after reading weights and cache at the assumed bandwidth; on other hardware than
    ``gpu`` they only summarise. Rates without a measured time (``engine=verl`` has none for the
    teacher) stay as assumed.

    Args:
        run: folder of the run.
        config: configuration of the run.
        student: shapes of the student.
        teacher: shapes of the teacher, or None.
        gpu: hardware of the run.
        assumed: rates where nothing was measured.
    """
    rows, trajectories = read_run(run)
    work = measured_workload(config, rows, trajectories, student.image_token)
    plan = make_plan(config, student, teacher, work, gpu, assumed)
    layout, counted = plan.layout, plan.flops
    source = f"measured in {run} over {len(rows)} steps"
    rates = assumed
    update = _mean(rows, "time/update")
    if update:
        rates = replace(rates, train=_achieved(counted.update, update, layout.student, source))
    scored = counted.old_logp * bool(_mean(rows, "time/old_logp"))
    seconds, gpus = _mean(rows, "time/old_logp"), layout.student
    if _mean(rows, "time/teacher") and layout.teacher:
        scored, seconds, gpus = counted.teacher, _mean(rows, "time/teacher"), layout.teacher
    if scored and seconds:
        rates = replace(rates, score=_achieved(scored, seconds, gpus, source))
    generate = _mean(rows, "time/generate")
    if generate:
        rates = replace(rates, iteration=_iteration(config, plan, gpu, rates, generate, source))
    return rates, make_plan(config, student, teacher, work, gpu, rates)


def _iteration(
    config: TrainConfig, plan: Plan, gpu: Gpu, rates: Rates, generate: float, source: str
) -> Rate:
    """Solves for the fixed time of an iteration at which the planned generation takes ``generate``
    seconds, which depend on it linearly."""

    def seconds(iteration: float) -> float:
        trial = replace(rates, iteration=Rate(iteration, source))
        made = make_plan(config, plan.student, plan.teacher, plan.work, gpu, trial)
        return made.seconds.generate

    base = seconds(0.0)
    return Rate(max(0.0, (generate - base) / (seconds(1.0) - base)), source)


def _achieved(counted: float, seconds: float, gpus: int, source: str) -> Rate:
    return Rate(counted / (seconds * gpus), source)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Returns the mean of a key over the rows that have it; 0 without any."""
    return statistics.fmean([float(row[key]) for row in rows if row.get(key)] or [0.0])
