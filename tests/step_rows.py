"""Rows of a training step for tests of the update and of scoring."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.rows import Row, entropy_threshold
from reopold_agent.train.update import Updater, UpdateStats
from reopold_agent.types import Trajectory


def rows_of(
    trajectories: Sequence[Trajectory], teacher: TransformersPolicy | None = None
) -> list[Row]:
    """Rows whose old log-probs and entropies are those of the trajectories."""
    rows = [Row(t, old_logp=t.logp, entropy=t.entropy) for t in trajectories]
    if teacher is not None:
        for row, states in zip(rows, states_of(trajectories, teacher), strict=True):
            row.teacher_states = states
    return rows


def states_of(trajectories: Sequence[Trajectory], teacher: TransformersPolicy) -> list[Tensor]:
    """What scoring keeps of the teacher's pass for objectives on distributions."""
    scores = teacher.score([t.for_teacher for t in trajectories], with_states=True)
    return [score.states for score in scores if score.states is not None]


def make_updates(
    updater: Updater,
    mini_batches: Sequence[Sequence[Trajectory]],
    step: int,
    teacher: TransformersPolicy | None = None,
) -> UpdateStats:
    """The updates on mini-batches of trajectories."""
    return update_rows(updater, [rows_of(batch, teacher) for batch in mini_batches], step)


def update_rows(updater: Updater, mini_batches: Sequence[list[Row]], step: int) -> UpdateStats:
    """The updates on mini-batches of rows, with the threshold of the whole batch."""
    everything = [row for batch in mini_batches for row in batch]
    return updater.step(mini_batches, step, entropy_threshold(updater.objective, everything))
