"""Held-out success of a policy, as training reports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reopold_agent.policies.base import Policy
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.tracking.statistics import rollout_statistics, wilson_interval
from reopold_agent.types import Sampling, Trajectory


@dataclass(frozen=True)
class EvaluationResult:
    """Success over ``n`` held-out tasks, one episode each.

    ``low`` and ``high`` bound the success rate with 95 % confidence (Wilson's score interval);
    ``stops`` has the share of episodes by ``stop/<reason>``.
    """

    success: float
    low: float
    high: float
    n: int
    tool_rate: float
    response_tokens: float
    stops: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> EvaluationResult:
        """The result of these episodes, one per task."""
        n = len(trajectories)
        successes = sum(t.success for t in trajectories)
        low, high = wilson_interval(successes, n)
        statistics = rollout_statistics(trajectories)
        return cls(
            success=successes / n,
            low=low,
            high=high,
            n=n,
            tool_rate=statistics["rollout/tool_rate"],
            response_tokens=statistics["rollout/response_tokens"],
            stops={
                name.removeprefix("rollout/"): share
                for name, share in statistics.items()
                if name.startswith("rollout/stop/")
            },
        )

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {**{k: v for k, v in vars(self).items() if k != "stops"}, **self.stops}


def evaluate_policy(
    runner: RolloutRunner,
    policy: Policy,
    *,
    tasks: int,
    sampling: Sampling,
    seed: int,
    split: str = "eval",
    on_done: Callable[[Trajectory], None] | None = None,
) -> EvaluationResult:
    """Plays the first ``tasks`` tasks of a split once each.

    The same seed gives the same random draws to every policy, so that two policies are compared
    on equal terms.
    """
    episodes = [EpisodeSpec(split, index) for index in range(tasks)]
    trajectories = runner.run(policy, episodes, sampling, (seed, 2), on_done=on_done)
    return EvaluationResult.of(trajectories)
