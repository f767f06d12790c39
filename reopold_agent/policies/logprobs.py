"""Log-prob and entropy of given tokens without ever holding tokens x vocabulary in float32.

The last hidden states are multiplied by the output embedding a slice of tokens at a time; only
``log pi`` and the entropy leave a slice. The backward pass makes the slices again, and only for
tokens whose gradient is not zero: in Reopold's refinement phase that is one token in five.
(Peers that keep the logits: vllm #5907, trl #2215.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**25
"""Logits held at once: 128 MiB as float32. Larger slices were not faster on CPU or GPU."""

BANNED = -1.0e30
"""Logit of a token that cannot be sampled. Finite, so that 0 x BANNED is 0 and not NaN."""


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    banned: Tensor | None = None,
    *,
    with_entropy: bool = False,
    slice_elements: int = SLICE_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``targets_N`` under ``softmax(hidden @ weight.T)`` and, if asked, entropies.

    Args:
        hidden_ND: last hidden states at the positions that predict the targets, any float dtype.
        weight_VD: output embedding; its gradient is accumulated in float32.
        targets_N: int64 token ids.
        banned: int64 ids that have probability 0 (forbidden or padded rows), or None.
        with_entropy: also return the entropy of the same distribution (nats, no gradient).
        slice_elements: upper limit on tokens x vocabulary held at once.

    Returns:
        ``(logp_N, entropy_N or None)``, float32. ``logp_N`` is differentiable in ``hidden_ND``
        and ``weight_VD``.
    """
    apply: Any = _TokenLogprobs.apply
    logp, entropy = apply(hidden_ND, weight_VD, targets_N, banned, with_entropy, slice_elements)
    return logp, entropy if with_entropy else None


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if banned is not None:
        logits.index_fill_(1, banned, BANNED)
    return logits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        banned: Tensor | None,
        with_entropy: bool,
        slice_elements: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            compute_dtype = torch.get_autocast_dtype(device)
        else:
            compute_dtype = weight.dtype
        count = hidden.shape[0]
        rows = max(1, slice_elements // weight.shape[0])
        logp = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logp)
        entropy = torch.zeros_like(logp)
        matrix = weight.to(compute_dtype)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = _logits(hidden[part].to(compute_dtype), matrix, banned)
            # One exponential for everything: with x = logits - max, the normaliser is log sum e^x
            # and the entropy is that minus sum(x e^x) / sum(e^x).
            top = logits.amax(dim=-1, keepdim=True)
            logits.sub_(top)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            if with_entropy:
                weights = logits.exp()
                total = weights.sum(dim=-1)
                entropy[part] = total.log() - weights.mul_(logits).sum(dim=-1) / total
            else:
                total = logits.exp_().sum(dim=-1)
            logp[part] = chosen - total.log()
            normaliser[part] = top[:, 0] + total.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.banned, ctx.rows, ctx.compute_dtype = banned, rows, compute_dtype
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logp = grads[0]
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        matrix = weight.to(ctx.compute_dtype)
        live = torch.nonzero(grad_logp)[:, 0]
        for start in range(0, live.shape[0], ctx.rows):
            rows = live[start : start + ctx.rows]
            part = hidden[rows].to(ctx.compute_dtype)
            # d logp / d logits = onehot(target) - softmax
            grad_logits = _logits(part, matrix, ctx.banned)
            grad_logits.sub_(normaliser[rows, None]).exp_().mul_(-grad_logp[rows, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad_logp[rows, None].float())
            grad_logits = grad_logits.to(ctx.compute_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ matrix).to(hidden.dtype)
            if grad_weight is not None:
                if ctx.compute_dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, part)
                else:
                    grad_weight += grad_logits.T @ part
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return cast("tuple[Tensor | None, ...]", (grad_hidden, grad_weight, None, None, None, None))
