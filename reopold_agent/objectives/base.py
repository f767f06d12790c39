"""What an engine hands to an objective, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Per-token values of a (micro-)batch, each (batch, time), any float dtype.

    Only ``logp`` carries a gradient. ``loss_mask`` is turned into bool.

    Raises:
        ValueError: the shapes differ.
    """

    logp: Tensor
    logp_old: Tensor
    logp_teacher: Tensor
    entropy: Tensor
    loss_mask: Tensor

    def __post_init__(self) -> None:
        shape = self.logp.shape
        for name in ("logp_old", "logp_teacher", "entropy", "loss_mask"):
            other = getattr(self, name).shape
            if other != shape:
                raise ValueError(
                    f"{name} has shape {tuple(other)}, but logp has {tuple(shape)}; all five "
                    "tensors are (batch, time)"
                )
        object.__setattr__(self, "loss_mask", self.loss_mask.bool())


@dataclass(frozen=True)
class LossTerms:
    """Sums that add up over micro-batches: the loss is ``numerator / max(1, denominator)``.

    ``numerator`` carries the gradient; ``denominator`` is a count. The (batch, time) tensors are
    detached and serve metrics only.
    """

    numerator: Tensor
    denominator: Tensor
    reward: Tensor
    clipped_reward: Tensor
    mask: Tensor
    ratio: Tensor


class Objective(Protocol):
    """A loss on the student's own tokens. Implementations are pure: tensors in, tensors out."""

    def phase(self, step: int) -> str:
        """Name of the phase that ``step`` (from 0) belongs to."""
        ...

    def threshold(self, entropy: Tensor, loss_mask: Tensor) -> float:
        """A number that needs the whole batch of a step; computed once and given to `terms`."""
        ...

    def terms(self, batch: TokenBatch, step: int, threshold: float) -> LossTerms:
        """Numerator and denominator of the loss over one micro-batch."""
        ...
