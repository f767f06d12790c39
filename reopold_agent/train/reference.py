"""Scores the rows of a step with an objective's reference model."""

from __future__ import annotations

from collections.abc import Sequence

from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.nonfinite import Finding, invalid_logp
from reopold_agent.train.roles import computing
from reopold_agent.train.rows import Row, trajectories_of


class Reference:
    """A frozen model in this process.

    Args:
        policy: runs the model.
    """

    def __init__(self, policy: TransformersPolicy) -> None:
        self._policy = policy

    def score(self, rows: Sequence[Row]) -> list[Finding]:
        """Sets ``reference_logp`` of rows; returns those with invalid values."""
        with computing(self._policy):
            scores = self._policy.score(trajectories_of(rows))
        self._policy.adapter.release_weights()
        findings = []
        for row, score in zip(rows, scores, strict=True):
            row.reference_logp = score.logp
            wrong = invalid_logp(score.logp, row.trajectory, "reference's")
            if wrong is not None:
                findings.append((row, wrong))
        return findings
