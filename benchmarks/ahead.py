"""Measures how far generation and training overlap with `engine.ahead=1`.

    python benchmarks/ahead.py [--steps 8] [--delay 0.2] [settings as for training]

Two cases on the embedded task: an environment whose every step takes ``--delay`` seconds, and a
teacher on a server whose every answer does, without computing here. Each is run with `ahead=0` and
`ahead=1` in turn. Of `ahead=0` come the seconds of a step's two halves alone: its episodes, and
everything else (waiting for scores, log-probs, update). Printed are medians, and the step over

* the longer half (what it could take at least; the aim is at most 1.1), and
* the step of `ahead=0`.

The halves compute on the same cores, so the first ratio says nothing on a busy machine.
The last line is JSON with these ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import demo_config, demo_loop

from reopold_agent.policies.base import PolicyRole
from reopold_agent.policies.registry import POLICIES, PolicyKind
from reopold_agent.rollout import runner
from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.types import TokenScores, Trajectory

WARM_UP = 2
CASES = {
    "environment": ("rollout.concurrency=4",),
    "server": ("policy.teacher.name=slow", "evaluation.teacher=false"),
}
SMALL = ("batch.prompts=4", "batch.mini_batch=4", "batch.samples=4")


class SlowTeacher:
    """Answers after ``seconds`` with log-probs that cost nothing to compute."""

    scoring_threads = 2
    seconds = 0.2

    def __init__(self, role: PolicyRole) -> None:
        self.role = role

    def score(self, trajectories: Sequence[Trajectory], **_: Any) -> list[TokenScores]:
        time.sleep(self.seconds)
        return [TokenScores(1.1 * each.logp, np.zeros_like(each.logp)) for each in trajectories]


def steps(case: str, ahead: int, count: int, settings: Sequence[str]) -> dict[str, float]:
    """Makes steps; returns the median seconds of one, of its wait for episodes, and of the rest."""
    folder = Path(tempfile.mkdtemp())
    config = demo_config(*SMALL, *CASES[case], *settings, f"steps={count}", f"engine.ahead={ahead}")
    loop: Any = demo_loop(config, folder)
    collect, waits = loop.rollouts.collect, list[float]()

    def timed(*arguments: Any) -> Any:
        begun = time.perf_counter()
        batch = collect(*arguments)
        waits.append(time.perf_counter() - begun)
        return batch

    loop.rollouts.collect = timed
    position = 0
    try:
        for step in range(count):
            position = loop.step(step, position)
    finally:
        loop.close()
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    whole = np.array([row["time/step"] for row in rows])[WARM_UP:]
    waited = np.array(waits)[WARM_UP:]
    parts = {"step": whole, "episodes": waited, "rest": whole - waited}
    return {name: float(np.median(values)) for name, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    SlowTeacher.seconds = options.delay
    POLICIES.register("slow", PolicyKind(SlowTeacher))  # type: ignore[arg-type]
    take_turn = runner.take_turn

    def slow_turn(*arguments: Any) -> Any:
        time.sleep(options.delay)
        return take_turn(*arguments)

    ratios = {}
    for case in CASES:
        runner.take_turn = slow_turn if case == "environment" else take_turn
        waits, ahead = (
            steps(case, number, options.steps + WARM_UP, options.settings) for number in (0, 1)
        )
        longer = max(waits["episodes"], waits["rest"])
        print(
            f"slow {case}: episodes {waits['episodes']:.2f} s, the rest {waits['rest']:.2f} s; "
            f"step {waits['step']:.2f} s, ahead {ahead['step']:.2f} s "
            f"(of which it waited {ahead['episodes']:.2f} s)"
        )
        ratios[f"{case}_over_longer_half"] = round(ahead["step"] / longer, 3)
        ratios[f"{case}_over_waiting"] = round(ahead["step"] / waits["step"], 3)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
