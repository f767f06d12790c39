"""The outcome beside the teacher: ``objective.outcome``, a setting of every objective.

``A_t = M_t Rhat_t + alpha O_t A`` is the advantage of a token: the objective's own reward where its
mask keeps the token, and the outcome of the episode compared with its group's. ``O`` is every token
that the student sampled, or those that the mask keeps. With ``rkl_sg``, which has no mask, this is
the advantage of MOPD (MiMo-V2-Flash, arXiv 2601.02780, eq. 9), and up to the common factor that of
KDRL (Xu et al. 2025, arXiv 2506.02208), whose beta is ``1 / alpha``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self, override

from reopold_agent.config import OutcomeConfig
from reopold_agent.errors import ConfigError
from reopold_agent.objectives.base import (
    DivergenceSettings,
    LossTerms,
    Needs,
    Objective,
    Outcomes,
    RunFacts,
    TokenBatch,
    required,
)
from reopold_agent.objectives.grpo import group_advantages, group_sums
from reopold_agent.objectives.pieces import at_least_float32, importance_ratio


def check_outcome(name: str, objective: Objective) -> None:
    """Refuses the outcome beside an objective that has no place for it.

    Args:
        name: of the objective, for messages.
        objective: the objective.

    Raises:
        ConfigError: it learns from outcomes already, or from tokens that the student did not draw.
    """
    if objective.needs & Needs.OUTCOME:
        raise ConfigError(
            f"objective={name} learns from outcomes already, so objective.outcome has no place "
            "beside it.\nLeave out objective.outcome, or choose an objective with a teacher."
        )
    if objective.needs & Needs.DEMONSTRATIONS:
        raise ConfigError(
            f"objective.outcome is for episodes of the student, and objective={name} learns from "
            "an expert's.\nLeave out objective.outcome, or choose an objective on the student's "
            "samples."
        )


@dataclass(frozen=True)
class WithOutcome(Objective):
    """An objective with the group's outcome added to its token rewards.

    ``loss = -sum_t ratio_t A_t / N``, where N is the number of tokens with either term. The
    objective may have any other term, such as a divergence of distributions: then the outcome's is
    a policy gradient beside it. It must be a mean over the tokens that it keeps.

    Attributes:
        objective: the objective.
        outcome: how the outcome counts.
    """

    objective: Objective
    outcome: OutcomeConfig

    @property
    def needs(self) -> Needs:
        """What the objective needs, and outcomes."""
        return self.objective.needs | Needs.OUTCOME

    @property
    @override
    def weighs_tokens(self) -> bool:
        return True  # the outcome's term, if not the objective's own

    @property
    @override
    def own(self) -> Objective:
        return self.objective.own

    @property
    @override
    def reference_path(self) -> str | None:
        return self.objective.reference_path

    @override
    def setting(self, name: str) -> object:
        holder = self.outcome if hasattr(self.outcome, name) else self.objective
        return getattr(holder, name, None)

    @property
    @override
    def max_rollout_rounds(self) -> int:
        return self.objective.max_rollout_rounds

    def for_run(self, facts: RunFacts) -> Self:
        """Fills in the objective's settings, and the last step of the outcome's schedule."""
        outcome = self.outcome
        if outcome.outcome_end is not None and outcome.outcome_until is None:
            last = max(facts.steps - 1, outcome.outcome_from)
            outcome = replace(outcome, outcome_until=last)
        return replace(self, objective=self.objective.for_run(facts), outcome=outcome)

    @override
    def phase(self, step: int) -> str:
        return self.objective.phase(step)

    @property
    @override
    def floor(self) -> float | None:
        return self.objective.floor

    @override
    def threshold(self, entropy: Tensor, loss_mask: Tensor) -> float | None:
        return self.objective.threshold(entropy, loss_mask)

    @property
    @override
    def divergence(self) -> DivergenceSettings:
        return self.objective.divergence

    @override
    def advantages(self, outcomes: Outcomes) -> Tensor:
        return group_advantages(
            at_least_float32(outcomes.reward),
            outcomes.group,
            normalise=self.outcome.outcome_normalise,
        )

    @override
    def taught(self, outcomes: Outcomes) -> Tensor | None:
        if self.outcome.outcome_mask == "none":
            return None
        success = required(outcomes.success, "success").bool()
        if self.outcome.outcome_mask == "group":
            return group_sums(success.float(), outcomes.group) == 0
        return ~success

    @override
    def informative(self, outcomes: Outcomes) -> Tensor:
        return self.objective.informative(outcomes)

    @override
    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        live_BT = batch.loss_mask
        advantage_BT = at_least_float32(required(batch.advantage, "advantage")).detach()
        if batch.taught is not None:
            live_BT = live_BT & batch.taught.bool()
        own = self.objective.terms(replace(batch, loss_mask=live_BT), step, threshold)
        if float(own.denominator) != float(own.mask.sum()):
            raise ConfigError(
                f"objective.outcome needs an objective that is a mean over its tokens, and "
                f"{type(self.objective).__name__} divides by something else.\nSet "
                "objective.outcome=0, or let its terms count the tokens of its mask."
            )
        acts_BT = own.mask if self.outcome.outcome_tokens == "kept" else batch.loss_mask
        gain_BT = self.outcome.alpha(step) * advantage_BT * acts_BT
        # Tokens are selected: a masked position may hold an infinity, whose gradient is NaN.
        ratio_K = importance_ratio(batch.logp[acts_BT], batch.logp_old[acts_BT])
        either_BT = own.mask | acts_BT
        return LossTerms(
            numerator=own.numerator - (ratio_K * gain_BT[acts_BT]).sum(),
            denominator=either_BT.sum(),
            reward=own.reward,
            clipped_reward=torch.where(own.mask, own.clipped_reward, 0.0) + gain_BT,
            mask=either_BT,
            ratio=own.ratio,
        )
