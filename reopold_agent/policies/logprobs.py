"""Log-probs and entropies of given tokens, without storing tokens x vocabulary in float32.

The last hidden states are multiplied by the output embedding for a slice of tokens at a time, and
only log-probs and entropies are kept. The backward pass recomputes the logits, only for tokens with
a nonzero gradient: one in five in Reopold's refinement phase. A CPU, where the product takes long,
keeps a few slices of them. (Peers that keep all logits: vllm #5907, trl #2215.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reopold_agent.objectives.chunks import (
    KEPT_SLICES,
    SLICE_ELEMENTS,
    backward_by_blocks,
    compute_dtype,
    make_logits,
    matrix_in,
)


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    banned: Tensor | None = None,
    *,
    with_entropy: bool = False,
    slice_elements: int = SLICE_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Computes log-probs of ``targets`` under ``softmax(hidden @ weight.T)``, and entropies.

    Args:
        hidden_ND: last hidden states at the positions that predict the targets, any float dtype.
        weight_VD: output embedding, any float dtype.
        targets: int64 token ids, (N,), or several per position, (N, K).
        banned: int64 ids that have probability 0 (forbidden or padded rows), or None.
        with_entropy: also return the entropy of the same distribution (nats, no gradient).
        slice_elements: most tokens x vocabulary held at once.

    Returns:
        ``(logp, entropy_N or None)``, float32; ``logp`` has the shape of ``targets`` and is
        differentiable in ``hidden_ND`` and ``weight_VD``.
    """
    apply: Any = _TokenLogprobs.apply
    targets_NK = targets if targets.dim() == 2 else targets[:, None]
    keeps = (
        hidden_ND.device.type == "cpu"
        and torch.is_grad_enabled()
        and hidden_ND.shape[0] * weight_VD.shape[0] <= KEPT_SLICES * slice_elements
    )
    logp, entropy = apply(
        hidden_ND, weight_VD, targets_NK, banned, with_entropy, keeps, slice_elements
    )
    return logp.reshape(targets.shape), entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        banned: Tensor | None,
        with_entropy: bool,
        keeps: bool,
        slice_elements: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden, weight)
        count = hidden.shape[0]
        rows = max(1, slice_elements // weight.shape[0])
        logp = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(normaliser)
        matrix = weight.to(dtype)
        kept: list[Tensor] = []
        room = None
        if dtype == torch.float32 or keeps:
            room = torch.empty(min(rows, count) * len(weight), device=hidden.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = make_logits(hidden[part].to(dtype), matrix, banned, None if keeps else room)
            # One exponential serves both: with x = logits - max, the normaliser is log sum e^x
            # and the entropy is that minus sum(x e^x) / sum(e^x).
            top = logits.amax(dim=-1, keepdim=True)
            if keeps and room is not None:
                kept.append(logits)
                logits = torch.sub(logits, top, out=matrix_in(room, *logits.shape))
            else:
                logits.sub_(top)
            chosen = logits.gather(1, targets[part])
            if with_entropy:
                weights = logits.exp()
                total = weights.sum(dim=-1)
                entropy[part] = total.log() - logits.mul_(weights).sum(dim=-1) / total
            else:
                weights = logits.exp_()
                total = weights.sum(dim=-1)
            logp[part] = chosen - total.log()[:, None]
            normaliser[part] = top[:, 0] + total.log()
            del logits, weights  # free them before the next slice is allocated
        ctx.save_for_backward(hidden, weight, targets, normaliser, *kept)
        ctx.banned, ctx.compute_dtype = banned, dtype
        ctx.slice_elements = slice_elements
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, *kept = ctx.saved_tensors
        live = torch.nonzero(grads[0].any(dim=1))[:, 0]
        grad_NK = grads[0][live].float()
        grad_N = grad_NK.sum(dim=1)
        targets_NK, normaliser_N = targets[live], normaliser[live]

        def logit_gradient(logits: Tensor, start: int, stop: int) -> Tensor:
            # d logp / d logits = onehot(target) - softmax
            logits.sub_(normaliser_N[:, None]).exp_().mul_(-grad_N[:, None])
            rows, which = torch.nonzero((targets_NK >= start) & (targets_NK < stop), as_tuple=True)
            places = (rows, targets_NK[rows, which] - start)
            return logits.index_put_(places, grad_NK[rows, which], accumulate=True)

        return *backward_by_blocks(ctx, hidden, weight, live, logit_gradient, kept), *(None,) * 5
