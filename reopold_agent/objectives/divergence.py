"""The generalised Jensen-Shannon divergence between two next-token distributions (GKD).

``D_beta = beta KL(p_T || M) + (1 - beta) KL(p_S || M)`` with ``M = beta p_T + (1 - beta) p_S``;
``beta`` 0 is forward KL, ``KL(p_T || p_S)``, and 1 reverse KL, ``KL(p_S || p_T)``, which are the
limits of ``D / beta`` and ``D / (1 - beta)`` (Agarwal et al. 2024, eq. 1 and section 3; TRL's
``GKDTrainer.generalized_jsd_loss`` is the same). ``p_S`` is the student's, ``p_T`` the teacher's.

`divergence_of_states` never holds tokens x vocabulary: forward in slices of tokens, backward in
blocks of the vocabulary, as `reopold_agent.policies.logprobs` does for log-probs.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**25
"""Logits of one model held at once: 128 MiB as float32."""

BANNED = -1.0e30
"""Logit of a token that has probability 0. Finite, so that 0 x BANNED is 0 and not NaN."""


def check_beta(beta: float) -> None:
    """Raises ValueError unless ``beta`` lies in [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence from log-probs, summed over the last axis; differentiable in ``student``.

    Args:
        student, teacher: (..., vocabulary) log-probs in float32 or float64. They need not sum to
            one (top-k without its rest).
        beta: see the module.

    Returns:
        (...), nats.
    """
    check_beta(beta)
    if beta == 0.0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1.0:
        return (student.exp() * (student - teacher)).sum(-1)
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    forward = (teacher.exp() * (teacher - mixed)).sum(-1)
    backward = (student.exp() * (student - mixed)).sum(-1)
    return beta * forward + (1 - beta) * backward


def with_rest(logps: Tensor) -> Tensor:
    """Adds one more outcome to the last axis, "any other token", so that the whole is a
    distribution again. A divergence over coarser outcomes is never larger."""
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([logps, rest.log()], dim=-1)


def topk_divergence(student_NK: Tensor, teacher_NK: Tensor, beta: float, *, rest: bool) -> Tensor:
    """The divergence over the teacher's k likeliest tokens, (N,) nats.

    Args:
        student_NK, teacher_NK: log-probs, over the whole vocabulary, of those tokens.
        beta: see the module.
        rest: count all other tokens as one more outcome. Without it what is left is not a
            divergence: it may fall below zero (verl's ``forward_kl_topk`` is this with beta 0).
    """
    if rest:
        student_NK, teacher_NK = with_rest(student_NK), with_rest(teacher_NK)
    return generalised_jsd(student_NK, teacher_NK, beta)


def divergence_of_states(
    student_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_NE: Tensor,
    teacher_weight_VE: Tensor,
    targets_N: Tensor,
    beta: float,
    banned: Tensor | None = None,
    *,
    slice_elements: int = SLICE_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The divergence between ``softmax(hidden @ weight.T)`` of student and teacher.

    Args:
        student_ND, teacher_NE: last hidden states; the widths may differ.
        student_weight_VD, teacher_weight_VE: output embeddings over the same ids.
        targets_N: int64; their log-probs under the student come along.
        beta: see the module.
        banned: int64 ids that have probability 0 for both, or None.
        slice_elements: upper limit on one model's logits held at once.

    Returns:
        ``(divergence_N, logp_N)``, float32. The first is differentiable in ``student_ND`` and
        ``student_weight_VD``.

    Raises:
        ValueError: ``beta`` is out of range, or the vocabularies differ in width.
    """
    check_beta(beta)
    if student_weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(
            f"the student has {student_weight_VD.shape[0]} rows and the teacher "
            f"{teacher_weight_VE.shape[0]}; cut both to the ids that the tokenizer knows"
        )
    apply: Any = _Divergence.apply
    divergence, logp = apply(
        student_ND,
        student_weight_VD,
        teacher_NE.detach(),
        teacher_weight_VE.detach(),
        targets_N,
        beta,
        banned,
        slice_elements,
    )
    return divergence, logp


@torch.no_grad()
def top_tokens(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    count: int,
    banned: Tensor | None = None,
    *,
    slice_elements: int = SLICE_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens of each position: ids (N, K) int64, log-probs float32."""
    dtype = _compute_dtype(hidden_ND, weight_VD)
    matrix = weight_VD.to(dtype)
    ids, logps = [], []
    for part in torch.split(hidden_ND, max(1, slice_elements // weight_VD.shape[0])):
        logits = _logits(part.to(dtype), matrix, banned)
        values, places = logits.topk(count, dim=-1)
        logps.append(values - logits.logsumexp(dim=-1, keepdim=True))
        ids.append(places)
    return torch.cat(ids), torch.cat(logps)


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if banned is not None:
        logits.index_fill_(1, banned, BANNED)
    return logits


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _normalise(logits: Tensor) -> Tensor:
    """Turns logits into log-probs in place; returns what was taken off, (N,)."""
    top = logits.amax(dim=-1, keepdim=True)
    logits.sub_(top)
    # The exponentials would be one more array of this size, so they are made an eighth at a time.
    total = torch.cat([part.exp().sum(dim=-1) for part in logits.chunk(8)])
    logits.sub_(total.log()[:, None])
    return top[:, 0] + total.log()


def _odds(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """``u = log(beta p_T / ((1 - beta) p_S))``, written over the teacher's log-probs.

    ``log M = log p_S + log(1 - beta) + softplus(u)``, which needs no further array.
    """
    return teacher.sub_(student).add_(math.log(beta) - math.log1p(-beta))


def _softplus(values: Tensor) -> Tensor:
    return torch.logaddexp(values, values.new_zeros(()), out=values)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        beta: float,
        banned: Tensor | None,
        slice_elements: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(student, student_weight)
        count = student.shape[0]
        rows = max(1, slice_elements // student_weight.shape[0])
        divergence = torch.empty(count, dtype=torch.float32, device=student.device)
        logp, own_norm, his_norm, centre = (torch.empty_like(divergence) for _ in range(4))
        own_matrix, his_matrix = student_weight.to(dtype), teacher_weight.to(dtype)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            own = _logits(student[part].to(dtype), own_matrix, banned)
            his = _logits(teacher[part].to(dtype), his_matrix, banned)
            own_norm[part], his_norm[part] = _normalise(own), _normalise(his)
            logp[part] = own.gather(1, targets[part, None])[:, 0]
            divergence[part], centre[part] = _values(own, his, beta)
        ctx.save_for_backward(
            student, student_weight, teacher, teacher_weight, own_norm, his_norm, centre
        )
        ctx.beta, ctx.banned, ctx.compute_dtype = beta, banned, dtype
        ctx.slice_elements = slice_elements
        ctx.mark_non_differentiable(logp)
        return divergence, logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, weight, teacher, teacher_weight, own_norm, his_norm, centre = ctx.saved_tensors
        dtype, beta = ctx.compute_dtype, ctx.beta
        live = torch.nonzero(grads[0])[:, 0]
        own_states, his_states = student[live].to(dtype), teacher[live].to(dtype)
        grad_N = grads[0][live].float()
        grad_states = torch.zeros(own_states.shape, dtype=torch.float32, device=student.device)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # By blocks of the vocabulary: each row of the weight's gradient is written once.
        block = max(1, ctx.slice_elements // max(1, len(live), weight.shape[1]))
        for start in range(0, weight.shape[0] if len(live) else 0, block):
            matrix = weight[start : start + block].to(dtype)
            stop = start + matrix.shape[0]
            own = _logits(own_states, matrix, None).sub_(own_norm[live][:, None])
            his_matrix = teacher_weight[start:stop].to(dtype)
            his = _logits(his_states, his_matrix, None).sub_(his_norm[live][:, None])
            slope = _slopes(own, his, beta, centre[live]).mul_(grad_N[:, None])
            if ctx.banned is not None:
                inside = ctx.banned[(ctx.banned >= start) & (ctx.banned < stop)]
                slope.index_fill_(1, inside - start, 0.0)
            slope = slope.to(dtype)
            grad_states += slope @ matrix
            if grad_weight is not None:
                grad_weight[start:stop] = (slope.T @ own_states).to(weight.dtype)
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(student)
            grad_hidden[live] = grad_states.to(student.dtype)
        nothing = (None,) * 6
        return cast("tuple[Tensor | None, ...]", (grad_hidden, grad_weight, *nothing))


def _values(own: Tensor, his: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence, and the mean under the student that the slopes need; overwrites both."""
    if beta == 0.0:
        own.sub_(his).neg_()  # log p_T - log p_S
        divergence = torch.linalg.vecdot(his.exp_(), own)
        return divergence, torch.zeros_like(divergence)
    if beta == 1.0:
        his.sub_(own).neg_()  # log p_S - log p_T
        divergence = torch.linalg.vecdot(own.exp_(), his)
        return divergence, divergence
    less = math.log1p(-beta)
    his_p = his.exp()
    odds = _odds(his, own, beta)
    # KL(p_T || M) = sum p_T (u - softplus(u)) - log(beta); KL(p_S || M) = -less - sum p_S softplus
    forward = torch.linalg.vecdot(his_p, odds) - math.log(beta)
    soft = _softplus(odds)
    forward = forward - torch.linalg.vecdot(his_p, soft)
    backward = -less - torch.linalg.vecdot(own.exp_(), soft)
    return beta * forward + (1 - beta) * backward, (1 - beta) * backward


def _slopes(own: Tensor, his: Tensor, beta: float, centre: Tensor) -> Tensor:
    """d divergence / d student's logits for a block of the vocabulary; overwrites both.

    With ``h`` the derivative by the student's probability (up to a constant) it is
    ``p_S (h - sum p_S h)``; ``centre`` is that sum over the whole vocabulary.
    """
    if beta == 0.0:
        return own.exp_().sub_(his.exp_())
    if beta == 1.0:
        his.sub_(own).neg_().sub_(centre[:, None])
        return own.exp_().mul_(his)
    soft = _softplus(_odds(his, own, beta))
    # h = (1 - beta) (log p_S - log M) = -(1 - beta) (log(1 - beta) + soft)
    soft.add_(math.log1p(-beta)).mul_(-(1 - beta)).sub_(centre[:, None])
    return own.exp_().mul_(soft)
