"""Computes a loss environment by environment: a threshold for each, a mean over each.

Both are for mixtures (``objective.threshold_over``, ``objective.normalise_over``). Each
environment's tokens go through the objective by themselves, and the terms are put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reopold_agent.objectives import LossTerms, Objective, TokenBatch
from reopold_agent.train.rows import Row, Threshold, threshold_of
from reopold_agent.train.token_use import expected_terms


@dataclass(frozen=True)
class Environments:
    """The environments of a mini-batch.

    Attributes:
        names: their names; a token's environment is a position in them.
        threshold: the objective's, over the whole step.
        counts: with means over environments, the loss's denominator for each; else None.
    """

    names: Sequence[str]
    threshold: Threshold
    counts: Sequence[float] | None = None

    def terms(self, objective: Objective, batch: TokenBatch, env: Tensor, step: int) -> LossTerms:
        """Returns the terms of a micro-batch.

        With `counts` the numerator is already the loss: the sum of ``numerator / count`` over
        environments, divided by the number of those that keep a token in the mini-batch. The
        denominator is 0 then, and engines divide by 1.

        Args:
            objective: the run's.
            batch: tokens, (batch, time).
            env: each token's environment, int64, of the same shape.
            step: training step from 0.
        """
        found: LossTerms | None = None
        for number, name in enumerate(self.names):
            mine = env == number
            mask = batch.loss_mask & mine
            if found is not None and not bool(mask.any()):
                continue
            part = replace(batch, loss_mask=mask)
            terms = objective.terms(part, step, threshold_of(self.threshold, name))
            if self.counts is not None:
                kinds = max(1, sum(count > 0 for count in self.counts))
                terms = replace(
                    terms,
                    numerator=terms.numerator / (kinds * max(1.0, self.counts[number])),
                    denominator=torch.zeros_like(terms.denominator),
                )
            found = terms if found is None else _joined(found, terms, mine)
        if found is None:
            raise ValueError("there is no environment")
        return found


def environment_counts(
    objective: Objective, rows: Sequence[Row], step: int, threshold: Threshold
) -> dict[str, float]:
    """Returns the loss's denominator for each environment of a mini-batch.

    Which tokens the loss keeps follows from the log-probs before the update of the step, since the
    update's own are known only after its last micro-batch.

    Args:
        objective: the run's.
        rows: of the mini-batch, with all that the update needs.
        step: training step from 0.
        threshold: the objective's, over the whole step.
    """
    counts: dict[str, float] = {}
    for row in rows:
        env = row.trajectory.env
        terms = expected_terms(objective, row, step, threshold_of(threshold, env))
        counts[env] = counts.get(env, 0.0) + float(terms.denominator)
    return counts


def environments(
    objective: Objective, rows: Sequence[Row], step: int, threshold: Threshold, *, means: bool
) -> Environments:
    """Returns the environments of a mini-batch; ``means``: the loss is the mean of their means.

    The other arguments are those of `environment_counts`.
    """
    names = list(dict.fromkeys(row.trajectory.env for row in rows))
    if not means:
        return Environments(names, threshold)
    counts = environment_counts(objective, rows, step, threshold)
    return Environments(names, threshold, [counts[name] for name in names])


def _joined(one: LossTerms, other: LossTerms, where: Tensor) -> LossTerms:
    """Adds sums, and takes the tokens' values from ``other`` where ``where`` is true."""
    names = ("reward", "clipped_reward", "mask", "ratio")
    pairs = {name: (getattr(other, name), getattr(one, name)) for name in names}
    return LossTerms(
        one.numerator + other.numerator,
        one.denominator + other.denominator,
        **{name: torch.where(where, *pair) for name, pair in pairs.items()},
    )
