"""Computes the reward and mask that each token was trained with, for the run's files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reopold_agent.objectives import LossTerms, Needs, Objective, TokenBatch
from reopold_agent.objectives.pieces import turns
from reopold_agent.tracking.trajectories import TokenUse
from reopold_agent.train.rows import Row
from reopold_agent.types import BoolArray, FloatArray, Trajectory


def token_uses(trajectories: Sequence[Trajectory], terms: LossTerms) -> list[TokenUse]:
    """Splits the terms of a micro-batch by trajectory.

    Args:
        trajectories: of the micro-batch, in its order.
        terms: of their loss tokens in a row: (1, N).

    Raises:
        ValueError: N is not the number of their loss tokens.
    """
    reward_N = terms.clipped_reward.detach().float().reshape(-1).cpu().numpy()
    kept_N = terms.mask.detach().bool().reshape(-1).cpu().numpy()
    counts = [t.response_tokens for t in trajectories]
    if sum(counts) != len(reward_N):
        raise ValueError(f"{sum(counts)} loss tokens, but terms of {len(reward_N)}")
    uses, start = [], 0
    for trajectory, count in zip(trajectories, counts, strict=True):
        reward: FloatArray = np.zeros(len(trajectory.ids), dtype=np.float32)
        kept: BoolArray = np.zeros(len(trajectory.ids), dtype=np.bool_)
        reward[trajectory.loss_mask] = reward_N[start : start + count]
        kept[trajectory.loss_mask] = kept_N[start : start + count]
        uses.append(TokenUse(reward, kept))
        start += count
    return uses


def expected_use(
    objective: Objective,
    row: Row,
    step: int,
    threshold: float | None,
) -> TokenUse:
    """Computes the use of a row's tokens by an update that starts from the student before the step.

    For engines whose workers do not return the terms. Exact for the first mini-batch of a step; in
    later ones the student has moved a little, so a token right at the floor may differ. Whether
    the update of the mini-batch was rejected is not known here.

    Args:
        objective: one on sampled tokens.
        row: scored, with the old log-probs, entropies (and the advantage) that the update used.
        step: training step from 0.
        threshold: the objective's, over the whole batch.
    """
    return token_uses([row.trajectory], expected_terms(objective, row, step, threshold))[0]


def expected_terms(objective: Objective, row: Row, step: int, threshold: float | None) -> LossTerms:
    """Returns a row's terms as an update that starts from the student before the step has them.

    A divergence is not known here, so that the numerator of an objective on distributions is 0.
    Arguments as of `expected_use`.
    """
    trajectory = row.trajectory
    old_logp, _ = row.behaviour

    def sampled(values: FloatArray | BoolArray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)[trajectory.loss_mask])[None]

    logp_N = sampled(old_logp)
    mask_L = torch.from_numpy(trajectory.loss_mask)
    teacher, advantage = trajectory.teacher_logp, trajectory.advantage
    batch = TokenBatch(
        logp=logp_N,
        logp_old=logp_N,
        logp_teacher=None if teacher is None else sampled(teacher),
        entropy=sampled(row.span_entropy),
        loss_mask=sampled(row.learned).bool(),
        advantage=None if advantage is None else torch.full_like(logp_N, advantage),
        response_length=torch.full_like(logp_N, float(trajectory.response_tokens)),
        divergence=torch.zeros_like(logp_N) if objective.needs & Needs.DISTRIBUTIONS else None,
        taught=torch.full_like(logp_N, row.taught, dtype=torch.bool),
        episode=torch.zeros_like(logp_N, dtype=torch.int64),
        turn=turns(mask_L)[mask_L][None],
        logp_reference=None if row.reference_logp is None else sampled(row.reference_logp),
    )
    return objective.terms(batch, step, threshold)
