"""Measures how long the parts of a step take."""

from __future__ import annotations

import time

import torch

from reopold_agent.rollout.runner import RolloutStats


class Clock:
    """A stopwatch: seconds between laps, by name."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to ``name``, work on a GPU included."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def step_times(clock: Clock, stats: RolloutStats, *, ahead: bool = False) -> dict[str, float]:
    """Returns the seconds of a step by part, ``time/<part>``, and in all, ``time/step``.

    ``teacher`` is the time spent waiting for scores after the rollout: a teacher that scores during
    generation takes no time of its own.

    Args:
        clock: the laps of the step.
        stats: of its rollouts.
        ahead: the episodes were generated during the step before. ``generate`` and
            ``environment`` are then no part of this step, but ``wait`` is: for their end.
    """
    laps = clock.laps
    episodes = {"generate": stats.generate_seconds, "environment": stats.env_wait_seconds}
    parts = {name: laps[name] for name in ("teacher", "old_logp", "update", "sync")}
    parts = {"wait": laps["rollout"], **parts} if ahead else {**episodes, **parts}
    total = sum(laps.values())
    parts["other"] = max(0.0, total - sum(parts.values()))
    named = {f"time/{name}": seconds for name, seconds in {**episodes, **parts}.items()}
    return {**named, "time/step": total}
