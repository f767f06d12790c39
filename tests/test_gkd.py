"""Divergences of whole distributions: plain, in chunks, over the top k, and between two models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_rows import states_of
from torch import Tensor

from benchmarks.objective import Stopwatch
from reopold_agent.objectives import GKD, DivergenceSettings, TokenBatch, whole_loss
from reopold_agent.objectives.divergence import (
    divergence_of_states,
    generalised_jsd,
    top_tokens,
    topk_divergence,
    with_rest,
)
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.logprobs import token_logprobs
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.types import Trajectory

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 13, 29, 8, 12
BANNED_IDS = torch.tensor([0, 5, 6, 28])


def plain_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Agarwal et al. 2024, eq. 1, from probabilities: torch sums p log p with 0 log 0 = 0."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def distributions(seed: int, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits of the student and log-probs of the teacher in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(4, 7, generator=generator, dtype=torch.float64) * scale
    return logits.requires_grad_(), torch.log_softmax(teacher, -1)


# The plain divergence


@pytest.mark.parametrize("beta", [*BETAS, 1e-6, 0.3, 1 - 1e-6])
def test_value_and_gradient_equal_the_definition(beta: float) -> None:
    for seed in range(5):
        logits, teacher = distributions(seed)
        found = generalised_jsd(torch.log_softmax(logits, -1), teacher, beta)
        wanted = plain_divergence(torch.softmax(logits, -1), teacher.exp(), beta)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), logits)[0],
            torch.autograd.grad(wanted.sum(), logits)[0],
            rtol=1e-8,
            atol=1e-12,
        )


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_gradient_equals_finite_differences(beta: float) -> None:
    logits, teacher = distributions(9)
    assert torch.autograd.gradcheck(
        lambda z: generalised_jsd(torch.log_softmax(z, -1), teacher, beta), (logits,)
    )


def test_by_hand() -> None:
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert generalised_jsd(student, teacher, 0.0).item() == pytest.approx(forward, rel=1e-5)
    assert generalised_jsd(student, teacher, 1.0).item() == pytest.approx(reverse, rel=1e-5)
    # beta belongs to the teacher, in the mixture and before its KL.
    mixed = [0.2 * 0.9 + 0.8 * 0.5, 0.2 * 0.1 + 0.8 * 0.5]
    wanted = 0.2 * (0.9 * math.log(0.9 / mixed[0]) + 0.1 * math.log(0.1 / mixed[1]))
    wanted += 0.8 * (0.5 * math.log(0.5 / mixed[0]) + 0.5 * math.log(0.5 / mixed[1]))
    assert generalised_jsd(student, teacher, 0.2).item() == pytest.approx(wanted, rel=1e-5)


def test_limits_of_the_scaled_divergence() -> None:
    logits, teacher = distributions(1)
    student = torch.log_softmax(logits.detach(), -1)
    forward, reverse = (
        generalised_jsd(student, teacher, 0.0),
        generalised_jsd(student, teacher, 1.0),
    )
    assert (forward - reverse).abs().max() > 0.1
    for small in (1e-3, 1e-5):
        near_zero = generalised_jsd(student, teacher, small) / small
        near_one = generalised_jsd(student, teacher, 1 - small) / small
        assert (near_zero - forward).abs().max() < 30 * small
        assert (near_one - reverse).abs().max() < 30 * small


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1 - 1e-6),
    st.floats(0.1, 8),
)
def test_it_is_a_divergence(seed: int, beta: float, scale: float) -> None:
    logits, teacher = distributions(seed, scale)
    student = torch.log_softmax(logits.detach(), -1)
    found = generalised_jsd(student, teacher, beta)
    assert (found >= -1e-12).all()
    same = generalised_jsd(teacher, teacher, beta)
    assert same.abs().max() < 1e-12
    torch.testing.assert_close(
        found, generalised_jsd(teacher, student, 1 - beta), atol=1e-9, rtol=1e-9
    )
    if 0 < beta < 1:  # the entropy of the choice between the two bounds it
        assert (found <= -math.log(beta) * beta - math.log1p(-beta) * (1 - beta) + 1e-12).all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_its_interval_is_refused(beta: float) -> None:
    logits, teacher = distributions(0)
    with pytest.raises(ValueError, match="beta must lie in"):
        generalised_jsd(logits, teacher, beta)
    with pytest.raises(ValueError, match="beta must lie in"):
        GKD(beta=beta)
    with pytest.raises(ValueError, match="beta must lie in"):
        divergence_of_states(*states(), beta)


# In chunks, from hidden states


def states(
    seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = torch.randint(1, 5, (tokens,), generator=generator)
    return (
        (normal(tokens, WIDTH) * scale).requires_grad_(),
        normal(VOCABULARY, WIDTH).requires_grad_(),
        normal(tokens, TEACHER_WIDTH) * scale,
        normal(VOCABULARY, TEACHER_WIDTH),
        targets,
    )


def reference(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    banned: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of both over the allowed ids, whole and in float64."""
    allowed = [i for i in range(len(student_weight)) if banned is None or i not in banned.tolist()]
    return tuple(  # type: ignore[return-value]
        torch.log_softmax((h.double() @ w.double().T)[:, allowed], -1)
        for h, w in ((student, student_weight), (teacher, teacher_weight))
    )


def chosen(student_logps: Tensor, targets: Tensor, banned: Tensor | None) -> Tensor:
    allowed = [i for i in range(VOCABULARY) if banned is None or i not in banned.tolist()]
    places = torch.tensor([allowed.index(int(t)) for t in targets])
    return student_logps.gather(1, places[:, None])[:, 0]


def upstream(seed: int = 1, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed))


def gradients(values: Tensor, weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((values * weights.to(values.dtype)).sum(), leaves)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("banned", [None, BANNED_IDS])
@pytest.mark.parametrize("rows", [1, 2, 5, TOKENS, 50])
def test_chunks_equal_the_plain_divergence(beta: float, banned: Any, rows: int) -> None:
    student, student_weight, teacher, teacher_weight, targets = states()
    divergence, logp = divergence_of_states(
        student,
        student_weight,
        teacher,
        teacher_weight,
        targets,
        beta,
        banned,
        slice_elements=rows * VOCABULARY + 3,
    )
    student_logps, teacher_logps = reference(
        student, student_weight, teacher, teacher_weight, banned
    )
    wanted = generalised_jsd(student_logps, teacher_logps, beta)
    assert divergence.dtype == logp.dtype == torch.float32
    wanted_logp = chosen(student_logps, targets, banned)
    torch.testing.assert_close(divergence.double(), wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logp.double(), wanted_logp, rtol=1e-5, atol=1e-5)
    # The log-probs carry a gradient too, at other tokens than the divergence's.
    both = (torch.cat([divergence, logp]), torch.cat([wanted, wanted_logp]))
    weights = torch.cat([upstream(), upstream(2) * (torch.arange(TOKENS) % 3 > 0)])
    weights[1] = 0
    found, exact = (gradients(each, weights, student, student_weight) for each in both)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if banned is not None:
        assert not found[1][banned].any()


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_weights_compute_as_bfloat16_logits_do(beta: float) -> None:
    student, student_weight, teacher, teacher_weight, targets = states(dtype=torch.bfloat16)
    for rows in (2, 100):
        divergence, logp = divergence_of_states(
            student,
            student_weight,
            teacher,
            teacher_weight,
            targets,
            beta,
            BANNED_IDS,
            slice_elements=rows * VOCABULARY,
        )
        allowed = [i for i in range(VOCABULARY) if i not in BANNED_IDS.tolist()]
        both = [
            torch.log_softmax((h @ w.T).float()[:, allowed], -1)
            for h, w in ((student, student_weight), (teacher, teacher_weight))
        ]
        assert divergence.dtype == logp.dtype == torch.float32
        torch.testing.assert_close(
            divergence, generalised_jsd(both[0], both[1], beta), rtol=1e-5, atol=2e-6
        )
        found = gradients(divergence, upstream(), student, student_weight)
        exact_logps = reference(student, student_weight, teacher, teacher_weight, BANNED_IDS)
        exact = gradients(generalised_jsd(*exact_logps, beta), upstream(), student, student_weight)
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == torch.bfloat16
            assert (one.double() - other.double()).norm() / other.double().norm() < 0.03


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(beta: float) -> None:
    student, student_weight, teacher, teacher_weight, targets = states()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        divergence, _ = divergence_of_states(
            student, student_weight, teacher, teacher_weight, targets, beta
        )
        both = [
            torch.log_softmax((h @ w.T).float(), -1)
            for h, w in ((student, student_weight), (teacher, teacher_weight))
        ]
    torch.testing.assert_close(
        divergence, generalised_jsd(both[0], both[1], beta), rtol=1e-5, atol=2e-6
    )
    exact = generalised_jsd(
        *reference(student, student_weight, teacher, teacher_weight, None), beta
    )
    assert (divergence - exact).abs().max() > 1e-4  # it really was bfloat16
    found = gradients(divergence, upstream(), student, student_weight)
    for one, other in zip(
        found, gradients(exact, upstream(), student, student_weight), strict=True
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 0.03


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("banned", [None, BANNED_IDS])
def test_extreme_logits_stay_finite_and_right(beta: float, banned: Any) -> None:
    # Logits differ by hundreds: most probabilities are 0 in float32.
    student, student_weight, teacher, teacher_weight, targets = states(scale=40.0)
    assert (student @ student_weight.T).std() > 90
    divergence, _ = divergence_of_states(
        student,
        student_weight,
        teacher,
        teacher_weight,
        targets,
        beta,
        banned,
        slice_elements=3 * VOCABULARY,
    )
    student_logps, teacher_logps = reference(
        student, student_weight, teacher, teacher_weight, banned
    )
    wanted = generalised_jsd(student_logps, teacher_logps, beta)
    torch.testing.assert_close(divergence.double(), wanted, rtol=1e-4, atol=1e-4)
    found = gradients(divergence, upstream(), student, student_weight)
    exact = gradients(wanted, upstream(), student, student_weight)
    for one, other in zip(found, exact, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() / other.abs().max() < 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_certain_and_opposed_models(beta: float) -> None:
    weight = torch.tensor([[100.0], [0.0], [-100.0]])
    student = torch.ones(1, 1, requires_grad=True)
    for direction in (1.0, -1.0):
        teacher = torch.full((1, 1), direction)
        divergence, _ = divergence_of_states(
            student, weight, teacher, weight, torch.tensor([0]), beta
        )
        entropy = -math.log(max(beta, 1e-9)) * beta - math.log1p(-min(beta, 0.999999)) * (1 - beta)
        most = 200.0 if beta in (0, 1) else entropy
        wanted = 0.0 if direction == 1 else most
        assert divergence.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        (gradient,) = torch.autograd.grad(divergence.sum(), student)
        assert torch.isfinite(gradient).all()


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    student, student_weight, _, _, targets = states()
    for beta in BETAS:
        divergence, _ = divergence_of_states(
            student,
            student_weight,
            student.detach(),
            student_weight.detach(),
            targets,
            beta,
            BANNED_IDS,
        )
        assert divergence.abs().max() < 1e-6
        for gradient in gradients(divergence, torch.ones(TOKENS), student, student_weight):
            assert gradient.abs().max() < 1e-5


def test_small_divergences_are_exact_enough() -> None:
    # Two models that nearly agree: the divergence is far below float32's steps at 1.
    student, student_weight, _, _, targets = states(tokens=200)
    generator = torch.Generator().manual_seed(3)
    teacher = student.detach() + 1e-2 * torch.randn(student.shape, generator=generator)
    for beta in BETAS:
        found, _ = divergence_of_states(
            student, student_weight, teacher, student_weight, targets, beta
        )
        wanted = generalised_jsd(
            *reference(student, student_weight, teacher, student_weight, None), beta
        )
        assert (found - wanted).abs().max() < 2e-6


def test_slices_never_exceed_the_limit(logit_sizes: list[int]) -> None:
    student, *others = states()
    divergence, _ = divergence_of_states(student, *others, 0.5, slice_elements=5 * VOCABULARY + 3)
    divergence.sum().backward()
    assert max(logit_sizes) <= 5 * VOCABULARY + 3
    assert sum(logit_sizes) == 2 * 2 * TOKENS * VOCABULARY  # forward and backward, two models


def test_backward_works_only_on_rows_with_a_gradient(logit_sizes: list[int]) -> None:
    student, student_weight, teacher, teacher_weight, targets = states()
    weights = upstream()
    weights[::3] = 0
    wanted = generalised_jsd(
        *reference(student, student_weight, teacher, teacher_weight, None), 0.3
    )
    exact = gradients(wanted, weights, student, student_weight)
    for rows in (1, 4, 100):
        divergence, _ = divergence_of_states(
            student,
            student_weight,
            teacher,
            teacher_weight,
            targets,
            0.3,
            slice_elements=rows * VOCABULARY,
        )
        logit_sizes.clear()
        found = gradients(divergence, weights, student, student_weight)
        assert sum(logit_sizes) == 2 * int((weights != 0).sum()) * VOCABULARY
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not found[0][::3].any()


@pytest.mark.parametrize("leaf", [0, 1])
def test_one_of_states_and_weight_may_be_frozen(leaf: int) -> None:
    student, student_weight, teacher, teacher_weight, targets = states()
    leaves = [student.detach(), student_weight.detach()]
    leaves[leaf].requires_grad_()
    divergence, _ = divergence_of_states(*leaves, teacher, teacher_weight, targets, 0.7, BANNED_IDS)
    wanted = generalised_jsd(*reference(*leaves, teacher, teacher_weight, BANNED_IDS), 0.7)
    (found,) = gradients(divergence, upstream(), leaves[leaf])
    (exact,) = gradients(wanted, upstream(), leaves[leaf])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    student, student_weight, teacher, teacher_weight, targets = states()
    teacher.requires_grad_()
    teacher_weight.requires_grad_()
    divergence, _ = divergence_of_states(
        student, student_weight, teacher, teacher_weight, targets, 0.5
    )
    divergence.sum().backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None
    assert teacher_weight.grad is None


def test_no_tokens_and_no_gradient() -> None:
    student, student_weight, teacher, teacher_weight, targets = states(tokens=0)
    divergence, logp = divergence_of_states(
        student, student_weight, teacher, teacher_weight, targets, 0.5
    )
    assert divergence.shape == logp.shape == (0,)
    for gradient in gradients(divergence, torch.zeros(0), student, student_weight):
        assert not gradient.any()
    student, student_weight, teacher, teacher_weight, targets = states()
    divergence, _ = divergence_of_states(
        student, student_weight, teacher, teacher_weight, targets, 0.5
    )
    for gradient in gradients(divergence, torch.zeros(TOKENS), student, student_weight):
        assert not gradient.any()
    with torch.no_grad():
        divergence, _ = divergence_of_states(
            student, student_weight, teacher, teacher_weight, targets, 0.5
        )
    assert not divergence.requires_grad


def test_vocabularies_of_different_width_are_refused() -> None:
    student, student_weight, teacher, teacher_weight, targets = states()
    with pytest.raises(ValueError, match="29 rows and the teacher's 28"):
        divergence_of_states(student, student_weight, teacher, teacher_weight[:-1], targets, 0.5)


@given(
    st.integers(0, 10_000),
    st.integers(1, 20),
    st.integers(1, 700),
    st.booleans(),
    st.sampled_from([*BETAS, 0.01, 0.99]),
)
def test_any_slicing_gives_the_same(
    seed: int, tokens: int, elements: int, ban: bool, beta: float
) -> None:
    inputs = states(seed, tokens=tokens)
    banned = BANNED_IDS if ban else None
    whole = divergence_of_states(*inputs, beta, banned)
    parts = divergence_of_states(*inputs, beta, banned, slice_elements=elements)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    weights = upstream(seed, tokens)
    for one, other in zip(
        gradients(whole[0], weights, *inputs[:2]),
        gradients(parts[0], weights, *inputs[:2]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# The top k


def test_top_tokens_are_the_likeliest() -> None:
    student, weight, *_ = states()
    ids, logps = top_tokens(student, weight, 5, BANNED_IDS, slice_elements=4 * VOCABULARY)
    logits = (student @ weight.T).index_fill(1, BANNED_IDS, -torch.inf)
    wanted = torch.log_softmax(logits, -1).topk(5)
    assert torch.equal(ids, wanted.indices)
    torch.testing.assert_close(logps, wanted.values, rtol=1e-5, atol=1e-5)
    assert not logps.requires_grad


def test_no_more_top_tokens_than_there_are_allowed_ids() -> None:
    student, weight, *_ = states()
    for banned, count in ((None, VOCABULARY), (BANNED_IDS, VOCABULARY - 4)):
        ids, logps = top_tokens(student, weight, 1000, banned)
        assert ids.shape == (TOKENS, count)
        assert logps.exp().sum(-1).tolist() == pytest.approx([1.0] * TOKENS, abs=1e-5)
        assert not set(ids.flatten().tolist()) & set(() if banned is None else banned.tolist())


def top_k_of_states(beta: float, top_k: int, rest: bool, inputs: Any) -> Tensor:
    """What `TransformersPolicy.divergence` does."""
    student, student_weight, teacher, teacher_weight, _ = inputs
    ids, teacher_logps = top_tokens(teacher, teacher_weight, top_k, BANNED_IDS)
    student_logps, _ = token_logprobs(student, student_weight, ids, BANNED_IDS)
    return topk_divergence(student_logps, teacher_logps, beta, rest=rest)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("rest", [True, False])
def test_all_tokens_are_the_full_divergence(beta: float, rest: bool) -> None:
    inputs = states()
    found = top_k_of_states(beta, VOCABULARY, rest, inputs)
    wanted, _ = divergence_of_states(*inputs, beta, BANNED_IDS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        gradients(found, upstream(), *inputs[:2]),
        gradients(wanted, upstream(), *inputs[:2]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 25), st.floats(0, 1))
def test_coarser_outcomes_diverge_no_more(seed: int, top_k: int, beta: float) -> None:
    inputs = states(seed)
    found = top_k_of_states(beta, top_k, True, inputs)
    whole, _ = divergence_of_states(*inputs, beta, BANNED_IDS)
    assert (found >= -2e-5).all()
    assert (found <= whole + 2e-5).all()


def test_without_the_rest_it_may_be_negative() -> None:
    student, teacher = torch.tensor([[0.9, 0.05]]).log(), torch.tensor([[0.3, 0.3]]).log()
    assert topk_divergence(student[:, :1], teacher[:, :1], 0.0, rest=False).item() < 0
    assert topk_divergence(student[:, :1], teacher[:, :1], 0.0, rest=True).item() > 0
    forward = 0.3 * math.log(0.3 / 0.9) + 0.3 * math.log(0.3 / 0.05)
    found = topk_divergence(student, teacher, 0.0, rest=False)
    assert found.item() == pytest.approx(forward, rel=1e-5)
    found = topk_divergence(student, teacher, 0.0, rest=True)
    assert found.item() == pytest.approx(forward + 0.4 * math.log(0.4 / 0.05), rel=1e-4)


def test_the_rest_makes_a_distribution_again() -> None:
    logps = torch.tensor([[0.5, 0.2], [1.0, 0.0]]).log()
    found = with_rest(logps).exp()
    assert found[0].tolist() == pytest.approx([0.5, 0.2, 0.3])
    assert found[1].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=2e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("rest", [True, False])
def test_top_k_gradient_equals_autograds(beta: float, rest: bool) -> None:
    inputs = states(2)
    found = gradients(top_k_of_states(beta, 5, rest, inputs), upstream(), *inputs[:2])
    student_logps, teacher_logps = reference(*inputs[:4], BANNED_IDS)
    ids = teacher_logps.topk(5).indices
    student, teacher = student_logps.gather(1, ids).exp(), teacher_logps.gather(1, ids).exp()
    if rest:
        student, teacher = (
            torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (student, teacher)
        )
        wanted = plain_divergence(student, teacher, beta)
    elif beta == 0:
        wanted = (teacher * (teacher.log() - student.log())).sum(-1)
    else:
        mixed = (beta * teacher + (1 - beta) * student).log()
        wanted = beta * (teacher * (teacher.log() - mixed)).sum(-1)
        wanted = wanted + (1 - beta) * (student * (student.log() - mixed)).sum(-1)
        if beta == 1:
            wanted = (student * (student.log() - teacher.log())).sum(-1)
    for one, other in zip(found, gradients(wanted, upstream(), *inputs[:2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


# Log-probs of several targets


def test_several_targets_with_repeated_ids() -> None:
    student, weight, *_ = states(4)
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(7, 20, (TOKENS, 6), generator=generator)
    targets[:, 3] = targets[:, 0]
    targets[0] = 9
    weights = torch.randn(TOKENS, 6, generator=generator)
    weights[5], weights[6, :3] = 0, 0
    exact_all = torch.log_softmax(
        (student.double() @ weight.double().T).index_fill(1, BANNED_IDS, -torch.inf), -1
    )
    wanted = exact_all.gather(1, targets)
    exact = gradients(wanted, weights, student, weight)
    for rows in (1, 4, 100):
        logp, _ = token_logprobs(
            student, weight, targets, BANNED_IDS, slice_elements=rows * VOCABULARY + 1
        )
        assert logp.shape == targets.shape
        torch.testing.assert_close(logp.double(), wanted, rtol=1e-5, atol=1e-5)
        found = gradients(logp, weights, student, weight)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        assert not found[0][5].any()


def test_one_column_of_targets_equals_a_plain_list() -> None:
    student, weight, _, _, targets = states(5)
    one, one_entropy = token_logprobs(student, weight, targets, with_entropy=True)
    column, entropy = token_logprobs(student, weight, targets[:, None], with_entropy=True)
    assert torch.equal(column[:, 0], one)
    assert one_entropy is not None
    assert entropy is not None
    assert torch.equal(one_entropy, entropy)
    for a, b in zip(
        gradients(one, upstream(), student, weight),
        gradients(column[:, 0], upstream(), student, weight),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gradients_that_cancel_still_count() -> None:
    # The sum over a row's targets is zero; the row has a gradient nevertheless.
    student, weight, *_ = states(6)
    targets = torch.tensor([[1, 2]]).expand(TOKENS, 2)
    weights = torch.tensor([[1.0, -1.0]]).expand(TOKENS, 2)
    logp, _ = token_logprobs(student, weight, targets)
    found = gradients(logp, weights, student, weight)
    torch.testing.assert_close(found[0], (weight[1] - weight[2]).expand(TOKENS, -1))


# The objective


def test_the_loss_is_the_mean_divergence_of_the_students_tokens() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    divergence = torch.tensor([[1.0, 50.0, 2.0], [6.0, 50.0, 50.0]], requires_grad=True)
    zero = torch.zeros(2, 3)
    # Ratio and teacher's log-probs have no say.
    batch = TokenBatch(zero - 1, zero, zero + 5, zero, mask, divergence=divergence)
    loss = whole_loss(GKD(), batch)
    assert loss.item() == 3.0
    (gradient,) = torch.autograd.grad(loss, divergence)
    torch.testing.assert_close(gradient, mask / 3)
    terms = GKD().terms(batch, 0, None)
    assert torch.equal(terms.reward, -divergence.detach())  # less divergence is more reward


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_steps_move_the_student_to_the_teacher(beta: float) -> None:
    logits, teacher = distributions(3)
    for _ in range(400):
        divergence = generalised_jsd(torch.log_softmax(logits, -1), teacher, beta)
        zero = torch.zeros(1, 4)
        loss = whole_loss(
            GKD(beta), TokenBatch(zero, zero, zero, zero, zero + 1, divergence=divergence[None])
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        scale = 1 / (4 * beta * (1 - beta)) if 0 < beta < 1 else 1.0
        with torch.no_grad():
            logits -= 8 * min(scale, 2) * gradient
    assert (torch.softmax(logits, -1) - teacher.exp()).abs().sum(-1).max() < 0.05


def test_the_settings_reach_the_engine() -> None:
    assert GKD(0.3, 5, False).divergence == DivergenceSettings(0.3, 5, False)
    assert GKD().divergence == DivergenceSettings(0.5, None, True)


# Two models


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Any], tokenizer: Any) -> tuple[Any, Any]:
    """Student and teacher; the teacher has more padded rows, as Qwen2.5-VL-7B does."""
    return make_model(seed=0), make_model(seed=1, vocab_size=len(tokenizer) + 40)


@pytest.fixture(scope="module")
def episodes(random_trajectory: Callable[..., Trajectory], encode: Any) -> list[Trajectory]:
    return [
        random_trajectory(1, [encode(1)]),
        random_trajectory(2, [encode(2), encode(3)], turns=2),
        random_trajectory(3, []),
    ]


def logps_of(
    policy: TransformersPolicy, batch: TrajectoryBatch, allowed: list[int]
) -> tuple[Tensor, Tensor]:
    """Log-probs over the allowed ids from the whole model's own logits; the chosen tokens."""
    model: Any = policy.adapter.model
    vision: Any = policy.adapter.vision
    pixel_values, grids = vision.patches(batch.images)
    logits = model(
        input_ids=batch.ids_BT,
        attention_mask=batch.attention_BT,
        position_ids=batch.positions_3BT,
        pixel_values=pixel_values,
        image_grid_thw=grids,
        use_cache=False,
    ).logits
    kept = logits[batch.row_N, batch.column_N - 1][:, allowed].double()
    places = torch.tensor(
        [allowed.index(int(i)) for i in batch.ids_BT[batch.row_N, batch.column_N]]
    )
    return torch.log_softmax(kept, -1), places


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        *(DivergenceSettings(beta) for beta in (0.0, 0.5, 1.0)),
        *(DivergenceSettings(beta, 5, True) for beta in (0.0, 0.5, 1.0)),
        DivergenceSettings(0.0, 5, False),
        DivergenceSettings(0.5, 100_000, True),
        DivergenceSettings(0.5, min_entropy=0.1),
        DivergenceSettings(0.0, 5, False, min_entropy=0.1),
    ],
)
def test_two_models_diverge_as_their_logits_do(
    models: tuple[Any, Any],
    make_policy: Callable[..., TransformersPolicy],
    episodes: list[Trajectory],
    chat: Any,
    settings: DivergenceSettings,
    swap: bool,
) -> None:
    student, teacher = (make_policy(model) for model in (models[::-1] if swap else models))
    assert student.adapter.vocabulary_rows != teacher.adapter.vocabulary_rows
    student.adapter.model.zero_grad()
    allowed = [i for i in range(len(chat.tokenizer)) if i not in chat.forbidden_ids]
    own, places = logps_of(student, TrajectoryBatch.build(student.adapter, episodes), allowed)
    with torch.no_grad():
        his, _ = logps_of(teacher, TrajectoryBatch.build(teacher.adapter, episodes), allowed)
    entropy = -(his.exp() * his).sum(-1)
    if settings.min_entropy is not None:  # between two tokens' entropies
        settings = replace(settings, min_entropy=float(entropy.sort().values[8:10].mean()))
    states = states_of(episodes, teacher)
    divergence, logp = student.divergence(episodes, teacher, states, settings)
    wanted_logp = own.gather(1, places[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), wanted_logp, rtol=1e-4, atol=1e-4)
    own_p, his_p = own.exp(), his.exp()
    if settings.top_k == 5:
        ids = his.topk(5).indices
        own_p, his_p = own_p.gather(1, ids), his_p.gather(1, ids)
        if settings.rest:
            own_p, his_p = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (own_p, his_p))
    wanted = plain_divergence(own_p, his_p, settings.beta)
    if settings.min_entropy is not None:
        wanted = wanted.masked_fill(entropy < settings.min_entropy, 0.0)
    assert wanted.detach().abs().mean() > 0.01
    torch.testing.assert_close(divergence.double(), wanted, rtol=1e-3, atol=1e-4)
    weights = upstream(0, 2 * len(wanted))
    parameters = [p for p in student.adapter.model.parameters() if p.requires_grad]
    found, exact = (
        torch.autograd.grad((torch.cat(each) * weights).sum(), parameters, allow_unused=True)
        for each in ((divergence, logp), (wanted, wanted_logp))
    )
    size = math.sqrt(sum(float(g.norm() ** 2) for g in exact if g is not None))
    assert size > 0.1
    for one, other in zip(found, exact, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() < 2e-3 * size
    assert all(p.grad is None for p in teacher.adapter.model.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [DivergenceSettings(0.5), DivergenceSettings(0.0, 5, False, min_entropy=0.1)],
)
def test_what_scoring_keeps_gives_the_divergence_of_a_pass_of_the_teacher(
    models: tuple[Any, Any],
    make_policy: Callable[..., TransformersPolicy],
    episodes: list[Trajectory],
    precision: torch.dtype,
    settings: DivergenceSettings,
) -> None:
    student, teacher = (make_policy(model) for model in models)
    for policy in (student, teacher):
        policy.adapter._autocast = None if precision == torch.float32 else precision
    plain, kept = teacher.score(episodes), teacher.score(episodes, with_states=True)
    for one, other, t in zip(plain, kept, episodes, strict=True):
        assert one.states is None
        np.testing.assert_array_equal(one.logp, other.logp)
        assert other.states is not None
        assert other.states.shape == (t.response_tokens, teacher.adapter.head.weight.shape[1])
        assert other.states.dtype == precision
    with torch.no_grad():
        again, _ = teacher._states(TrajectoryBatch.build(teacher.adapter, episodes))
    found, wanted = (
        student.divergence(episodes, teacher, states, settings)
        for states in (states_of(episodes, teacher), [again])
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    if precision == torch.float32:  # in other passes than the update's
        teacher.max_tokens_per_pass = 1
        apart, _ = student.divergence(episodes, teacher, states_of(episodes, teacher), settings)
        torch.testing.assert_close(apart, found[0], rtol=1e-4, atol=1e-6)


def test_the_benchmark_leaves_the_divergence_s_own_gradient() -> None:
    leaf = torch.zeros(1, 3, requires_grad=True)
    values = torch.full((1, 3), -1.0)
    batch = TokenBatch(values, values, values, values, values < 0, divergence=leaf.exp())
    watch = Stopwatch()
    watch.terms(GKD.terms)(GKD(), batch, 0, None).numerator.backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[1.0, 1.0, 1.0]]
    assert watch.own > 0
