"""Measures seconds per question with k answers in parallel (paper, figures 1b and 13)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from reopold_agent.policies.base import Policy
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.types import Sampling


@dataclass(frozen=True)
class LatencyPoint:
    """Latency of k parallel answers per question, over questions one after the other.

    Attributes:
        k: answers in parallel.
        seconds: mean seconds until the last of the k answers of a question.
        tokens_per_second: sampled tokens over that time.
        solved: share of the questions with at least one right answer.
        questions: number of questions.
    """

    k: int
    seconds: float
    tokens_per_second: float
    solved: float
    questions: int


def measure_latency(
    runner: RolloutRunner,
    policy: Policy,
    *,
    ks: Sequence[int],
    questions: int,
    sampling: Sampling,
    seed: int,
) -> list[LatencyPoint]:
    """Measures each k on the first ``questions`` questions; the first question warms up."""
    runner.run(policy, [EpisodeSpec("eval", 0)], sampling, (seed, 6))
    points = []
    for k in ks:
        seconds, tokens, solved = [], 0, 0
        for index in range(questions):
            episodes = [EpisodeSpec("eval", index, sample) for sample in range(k)]
            started = time.perf_counter()
            trajectories = runner.run(policy, episodes, sampling, (seed, 6, k))
            seconds.append(time.perf_counter() - started)
            tokens += sum(t.response_tokens for t in trajectories)
            solved += any(t.success for t in trajectories)
        points.append(
            LatencyPoint(
                k=k,
                seconds=statistics.fmean(seconds),
                tokens_per_second=tokens / sum(seconds),
                solved=solved / questions,
                questions=questions,
            )
        )
    return points
