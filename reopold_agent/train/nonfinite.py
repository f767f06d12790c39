"""Guards a run against numbers that cannot be trained on (``on_nonfinite``).

NaN and the infinities spread: one in a batch's entropies spoils its threshold, one in a gradient
spoils every weight. So all numbers are checked before use, separately for each trajectory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from reopold_agent.errors import NonFiniteError
from reopold_agent.train.rows import Row
from reopold_agent.types import Trajectory

_log = logging.getLogger(__name__)

Finding: TypeAlias = tuple[Row, str]
"""A row and what is wrong with its numbers."""

MAX_STEPS_WITHOUT_UPDATE = 5
"""Consecutive steps without an update, because of invalid numbers, that end even ``skip``."""

TOLERANCE = 1e-3
"""Largest log-prob that rounding can explain, nats; any larger is a probability above 1."""

CONSTANT = 16
"""From this number of tokens on, log-probs that are all equal cannot come from a model."""

ROUNDING, SURE = 1e-6, 0.05
"""Nats: rounding error of a certain token's log-prob, and how far from 0 the sampler's may be."""

NOTE = "nonfinite"
"""Key of a trajectory's ``info`` that says what was wrong."""


class NonFiniteGuard:
    """Rejects the rows of a step whose numbers cannot be trained on.

    Args:
        mode: ``fail`` ends the run at the first finding, ``skip`` leaves the rows out.

    Attributes:
        rejected: the rejected rows of the current step.
    """

    def __init__(self, mode: str) -> None:
        self.skips = mode == "skip"
        self.rejected: list[Row] = []
        self._step = self._without_update = 0

    def begin(self, step: int) -> None:
        """Begins a step and forgets the rows of the last one."""
        self._step, self.rejected = step, []

    def note(self, findings: Sequence[Finding]) -> None:
        """Records rows as rejected, each with the reason in its trajectory's ``info``."""
        for row, reason in findings:
            row.trajectory.info[NOTE] = reason
            self.rejected.append(row)
            _log.warning("step %d, %s: %s", self._step, row, reason)

    def reject(self, findings: Sequence[Finding]) -> list[Row]:
        """Records findings and returns their rows, which the step has to leave out.

        Raises:
            NonFiniteError: there are findings, and the run does not skip.
        """
        self.note(findings)
        if findings and not self.skips:
            raise NonFiniteError(describe(self._step, findings))
        return [row for row, _ in findings]

    def end(self, updated: bool) -> None:
        """Ends the step; ``updated`` says whether any update was made.

        Raises:
            NonFiniteError: too many consecutive steps made no update.
        """
        self._without_update = 0 if updated or not self.rejected else self._without_update + 1
        if self._without_update >= MAX_STEPS_WITHOUT_UPDATE:
            findings = [(row, str(row.trajectory.info[NOTE])) for row in self.rejected]
            raise NonFiniteError(
                f"{MAX_STEPS_WITHOUT_UPDATE} steps in a row made no update; the last one: "
                + describe(self._step, findings)
            )


def describe(step: int, findings: Sequence[Finding]) -> str:
    """Returns one line about the findings of a step."""
    row, reason = findings[0]
    others = [str(other) for other, _ in findings[1:6]]
    more = f"; likewise {', '.join(others)}" if others else ""
    if len(findings) > 6:
        more += f" and {len(findings) - 6} more"
    return f"step {step}, {row}: {reason}{more}; the update was not made"


def invalid_logp(values: Any, trajectory: Trajectory, whose: str) -> str | None:
    """Returns why these cannot be log-probs of the trajectory's tokens; None if they can.

    Args:
        values: what a policy returned, of any type; (L,) float aligned with the ids is valid.
        trajectory: the trajectory that was scored.
        whose: "teacher's" or "student's", for the message.
    """
    what = f"the {whose} log-probs"
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        return f"{what} are not an array of numbers but {type(values).__name__}"
    if values.shape != trajectory.ids.shape:
        return f"{what} are {len(values)} for {len(trajectory.ids)} ids (in {values.ndim}-d)"
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        return f"{what} are not finite ({values[bad[0]]} at id {bad[0]}, {bad.size} in all)"
    sampled = values[trajectory.loss_mask]
    if sampled.size and sampled.max() > TOLERANCE:
        at = int(np.flatnonzero(trajectory.loss_mask)[sampled.argmax()])
        return f"{what} are invalid: {sampled.max():.4g} at id {at} is above 0"
    if sampled.size >= CONSTANT and (sampled == sampled[0]).all():
        # The tokens of a collapsed student are certain for any teacher too, so zeros are valid.
        certain = (
            abs(sampled[0]) < ROUNDING and (trajectory.logp[trajectory.loss_mask] > -SURE).all()
        )
        if not certain:
            return f"{what} are invalid: all {sampled.size} are {sampled[0]:.4g}"
    return None


def invalid_entropy(values: Any, trajectory: Trajectory) -> str | None:
    """Returns why these cannot be the (L,) entropies of the trajectory in nats, or None."""
    if not isinstance(values, np.ndarray) or values.shape != trajectory.ids.shape:
        return "the student's entropies are not one per id"
    bad = np.flatnonzero(~np.isfinite(values) & trajectory.loss_mask)
    if bad.size:
        return (
            f"the student's entropies are not finite ({values[bad[0]]} at id {bad[0]}, "
            f"{bad.size} in all)"
        )
    return None


def invalid_outcome(trajectory: Trajectory) -> str | None:
    """Returns why reward or advantage cannot be compared with others; None if they can."""
    if not np.isfinite(trajectory.reward):
        return f"the environment's reward ({trajectory.reward}) is not finite"
    if trajectory.advantage is not None and not np.isfinite(trajectory.advantage):
        return f"the objective's advantage ({trajectory.advantage}) is not finite"
    return None
