"""The generalised Jensen-Shannon divergence between two next-token distributions (GKD).

``D_beta = beta KL(p_T || M) + (1 - beta) KL(p_S || M)`` with ``M = beta p_T + (1 - beta) p_S``;
``beta`` 0 is forward KL, ``KL(p_T || p_S)``, and 1 reverse KL, ``KL(p_S || p_T)``, which are the
limits of ``D / beta`` and ``D / (1 - beta)`` (Agarwal et al. 2024, eq. 1 and section 3; TRL's
``GKDTrainer.generalized_jsd_loss`` is the same). ``p_S`` is the student's, ``p_T`` the teacher's.

`divergence_of_states` never holds tokens x vocabulary: it runs forward in slices of tokens and
backward in blocks of the vocabulary, as `reopold_agent.policies.logprobs` does for log-probs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reopold_agent.objectives.chunks import (
    SLICE_ELEMENTS,
    backward_by_blocks,
    compute_dtype,
    make_logits,
    take_rows,
)

SCRATCH_PARTS = 8
"""Temporary arrays have 1/8 of a slice's rows and are allocated once: allocating them again for
each part fragments the C library's heap."""


def check_beta(beta: float) -> None:
    """Raises ValueError unless ``beta`` lies in [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Computes the divergence from log-probs over the last axis; differentiable in ``student``.

    Args:
        student: (..., vocabulary) log-probs in float32 or float64. Their probabilities need not sum
            to one (top-k without the rest).
        teacher: the same for the teacher.
        beta: in [0, 1], see the module.

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
    """Appends one more outcome, "any other token", so that probabilities sum to one again.

    A divergence over such coarser outcomes is never larger.
    """
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([logps, rest.log()], dim=-1)


def topk_divergence(student_NK: Tensor, teacher_NK: Tensor, beta: float, *, rest: bool) -> Tensor:
    """Computes the divergence over the teacher's k likeliest tokens, (N,) nats.

    Args:
        student_NK: the student's log-probs of those tokens, normalised over the whole vocabulary.
        teacher_NK: the teacher's.
        beta: in [0, 1], see the module.
        rest: count all other tokens as one more outcome. Without it the result is not a
            divergence and may be negative (verl's ``forward_kl_topk`` is this with beta 0).
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
    """Computes the divergence between ``softmax(hidden @ weight.T)`` of student and teacher.

    Args:
        student_ND: the student's last hidden states.
        student_weight_VD: its output embedding.
        teacher_NE: the teacher's last hidden states; their width may differ.
        teacher_weight_VE: its output embedding, over the same ids.
        targets_N: int64 ids whose log-probs under the student are returned too.
        beta: in [0, 1], see the module.
        banned: int64 ids that have probability 0 for both, or None.
        slice_elements: upper limit on one model's logits held at once, and in the backward pass,
            which also holds the gradient of the weight, on those of both.

    Returns:
        ``(divergence_N, logp_N)``, float32; both are differentiable in ``student_ND`` and
        ``student_weight_VD``.

    Raises:
        ValueError: ``beta`` is out of range, or the vocabularies differ in width.
    """
    check_beta(beta)
    if student_weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(
            f"the student's output embedding has {student_weight_VD.shape[0]} rows and the "
            f"teacher's {teacher_weight_VE.shape[0]}; cut both to the ids that the tokenizer knows"
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
    """Returns the likeliest tokens of each position: ids (N, K) int64 and log-probs (N, K) float32.

    K is ``count``, or the number of ids that are not banned if that is smaller.
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
    """Turns logits into log-probs in place; returns the normaliser that was subtracted, (N,)."""
    top = logits.amax(dim=-1, keepdim=True)
    logits.sub_(top)
    total = torch.empty_like(top)
    rows = len(scratch)
    for piece, out in zip(torch.split(logits, rows), torch.split(total, rows), strict=True):
        torch.sum(torch.exp(piece, out=scratch[: len(piece)]), dim=-1, keepdim=True, out=out)
    total.log_()
    logits.sub_(total)
    return (top + total)[:, 0]


def _log_odds(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Returns ``u = log(beta p_T / ((1 - beta) p_S))``, written over the teacher's log-probs.

    Then ``log M = log p_S + log(1 - beta) + softplus(u)``, which needs no further array.
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
        logp, student_norm, teacher_norm, centre = (torch.empty_like(divergence) for _ in range(4))
        student_matrix, teacher_matrix = student_weight.to(dtype), teacher_weight.to(dtype)
        shape = (2, max(1, min(rows, count) // SCRATCH_PARTS), student_weight.shape[0])
        scratch = torch.empty(shape, dtype=torch.float32, device=student.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            student_logp = make_logits(student[part].to(dtype), student_matrix, banned)
            teacher_logp = make_logits(teacher[part].to(dtype), teacher_matrix, banned)
            student_norm[part] = _normalise(student_logp, scratch[0])
            teacher_norm[part] = _normalise(teacher_logp, scratch[0])
            logp[part] = student_logp.gather(1, targets[part, None])[:, 0]
            _fill_values(student_logp, teacher_logp, beta, scratch, divergence[part], centre[part])
            del student_logp, teacher_logp  # or the next two would be held beside them
        ctx.save_for_backward(
            *(student, student_weight, teacher, teacher_weight, student_norm, teacher_norm, centre),
            targets,
        )
        ctx.beta, ctx.banned, ctx.compute_dtype = beta, banned, dtype
        ctx.slice_elements = slice_elements // 2
        return divergence, logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, weight, teacher, teacher_weight, *saved = ctx.saved_tensors
        live = torch.nonzero(torch.logical_or(*grads))[:, 0]
        teacher_states = take_rows(teacher, live).to(ctx.compute_dtype)
        student_norm_N, teacher_norm_N, centre_N, targets_N = (values[live] for values in saved)
        grad_N, logp_grad_N = (grad[live].float() for grad in grads)
        through_logp = bool(logp_grad_N.any())

        def logit_gradient(logits: Tensor, start: int, stop: int) -> Tensor:
            teacher_matrix = teacher_weight[start:stop].to(ctx.compute_dtype)
            teacher_logp = make_logits(teacher_states, teacher_matrix, None)
            teacher_logp.sub_(teacher_norm_N[:, None])
            student_logp = logits.sub_(student_norm_N[:, None])
            # d logp / d logits = onehot(target) - softmax
            minus_N = -logp_grad_N[:, None]
            slopes = student_logp.exp().mul_(minus_N) if through_logp else None
            found = _slopes(student_logp, teacher_logp, ctx.beta, centre_N).mul_(grad_N[:, None])
            if slopes is None:
                return found
            rows = torch.nonzero((targets_N >= start) & (targets_N < stop))[:, 0]
            places = (rows, targets_N[rows] - start)
            return found.add_(slopes.index_put_(places, logp_grad_N[rows], accumulate=True))

        return *backward_by_blocks(ctx, student, weight, live, logit_gradient), *(None,) * 6


def _fill_values(
    student: Tensor,
    teacher: Tensor,
    beta: float,
    scratch: Tensor,
    divergence: Tensor,
    centre: Tensor,
) -> None:
    """Computes the divergence from log-probs, and the mean that `_slopes` needs.

    Writes ``divergence`` and ``centre``; the other tensors are overwritten. The sums do not use
    ``linalg.vecdot``, because autocast would run it in bfloat16.
    """
    if beta == 0.0:
        student.sub_(teacher).neg_()  # log p_T - log p_S
        torch.sum(teacher.exp_().mul_(student), dim=-1, out=divergence)
        centre.zero_()
        return
    if beta == 1.0:
        teacher.sub_(student).neg_()  # log p_S - log p_T
        torch.sum(student.exp_().mul_(teacher), dim=-1, out=divergence)
        centre.copy_(divergence)
        return
    rows, log_1_beta = scratch.shape[1], math.log1p(-beta)
    for start in range(0, len(student), rows):
        part = slice(start, min(start + rows, len(student)))
        first, second = scratch[:, : part.stop - start]
        teacher_p = torch.exp(teacher[part], out=first)
        odds = _log_odds(teacher[part], student[part], beta)
        # KL(p_T || M) = sum p_T (u - softplus(u)) - log(beta)
        forward = torch.mul(teacher_p, odds, out=second).sum(dim=-1) - math.log(beta)
        soft = _softplus(odds)
        forward -= teacher_p.mul_(soft).sum(dim=-1)
        # KL(p_S || M) = - log(1 - beta) - sum p_S softplus(u)
        backward = -log_1_beta - student[part].exp_().mul_(soft).sum(dim=-1)
        centre[part] = (1 - beta) * backward
        divergence[part] = beta * forward + centre[part]


def _slopes(student: Tensor, teacher: Tensor, beta: float, centre: Tensor) -> Tensor:
    """Returns d divergence / d student's logits for a block of ids, from the log-probs.

    With ``h`` the derivative by the student's probability (up to a constant) it is
    ``p_S (h - sum p_S h)``; ``centre`` is that sum over the whole vocabulary. Both log-probs are
    overwritten; the result takes the student's place.
    """
    if beta == 0.0:
        return student.exp_().sub_(teacher.exp_())
    if beta == 1.0:
        teacher.sub_(student).neg_().sub_(centre[:, None])
        return student.exp_().mul_(teacher)
    soft = _softplus(_log_odds(teacher, student, beta))
    # h = (1 - beta) (log p_S - log M) = -(1 - beta) (log(1 - beta) + soft)
    soft.add_(math.log1p(-beta)).mul_(-(1 - beta)).sub_(centre[:, None])
    return student.exp_().mul_(soft)
