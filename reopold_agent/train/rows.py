"""Defines the rows of a training step: each trajectory with the values that its update needs.

A row is made when its episode ends. Before the update it gets the trainer's log-probs and
entropies; after the update it gets the reward and mask that each token was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from reopold_agent.errors import EnvironmentCodeError
from reopold_agent.objectives import Objective, Outcomes
from reopold_agent.rollout.runner import RolloutStats
from reopold_agent.tracking.trajectories import TokenUse
from reopold_agent.types import BoolArray, FloatArray, IntArray, Trajectory, span_count


@dataclass(eq=False)
class Row:
    """One trajectory of a step and the values that its update needs, aligned with its ids.

    The sampler's log-probs, the teacher's scores and the advantage are fields of the trajectory.

    Attributes:
        trajectory: the episode as tokens.
        old_logp: (L,) float32, nats: the trainer's log-probs before the update; None until known.
        entropy: (L,) float32, nats: entropies of the same distributions; None until known.
        teacher_states: (N, width): the teacher's states at the loss tokens (`TokenScores.states`);
            None unless the objective compares distributions.
        weight: (L,) float32: importance weights of the tokens; None where none are used.
        reference_logp: (L,) float32, nats: log-probs under the reference model; None without one.
        taught: false if the outcome leaves the row no teacher's term (`Objective.taught`).
        pending_score: the teacher's scoring, if it runs beside the rollout.
        use: reward and mask that the tokens were trained with; None without an update.
    """

    trajectory: Trajectory
    old_logp: FloatArray | None = None
    entropy: FloatArray | None = None
    teacher_states: Tensor | None = field(default=None, repr=False)
    weight: FloatArray | None = None
    reference_logp: FloatArray | None = None
    taught: bool = True
    pending_score: Future[Any] | None = field(default=None, repr=False)
    use: TokenUse | None = None

    @property
    def behaviour(self) -> tuple[FloatArray, FloatArray]:
        """The old log-probs and the entropies.

        Raises:
            ValueError: they have not been computed yet.
        """
        if self.old_logp is None or self.entropy is None:
            raise ValueError(f"{self} has no old log-probs and entropies yet")
        return self.old_logp, self.entropy

    @property
    def span_entropy(self) -> FloatArray:
        """(L,) float32, nats: for each token the largest entropy in its span: where it branches.

        Raises:
            ValueError: the entropies have not been computed yet.
        """
        _, entropy = self.behaviour
        spans = self.trajectory.teacher_spans
        if spans is None or not (spans >= 0).any():
            return entropy
        inside = spans >= 0
        largest = np.zeros(int(spans.max()) + 1, entropy.dtype)
        np.maximum.at(largest, spans[inside], entropy[inside])
        shared: FloatArray = entropy.copy()
        shared[inside] = largest[spans[inside]]
        return shared

    @property
    def learned(self) -> BoolArray:
        """(L,) bool: the sampled tokens that can be trained on: those that the teacher scored."""
        mask, spans = self.trajectory.loss_mask, self.trajectory.teacher_spans
        return mask if spans is None else mask & (spans >= 0)

    def __str__(self) -> str:
        t = self.trajectory
        where = f"{t.env}, " if t.env else ""
        return f"task {t.task_id} ({where}index {t.index}, sample {t.sample})"


@dataclass
class StepBatch:
    """The rows of a step.

    Attributes:
        position: number of task draws used so far in the run.
        rows: every episode, in the order of the draws.
        usable: the rows without an error.
        chosen: the rows to update on.
        invalid: rows that were left out, each with what is wrong.
        stats: time and tokens of the rollouts.
        staleness: number of updates made since the weights that generated the rows; None if
            generation waits for the update.
    """

    position: int
    rows: list[Row] = field(default_factory=list)
    usable: list[Row] = field(default_factory=list)
    chosen: list[Row] = field(default_factory=list)
    invalid: list[tuple[Row, str]] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)
    staleness: int | None = None

    @property
    def trajectories(self) -> list[Trajectory]:
        """The trajectories of all rows."""
        return trajectories_of(self.rows)

    def add(self, rows: Sequence[Row], stats: RolloutStats) -> None:
        """Adds the rows and the statistics of a rollout."""
        self.rows += rows
        self.usable += [row for row in rows if row.trajectory.trainable]
        for name, value in vars(stats).items():
            setattr(self.stats, name, getattr(self.stats, name) + value)

    def drop(self, rows: Sequence[Row]) -> None:
        """Removes rows from `usable` and `chosen`."""
        dropped = set(rows)
        self.usable = [row for row in self.usable if row not in dropped]
        self.chosen = [row for row in self.chosen if row not in dropped]


def kept_tokens(row: Row) -> float:
    """Returns how many tokens of a row the loss of the update kept; 0 without an update."""
    return 0.0 if row.use is None else float(row.use.kept.sum())


def trajectories_of(rows: Sequence[Row]) -> list[Trajectory]:
    """Returns the trajectories of rows, in their order."""
    return [row.trajectory for row in rows]


Threshold: TypeAlias = "float | Mapping[str, float | None] | None"
"""What `Objective.threshold` says of a step's whole batch, or of each environment by name."""


def entropy_threshold(
    objective: Objective, rows: Sequence[Row], *, by_environment: bool = False
) -> Threshold:
    """Returns the objective's entropy threshold (paper, eq. 10) over a whole batch.

    It is computed before the batch is split, so that micro- and mini-batches do not change which
    tokens are kept.

    Args:
        objective: the run's.
        rows: the rows to update on, with the entropies of the policy before the update.
        by_environment: one threshold for each environment, over its tokens.
    """
    if not by_environment:
        return _threshold(objective, rows)
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.trajectory.env, []).append(row)
    return {name: _threshold(objective, part) for name, part in parts.items()}


def _threshold(objective: Objective, rows: Sequence[Row]) -> float | None:
    entropy_N = torch.from_numpy(np.concatenate([row.span_entropy[row.learned] for row in rows]))
    return objective.threshold(entropy_N, torch.ones_like(entropy_N))


def threshold_of(threshold: Threshold, env: str) -> float | None:
    """Returns the threshold for the tokens of an environment."""
    return threshold.get(env) if isinstance(threshold, Mapping) else threshold


def spans_of(rows: Sequence[Row]) -> list[IntArray] | None:
    """Returns the spans of the rows' tokens, each (L,), numbered through all rows; -1 for none.

    None if all spans are single tokens.
    """
    if all(row.trajectory.teacher_spans is None for row in rows):
        return None
    numbered, first = [], 0
    for row in rows:
        spans = row.trajectory.teacher_spans
        if spans is None:
            mask = row.trajectory.loss_mask
            spans = np.where(mask, np.cumsum(mask) - 1, -1)
        numbered.append(np.where(spans >= 0, spans + first, -1))
        first += span_count(spans)
    return numbered


def outcomes_of(rows: Sequence[Row]) -> Outcomes:
    """Returns how the episodes ended, for objectives that compare outcomes."""
    trajectories = trajectories_of(rows)
    groups = {
        group: number for number, group in enumerate(dict.fromkeys(t.group for t in trajectories))
    }
    return Outcomes(
        reward=torch.tensor([t.reward for t in trajectories]),
        group=torch.tensor([groups[t.group] for t in trajectories]),
        tool_calls=torch.tensor([len(t.tool_calls) for t in trajectories]),
        tool_successes=torch.tensor([sum(c.ok for c in t.tool_calls) for t in trajectories]),
        tokens=torch.tensor([len(t.ids) - t.prompt_length for t in trajectories]),
        success=torch.tensor([t.success for t in trajectories]),
    )


def set_advantages(objective: Objective, rows: Sequence[Row]) -> list[bool]:
    """Sets each row's advantage and ``taught``; returns which rows are in informative groups.

    Raises:
        EnvironmentCodeError: the samples of a group were asked different things.
    """
    _check_groups(rows)
    outcomes = outcomes_of(rows)
    for row, advantage in zip(rows, objective.advantages(outcomes).tolist(), strict=True):
        row.trajectory.advantage = advantage
    taught = objective.taught(outcomes)
    if taught is not None:
        for row, flag in zip(rows, taught.tolist(), strict=True):
            row.taught = bool(flag)
    return [bool(kept) for kept in objective.informative(outcomes).tolist()]


def _check_groups(rows: Sequence[Row]) -> None:
    """Checks that the samples of each group, whose outcomes are compared, had one prompt."""
    firsts: dict[tuple[str, int], Row] = {}
    for row in rows:
        first = firsts.setdefault(row.trajectory.group, row)
        if first.trajectory.prompt_digest != row.trajectory.prompt_digest:
            env = row.trajectory.env
            raise EnvironmentCodeError(
                f"{f'env={env}' if env else 'the environment'}: samples {first.trajectory.sample} "
                f"and {row.trajectory.sample} of task index {row.trajectory.index} had different "
                "prompts or pictures, so their outcomes cannot be compared.\nLet reset(seed=...) "
                "alone decide the task (super().reset(seed=seed), then self.np_random); load_tasks "
                "must give the same tasks each time."
            )
