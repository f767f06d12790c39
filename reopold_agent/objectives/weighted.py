"""Distillation whose tokens count by how far student and teacher have drifted apart before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from reopold_agent.objectives.base import TokenBatch, required
from reopold_agent.objectives.distillation import ReverseKLStopGradient
from reopold_agent.objectives.pieces import at_least_float32, prefix_weights, step_weights


class DriftWeighted(ReverseKLStopGradient):
    """`ReverseKLStopGradient` with a weight per token from ``|log pi_T - log pi_old|``.

    The weights are constants, and the same for every mini-batch of a step.
    """

    def weights_of(self, gap_N: Tensor, episode_N: Tensor, turn_N: Tensor) -> Tensor:
        """Returns the weights of the student's tokens in their order, (tokens,)."""
        raise NotImplementedError(f"{type(self).__name__} has no weights")

    @override
    def weights(self, batch: TokenBatch) -> Tensor:
        live_BT = batch.loss_mask
        teacher, episode, turn = (
            required(getattr(batch, name), name)[live_BT]
            for name in ("logp_teacher", "episode", "turn")
        )
        gap_N = (at_least_float32(teacher) - at_least_float32(batch.logp_old[live_BT])).abs()
        weight_BT = torch.zeros(live_BT.shape, dtype=gap_N.dtype, device=gap_N.device)
        weight_BT[live_BT] = self.weights_of(gap_N.detach(), episode, turn)
        return weight_BT


@dataclass(frozen=True)
class IWOPD(DriftWeighted):
    """``iw_opd``: importance-weighted on-policy distillation, `prefix_weights`.

    Tokens after a prefix on which student and teacher agree count more ("On the Position Bias of
    On-Policy Distillation", arXiv 2606.22600; TRL 1.16's ``IWOPDTrainer``).

    Attributes:
        gamma: how much more the first token counts than one after the whole gap.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")

    @override
    def weights_of(self, gap_N: Tensor, episode_N: Tensor, turn_N: Tensor) -> Tensor:
        return prefix_weights(gap_N, episode_N, self.gamma)


@dataclass(frozen=True)
class SOD(DriftWeighted):
    """``sod``: step-wise on-policy distillation for tool agents, `step_weights`.

    A turn in which student and teacher are further apart than in the first counts less, since a
    wrong tool call leads where the teacher's advice is unreliable (Zhong et al. 2026, arXiv
    2605.07725). The authors add GRPO's advantage: ``objective.outcome=1``.

    Attributes:
        delta: how far the weight of a turn that agrees better may exceed 1.
    """

    delta: float = 0.2

    def __post_init__(self) -> None:
        if self.delta < 0:
            raise ValueError(f"delta must not be negative, got {self.delta}")

    @override
    def weights_of(self, gap_N: Tensor, episode_N: Tensor, turn_N: Tensor) -> Tensor:
        return step_weights(gap_N, episode_N, turn_N, self.delta)
