"""Rewards, masks and ratios that objectives are made of: pure functions on tensors.

All tensors are (batch, time) and hold one value per token; ``loss_mask`` is true where the
student sampled the token. Equation numbers are the paper's; ``docs/objective.md`` restores the
formulas that are missing from its text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PPO_CLIP = 0.2
"""PPO's usual clip. Reopold does not clip; it only reports how often PPO would (figure 11)."""


def check_mixture(mixture: float) -> None:
    """Raises ValueError unless the paper's lambda lies strictly between 0 and 1."""
    if not 0.0 < mixture < 1.0:
        raise ValueError(f"mixture (the paper's lambda) must lie strictly in (0, 1), got {mixture}")


def check_top_share(top_share: float) -> None:
    """Raises ValueError unless the paper's rho lies in (0, 1]."""
    if not 0.0 < top_share <= 1.0:
        raise ValueError(f"top_share (the paper's rho) must lie in (0, 1], got {top_share}")


def reward_floor(mixture: float) -> float:
    """Returns the lowest reward that the mixture bound allows: ``log(m) / (1 - m)``, eq. 7.

    By Jensen, ``log(p_T/p) <= log((m p + (1-m) p_T)/p) / (1-m)``, whose right side tends to this
    value as ``p_T`` tends to 0 (paper, appendix A.2). For example, 0.1 gives -2.558.

    Args:
        mixture: m, the paper's lambda, strictly between 0 and 1.

    Raises:
        ValueError: ``mixture`` is outside (0, 1).
    """
    check_mixture(mixture)
    return math.log(mixture) / (1.0 - mixture)


def at_least_float32(values: Tensor) -> Tensor:
    """Converts half precision to float32 for arithmetic; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def distillation_reward(logp: Tensor, logp_teacher: Tensor) -> Tensor:
    """Returns ``R = stop_gradient(log pi_T - log pi)`` per token, nats (paper, remark 3.1)."""
    return at_least_float32(logp_teacher.detach()) - at_least_float32(logp.detach())


def span_teacher_logp(
    logp_teacher: Tensor, logp_sampler: Tensor, logp: Tensor, spans: Tensor
) -> Tensor:
    """Returns teacher log-probs whose `distillation_reward` is that of each token's whole span.

    A teacher with another tokenizer scores spans of tokens. The reward of a span is its
    ``log pi_T - log pi``, the sums over its tokens on either side, and each token of the student
    has the whole of it: the span is the action, and sharing it out would divide the gradient. The
    teacher's sum belongs to its own tokenisation of the text, so that a span's reward is a
    difference of two lower bounds of the text's log-probs.

    Under the sampler's log-probs the reward is that of ``logp_teacher``. Here the current student's
    take their place, for all tokens of the span. A span of one token stays as it is, bit for bit.

    Args:
        logp_teacher: of each token: its span's reward plus ``logp_sampler``.
        logp_sampler: of the sampled tokens, under the policy that sampled.
        logp: the same under the current student; no gradient flows.
        spans: int64, number of each token's span, from 0; -1 for none.
    """
    moved = at_least_float32(logp.detach()) - at_least_float32(logp_sampler)
    inside = spans >= 0
    sums = moved.new_zeros(int(spans.max()) + 1 if inside.any() else 0)
    sums.index_add_(0, spans[inside], moved[inside])
    others = torch.zeros_like(moved)
    others[inside] = sums[spans[inside]] - moved[inside]
    return at_least_float32(logp_teacher.detach()) - others


def differentiable_reward(logp: Tensor, logp_teacher: Tensor) -> Tensor:
    """Returns ``R = log pi_T - log pi`` with its gradient in ``logp``: reverse KL, eq. 3."""
    return at_least_float32(logp_teacher.detach()) - at_least_float32(logp)


def skewed_reward(logp: Tensor, logp_teacher: Tensor, mixture: float) -> Tensor:
    """Returns ``log((m pi + (1 - m) pi_T) / pi)``, with its gradient in ``logp``.

    The mixture ``m`` is skew RKL's lambda (DistiLLM, Ko et al. 2024; paper, eq. 20). The result
    tends to the plain reward as ``m`` tends to 0 and to zero as it tends to 1, and is never below
    ``log(m)``.
    """
    student, teacher = at_least_float32(logp), at_least_float32(logp_teacher.detach())
    mixed = torch.logaddexp(student + math.log(mixture), teacher + math.log1p(-mixture))
    return mixed - student


def exploration_mask(reward: Tensor, loss_mask: Tensor, floor: float) -> Tensor:
    """Returns, as bool, the student's tokens whose unclipped reward is above the floor (eq. 9)."""
    return loss_mask.bool() & (reward > floor)


def entropy_threshold(entropy: Tensor, loss_mask: Tensor, top_share: float) -> float:
    """Returns the entropy from which on a token counts as uncertain: tau of eq. 10.

    It is the k-th largest entropy of the ``n`` loss tokens given, ``k = max(1, ceil(rho n))``.
    Pass the whole batch (all micro-batches and ranks), or the choice depends on the split.

    Args:
        entropy: of the policy that sampled the tokens, nats.
        loss_mask: true where the student sampled the token.
        top_share: the paper's rho, in (0, 1]; 1 keeps every token.

    Returns:
        The threshold; infinity if there is no loss token.

    Raises:
        ValueError: ``top_share`` is outside (0, 1].
    """
    check_top_share(top_share)
    values = entropy.detach().float()[loss_mask.bool()]
    if values.numel() == 0:
        return math.inf
    # The product is rounded first: 0.07 * 100 is 7.000000000000001, whose ceiling is 8.
    count = max(1, math.ceil(round(top_share * values.numel(), 9)))
    return float(torch.topk(values, count, sorted=True).values[-1])


def refinement_mask(entropy: Tensor, loss_mask: Tensor, threshold: float) -> Tensor:
    """Returns, as bool, the student's tokens with at least the threshold's entropy (eq. 10)."""
    return loss_mask.bool() & (entropy.detach().float() >= threshold)


def importance_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """Returns ``exp(log pi - log pi_old)``, with the gradient of ``logp``."""
    return torch.exp(at_least_float32(logp) - at_least_float32(logp_old.detach()))


def importance_weight(logp_old: Tensor, logp_sampler: Tensor, cap: float) -> Tensor:
    """Returns ``min(exp(log pi_old - log mu), cap)``: truncated importance sampling.

    It corrects for a sampler ``mu`` whose numbers differ from the trainer's (other kernels, another
    precision) although their weights are the same (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"; verl's ``rollout_is=token``). It is NaN where a
    log-prob is NaN or both are minus infinity.

    Args:
        logp_old: log-probs of the sampled tokens by the trainer, before the update.
        logp_sampler: the same by the sampler.
        cap: the largest weight.
    """
    return torch.exp(at_least_float32(logp_old) - at_least_float32(logp_sampler)).clamp(max=cap)


def scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """Returns ``values``, whose gradient is multiplied by ``scale`` (same shape, constant).

    So each token's term of a loss that is a sum over tokens is weighted, whatever the loss.
    """
    scaled: Tensor = _ScaleGradient.apply(values, scale.detach())  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def turns(loss_mask: Tensor) -> Tensor:
    """Returns the number of the turn at each token, int64, from 0: runs of the student's tokens.

    Args:
        loss_mask: (..., time) of whole trajectories; true where the student sampled the token.
            Other tokens get any number.
    """
    mask = loss_mask.bool()
    before = torch.cat([torch.zeros_like(mask[..., :1]), mask[..., :-1]], dim=-1)
    return (mask & ~before).long().cumsum(dim=-1) - 1


def episode_parts(episode: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of the part that each token is in, (tokens,), and the parts' first places.

    A part is a run of equal numbers; all are int64.
    """
    first = torch.ones_like(episode, dtype=torch.bool)
    first[1:] = episode[1:] != episode[:-1]
    return first.long().cumsum(dim=0) - 1, torch.nonzero(first)[:, 0]


def prefix_weights(gap: Tensor, episode: Tensor, gamma: float) -> Tensor:
    """Returns ``1 + gamma (1 - sum_{u<t} d_u / sum_u d_u)``: tokens count less the later the gap.

    It is IW-OPD's weight ("On the Position Bias of On-Policy Distillation", arXiv 2606.22600; TRL
    1.16, ``IWOPDTrainer``).

    Args:
        gap: d, (tokens,): ``|log pi_T - log pi_old|`` of the student's tokens in their order.
        episode: (tokens,) int64, equal within a trajectory.
        gamma: from 0 (no weights); the first token weighs ``1 + gamma``.
    """
    part, firsts = episode_parts(episode)
    gap64 = gap.double()  # sums over many episodes lose digits
    before = gap64.cumsum(dim=0) - gap64
    before = before - before[firsts][part]
    total = gap64.new_zeros(len(firsts)).index_add(0, part, gap64)[part]
    return (1 + gamma * (1 - before / total.clamp(min=1e-8))).to(gap.dtype)


def step_weights(gap: Tensor, episode: Tensor, turn: Tensor, delta: float) -> Tensor:
    """Returns ``min((d_1 + e) / (d_k + e), 1 + delta)`` for each token of turn k; e is 1e-6.

    ``d_k`` is the mean gap of the turn. It is SOD's weight, whose product of the ratios of
    neighbouring turns telescopes (arXiv 2605.07725, eq. 7; the authors'
    ``compute_stepwise_opd_weights``). The first turn weighs 1.

    Args:
        gap: ``|log pi_T - log pi_old|`` of the student's tokens in their order, (tokens,).
        episode: (tokens,) int64, equal within a trajectory.
        turn: (tokens,) int64, equal within a turn and different in the next.
        delta: how far the weight may exceed 1.
    """
    gap64 = gap.double()
    part, firsts = episode_parts(episode)
    step, starts = episode_parts(part * (turn.max() + 1) + turn if len(turn) else turn)
    sums = gap64.new_zeros(len(starts)).index_add(0, step, gap64)
    counts = gap64.new_zeros(len(starts)).index_add(0, step, torch.ones_like(gap64))
    mean = (sums / counts)[step] + 1e-6
    return (mean[firsts][part] / mean).clamp(max=1 + delta).to(gap.dtype)


def ppo_clipped(ratio: Tensor, reward: Tensor) -> Tensor:
    """Returns, as bool, the tokens that PPO would clip: ratio off 1 on the reward's side."""
    above = (ratio > 1 + PPO_CLIP) & (reward > 0)
    return above | ((ratio < 1 - PPO_CLIP) & (reward < 0))
