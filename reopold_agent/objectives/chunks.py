"""Logits a chunk at a time: what `divergence` and `reopold_agent.policies.logprobs` share."""

from __future__ import annotations

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**25
"""Logits of one model held at once: 128 MiB as float32. Larger slices were not faster."""

BANNED = -1.0e30
"""Logit of a token that has probability 0. Finite, so that 0 x BANNED is 0 and not NaN."""


def make_logits(hidden_ND: Tensor, weight_VD: Tensor, banned: Tensor | None) -> Tensor:
    """``hidden @ weight.T`` as float32, with `BANNED` at the ids in ``banned``."""
    logits = (hidden_ND @ weight_VD.T).float()
    if banned is not None:
        logits.index_fill_(1, banned, BANNED)
    return logits


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """In which dtype the two are multiplied: autocast's where it is on, else the weight's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def vocabulary_block(slice_elements: int, tokens: int, width: int) -> int:
    """Number of ids that a backward pass handles at once.

    It bounds the logits of ``tokens`` rows, and the block's own gradient, which stands beside the
    whole one.
    """
    return max(1, slice_elements // max(1, tokens, width))


def banned_inside(banned: Tensor, start: int, stop: int) -> Tensor:
    """Places of the banned ids within the block from ``start`` to ``stop``."""
    return banned[(banned >= start) & (banned < stop)] - start


def some_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]`` for rows in order, without a copy where that is all of them."""
    return values if len(rows) == len(values) else values[rows]


def at_rows(values: Tensor, rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The other way round: ``count`` rows of zeros but for these."""
    if len(rows) == count:
        return values.to(dtype)
    return values.new_zeros((count, values.shape[1]), dtype=dtype).index_copy_(
        0, rows, values.to(dtype)
    )
