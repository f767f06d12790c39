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

from reopold_agent.objectives.chunks import (
    SLICE_ELEMENTS,
    at_rows,
    banned_inside,
    compute_dtype,
    make_logits,
    some_rows,
    vocabulary_block,
)

PIECES = 8
"""Arrays that would be one more of a slice's size are made this many times smaller, in a place
that is allocated once: taken afresh for each part, they split the C library's heap."""


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
    """The ``count`` likeliest tokens of each position: ids (N, K) int64, log-probs float32.

    K is ``count``, or the number of ids that are not banned if those are fewer.
    """
    dtype = compute_dtype(hidden_ND, weight_VD)
    matrix = weight_VD.to(dtype)
    count = min(count, weight_VD.shape[0] - (0 if banned is None else len(banned)))
    ids, logps = [], []
    for part in torch.split(hidden_ND, max(1, slice_elements // weight_VD.shape[0])):
        logits = make_logits(part.to(dtype), matrix, banned)
        values, places = logits.topk(count, dim=-1)
        logps.append(values - logits.logsumexp(dim=-1, keepdim=True))
        ids.append(places)
    return torch.cat(ids), torch.cat(logps)


def _normalise(logits: Tensor, scratch: Tensor) -> Tensor:
    """Turns logits into log-probs in place; returns what was taken off, (N,)."""
    top = logits.amax(dim=-1, keepdim=True)
    logits.sub_(top)
    total = torch.empty_like(top)
    rows = len(scratch)
    for piece, out in zip(torch.split(logits, rows), torch.split(total, rows), strict=True):
        torch.sum(torch.exp(piece, out=scratch[: len(piece)]), dim=-1, keepdim=True, out=out)
    total.log_()
    logits.sub_(total)
    return (top + total)[:, 0]


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
        dtype = compute_dtype(student, student_weight)
        count = student.shape[0]
        rows = max(1, slice_elements // student_weight.shape[0])
        divergence = torch.empty(count, dtype=torch.float32, device=student.device)
        logp, own_norm, his_norm, centre = (torch.empty_like(divergence) for _ in range(4))
        own_matrix, his_matrix = student_weight.to(dtype), teacher_weight.to(dtype)
        shape = (2, max(1, min(rows, count) // PIECES), student_weight.shape[0])
        scratch = torch.empty(shape, dtype=torch.float32, device=student.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            own = make_logits(student[part].to(dtype), own_matrix, banned)
            his = make_logits(teacher[part].to(dtype), his_matrix, banned)
            own_norm[part], his_norm[part] = (_normalise(x, scratch[0]) for x in (own, his))
            logp[part] = own.gather(1, targets[part, None])[:, 0]
            _values(own, his, beta, scratch, divergence[part], centre[part])
            del own, his  # or the next two would stand beside them
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
        own_states = some_rows(student, live).to(dtype)
        his_states = some_rows(teacher, live).to(dtype)
        own_norm, his_norm, centre = own_norm[live], his_norm[live], centre[live]
        grad_N = grads[0][live].float()
        grad_states = torch.zeros(own_states.shape, dtype=torch.float32, device=student.device)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # By blocks of the vocabulary: each row of the weight's gradient is written once.
        block = vocabulary_block(ctx.slice_elements, len(live), weight.shape[1])
        for start in range(0, weight.shape[0] if len(live) else 0, block):
            matrix = weight[start : start + block].to(dtype)
            stop = start + matrix.shape[0]
            own = make_logits(own_states, matrix, None).sub_(own_norm[:, None])
            his_matrix = teacher_weight[start:stop].to(dtype)
            his = make_logits(his_states, his_matrix, None).sub_(his_norm[:, None])
            slope = _slopes(own, his, beta, centre).mul_(grad_N[:, None])
            if ctx.banned is not None:
                slope.index_fill_(1, banned_inside(ctx.banned, start, stop), 0.0)
            del own, his  # what follows fits in the place of the second
            slope = slope.to(dtype)
            grad_states += slope @ matrix
            if grad_weight is not None:
                grad_weight[start:stop] = (slope.T @ own_states).to(weight.dtype)
            del slope
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = at_rows(grad_states, live, len(student), student.dtype)
        nothing = (None,) * 6
        return cast("tuple[Tensor | None, ...]", (grad_hidden, grad_weight, *nothing))


def _values(
    own: Tensor, his: Tensor, beta: float, scratch: Tensor, divergence: Tensor, centre: Tensor
) -> None:
    """Fills in the divergence, and the mean under the student that the slopes need; overwrites
    all others.

    The sums are not made by ``linalg.vecdot``: autocast would turn it into bfloat16.
    """
    if beta == 0.0:
        own.sub_(his).neg_()  # log p_T - log p_S
        torch.sum(his.exp_().mul_(own), dim=-1, out=divergence)
        centre.zero_()
        return
    if beta == 1.0:
        his.sub_(own).neg_()  # log p_S - log p_T
        torch.sum(own.exp_().mul_(his), dim=-1, out=divergence)
        centre.copy_(divergence)
        return
    rows, less = scratch.shape[1], math.log1p(-beta)
    for start in range(0, len(own), rows):
        part = slice(start, min(start + rows, len(own)))
        one, two = scratch[:, : part.stop - start]
        his_p = torch.exp(his[part], out=one)
        odds = _odds(his[part], own[part], beta)
        # KL(p_T || M) = sum p_T (u - softplus(u)) - log(beta)
        forward = torch.mul(his_p, odds, out=two).sum(dim=-1) - math.log(beta)
        soft = _softplus(odds)
        forward -= his_p.mul_(soft).sum(dim=-1)
        # KL(p_S || M) = - log(1 - beta) - sum p_S softplus(u)
        backward = -less - own[part].exp_().mul_(soft).sum(dim=-1)
        centre[part] = (1 - beta) * backward
        divergence[part] = beta * forward + centre[part]


def _slopes(own: Tensor, his: Tensor, beta: float, centre: Tensor) -> Tensor:
    """d divergence / d student's logits for a block of the vocabulary, in ``own``'s place;
    overwrites both.

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
