"""The interface between engines and objectives: token batches in, loss terms out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


class Needs(Flag):
    """The signals that an objective learns from. The engine computes no others."""

    TEACHER = auto()
    """The teacher's log-probs of the student's tokens: ``TokenBatch.logp_teacher``."""
    DISTRIBUTIONS = auto()
    """The student's and the teacher's distributions at every token: ``TokenBatch.divergence``."""
    OUTCOME = auto()
    """The environment's reward, compared within groups: ``TokenBatch.advantage``."""
    REFERENCE = auto()
    """The same log-probs under a further model: ``TokenBatch.logp_reference``."""
    DEMONSTRATIONS = auto()
    """An expert's trajectories instead of the student's own."""


@dataclass(frozen=True)
class TokenBatch:
    """Per-token values of a (micro-)batch, each (batch, time), any float dtype.

    Only ``logp`` and ``divergence`` carry a gradient. ``loss_mask`` is converted to bool. Values
    that the objective does not need may be None. The tokens of a trajectory are in their order and
    all there; engines may join trajectories to one row.

    Attributes:
        logp: log-probs of the sampled tokens under the current student.
        logp_old: the same under the policy that sampled the tokens.
        logp_teacher: the same under the teacher.
        entropy: of the policy that sampled the tokens, nats.
        loss_mask: true where the student sampled the token.
        advantage: of the token's trajectory; the same at all of its tokens.
        response_length: number of loss tokens in the token's trajectory.
        divergence: between the student's and the teacher's distribution at this token, nats.
        taught: false where the outcome leaves no place for the teacher
            (``objective.outcome_mask``); the same at all tokens of a trajectory. None: true.
        episode: number of the token's trajectory in the batch, int64.
        turn: number of the student's turn in its trajectory, int64; equal within a turn.
        logp_reference: log-probs of the sampled tokens under the reference model.

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
    taught: Tensor | None = None
    episode: Tensor | None = None
    turn: Tensor | None = None
    logp_reference: Tensor | None = None

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
    ``reward`` is each token's reward, ``clipped_reward`` the same raised to the floor.
    """

    numerator: Tensor
    denominator: Tensor
    reward: Tensor
    clipped_reward: Tensor
    mask: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class DivergenceSettings:
    """The divergence that `Needs.DISTRIBUTIONS` asks for.

    Attributes:
        beta: of the generalised JSD.
        top_k: compare only the teacher's k likeliest tokens; None for the whole vocabulary.
        rest: with ``top_k``, count all other tokens as one more outcome.
        min_entropy: the divergence is 0 where the teacher's distribution (over the whole
            vocabulary) has less entropy, nats; None for none.
    """

    beta: float
    top_k: int | None = None
    rest: bool = True
    min_entropy: float | None = None


@dataclass(frozen=True)
class Outcomes:
    """How the episodes of a step ended, each (episodes,).

    Attributes:
        reward: of the environment, float.
        group: int64; episodes of one task share a number.
        tool_calls: number of tool calls.
        tool_successes: number of tool calls that succeeded.
        tokens: number of tokens after the prompt, observations included, as the response budget
            counts them.
        success: whether the environment counts the episode as solved, bool.
    """

    reward: Tensor
    group: Tensor
    tool_calls: Tensor
    tool_successes: Tensor
    tokens: Tensor
    success: Tensor | None = None


@dataclass(frozen=True)
class RunFacts:
    """Facts about the run that settings may depend on: its steps and response budget in tokens."""

    steps: int
    max_response_tokens: int


class Objective:
    """A loss on tokens.

    Subclasses are frozen dataclasses whose fields are the settings of ``objective=NAME``. They
    define `terms` and override the defaults below where they differ. All methods are pure: tensors
    in, tensors out.
    """

    @property
    def needs(self) -> Needs:
        """The signals that the engine has to provide."""
        return Needs.TEACHER

    @property
    def weighs_tokens(self) -> bool:
        """Whether a token's term is an expectation over the student's draw of that token.

        Then importance weights apply to it (``objective.importance_cap``): the engine multiplies
        what the loss sends back through ``TokenBatch.logp`` by them. It is false for
        demonstrations, which the student did not draw, and for divergences, which sum over all
        tokens that it might have drawn.
        """
        return not self.needs & (Needs.DEMONSTRATIONS | Needs.DISTRIBUTIONS)

    @property
    def own(self) -> Objective:
        """The objective without what every objective may have beside it (``objective.outcome``)."""
        return self

    @property
    def reference_path(self) -> str | None:
        """The checkpoint of the reference model (`Needs.REFERENCE`); None: the starting student."""
        return None

    def setting(self, name: str) -> Any:
        """Returns a setting with what `for_run` filled in; None if the objective has none."""
        return getattr(self, name, None)

    @property
    def max_rollout_rounds(self) -> int:
        """How many times a step may roll out prompts to replace those that `informative` drops."""
        return 1

    def for_run(self, facts: RunFacts) -> Self:
        """Returns the objective with the settings that depend on the run filled in."""
        return self

    def phase(self, step: int) -> str:
        """Returns the name of the phase that ``step`` (from 0) belongs to."""
        return "training"

    @property
    def floor(self) -> float | None:
        """The lowest reward that a token can get, or None if there is no floor; for logs."""
        return None

    def threshold(self, entropy: Tensor, loss_mask: Tensor) -> float | None:
        """Returns a value over the whole batch of a step, computed once and passed to `terms`."""
        return None

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """Returns each episode's advantage, (episodes,) float; called with `Needs.OUTCOME`."""
        raise NotImplementedError(f"{type(self).__name__} has no advantages")

    def taught(self, outcomes: Outcomes) -> Tensor | None:
        """Returns (episodes,) bool: those with the teacher's term; None for all."""
        return None

    @property
    def divergence(self) -> DivergenceSettings:
        """The divergence to compute; read with `Needs.DISTRIBUTIONS`."""
        raise NotImplementedError(f"{type(self).__name__} uses no divergence")

    def informative(self, outcomes: Outcomes) -> Tensor:
        """Returns (episodes,) bool: the episodes that the update can learn from."""
        return torch.ones_like(outcomes.group, dtype=torch.bool)

    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        """Returns the loss's numerator and denominator over one micro-batch.

        Args:
            batch: its tokens.
            step: training step, from 0.
            threshold: what `threshold` returned for the whole batch of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no terms")


def whole_loss(objective: Objective, batch: TokenBatch, step: int = 0) -> Tensor:
    """Returns the scalar loss of one whole batch (engines split it and add up `LossTerms`)."""
    threshold = objective.threshold(batch.entropy, batch.loss_mask)
    terms = objective.terms(batch, step, threshold)
    return terms.numerator / terms.denominator.clamp(min=1)


def required(value: Tensor | None, name: str) -> Tensor:
    """Returns a tensor that the objective needs.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"this objective needs {name}, but the batch has none")
    return value
