"""GRPO: learning from the environment's reward, compared within each task's group of episodes.

Shao et al. 2024 (DeepSeekMath), with the switches of Dr.GRPO (Liu et al. 2025c) and DAPO (Yu et
al. 2025), and Pixel-Reasoner's curiosity reward (Su et al. 2025). There is no KL term against a
reference policy, as in both successors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self, override

from reopold_agent.errors import ConfigError
from reopold_agent.objectives.base import (
    LossTerms,
    Needs,
    Objective,
    Outcomes,
    RunFacts,
    TokenBatch,
    required,
)
from reopold_agent.objectives.pieces import at_least_float32, importance_ratio


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """Returns for each episode the sum of ``values`` over its group; all are (episodes,)."""
    _, place = torch.unique(group, return_inverse=True)
    totals = values.new_zeros(int(place.max()) + 1 if len(place) else 0)
    return totals.index_add(0, place, values)[place]


def group_advantages(reward: Tensor, group: Tensor, *, normalise: bool = True) -> Tensor:
    """Returns ``(r - mean) / (std + 1e-6)`` over the episodes of each task.

    Args:
        reward: (episodes,) float.
        group: (episodes,) int64.
        normalise: divide by the standard deviation (with n - 1 in its denominator, as in verl and
            TRL). False is Dr.GRPO, whose authors find that the division favours very easy and very
            hard questions.

    Returns:
        (episodes,) float; 0 for a group of one, which has nothing to compare with.
    """
    # In float64: eight rewards of 0.3 differ from their float32 mean by 3e-8, and dividing that
    # by 1e-6 would give an advantage of 0.03.
    exact = reward.double()
    count = group_sums(torch.ones_like(exact), group)
    advantage = exact - group_sums(exact, group) / count
    if normalise:
        variance = group_sums(advantage**2, group) / (count - 1).clamp(min=1)
        advantage = advantage / (variance.sqrt() + 1e-6)
    return advantage.to(at_least_float32(reward).dtype)


def curiosity_reward(
    outcomes: Outcomes, *, target: float, calls: int, bonus: float, penalty: float
) -> Tensor:
    """Returns Pixel-Reasoner's addition to the outcome: try tools, but do not overuse them.

    ``bonus * max(target - p, 0) * 1[n > 0] + penalty * min(calls - n, 0)``, where ``p`` is the
    share of the group with a successful tool call and ``n`` the episode's number of calls.

    Returns:
        (episodes,) float.
    """
    succeeded = (outcomes.tool_successes > 0).float()
    group_size = group_sums(torch.ones_like(succeeded), outcomes.group)
    share = group_sums(succeeded, outcomes.group) / group_size
    called = (outcomes.tool_calls > 0).float()
    minus_excess = (calls - outcomes.tool_calls.float()).clamp(max=0)
    return bonus * (target - share).clamp(min=0) * called + penalty * minus_excess


def overlong_penalty(tokens: Tensor, longest: int, buffer: int) -> Tensor:
    """Returns DAPO's soft penalty on long responses (its eq. 13), (episodes,) float in [-1, 0].

    It is 0 up to ``longest - buffer`` tokens and falls linearly to -1 at ``longest``.
    """
    over = tokens.float() - (longest - buffer)
    return -(over / buffer).clamp(min=0, max=1)


@dataclass(frozen=True)
class GRPO(Objective):
    """``grpo``: clipped policy gradient with group-normalised outcomes.

    ``loss = -sum_i w_i sum_t min(ratio A_i, clip(ratio) A_i) / N``; ``aggregate`` sets the weights
    w_i and N.

    Attributes:
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``. DAPO's "clip-higher" takes 0.2
            and 0.28.
        normalise: divide advantages by the group's standard deviation; false in Dr.GRPO.
        aggregate: ``sequence`` is the mean over responses of the mean over their tokens
            (GRPO); ``token`` the mean over all tokens (DAPO); ``budget`` the sum over tokens
            divided by the response budget and by the number of responses (Dr.GRPO).
        drop_equal_groups: drop groups whose rewards are all equal, and roll out further prompts
            to replace them (DAPO's dynamic sampling).
        rounds: with ``drop_equal_groups``, roll out at most this many times per step.
        overlong_buffer: number of tokens at the end of the budget over which a response loses up
            to 1 of its reward (DAPO); 0 for none.
        curiosity: weight of Pixel-Reasoner's curiosity bonus (its alpha, 0.5); 0 for none.
        curiosity_target: the bonus is paid while a smaller share of the group's episodes uses
            tools (its H).
        call_penalty: taken off the reward for each tool call beyond ``free_calls`` (its beta,
            0.05).
        free_calls: number of tool calls without penalty.
        token_budget: budget for ``aggregate=budget`` and ``overlong_buffer``; None takes the run's
            response budget.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalise: bool = True
    aggregate: str = "sequence"
    drop_equal_groups: bool = False
    rounds: int = 1
    overlong_buffer: int = 0
    curiosity: float = 0.0
    curiosity_target: float = 0.3
    call_penalty: float = 0.0
    free_calls: int = 1
    token_budget: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(
                f"clip_low must lie in (0, 1) and clip_high above 0, got {self.clip_low} and "
                f"{self.clip_high}"
            )
        if self.aggregate not in ("sequence", "token", "budget"):
            raise ValueError(f"aggregate must be sequence, token or budget, got '{self.aggregate}'")
        for name in ("overlong_buffer", "curiosity", "call_penalty", "free_calls"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.curiosity_target <= 1:
            raise ValueError(f"curiosity_target must lie in [0, 1], got {self.curiosity_target}")
        if self.rounds < 1 or (self.token_budget is not None and self.token_budget < 1):
            raise ValueError("rounds and token_budget must be at least 1")

    @property
    def needs(self) -> Needs:
        """Only outcomes; no teacher."""
        return Needs.OUTCOME

    @property
    @override
    def max_rollout_rounds(self) -> int:
        return self.rounds if self.drop_equal_groups else 1

    def for_run(self, facts: RunFacts) -> Self:
        """Fills in ``token_budget``.

        Raises:
            ConfigError: ``overlong_buffer`` is more than the whole budget.
        """
        budget = self.token_budget or facts.max_response_tokens
        if self.overlong_buffer > budget:
            raise ConfigError(
                f"objective.overlong_buffer={self.overlong_buffer} is more than the whole budget "
                f"of {budget} tokens (objective.token_budget, rollout.max_response_tokens)"
            )
        return replace(self, token_budget=budget)

    def shaped_reward(self, outcomes: Outcomes) -> Tensor:
        """Returns the environment's reward plus curiosity bonus, call and length penalty."""
        reward = at_least_float32(outcomes.reward)
        if self.curiosity or self.call_penalty:
            reward = reward + curiosity_reward(
                outcomes,
                target=self.curiosity_target,
                calls=self.free_calls,
                bonus=self.curiosity,
                penalty=self.call_penalty,
            )
        if self.overlong_buffer:
            budget = self._budget()
            reward = reward + overlong_penalty(outcomes.tokens, budget, self.overlong_buffer)
        return reward

    @override
    def advantages(self, outcomes: Outcomes) -> Tensor:
        reward = self.shaped_reward(outcomes)
        return group_advantages(reward, outcomes.group, normalise=self.normalise)

    def informative(self, outcomes: Outcomes) -> Tensor:
        """With ``drop_equal_groups``, keeps the groups whose outcomes differ.

        As in DAPO, the outcomes are compared before any shaping.
        """
        if not self.drop_equal_groups:
            return super().informative(outcomes)
        centred = group_advantages(outcomes.reward, outcomes.group, normalise=False)
        return group_sums(centred.abs(), outcomes.group) > 1e-6

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        mask_BT = batch.loss_mask
        advantage_BT = at_least_float32(required(batch.advantage, "advantage")).detach()
        ratio_K = importance_ratio(batch.logp[mask_BT], batch.logp_old[mask_BT])
        advantage_K = advantage_BT[mask_BT]
        clipped_K = ratio_K.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain_K = torch.minimum(ratio_K * advantage_K, clipped_K * advantage_K)
        if self.aggregate == "token":
            numerator, denominator = gain_K.sum(), mask_BT.sum()
        else:
            # Each token counts 1 / length of its response, so the sum is the number of responses.
            length_BT = required(batch.response_length, "response_length")
            share_K = 1 / at_least_float32(length_BT[mask_BT])
            denominator = share_K.sum()
            weight_K = share_K if self.aggregate == "sequence" else 1 / self._budget()
            numerator = (gain_K * weight_K).sum()
        return LossTerms(
            numerator=-numerator,
            denominator=denominator,
            reward=advantage_BT,
            clipped_reward=advantage_BT,
            mask=mask_BT,
            ratio=importance_ratio(batch.logp.detach(), batch.logp_old),
        )

    def _budget(self) -> int:
        if self.token_budget is None:
            raise ValueError("this objective needs a token_budget; set it, or call for_run(facts)")
        return self.token_budget
