"""Rates and lengths from a run that was made."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.errors import DataError
from reopold_agent.planning.architecture import Architecture
from reopold_agent.planning.estimate import Plan, make_plan
from reopold_agent.planning.hardware import Gpu, Rate, Rates
from reopold_agent.planning.workload import measured_workload
from reopold_agent.tracking.metrics import read_json_lines, read_metrics


def read_run(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows of a run, the first step left out where there are several (it warms up), and
    its recorded trajectories.

    Raises:
        DataError: not a run's folder, or no step was made.
    """
    rows = [row for row in read_metrics(run) if row.get("kind") == "train"]
    if not rows:
        raise DataError(f"{run} has no training step yet: nothing to measure")
    return rows[1:] or rows, read_json_lines(run / "trajectories.jsonl")


def measured_rates(
    run: Path,
    config: TrainConfig,
    student: Architecture,
    teacher: Architecture | None,
    gpu: Gpu,
    assumed: Rates,
) -> tuple[Rates, Plan]:
    """What a run achieved, and the plan of that run with those rates.

    FLOP/s come from counted FLOPs and measured seconds. The seconds of an iteration are what is
    left of the generation after reading weights and cache at the assumed bandwidth: on other
    hardware than ``gpu`` that is only a summary. What the run has no time for (``engine=verl``
    has none of the teacher) stays as assumed.

    Args:
        run: its folder.
        config: its configuration.
        student: its shapes.
        teacher: its shapes, or None.
        gpu: the hardware it ran on.
        assumed: for what it did not measure.
    """
    rows, trajectories = read_run(run)
    work = measured_workload(config, rows, trajectories, student.image_token)
    plan = make_plan(config, student, teacher, work, gpu, assumed)
    layout, counted = plan.layout, plan.flops
    said = f"measured in {run} over {len(rows)} steps"
    rates = assumed
    update = _mean(rows, "time/update")
    if update:
        rates = replace(rates, train=_achieved(counted.update, update, layout.student, said))
    scored = counted.old_logp * bool(_mean(rows, "time/old_logp"))
    seconds, gpus = _mean(rows, "time/old_logp"), layout.student
    if _mean(rows, "time/teacher") and layout.teacher:
        scored, seconds, gpus = counted.teacher, _mean(rows, "time/teacher"), layout.teacher
    if scored and seconds:
        rates = replace(rates, score=_achieved(scored, seconds, gpus, said))
    generate = _mean(rows, "time/generate")
    if generate:
        rates = replace(rates, iteration=_iteration(config, plan, gpu, rates, generate, said))
    return rates, make_plan(config, student, teacher, work, gpu, rates)


def _iteration(
    config: TrainConfig, plan: Plan, gpu: Gpu, rates: Rates, generate: float, said: str
) -> Rate:
    """The fixed time of an iteration under which the plan's generation takes this long; it enters
    the seconds linearly."""

    def seconds(iteration: float) -> float:
        trial = replace(rates, iteration=Rate(iteration, said))
        made = make_plan(config, plan.student, plan.teacher, plan.work, gpu, trial)
        return made.seconds.generate

    base = seconds(0.0)
    return Rate(max(0.0, (generate - base) / (seconds(1.0) - base)), said)


def _achieved(counted: float, seconds: float, gpus: int, said: str) -> Rate:
    return Rate(counted / (seconds * gpus), said)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean of a key over the rows that have it; 0 where none has."""
    return statistics.fmean([float(row[key]) for row in rows if row.get(key)] or [0.0])
