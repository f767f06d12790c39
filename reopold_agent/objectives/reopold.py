"""The Reopold loss as one function, with metrics of its tokens.

The loss is a policy gradient whose reward is the teacher's log-ratio at each token that the
student sampled. It uses no answer, label or environment reward.
"""

from __future__ import annotations

from torch import Tensor

from reopold_agent.objectives.base import LossTerms, TokenBatch
from reopold_agent.objectives.distillation import Reopold
from reopold_agent.objectives.pieces import ppo_clipped


def reopold_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_teacher: Tensor,
    entropy: Tensor,
    loss_mask: Tensor,
    *,
    step: int,
    switch_step: int,
    mixture: float = 0.1,
    top_share: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """Computes the Reopold loss of one whole batch (paper, eq. 4 to 10).

    Any float dtype is accepted; arithmetic and loss are float32, or float64 for float64 inputs.
    The entropy threshold is taken over all tokens given here, so pass the whole batch. Engines,
    which split a batch, use `Reopold`.

    Args:
        logp: (batch, time), log-probs of the sampled tokens under the current student, with
            gradient.
        logp_old: the same under the policy that sampled the tokens; constant.
        logp_teacher: the same under the teacher; constant.
        entropy: of the full distribution of the policy that sampled the tokens, nats; constant.
        loss_mask: non-zero where the student sampled the token.
        step: training step, from 0; ``step < switch_step`` is exploration.
        switch_step: the paper's T_switch.
        mixture: the paper's lambda, in (0, 1).
        top_share: the paper's rho, in (0, 1].

    Returns:
        The scalar loss, and metrics as plain floats (see `summarise_terms`).

    Raises:
        ValueError: a setting is out of range, or the shapes differ.
    """
    batch = TokenBatch(logp, logp_old, logp_teacher, entropy, loss_mask)
    objective = Reopold(switch_step=switch_step, mixture=mixture, top_share=top_share)
    threshold = objective.threshold(entropy, batch.loss_mask)
    terms = objective.terms(batch, step, threshold)
    loss = terms.numerator / terms.denominator.clamp(min=1)
    metrics = summarise_terms(terms, batch, floor=objective.floor)
    metrics["loss"] = float(loss.detach())
    metrics["entropy_threshold"] = threshold
    metrics["refinement"] = float(step >= switch_step)
    return loss, metrics


def summarise_terms(terms: LossTerms, batch: TokenBatch, floor: float) -> dict[str, float]:
    """Returns metrics of a batch as plain floats; means are over the loss tokens.

    ``share_below_floor`` is the share with ``R <= floor``, ``ppo_clip_share`` the share whose term
    PPO would have clipped (`ppo_clipped`).
    """
    live = batch.loss_mask
    count = int(live.sum())
    if count == 0:
        return {"tokens": 0.0, "kept_tokens": 0.0}
    reward, clipped, ratio = terms.reward[live], terms.clipped_reward[live], terms.ratio[live]
    entropy = batch.entropy.detach().float()[live]
    return {
        "tokens": float(count),
        "kept_tokens": float(terms.mask.sum()),
        "kept_share": float(terms.mask.sum()) / count,
        "reward_mean": float(reward.mean()),
        "reward_min": float(reward.min()),
        "reward_max": float(reward.max()),
        "clipped_reward_mean": float(clipped.mean()),
        "share_below_floor": float((reward <= floor).float().mean()),
        "ratio_mean": float(ratio.mean()),
        "ratio_max": float(ratio.max()),
        "ppo_clip_share": float(ppo_clipped(ratio, clipped).float().mean()),
        "entropy_mean": float(entropy.mean()),
    }
