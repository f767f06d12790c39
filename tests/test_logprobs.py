"""Chunked log-probs and entropies against torch's own, values and gradients."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reopold_agent.objectives.chunks import BANNED, KEPT_SLICES, make_logits
from reopold_agent.policies import logprobs
from reopold_agent.policies.logprobs import token_logprobs

TOKENS, VOCABULARY, WIDTH = 23, 37, 16
BANNED_IDS = torch.tensor([0, 7, 8, 36])
ALLOWED = [i for i in range(VOCABULARY) if i not in BANNED_IDS.tolist()]


def inputs(
    seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = TOKENS, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator) * scale
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    choice = torch.randint(len(ALLOWED), (tokens,), generator=generator)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.tensor(ALLOWED)[choice],
    )


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log_softmax over the whole vocabulary in float64; entropy from torch's Categorical."""
    logits = hidden.double() @ weight.double().T
    if banned is not None:
        logits = logits.index_fill(1, banned, -torch.inf)
    logp = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    if banned is not None:
        allowed[banned] = False
    entropy = torch.distributions.Categorical(logits=logits[:, allowed]).entropy()
    return logp, entropy.detach()


def gradients(values: Tensor, weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((values * weights.to(values.dtype)).sum(), leaves)


@pytest.mark.parametrize("banned", [None, BANNED_IDS])
@pytest.mark.parametrize("rows", [1, 2, 7, TOKENS - 1, TOKENS, 10 * TOKENS])
def test_values_and_gradients_equal_log_softmax(banned: Tensor | None, rows: int) -> None:
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(
        hidden, weight, targets, banned, with_entropy=True, slice_elements=rows * VOCABULARY
    )
    expected, expected_entropy = reference(hidden, weight, targets, banned)
    assert logp.dtype == torch.float32
    assert entropy is not None
    assert entropy.dtype == torch.float32
    assert not entropy.requires_grad
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
    found = gradients(logp, upstream, hidden, weight)
    wanted = gradients(expected, upstream, hidden, weight)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_a_slice_smaller_than_the_vocabulary_still_works() -> None:
    hidden, weight, targets = inputs()
    logp, _ = token_logprobs(hidden, weight, targets, BANNED_IDS, slice_elements=1)
    expected, _ = reference(hidden, weight, targets, BANNED_IDS)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)


def test_slices_never_exceed_the_limit(logit_sizes: list[int]) -> None:
    hidden, weight, targets = inputs()
    logp, _ = token_logprobs(hidden, weight, targets, slice_elements=5 * VOCABULARY + 3)
    logp.sum().backward()
    assert max(logit_sizes) <= 5 * VOCABULARY + 3
    assert max(logit_sizes[: -(-TOKENS // 5)]) == 5 * VOCABULARY  # the forward pass
    assert sum(logit_sizes) == 2 * TOKENS * VOCABULARY


def test_backward_works_only_on_rows_with_a_gradient(logit_sizes: list[int]) -> None:
    hidden, weight, targets = inputs()
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(2))
    upstream[::2] = 0
    expected, _ = reference(hidden, weight, targets, BANNED_IDS)
    wanted = gradients(expected, upstream, hidden, weight)
    for rows in (1, 4, 100):
        logp, _ = token_logprobs(
            hidden, weight, targets, BANNED_IDS, slice_elements=rows * VOCABULARY
        )
        logit_sizes.clear()
        found = gradients(logp, upstream, hidden, weight)
        kept = KEPT_SLICES * rows >= TOKENS
        assert sum(logit_sizes) == (0 if kept else TOKENS // 2 * VOCABULARY)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        assert not found[0][::2].any()


def test_kept_logits_give_the_same_gradient_twice() -> None:
    hidden, weight, targets = inputs()
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(2))
    logp, _ = token_logprobs(hidden, weight, targets, BANNED_IDS)
    total = (logp * upstream).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(total, (hidden, weight)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kept", [True, False])
def test_only_a_backward_pass_keeps_slices_of_logits(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(*arguments: Any) -> Tensor:
        alive.append(sum(each() is not None for each in slices))
        logits = make_logits(*arguments)
        slices.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(logprobs, "make_logits", watched)
    hidden, weight, targets = inputs()
    with torch.set_grad_enabled(kept):
        token_logprobs(hidden, weight, targets, slice_elements=8 * VOCABULARY)
    assert alive == ([0, 1, 2] if kept else [0, 0, 0])


def test_no_gradient_at_all_gives_zeros() -> None:
    hidden, weight, targets = inputs()
    logp, _ = token_logprobs(hidden, weight, targets)
    for gradient in gradients(logp, torch.zeros(TOKENS), hidden, weight):
        assert not gradient.any()


@pytest.mark.parametrize("leaf", [0, 1])
def test_one_of_hidden_and_weight_may_be_frozen(leaf: int) -> None:
    hidden, weight, targets = inputs()
    leaves = [hidden.detach(), weight.detach()]
    leaves[leaf].requires_grad_()
    logp, _ = token_logprobs(leaves[0], leaves[1], targets, BANNED_IDS)
    expected, _ = reference(leaves[0], leaves[1], targets, BANNED_IDS)
    ones = torch.ones(TOKENS)
    (found,) = gradients(logp, ones, leaves[leaf])
    (wanted,) = gradients(expected, ones, leaves[leaf])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_no_grad_builds_no_graph() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        logp, _ = token_logprobs(hidden, weight, targets)
    assert not logp.requires_grad


@pytest.mark.parametrize("rows", [1, 6, 100])
def test_bfloat16_weights_compute_as_bfloat16_logits_do(rows: int) -> None:
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    logp, entropy = token_logprobs(
        hidden, weight, targets, BANNED_IDS, with_entropy=True, slice_elements=rows * VOCABULARY
    )
    assert logp.dtype == torch.float32
    logits = (hidden @ weight.T).float().index_fill(1, BANNED_IDS, -torch.inf)
    expected = torch.log_softmax(logits, -1)
    chosen = expected.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, chosen, rtol=1e-5, atol=1e-5)
    expected_entropy = torch.special.entr(expected.exp()).sum(-1)
    assert entropy is not None
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(3))
    found = gradients(logp, upstream, hidden, weight)
    exact, _ = reference(hidden, weight, targets, BANNED_IDS)
    wanted = gradients(exact, upstream, hidden, weight)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < 0.02


def test_weight_gradient_is_summed_in_float32_over_slices() -> None:
    # Bfloat16 sums of many equal terms stop growing at 256 times a term.
    tokens = 4000
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    logp, _ = token_logprobs(hidden, weight, targets, slice_elements=2)
    (gradient,) = torch.autograd.grad(logp.sum(), weight)
    assert gradient[:, 0].tolist() == pytest.approx([tokens / 2, -tokens / 2], rel=0.01)


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients() -> None:
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = token_logprobs(hidden, weight, targets, BANNED_IDS, with_entropy=True)
        logits = (hidden @ weight.T).float()
    assert logits.dtype == torch.float32
    expected = torch.log_softmax(logits.index_fill(1, BANNED_IDS, -torch.inf), -1)
    chosen = expected.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, chosen, rtol=1e-5, atol=1e-5)
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.special.entr(expected.exp()).sum(-1))
    exact, _ = reference(hidden, weight, targets, BANNED_IDS)
    assert (logp - exact).abs().max() > 1e-4  # it really was bfloat16
    ones = torch.ones(TOKENS)
    for one, other in zip(
        gradients(logp, ones, hidden, weight), gradients(exact, ones, hidden, weight), strict=True
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 0.02


def test_bfloat16_hidden_with_float32_weights() -> None:
    # A body under autocast hands over bfloat16 states; the head outside stays float32.
    hidden, weight, targets = inputs()
    half = hidden.detach().bfloat16().requires_grad_()
    logp, _ = token_logprobs(half, weight, targets, BANNED_IDS)
    expected, _ = reference(half, weight, targets, BANNED_IDS)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    found = gradients(logp, torch.ones(TOKENS), half, weight)
    wanted = gradients(expected, torch.ones(TOKENS), half, weight)
    assert found[0].dtype == torch.bfloat16
    assert (found[0].double() - wanted[0].double()).norm() / wanted[0].double().norm() < 0.01
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=2e-5)


def test_gradcheck_in_float64() -> None:
    # The logits are float32 inside, so the steps are coarse and the tolerance is theirs.
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    targets, banned = torch.tensor([1, 4, 1]), torch.tensor([0, 5])
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, banned, slice_elements=12)[0].double(),
        (hidden, weight),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
        nondet_tol=1e-6,
    )


def test_banned_ids_have_no_probability_and_get_no_gradient() -> None:
    hidden, weight, targets = inputs()
    huge = weight.detach().clone()
    huge[BANNED_IDS] *= 1000
    huge.requires_grad_()
    logp, entropy = token_logprobs(hidden, huge, targets, BANNED_IDS, with_entropy=True)
    plain, plain_entropy = token_logprobs(hidden, weight, targets, BANNED_IDS, with_entropy=True)
    assert torch.equal(logp, plain)
    assert entropy is not None
    assert plain_entropy is not None
    assert torch.equal(entropy, plain_entropy)
    grad_hidden, grad_weight = gradients(logp, torch.ones(TOKENS), hidden, huge)
    assert torch.isfinite(grad_hidden).all()
    assert not grad_weight[BANNED_IDS].any()
    on_banned, _ = token_logprobs(hidden, weight, BANNED_IDS[torch.arange(TOKENS) % 4], BANNED_IDS)
    assert (on_banned <= BANNED / 2).all()
    every = torch.arange(VOCABULARY).repeat(2)
    states = hidden[:2].repeat_interleave(VOCABULARY, 0)
    probabilities = token_logprobs(states, weight, every, BANNED_IDS)[0].exp().view(2, VOCABULARY)
    assert probabilities.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_one_allowed_id_is_certain() -> None:
    hidden, weight, _ = inputs()
    banned = torch.arange(1, VOCABULARY)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    logp, entropy = token_logprobs(hidden, weight, targets, banned, with_entropy=True)
    assert entropy is not None
    assert logp.abs().max() == 0
    assert entropy.abs().max() == 0


def test_no_tokens() -> None:
    hidden, weight, targets = inputs(tokens=0)
    logp, entropy = token_logprobs(hidden, weight, targets, BANNED_IDS, with_entropy=True)
    assert logp.shape == (0,)
    assert entropy is not None
    assert entropy.shape == (0,)
    for gradient in gradients(logp, torch.zeros(0), hidden, weight):
        assert not gradient.any()


def test_entropy_is_only_made_when_asked() -> None:
    assert token_logprobs(*inputs())[1] is None


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(scale=500.0)
    logp, entropy = token_logprobs(hidden, weight, targets, BANNED_IDS, with_entropy=True)
    expected, expected_entropy = reference(hidden, weight, targets, BANNED_IDS)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=1e-2)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-2, atol=1e-3)
    for gradient in gradients(logp, torch.ones(TOKENS), hidden, weight):
        assert torch.isfinite(gradient).all()


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 1200), st.booleans())
def test_any_slicing_gives_the_same(seed: int, tokens: int, elements: int, ban: bool) -> None:
    hidden, weight, targets = inputs(seed, tokens=tokens)
    banned = BANNED_IDS if ban else None
    whole: Any = token_logprobs(hidden, weight, targets, banned, with_entropy=True)
    parts: Any = token_logprobs(
        hidden, weight, targets, banned, with_entropy=True, slice_elements=elements
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    for one, other in zip(
        gradients(whole[0], upstream, hidden, weight),
        gradients(parts[0], upstream, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
