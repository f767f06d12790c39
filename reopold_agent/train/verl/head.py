"""Log-probs and entropies of the student's tokens in place of logits.

verl's engine runs the whole model and expects logits of every token, which fill a GPU: 14 bytes per
logit with entropies, 87 GB for 41,000 tokens of Qwen's vocabulary. Here the output embedding is
multiplied only with the states before the student's own tokens, a chunk of the vocabulary or of
tokens at a time (`policies.logprobs`), as in the local engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reopold_agent.errors import ModelError
from reopold_agent.objectives.chunks import SLICE_ELEMENTS
from reopold_agent.policies.logprobs import token_logprobs


@dataclass(frozen=True)
class Wanted:
    """What `TokenHead` shall compute in the model's next forward pass.

    Attributes:
        states_N: places of the states that predict the targets, in the flattened batch, int64.
        targets_N: int64 token ids.
        entropy: also compute entropies.
    """

    states_N: Tensor
    targets_N: Tensor
    entropy: bool = False


class TokenHead:
    """Takes the place of a model's output embedding: its "logits" are log-probs and entropies.

    It must run within the model's forward pass, since FSDP gathers weights only for that. The
    module stays where it is, with its weight and its name in checkpoints.

    Args:
        projection: the output embedding, whose ``forward`` is replaced.
        banned: ids that have probability 0.
        slice_elements: most tokens x vocabulary held at once.

    Raises:
        ModelError: the output embedding has a bias.
    """

    def __init__(
        self,
        projection: nn.Module,
        banned: Sequence[int],
        *,
        slice_elements: int = SLICE_ELEMENTS,
    ) -> None:
        if getattr(projection, "bias", None) is not None:
            raise ModelError("models whose output embedding has a bias are not supported")
        self._projection: Any = projection
        self._banned = torch.tensor(sorted(banned), dtype=torch.int64)
        self._slice_elements = slice_elements
        self.wanted: Wanted | None = None
        self._projection.forward = self._forward

    def _forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns (2, N) float32: log-probs, which carry the gradient, and entropies or zeros."""
        wanted, self.wanted = self.wanted, None
        if wanted is None:
            raise RuntimeError("a forward pass began without saying whose log-probs it is for")
        self._banned = self._banned.to(hidden_BTD.device)
        logp_N, entropy_N = token_logprobs(
            hidden_BTD.flatten(0, 1)[wanted.states_N],
            self._projection.weight,
            wanted.targets_N,
            self._banned,
            with_entropy=wanted.entropy,
            slice_elements=self._slice_elements,
        )
        return torch.stack([logp_N, torch.zeros_like(logp_N) if entropy_N is None else entropy_N])


def before_tokens(ends: Sequence[int], masks: Sequence[Tensor]) -> Tensor:
    """Returns the places of the states that predict the tokens of masks.

    Args:
        ends: of each sequence the place after its last token, in the flattened batch.
        masks: of the response with which each sequence ends, (length,); nonzero at a token.

    Returns:
        (N,) int64; the predicted tokens are one place further.
    """
    pairs = zip(ends, masks, strict=True)
    return torch.cat([torch.nonzero(mask)[:, 0] + (end - len(mask) - 1) for end, mask in pairs])
