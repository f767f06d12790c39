"""Numbers that cannot be trained on: who is to blame, and what the run does (``on_nonfinite``).

NaN and the infinities spread: one in a batch's entropies spoils its threshold, one in a gradient
every weight. So all numbers are looked at before they are used, and each trajectory is judged on
its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from reopold_agent.errors import NonFiniteError
from reopold_agent.types import Trajectory

_log = logging.getLogger(__name__)

Finding: TypeAlias = tuple[Trajectory, str]
"""A trajectory and what is wrong with its numbers."""

MOST_IN_A_ROW = 5
"""Steps without any update, for want of numbers, after which ``skip`` gives up too."""

TOLERANCE = 1e-3
"""By how much rounding may lift a log-prob above 0, nats."""

CONSTANT = 16
"""From so many tokens on, log-probs that are all the same float32 come from no model."""

ROUNDING, SURE = 1e-6, 0.05
"""Nats: how far rounding takes a certain token's log-prob, and up to which its sampler was sure."""

NOTE = "nonfinite"
"""Key of a trajectory's ``info`` that says what was wrong."""


class Suspects:
    """The trajectories of the current step whose numbers cannot be trained on.

    Args:
        mode: ``fail`` ends the run at the first finding, ``skip`` leaves the trajectories out.
    """

    def __init__(self, mode: str) -> None:
        self.skips = mode == "skip"
        self.trajectories: list[Trajectory] = []
        self._step = self._in_a_row = 0

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self.trajectories = step, []

    def note(self, findings: Sequence[Finding]) -> None:
        """Keeps trajectories for the record, each with what was wrong in its ``info``."""
        for trajectory, what in findings:
            trajectory.info[NOTE] = what
            self.trajectories.append(trajectory)
            _log.warning("step %d, %s: %s", self._step, named(trajectory), what)

    def left_out(self, findings: Sequence[Finding]) -> list[Trajectory]:
        """The trajectories to leave out of the step.

        Raises:
            NonFiniteError: there are some, and the run does not skip.
        """
        self.note(findings)
        if findings and not self.skips:
            raise NonFiniteError(describe(self._step, findings))
        return [trajectory for trajectory, _ in findings]

    def end(self, updated: bool) -> None:
        """The step is done; ``updated`` says whether any update was made.

        Raises:
            NonFiniteError: this is the fifth step in a row that came to nothing.
        """
        self._in_a_row = 0 if updated or not self.trajectories else self._in_a_row + 1
        if self._in_a_row >= MOST_IN_A_ROW:
            findings = [(t, str(t.info[NOTE])) for t in self.trajectories]
            raise NonFiniteError(
                f"{MOST_IN_A_ROW} steps in a row made no update; the last one: "
                + describe(self._step, findings)
            )


def named(trajectory: Trajectory) -> str:
    """How messages call a trajectory."""
    return f"task {trajectory.task_id} (index {trajectory.index}, sample {trajectory.sample})"


def describe(step: int, findings: Sequence[Finding]) -> str:
    """One line on what was found in a step."""
    trajectory, what = findings[0]
    others = [named(t) for t, _ in findings[1:6]]
    more = f"; likewise {', '.join(others)}" if others else ""
    if len(findings) > 6:
        more += f" and {len(findings) - 6} more"
    return f"step {step}, {named(trajectory)}: {what}{more}; the update was not made"


def unusable_logp(values: Any, trajectory: Trajectory, whose: str) -> str | None:
    """What makes these no log-probs of the trajectory's tokens, or None.

    Args:
        values: (L,) float, aligned with the trajectory's ids; anything at all is allowed.
        trajectory: whose tokens they are of.
        whose: "teacher's", "student's"; begins the text.
    """
    what = f"the {whose} log-probs"
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        return f"{what} are not an array of numbers but {type(values).__name__}"
    if values.shape != trajectory.ids.shape:
        return f"{what} are {len(values)} for {len(trajectory.ids)} ids (in {values.ndim}-d)"
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        return f"{what} are not finite ({values[bad[0]]} at id {bad[0]}, {bad.size} in all)"
    own = values[trajectory.loss_mask]
    if own.size and own.max() > TOLERANCE:
        at = int(np.flatnonzero(trajectory.loss_mask)[own.argmax()])
        return f"{what} are none: {own.max():.4g} at id {at} is a probability above 1"
    if own.size >= CONSTANT and (own == own[0]).all():
        # A student that has collapsed says what everybody foresees: zeros, and true ones.
        foreseen = abs(own[0]) < ROUNDING and (trajectory.logp[trajectory.loss_mask] > -SURE).all()
        if not foreseen:
            return f"{what} are none: all {own.size} are {own[0]:.4g}"
    return None


def unusable_entropy(values: Any, trajectory: Trajectory) -> str | None:
    """What makes these no entropies of the trajectory's tokens, (L,) nats, or None."""
    if not isinstance(values, np.ndarray) or values.shape != trajectory.ids.shape:
        return "the student's entropies are not one per id"
    bad = np.flatnonzero(~np.isfinite(values) & trajectory.loss_mask)
    if bad.size:
        return (
            f"the student's entropies are not finite ({values[bad[0]]} at id {bad[0]}, "
            f"{bad.size} in all)"
        )
    return None


def unusable_outcome(trajectory: Trajectory) -> str | None:
    """What makes reward or advantage useless for objectives that compare outcomes, or None."""
    if not np.isfinite(trajectory.reward):
        return f"the environment's reward ({trajectory.reward}) is not finite"
    if trajectory.advantage is not None and not np.isfinite(trajectory.advantage):
        return f"the objective's advantage ({trajectory.advantage}) is not finite"
    return None
