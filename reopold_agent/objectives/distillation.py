"""Distillation on the tokens that the student sampled: reverse KL and Reopold's additions.

There is one loss, `SampledDistillation.terms`. Subclasses switch on its parts: stop-gradient
(paper, ablation 1), reward floor (2), entropy mask (3), exploration before refinement (4). So
every ablation runs the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import Self, override

from reopold_agent.objectives.base import (
    LossTerms,
    Objective,
    RunFacts,
    TokenBatch,
    required,
)
from reopold_agent.objectives.pieces import (
    check_mixture,
    check_top_share,
    differentiable_reward,
    distillation_reward,
    entropy_threshold,
    exploration_mask,
    importance_ratio,
    refinement_mask,
    reward_floor,
    skewed_reward,
)


class SampledDistillation(Objective):
    """``loss = -sum(M * ratio * Rhat) / max(1, sum(M))`` over the tokens of a mini-batch.

    The sums run over all micro-batches (add their terms, then divide), so the loss does not depend
    on how a batch is split.
    """

    def reward(self, logp: Tensor, logp_teacher: Tensor) -> Tensor:
        """Returns R of each token, with a gradient only if the objective differentiates it."""
        return distillation_reward(logp, logp_teacher)

    def mask(self, batch: TokenBatch, reward: Tensor, step: int, threshold: float | None) -> Tensor:
        """Returns M, the tokens that the loss keeps, (batch, time) bool."""
        return batch.loss_mask

    def weights(self, batch: TokenBatch) -> Tensor | None:
        """Returns what each token's reward is multiplied by, (batch, time); None for nothing."""
        return None

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        teacher_BT = required(batch.logp_teacher, "logp_teacher")
        reward_BT = self.reward(batch.logp, teacher_BT).detach()
        clipped_BT = reward_BT
        if self.floor is not None:
            clipped_BT = reward_BT.clamp(min=self.floor)  # one-sided: high rewards stay
        mask_BT = self.mask(batch, reward_BT, step, threshold)
        weight_BT = self.weights(batch)
        # Tokens are selected, not multiplied by the mask: a masked position may hold an infinity
        # or NaN, and 0 * inf is NaN, in the gradient too.
        logp_K = batch.logp[mask_BT]
        ratio_K = importance_ratio(logp_K, batch.logp_old[mask_BT])
        reward_K = self.reward(logp_K, teacher_BT[mask_BT])
        if self.floor is not None:
            reward_K = reward_K.clamp(min=self.floor)
        if weight_BT is not None:
            clipped_BT = clipped_BT * weight_BT
            reward_K = reward_K * weight_BT[mask_BT]
        return LossTerms(
            numerator=-(ratio_K * reward_K).sum(),
            denominator=mask_BT.sum(),
            reward=reward_BT,
            clipped_reward=clipped_BT,
            mask=mask_BT,
            ratio=importance_ratio(batch.logp.detach(), batch.logp_old),
        )


@dataclass(frozen=True)
class ReverseKL(SampledDistillation):
    """``rkl``: reverse KL on sampled tokens (paper, eq. 3; Agarwal et al. 2024).

    The reward is not detached: its gradient, ``-grad log pi`` at every token, has expectation
    zero on policy and only adds variance (remark 3.1).
    """

    @override
    def reward(self, logp: Tensor, logp_teacher: Tensor) -> Tensor:
        return differentiable_reward(logp, logp_teacher)


@dataclass(frozen=True)
class ReverseKLStopGradient(SampledDistillation):
    """``rkl_sg``: `ReverseKL` with a detached reward, which is policy gradient (ablation 1;
    remark 3.1; Lu et al. 2025)."""


@dataclass(frozen=True)
class ClippedReverseKL(SampledDistillation):
    """``rkl_sg_clip``: `ReverseKLStopGradient` with the reward floor of eq. 7 (ablation 2).

    Attributes:
        mixture: the paper's lambda.
    """

    mixture: float = 0.1

    def __post_init__(self) -> None:
        check_mixture(self.mixture)

    @property
    @override
    def floor(self) -> float:
        return reward_floor(self.mixture)


@dataclass(frozen=True)
class EntropyMaskedReverseKL(ClippedReverseKL):
    """``rkl_sg_clip_entropy``: `ClippedReverseKL` on the most uncertain tokens only, from the first
    step on (eq. 10; ablation 3).

    Attributes:
        top_share: the paper's rho: the share of tokens that is kept.
    """

    top_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_share(self.top_share)

    def threshold(self, entropy: Tensor, loss_mask: Tensor) -> float:
        """Returns tau over all tokens given: call it once with the whole batch of a step."""
        return entropy_threshold(entropy, loss_mask, self.top_share)

    def mask(self, batch: TokenBatch, reward: Tensor, step: int, threshold: float | None) -> Tensor:
        """Returns M of eq. 10."""
        if threshold is None:
            raise ValueError("the entropy mask needs the batch's threshold; see `threshold`")
        return refinement_mask(batch.entropy, batch.loss_mask, threshold)


@dataclass(frozen=True)
class Reopold(EntropyMaskedReverseKL):
    """``reopold``: exploration, then refinement (paper, section 4, eq. 4 to 10; ablation 4).

    Steps before the switch keep every token whose reward is above the floor (eq. 9). Later steps
    keep the most uncertain tokens, with negative rewards down to the floor (eq. 10).

    Attributes:
        switch_share: the step of the switch as a share of the run's steps.
        switch_step: the step itself, the paper's T_switch; None takes ``switch_share``.
    """

    switch_share: float = 0.33
    switch_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.switch_share <= 1:
            raise ValueError(f"switch_share must lie in [0, 1], got {self.switch_share}")
        if self.switch_step is not None and self.switch_step < 0:
            raise ValueError(f"switch_step must be >= 0, got {self.switch_step}")

    def for_run(self, facts: RunFacts) -> Self:
        """Fills in ``switch_step``: ``switch_share`` of the steps, rounded half up."""
        if self.switch_step is not None:
            return self
        return replace(self, switch_step=int(self.switch_share * facts.steps + 0.5))

    def explores(self, step: int) -> bool:
        """Returns whether ``step`` (from 0) is before the switch.

        Raises:
            ValueError: no ``switch_step`` was given and `for_run` was not called.
        """
        if self.switch_step is None:
            raise ValueError("Reopold needs a switch_step; set it, or call for_run(facts)")
        return step < self.switch_step

    def phase(self, step: int) -> str:
        """Returns ``"exploration"`` or ``"refinement"``; steps count from 0."""
        return "exploration" if self.explores(step) else "refinement"

    def mask(self, batch: TokenBatch, reward: Tensor, step: int, threshold: float | None) -> Tensor:
        """Returns M of eq. 9 before the switch, of eq. 10 after it."""
        if self.explores(step):
            return exploration_mask(reward, batch.loss_mask, self.floor)
        return super().mask(batch, reward, step, threshold)


@dataclass(frozen=True)
class SkewReverseKL(SampledDistillation):
    """``skew_rkl``: the reward is the log-ratio of a mixture, ``log((m pi + (1 - m) pi_T) / pi)``
    (DistiLLM, Ko et al. 2024; paper, appendix A.2 and figure 12).

    Attributes:
        mixture: skew RKL's lambda, in (0, 1).
        stop_gradient: detach the reward, as in the paper's comparison. The gradient of the skewed
            divergence itself has one more term, ``-m pi / (m pi + (1 - m) pi_T)`` times
            ``grad log pi``, which does not vanish; false keeps it.
    """

    mixture: float = 0.1
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        check_mixture(self.mixture)

    @override
    def reward(self, logp: Tensor, logp_teacher: Tensor) -> Tensor:
        if self.stop_gradient:
            logp = logp.detach()
        return skewed_reward(logp, logp_teacher, self.mixture)
