"""The Reopold objective: relaxed on-policy distillation (paper, section 4, eq. 4 to 10).

The loss is a policy gradient whose reward is the teacher's opinion of each token that the
student sampled. Nothing here reads an answer, a label or an environment's reward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reopold_agent.objectives.base import LossTerms, TokenBatch
from reopold_agent.objectives.pieces import (
    distillation_reward,
    entropy_threshold,
    exploration_mask,
    importance_ratio,
    refinement_mask,
    reward_floor,
)

PPO_CLIP = 0.2
"""The clip that PPO would apply; Reopold only reports how often it would have (figure 11)."""


@dataclass(frozen=True)
class Reopold:
    """Reopold as an objective of the engines.

    Attributes:
        mixture: the paper's lambda; sets the reward floor.
        top_share: the paper's rho; the share of tokens kept in the refinement phase.
        switch_step: steps below it explore, steps from it on refine (the paper's T_switch).
    """

    switch_step: int
    mixture: float = 0.1
    top_share: float = 0.2

    def __post_init__(self) -> None:
        reward_floor(self.mixture)
        if not 0.0 < self.top_share <= 1.0:
            raise ValueError(f"top_share must lie in (0, 1], got {self.top_share}")
        if self.switch_step < 0:
            raise ValueError(f"switch_step must be >= 0, got {self.switch_step}")

    def phase(self, step: int) -> str:
        """``"exploration"`` or ``"refinement"``; steps count from 0."""
        return "exploration" if step < self.switch_step else "refinement"

    def threshold(self, entropy: Tensor, loss_mask: Tensor) -> float:
        """Tau over everything given: call it once with the whole batch of a step."""
        return entropy_threshold(entropy, loss_mask, self.top_share)

    def terms(self, batch: TokenBatch, step: int, threshold: float) -> LossTerms:
        """Numerator and denominator of the loss over this micro-batch.

        ``loss = -sum(M * ratio * Rhat) / max(1, sum(M))``, both sums over the mini-batch: add the
        terms of its micro-batches, then divide. Splitting a batch therefore changes nothing.
        """
        floor = reward_floor(self.mixture)
        reward_BT = distillation_reward(batch.logp, batch.logp_teacher)
        clipped_BT = reward_BT.clamp(min=floor)  # one-sided: positive rewards are untouched
        if step < self.switch_step:
            mask_BT = exploration_mask(reward_BT, batch.loss_mask, floor)
        else:
            mask_BT = refinement_mask(batch.entropy, batch.loss_mask, threshold)
        # Selected, not multiplied by the mask: a masked position may hold an infinity or NaN, and
        # 0 * inf is NaN, in the gradient too.
        ratio_K = importance_ratio(batch.logp[mask_BT], batch.logp_old[mask_BT])
        return LossTerms(
            numerator=-(ratio_K * clipped_BT[mask_BT]).sum(),
            denominator=mask_BT.sum(),
            reward=reward_BT,
            clipped_reward=clipped_BT,
            mask=mask_BT,
            ratio=importance_ratio(batch.logp.detach(), batch.logp_old),
        )


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
    """The Reopold loss of one whole batch (paper, eq. 4 to 10).

    Args:
        logp: (batch, time), current student's log-probs of the sampled tokens; carries gradient.
        logp_old: the same under the policy that sampled; constant.
        logp_teacher: the teacher's log-probs of the same tokens; constant.
        entropy: nats, of the policy that sampled, over its full distribution; constant.
        loss_mask: non-zero where the student sampled the token.
        step: training step, from 0; ``step < switch_step`` is exploration.
        switch_step: the paper's T_switch.
        mixture: the paper's lambda, in (0, 1).
        top_share: the paper's rho, in (0, 1].

    Returns:
        The scalar loss and metrics as plain floats (see `summarise_terms`).

    Raises:
        ValueError: a setting is out of range, or the shapes differ.

    Any float dtype is accepted; arithmetic and loss are float32, or float64 if given that. The
    entropy threshold is taken over all tokens given here, so give the whole batch; the engines,
    which split it, use `Reopold`.
    """
    batch = TokenBatch(logp, logp_old, logp_teacher, entropy, loss_mask)
    objective = Reopold(switch_step=switch_step, mixture=mixture, top_share=top_share)
    threshold = objective.threshold(entropy, batch.loss_mask)
    terms = objective.terms(batch, step, threshold)
    loss = terms.numerator / terms.denominator.clamp(min=1)
    metrics = summarise_terms(terms, batch, floor=reward_floor(mixture))
    metrics["loss"] = float(loss.detach())
    metrics["entropy_threshold"] = threshold
    metrics["refinement"] = float(step >= switch_step)
    return loss, metrics


def summarise_terms(terms: LossTerms, batch: TokenBatch, floor: float) -> dict[str, float]:
    """What a step logs about its tokens; all plain floats, means over the loss tokens.

    ``share_below_floor`` counts ``R <= floor``; ``ppo_clip_share`` is the share of loss tokens
    whose PPO term a 0.2 clip would have cut (ratio beyond the clip on the side of its reward).
    """
    live = batch.loss_mask
    count = int(live.sum())
    if count == 0:
        return {"tokens": 0.0, "kept_tokens": 0.0}
    reward, clipped, ratio = terms.reward[live], terms.clipped_reward[live], terms.ratio[live]
    entropy = batch.entropy.detach().float()[live]
    cut = ((ratio > 1 + PPO_CLIP) & (clipped > 0)) | ((ratio < 1 - PPO_CLIP) & (clipped < 0))
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
        "ppo_clip_share": float(cut.float().mean()),
        "entropy_mean": float(entropy.mean()),
    }
