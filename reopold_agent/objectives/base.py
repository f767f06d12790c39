"""What an engine hands to an objective, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto

import torch
from torch import Tensor
from typing_extensions import Self


class Needs(Flag):
    """What an objective learns from. The engine fetches no more than that."""

    TEACHER = auto()
    """The teacher's log-probs of the student's tokens: ``TokenBatch.logp_teacher``."""
    DISTRIBUTIONS = auto()
    """Student's and teacher's distributions at every token: ``TokenBatch.divergence``."""
    OUTCOME = auto()
    """The environment's reward, compared within groups: ``TokenBatch.advantage``."""
    DEMONSTRATIONS = auto()
    """Trajectories of an expert in place of the student's own."""


@dataclass(frozen=True)
class TokenBatch:
    """Per-token values of a (micro-)batch, each (batch, time), any float dtype.

    Only ``logp`` and ``divergence`` carry a gradient. ``loss_mask`` is turned into bool. What an
    objective does not need (`Needs`) may be None.

    Attributes:
        logp: current student's log-probs of the sampled tokens.
        logp_old: the same under the policy that sampled.
        logp_teacher: the same under the teacher.
        entropy: nats, of the policy that sampled.
        loss_mask: true where the student sampled the token.
        advantage: of the token's trajectory, the same at all its tokens.
        response_length: number of loss tokens of the token's trajectory.
        divergence: between the student's and the teacher's distribution of this token, nats.

    Raises:
        ValueError: the shapes differ.
    """

    logp: Tensor
    logp_old: Tensor
    logp_teacher: Tensor | None
    entropy: Tensor
    loss_mask: Tensor
    advantage: Tensor | None = None
    response_length: Tensor | None = None
    divergence: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.logp.shape
        for name, value in vars(self).items():
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, but logp has {tuple(shape)}; all "
                    "tensors are (batch, time)"
                )
        object.__setattr__(self, "loss_mask", self.loss_mask.bool())


@dataclass(frozen=True)
class LossTerms:
    """Sums that add up over micro-batches: the loss is ``numerator / max(1, denominator)``.

    ``numerator`` carries the gradient; ``denominator`` is a count (of tokens, or of
    trajectories). The (batch, time) tensors are detached and serve metrics only:
    ``reward`` is what the tokens were rewarded with, ``clipped_reward`` the same above its floor.
    """

    numerator: Tensor
    denominator: Tensor
    reward: Tensor
    clipped_reward: Tensor
    mask: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class DivergenceSettings:
    """Which divergence `Needs.DISTRIBUTIONS` asks for: ``beta`` of the generalised JSD, the
    teacher's ``top_k`` tokens or all, and whether all others count as one more outcome."""

    beta: float
    top_k: int | None = None
    rest: bool = True


@dataclass(frozen=True)
class Outcomes:
    """How the episodes of a step ended, each (episodes,).

    Attributes:
        reward: of the environment, float.
        group: int64; episodes of one task share a number.
        tool_calls: number of tool calls.
        tool_successes: number of those that worked.
        tokens: number of tokens the student sampled.
    """

    reward: Tensor
    group: Tensor
    tool_calls: Tensor
    tool_successes: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class RunFacts:
    """What an objective may want to know of its run: number of steps, response budget in tokens."""

    steps: int
    max_response_tokens: int


class Objective:
    """A loss on tokens. Subclasses are frozen dataclasses whose fields are the settings of
    ``objective=NAME``; everything here is pure: tensors in, tensors out.

    A subclass gives `terms`, and what differs from the defaults below.
    """

    @property
    def needs(self) -> Needs:
        """What the engine has to provide."""
        return Needs.TEACHER

    @property
    def roll_outs(self) -> int:
        """How often a step may roll out prompts, while `informative` leaves too many out."""
        return 1

    def for_run(self, facts: RunFacts) -> Self:
        """The objective with settings filled in that depend on the run."""
        return self

    def phase(self, step: int) -> str:
        """Name of the phase that ``step`` (from 0) belongs to."""
        return "training"

    @property
    def floor(self) -> float | None:
        """The least reward of a token, if there is one; for logs."""
        return None

    def threshold(self, entropy: Tensor, loss_mask: Tensor) -> float | None:
        """A number that needs the whole batch of a step; computed once and given to `terms`."""
        return None

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """(episodes,) float; asked for with `Needs.OUTCOME`."""
        raise NotImplementedError(f"{type(self).__name__} has no advantages")

    @property
    def divergence(self) -> DivergenceSettings:
        """Asked for with `Needs.DISTRIBUTIONS`."""
        raise NotImplementedError(f"{type(self).__name__} uses no divergence")

    def informative(self, outcomes: Outcomes) -> Tensor:
        """(episodes,) bool: which are worth an update."""
        return torch.ones_like(outcomes.group, dtype=torch.bool)

    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        """Numerator and denominator of the loss over one micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} has no terms")


def whole_loss(objective: Objective, batch: TokenBatch, step: int = 0) -> Tensor:
    """The scalar loss of one whole batch; the engines, which split it, add up `LossTerms`."""
    threshold = objective.threshold(batch.entropy, batch.loss_mask)
    terms = objective.terms(batch, step, threshold)
    return terms.numerator / terms.denominator.clamp(min=1)


def required(value: Tensor | None, name: str) -> Tensor:
    """A tensor of the batch that the objective cannot do without.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"this objective needs {name}, which the batch lacks")
    return value
