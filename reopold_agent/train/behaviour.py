"""Computes the student's log-probs and entropies before the update of a step.

These log-probs are the denominator of the importance ratio, and the numerator of the importance
weights of tokens whose sampler computed others; the entropy masks use the entropies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reopold_agent.objectives.pieces import importance_weight
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.nonfinite import Finding, invalid_entropy, invalid_logp
from reopold_agent.train.rows import Row, trajectories_of


def old_logp_source(setting: str, student: TransformersPolicy) -> str:
    """Decides ``engine.old_logp=auto``.

    ``rollout`` uses the log-probs of generation, ``recompute`` makes a full pass.

    In float32 the two agree to 1e-5; in bfloat16 the batched decoder and the full pass differ
    enough to show up in the importance ratio.
    """
    if setting != "auto":
        return setting
    exact = student.adapter.head.weight.dtype == torch.float32 and not student.adapter.autocasts
    return "rollout" if exact else "recompute"


def set_behaviour(
    rows: Sequence[Row], student: TransformersPolicy, source: str, cap: float | None = None
) -> list[Finding]:
    """Sets ``old_logp``, ``entropy`` and ``weight`` of rows; returns the rows with invalid values.

    Args:
        rows: the rows of the step to train on.
        student: the trainer's policy, before the update.
        source: ``rollout`` or ``recompute``; see `old_logp_source`. With ``rollout`` all weights
            are 1 exactly.
        cap: the largest importance weight; None for no weights.
    """
    if source == "rollout":
        for row in rows:
            row.old_logp, row.entropy = row.trajectory.logp, row.trajectory.entropy
    else:
        with student.adapter.autocast():
            scores = student.score(trajectories_of(rows), with_entropy=True)
        for row, score in zip(rows, scores, strict=True):
            row.old_logp, row.entropy = score.logp, score.entropy
    if cap is not None:
        for row in rows:
            sampler = torch.from_numpy(row.trajectory.logp)
            trainer = torch.from_numpy(row.behaviour[0])
            row.weight = importance_weight(trainer, sampler, cap).numpy()
    return invalid_behaviour(rows)


def invalid_behaviour(rows: Sequence[Row]) -> list[Finding]:
    """Returns the rows whose old log-probs or entropies are invalid, with what is wrong."""
    return [
        (row, wrong)
        for row in rows
        if (
            wrong := invalid_logp(row.old_logp, row.trajectory, "student's")
            or invalid_entropy(row.entropy, row.trajectory)
            or (
                row.weight is not None
                and invalid_logp(row.trajectory.logp, row.trajectory, "sampler's")
            )
        )
    ]
