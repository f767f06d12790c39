"""The paper's GPU-hours against the plan's (appendix C and D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from reopold_agent.planning.estimate import Plan
from reopold_agent.planning.hardware import Rate, Rates

FITTED_ON = "paper_math_1_5b"
"""The two constants of `hardware` come from this setting alone: its GPU-hours, and the share of
generation (appendix D)."""

GENERATION_SHARE = 0.773
"""Of a step of mathematics with 8192 tokens; the paper does not say of which student."""


@dataclass(frozen=True)
class PaperRun:
    """What the paper says of one setting; ``teacher`` is its share of a step, where it says."""

    gpu_hours: float
    teacher: float | None


PAPER_RUNS: Mapping[str, PaperRun] = {
    "paper_math_1_5b": PaperRun(200, 0.082),
    "paper_math_7b": PaperRun(312, 0.082),
    "paper_agentic": PaperRun(120, None),
    "paper_geometry_3b": PaperRun(20, 0.218),
    "paper_geometry_7b": PaperRun(24, 0.218),
}
"""Appendix C; the shares are appendix D's for mathematics and for visual reasoning, given without
the student's size."""


def fit(plan: Callable[[Rates], Plan], rates: Rates) -> tuple[float, float]:
    """The two constants under which a plan has the paper's GPU-hours and share of generation.

    Args:
        plan: makes the plan of `FITTED_ON` under given rates, all GPUs doing all in turn.
        rates: with the memory bandwidth, which is not fitted.

    Returns:
        FLOP/s per GPU, and seconds of a decoding iteration.
    """
    start = plan(rates)
    hours = PAPER_RUNS[FITTED_ON].gpu_hours
    step = hours * 3600 / (start.config.steps * start.layout.gpus)

    def trial(compute: float, iteration: float) -> Plan:
        return plan(
            replace(
                rates,
                train=Rate(compute, "fit"),
                score=Rate(compute, "fit"),
                iteration=Rate(iteration, "fit"),
            )
        )

    # Generation hardly depends on the first constant, and the rest not at all on the second.
    compute, iteration = rates.train.value, rates.iteration.value
    for _ in range(20):
        seconds = trial(compute, iteration).seconds
        rest = seconds.teacher + seconds.old_logp + seconds.update
        compute *= rest / (step * (1 - GENERATION_SHARE) - seconds.sync)
        without, with_one = (trial(compute, x).seconds.generate for x in (0.0, 1.0))
        iteration = (step * GENERATION_SHARE - without) / (with_one - without)
    return compute, iteration
