"""Parts of computations on logits a chunk at a time, for `divergence` and `policies.logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**25
"""How many logits of one model are held at once: 128 MiB as float32. More was not faster."""

KEPT_SLICES = 4
"""Most slices of logits that a CPU keeps for the backward pass."""

BANNED = -1.0e30
"""Logit of a token that has probability 0. Finite, so that 0 x BANNED is 0 and not NaN."""


def make_logits(
    hidden_ND: Tensor, weight_VD: Tensor, banned: Tensor | None, room: Tensor | None = None
) -> Tensor:
    """Returns ``hidden @ weight.T`` as float32, with `BANNED` at the ids in ``banned``.

    Args:
        hidden_ND, weight_VD, banned: as of `policies.logprobs.token_logprobs`.
        room: a vector with enough elements, which the logits overwrite if all are float32: memory
            that was used before is filled faster than fresh memory.
    """
    if room is None:
        logits = (hidden_ND @ weight_VD.T).float()
    else:
        logits = matrix_in(room, len(hidden_ND), len(weight_VD))
        torch.mm(hidden_ND, weight_VD.T, out=logits)
    if banned is not None:
        logits.index_fill_(1, banned, BANNED)
    return logits


def matrix_in(room: Tensor, rows: int, columns: int) -> Tensor:
    """Returns a matrix of the first elements of a vector."""
    return room[: rows * columns].view(rows, columns)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype for their product: autocast's where it is on, else the weight's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def backward_by_blocks(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    live: Tensor,
    logit_gradient: Callable[[Tensor, int, int], Tensor],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """Computes the gradients of hidden states and output embedding, a block of ids at a time.

    By blocks of the vocabulary, not of tokens: each row of the weight's gradient, the largest
    tensor here, is then written once.

    Args:
        ctx: of an autograd function whose first two inputs are ``hidden`` and ``weight``, with
            ``banned``, ``compute_dtype`` and ``slice_elements``.
        hidden: (N, D).
        weight: (V, D).
        live: sorted positions of the tokens that have a gradient; no others are computed.
        logit_gradient: turns the live tokens' logits for a block of ids (float32, to be
            overwritten; first id; id after the last) into their gradient.
        kept: the logits of all tokens, in slices of tokens; without them they are computed again.

    Returns:
        The gradients of ``hidden`` and ``weight``, each None where autograd needs none.
    """
    states = take_rows(hidden, live).to(ctx.compute_dtype)
    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
    # Bounds the logits, and the block's gradient, which is held beside the whole weight's.
    block = max(1, ctx.slice_elements // max(1, len(live), weight.shape[1]))
    room = None
    if kept or states.dtype == torch.float32:
        room = torch.empty(len(live) * min(block, len(weight)), device=hidden.device)
    ends = list(accumulate(len(each) for each in kept))
    kept = [
        take_rows(each, live[(live >= end - len(each)) & (live < end)] - (end - len(each)))
        for each, end in zip(kept, ends, strict=True)
    ]
    for start in range(0, weight.shape[0] if len(live) else 0, block):
        matrix = weight[start : start + block].to(ctx.compute_dtype)
        stop = start + matrix.shape[0]
        if kept and room is not None:
            logits = matrix_in(room, len(live), len(matrix))
            torch.cat([each[:, start:stop] for each in kept], out=logits)
        else:
            logits = make_logits(states, matrix, None, room)
        grad_logits = logit_gradient(logits, start, stop)
        if ctx.banned is not None:
            inside = ctx.banned[(ctx.banned >= start) & (ctx.banned < stop)] - start
            grad_logits.index_fill_(1, inside, 0.0)
        grad_logits = grad_logits.to(ctx.compute_dtype)
        grad_states += grad_logits @ matrix
        if grad_weight is not None:
            into = grad_weight[start:stop]
            if into.dtype == grad_logits.dtype:
                torch.mm(grad_logits.T, states, out=into)
            else:
                into.copy_(grad_logits.T @ states)
        del grad_logits  # or the next block would be held beside it
    if not ctx.needs_input_grad[0]:
        return None, grad_weight
    if len(live) == len(hidden):
        return grad_states.to(hidden.dtype), grad_weight
    grad_hidden = torch.zeros_like(hidden)
    return grad_hidden.index_copy_(0, live, grad_states.to(hidden.dtype)), grad_weight


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Returns ``values[rows]`` for sorted rows, without a copy if these are all rows."""
    return values if len(rows) == len(values) else values[rows]
