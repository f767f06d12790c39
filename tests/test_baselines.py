"""The baseline objectives against plain versions of their formulas, limits and exact gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reopold_agent.errors import ConfigError, UnknownNameError
from reopold_agent.objectives import (
    GRPO,
    OBJECTIVES,
    SFT,
    ClippedReverseKL,
    EntropyMaskedReverseKL,
    Needs,
    Objective,
    Outcomes,
    Reopold,
    ReverseKL,
    ReverseKLStopGradient,
    RunFacts,
    SkewReverseKL,
    TokenBatch,
    make_objective,
    whole_loss,
)
from reopold_agent.objectives.grpo import (
    curiosity_reward,
    group_advantages,
    group_sums,
    overlong_penalty,
)
from reopold_agent.objectives.pieces import skewed_reward
from reopold_agent.train.rows import Row, outcomes_of
from reopold_agent.types import Trajectory

ROWS, TIME = 5, 8
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "rkl": [{}],
    "rkl_sg": [{}],
    "rkl_sg_clip": [{"mixture": 0.1}, {"mixture": 0.6}],
    "rkl_sg_clip_entropy": [{}, {"top_share": 0.5, "mixture": 0.3}],
    "reopold": [{"switch_step": 0}, {"switch_step": 1}, {"switch_step": 1, "top_share": 0.6}],
    "skew_rkl": [{}, {"mixture": 0.4, "stop_gradient": False}],
    "gkd": [{}],
    "grpo": [
        {},
        {"aggregate": "token", "clip_high": 0.28},
        {"aggregate": "budget", "token_budget": 11, "normalise": False},
    ],
    "sft": [{}],
}
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]


def random_values(seed: int) -> dict[str, Any]:
    """Values as the engine gives them: an advantage and a length for each row."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, TIME)
    logp = -rng.exponential(1.5, shape)
    mask = rng.random(shape) < 0.7
    mask[:, 0] = True
    return {
        "logp": logp,
        "logp_old": logp + rng.normal(0, 0.3, shape),
        "logp_teacher": -rng.exponential(3.0, shape),
        "entropy": rng.exponential(1.0, shape),
        "loss_mask": mask,
        "advantage": np.repeat(rng.normal(0, 1, (ROWS, 1)), TIME, axis=1),
        "response_length": np.repeat(mask.sum(1, keepdims=True).astype(float), TIME, axis=1),
        "divergence": rng.exponential(1.0, shape),
    }


def token_batch(values: dict[str, Any], rows: Any = slice(None), dtype: Any = torch.float64) -> Any:
    """The batch, and the two leaves that carry gradients."""
    tensors = {k: torch.tensor(v[rows], dtype=dtype) for k, v in values.items()}
    leaves = [tensors[k].requires_grad_() for k in ("logp", "divergence")]
    return TokenBatch(**tensors), leaves


def plain_loss(name: str, values: dict[str, Any], settings: dict[str, Any], step: int) -> Any:
    """The definition, token by token: the loss and its gradient by ``logp`` or ``divergence``."""
    mixture = settings.get("mixture", 0.1)
    floor = math.log(mixture) / (1 - mixture)
    tokens = [index for index in np.ndindex(ROWS, TIME) if values["loss_mask"][index]]
    entropies = sorted((values["entropy"][i] for i in tokens), reverse=True)
    kth = next(k for k in range(1, 99) if k / len(tokens) >= settings.get("top_share", 0.2))
    tau = entropies[kth - 1]
    total, count, gradient = 0.0, 0.0, np.zeros((ROWS, TIME))
    for i in tokens:
        own, his = values["logp"][i], values["logp_teacher"][i]
        ratio = math.exp(own - values["logp_old"][i])
        reward, inner = his - own, 0.0  # inner: d reward / d logp
        keep, weight, share = True, 1.0, 1.0
        if name == "rkl":
            inner = -1.0
        elif name == "skew_rkl":
            mixed = mixture * math.exp(own) + (1 - mixture) * math.exp(his)
            reward = math.log(mixed / math.exp(own))
            if not settings.get("stop_gradient", True):
                inner = mixture * math.exp(own) / mixed - 1
        elif name in ("rkl_sg_clip", "rkl_sg_clip_entropy", "reopold"):
            explores = name == "reopold" and step < settings["switch_step"]
            if explores:
                keep = reward > floor
            elif name != "rkl_sg_clip":
                keep = values["entropy"][i] >= tau
            reward = max(reward, floor)
        value, slope = ratio * reward, ratio * reward + ratio * inner
        if name == "gkd":
            value, slope = -values["divergence"][i], -1.0
        elif name == "sft":
            value, slope = own, 1.0
        elif name == "grpo":
            advantage, high = values["advantage"][i], 1 + settings.get("clip_high", 0.2)
            if advantage >= 0:
                value = min(ratio, high) * advantage
                slope = ratio * advantage if ratio < high else 0.0
            else:
                value = max(ratio, 0.8) * advantage
                slope = ratio * advantage if ratio > 0.8 else 0.0
            how = settings.get("aggregate", "sequence")
            if how != "token":
                share = 1 / values["response_length"][i]  # so that a response counts as one
                weight = share if how == "sequence" else 1 / settings["token_budget"]
        if not keep:
            continue
        total += weight * value
        gradient[i] = weight * slope
        count += share
    return -total / max(1.0, count), -gradient / max(1.0, count)


def gradient_of(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    """Gradient by the leaf that the objective uses."""
    found = [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]
    assert len(found) == 1
    return found[0]


def test_the_cases_are_all_objectives() -> None:
    others = {"eopd", "exopd", "iw_opd", "sod"}  # those of later papers are in test_family.py
    assert set(SETTINGS) == set(OBJECTIVES.names()) - others


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_value_and_gradient_equal_the_plain_version(name: str, settings: dict[str, Any]) -> None:
    objective = make_objective(name, settings)
    for seed in range(8):
        values = random_values(seed)
        for step in (0, 1):
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
                batch, leaves = token_batch(values, dtype=dtype)
                loss = whole_loss(objective, batch, step)
                expected, gradient = plain_loss(name, values, settings, step)
                assert loss.dtype == dtype
                assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
                np.testing.assert_allclose(
                    gradient_of(loss, leaves).numpy(), gradient, rtol=tolerance, atol=tolerance
                )


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]]])
def test_micro_batches_change_nothing(
    name: str, settings: dict[str, Any], groups: list[list[int]]
) -> None:
    objective, values = make_objective(name, settings), random_values(3)
    batch, leaves = token_batch(values)
    whole = whole_loss(objective, batch, 0)
    gradient = gradient_of(whole, leaves)
    threshold = objective.threshold(batch.entropy, batch.loss_mask)
    numerator, denominator = 0.0, 0.0
    pieces = torch.zeros(ROWS, TIME, dtype=torch.float64)
    for rows in groups:
        part, part_leaves = token_batch(values, rows)
        terms = objective.terms(part, 0, threshold)
        pieces[rows] = gradient_of(terms.numerator, part_leaves)
        numerator += terms.numerator.item()
        denominator += float(terms.denominator)
    assert numerator / denominator == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(pieces / denominator, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_what_is_masked_may_hold_anything(name: str, settings: dict[str, Any]) -> None:
    objective, values = make_objective(name, settings), random_values(4)
    batch, leaves = token_batch(values)
    loss = whole_loss(objective, batch, 1)
    gradient = gradient_of(loss, leaves)
    for garbage in (math.nan, math.inf, -math.inf):
        spoilt = {
            k: v if k == "loss_mask" else np.where(values["loss_mask"], v, garbage)
            for k, v in values.items()
        }
        other, other_leaves = token_batch(spoilt)
        assert whole_loss(objective, other, 1).item() == pytest.approx(loss.item(), rel=1e-12)
        found = gradient_of(whole_loss(objective, other, 1), other_leaves)
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_no_loss_token_gives_zero(name: str, settings: dict[str, Any]) -> None:
    values = random_values(5) | {"loss_mask": np.zeros((ROWS, TIME))}
    batch, leaves = token_batch(values)
    loss = whole_loss(make_objective(name, settings), batch, 1)
    assert loss.item() == 0.0
    assert not gradient_of(loss, leaves).any()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_what_is_logged_carries_no_gradient(name: str, settings: dict[str, Any]) -> None:
    objective = make_objective(name, settings)
    batch, _ = token_batch(random_values(6))
    terms = objective.terms(batch, 1, objective.threshold(batch.entropy, batch.loss_mask))
    for key, value in vars(terms).items():
        assert value.requires_grad == (key == "numerator"), key
        assert value.shape == ((ROWS, TIME) if value.dim() else ())
    ratio = np.exp(batch.logp.detach().numpy() - batch.logp_old.numpy())
    np.testing.assert_allclose(terms.ratio.numpy(), ratio)


DIFFERENTIABLE: dict[str, Objective] = {
    "rkl": ReverseKL(),
    "skew_rkl": SkewReverseKL(0.3, stop_gradient=False),
    "grpo": GRPO(),
    "gkd": make_objective("gkd", {}),
    "sft": SFT(),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name: str) -> None:
    values = random_values(7)
    ratio = np.exp(values["logp"] - values["logp_old"])
    assert np.abs(ratio - 1.2).min() > 1e-4  # finite differences would not see the kink
    assert np.abs(ratio - 0.8).min() > 1e-4
    key = "divergence" if name == "gkd" else "logp"

    def loss(moved: Tensor) -> Tensor:
        batch, _ = token_batch(values)
        return whole_loss(DIFFERENTIABLE[name], TokenBatch(**{**vars(batch), key: moved}))

    leaf = torch.tensor(values[key], requires_grad=True)
    assert torch.autograd.gradcheck(loss, (leaf,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", [ReverseKLStopGradient(), SkewReverseKL(0.3)])
def test_a_detached_reward_leaves_the_ratio_to_differentiate(objective: Objective) -> None:
    values = random_values(8)
    batch, leaves = token_batch(values)
    gradient = gradient_of(whole_loss(objective, batch), leaves)
    for index in np.ndindex(ROWS, TIME):
        losses = []
        for sign in (1, -1):
            moved = {k: v.copy() for k, v in values.items()}
            for key in ("logp", "logp_teacher"):  # together: the reward stays the same
                moved[key][index] += sign * 1e-6
            losses.append(whole_loss(objective, token_batch(moved)[0]).item())
        numeric = (losses[0] - losses[1]) / 2e-6
        assert numeric == pytest.approx(gradient[index].item(), abs=1e-7)


# Exact divergences over a small vocabulary

Exact = Callable[[Tensor, Tensor], Tensor]


def logits_and_teacher(seed: int, vocabulary: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator, dtype=torch.float64) * 1.5
    teacher = torch.randn(vocabulary, generator=generator, dtype=torch.float64) * 1.5
    return logits.requires_grad_(), torch.log_softmax(teacher, -1)


def expected_gradient(objective: Objective, logits: Tensor, teacher: Tensor, old: Tensor) -> Tensor:
    """The mean over all tokens, weighted by the policy that samples, of a token's gradient."""
    total = torch.zeros_like(logits)
    for token in range(len(logits)):
        logp = torch.log_softmax(logits, -1)[token]
        columns = (logp, old[token], teacher[token], torch.ones(()), torch.ones(()))
        loss = whole_loss(objective, TokenBatch(*(c[None, None] for c in columns)))
        total += old[token].exp() * torch.autograd.grad(loss, logits)[0]
    return total


def exact_gradient(divergence: Exact, logits: Tensor, teacher: Tensor) -> Tensor:
    return torch.autograd.grad(divergence(torch.log_softmax(logits, -1), teacher), logits)[0]


def reverse_kl(own: Tensor, his: Tensor) -> Tensor:
    return (own.exp() * (own - his)).sum()


def skew_kl(mixture: float) -> Exact:
    def divergence(own: Tensor, his: Tensor) -> Tensor:
        mixed = (mixture * own.exp() + (1 - mixture) * his.exp()).log()
        return (own.exp() * (own - mixed)).sum()

    return divergence


@pytest.mark.parametrize("objective", [ReverseKL(), ReverseKLStopGradient()])
def test_reverse_kl_has_the_gradient_of_the_divergence(objective: Objective) -> None:
    # Remark 3.1: with and without the stop-gradient the expected gradient is the same.
    for seed in range(5):
        logits, teacher = logits_and_teacher(seed)
        old = torch.log_softmax(logits.detach(), -1)
        wanted = exact_gradient(reverse_kl, logits, teacher)
        found = expected_gradient(objective, logits, teacher, old)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert wanted.norm() > 0.05


def test_the_ratio_makes_up_for_an_older_policy() -> None:
    for objective in (ReverseKL(), ReverseKLStopGradient()):
        logits, teacher = logits_and_teacher(1)
        old = torch.log_softmax(logits.detach() + torch.randn(6, dtype=torch.float64) * 0.5, -1)
        wanted = exact_gradient(reverse_kl, logits, teacher)
        found = expected_gradient(objective, logits, teacher, old)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mixture", [0.01, 0.1, 0.5, 0.9])
def test_skew_reverse_kl_has_the_gradient_of_the_divergence(mixture: float) -> None:
    for seed in range(5):
        logits, teacher = logits_and_teacher(seed)
        old = torch.log_softmax(logits.detach(), -1)
        wanted = exact_gradient(skew_kl(mixture), logits, teacher)
        whole = SkewReverseKL(mixture, stop_gradient=False)
        found = expected_gradient(whole, logits, teacher, old)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        # The constant reward lacks - m pi / (m pi + (1 - m) pi_T) times grad log pi.
        constant = expected_gradient(SkewReverseKL(mixture), logits, teacher, old)
        own = torch.log_softmax(logits, -1)
        mixed = mixture * own.exp() + (1 - mixture) * teacher.exp()
        weight = (-mixture * own.exp() / mixed).detach()
        (missing,) = torch.autograd.grad((own.exp().detach() * weight * own).sum(), logits)
        torch.testing.assert_close(constant + missing, wanted, rtol=1e-10, atol=1e-12)
        assert missing.norm() > 1e-4


def test_rewards_remain_when_no_gradient_is_left() -> None:
    # At the teacher's own distribution every objective is at rest.
    logits, _ = logits_and_teacher(2)
    teacher = torch.log_softmax(logits.detach(), -1)
    for objective in (
        *(ReverseKL(), ReverseKLStopGradient(), ClippedReverseKL()),
        *(SkewReverseKL(), SkewReverseKL(stop_gradient=False), Reopold(switch_step=0)),
    ):
        found = expected_gradient(objective, logits, teacher, teacher)
        torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


# Limits


def loss_and_gradient(objective: Objective, seed: int, step: int = 0) -> tuple[float, Tensor]:
    batch, leaves = token_batch(random_values(seed))
    loss = whole_loss(objective, batch, step)
    return loss.item(), gradient_of(loss, leaves)


@pytest.mark.parametrize(
    ("limit", "of"),
    [
        (Reopold(mixture=1e-300, top_share=1.0, switch_step=0), ReverseKLStopGradient()),
        (EntropyMaskedReverseKL(mixture=1e-300, top_share=1.0), ReverseKLStopGradient()),
        (EntropyMaskedReverseKL(mixture=0.4, top_share=1.0), ClippedReverseKL(mixture=0.4)),
        (Reopold(mixture=0.4, switch_step=0), EntropyMaskedReverseKL(mixture=0.4)),
        (ClippedReverseKL(mixture=1e-300), ReverseKLStopGradient()),
        (SkewReverseKL(mixture=1e-15), ReverseKLStopGradient()),
        (SkewReverseKL(mixture=1e-15, stop_gradient=False), ReverseKL()),
    ],
)
def test_limits(limit: Objective, of: Objective) -> None:
    for seed in range(5):
        loss, gradient = loss_and_gradient(limit, seed)
        wanted, wanted_gradient = loss_and_gradient(of, seed)
        assert loss == pytest.approx(wanted, rel=1e-8)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-8, atol=1e-12)


def test_these_limits_are_not_trivial() -> None:
    base = loss_and_gradient(ReverseKLStopGradient(), 0)[0]
    for other in (
        *(Reopold(mixture=0.1, top_share=1.0, switch_step=0), Reopold(switch_step=1)),
        *(SkewReverseKL(0.1), ReverseKL(), EntropyMaskedReverseKL(mixture=1e-300)),
    ):
        loss, gradient = loss_and_gradient(other, 0)
        same = torch.allclose(gradient, loss_and_gradient(ReverseKLStopGradient(), 0)[1])
        assert abs(loss - base) > 0.01 or not same, other


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_skew_reverse_kl_vanishes_towards_one(stop_gradient: bool) -> None:
    for gap in (1e-3, 1e-6, 1e-9):
        loss, gradient = loss_and_gradient(SkewReverseKL(1 - gap, stop_gradient), 1)
        largest = float(np.exp(random_values(1)["logp_teacher"] - random_values(1)["logp"]).max())
        assert abs(loss) < 3 * gap * largest
        assert gradient.abs().max() < 3 * gap * largest


@given(st.floats(-60, 0), st.floats(-60, 0), st.floats(1e-6, 1 - 1e-6))
def test_skewed_reward_lies_between_its_floor_and_the_teachers(
    own: float, his: float, mixture: float
) -> None:
    logp = torch.tensor(own, dtype=torch.float64)
    reward = skewed_reward(logp, torch.tensor(his, dtype=torch.float64), mixture).item()
    assert reward >= math.log(mixture) - 1e-9
    # Jensen: the mixture is at least the geometric one.
    assert reward >= (1 - mixture) * (his - own) - 1e-9
    assert reward <= max(0.0, his - own) + 1e-9


def test_skewed_reward_takes_a_token_the_teacher_excludes() -> None:
    logp = torch.tensor([[-1.0, -80.0]], requires_grad=True)
    his = torch.tensor([[-math.inf, -2.0]])
    columns = (logp, logp.detach(), his, torch.ones(1, 2), torch.ones(1, 2))
    for stop_gradient in (True, False):
        objective = SkewReverseKL(0.1, stop_gradient)
        loss = whole_loss(objective, TokenBatch(*columns))
        (gradient,) = torch.autograd.grad(loss, logp)
        assert math.isfinite(loss.item())
        assert torch.isfinite(gradient).all()


# Signs


@pytest.mark.parametrize(
    "name", ["rkl_sg", "rkl_sg_clip", "rkl_sg_clip_entropy", "reopold", "skew_rkl"]
)
def test_what_the_teacher_likes_more_becomes_more_likely(name: str) -> None:
    settings = {"switch_step": 0} if name == "reopold" else {}
    objective = make_objective(name, settings)
    for better in (True, False):
        logits = torch.zeros(4, requires_grad=True)
        logp = torch.log_softmax(logits, -1)[0][None, None]
        his = logp.detach() + (0.7 if better else -0.7)
        ones = torch.ones(1, 1)
        loss = whole_loss(objective, TokenBatch(logp, logp.detach(), his, ones, ones))
        (gradient,) = torch.autograd.grad(loss, logits)
        after = torch.log_softmax(logits - 0.1 * gradient, -1)[0]
        assert (after.item() > logp.item() + 0.005) == better
        assert (after.item() < logp.item() - 0.005) == (not better)


def test_an_experts_token_becomes_more_likely() -> None:
    loss, gradient = loss_and_gradient(SFT(), 2)
    values = random_values(2)
    assert loss == pytest.approx(-values["logp"][values["loss_mask"]].mean())
    np.testing.assert_allclose(
        gradient.numpy(), np.where(values["loss_mask"], -1 / values["loss_mask"].sum(), 0.0)
    )


# GRPO's clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "value"),
    [
        *[(1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0)],
        *[(1.1, 2.0, -2.2, -2.2), (0.9, -2.0, 1.8, 1.8)],
        # Beyond the clip on the side that the advantage pushes to: no further.
        *[(1.5, 2.0, 0.0, -2.4), (0.5, -2.0, 0.0, 1.6)],
        # Beyond it on the other side: back, with the full gradient.
        *[(0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0)],
        (1.5, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_clip_sides(
    ratio: float, advantage: float, gradient: float, value: float, aggregate: str
) -> None:
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    batch = TokenBatch(
        logp,
        logp.detach() - math.log(ratio),
        None,
        one,
        one,
        advantage=one * advantage,
        response_length=one,
    )
    loss = whole_loss(GRPO(aggregate=aggregate), batch)
    assert loss.item() == pytest.approx(value)
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(gradient)


def test_clip_higher_leaves_more_room_above_only() -> None:
    def slope(ratio: float, advantage: float, objective: GRPO) -> float:
        logp = torch.tensor([[-1.0]], requires_grad=True)
        old = logp.detach() - math.log(ratio)
        ones = torch.ones(1, 1)
        batch = TokenBatch(logp, old, None, ones, ones, ones * advantage, ones)
        return float(torch.autograd.grad(whole_loss(objective, batch), logp)[0])

    dapo = GRPO(clip_high=0.28, aggregate="token")
    assert slope(1.25, 1.0, dapo) == pytest.approx(-1.25)
    assert slope(1.25, 1.0, GRPO()) == 0.0
    assert slope(1.29, 1.0, dapo) == 0.0
    assert slope(0.79, -1.0, dapo) == 0.0
    assert slope(0.81, -1.0, dapo) == pytest.approx(0.81)
    assert slope(0.65, -1.0, GRPO(clip_low=0.4)) == pytest.approx(0.65)


def test_aggregations_by_hand() -> None:
    # Two responses of 1 and 3 tokens, advantages 1 and -1, ratio 1.
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    zero = torch.zeros(2, 3, requires_grad=True)
    advantage = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    length = torch.tensor([[1.0], [3.0]]).expand(2, 3)
    batch = TokenBatch(zero, zero.detach(), None, zero.detach(), mask, advantage, length)
    for objective, value, slopes in [
        (GRPO(), 0.0, [-1 / 2, 1 / 6]),
        (GRPO(aggregate="token"), 0.5, [-1 / 4, 1 / 4]),
        (GRPO(aggregate="budget", token_budget=10), 0.1, [-1 / 20, 1 / 20]),
    ]:
        loss = whole_loss(objective, batch)
        assert loss.item() == pytest.approx(value, abs=1e-7)
        (gradient,) = torch.autograd.grad(loss, zero)
        assert gradient[0].tolist() == pytest.approx([slopes[0], 0, 0])
        assert gradient[1].tolist() == pytest.approx([slopes[1]] * 3)


def test_dr_grpo_does_not_favour_short_or_long_responses() -> None:
    # Every token of a response has the same weight whatever its length; GRPO divides by it.
    values = random_values(9)
    values["logp_old"] = values["logp"].copy()
    values["advantage"] = np.ones((ROWS, TIME))
    for objective, equal in [(GRPO(aggregate="budget", token_budget=64), True), (GRPO(), False)]:
        batch, leaves = token_batch(values)
        gradient = gradient_of(whole_loss(objective, batch), leaves).numpy()
        weights = {round(float(g), 12) for g in gradient[values["loss_mask"]]}
        assert (len(weights) == 1) == equal


# Advantages


def outcomes(
    reward: Any, group: Any, calls: Any = None, successes: Any = None, tokens: Any = None
) -> Outcomes:
    count = len(reward)
    return Outcomes(
        reward=torch.tensor(reward, dtype=torch.float32),
        group=torch.tensor(group),
        tool_calls=torch.tensor(calls or [0] * count),
        tool_successes=torch.tensor(successes or [0] * count),
        tokens=torch.tensor(tokens or [10] * count),
    )


def plain_advantages(reward: list[float], group: list[int], normalise: bool) -> list[float]:
    found = []
    for value, own in zip(reward, group, strict=True):
        members = [r for r, g in zip(reward, group, strict=True) if g == own]
        advantage = value - statistics.fmean(members)
        if normalise and len(members) > 1:
            advantage /= statistics.stdev(members) + 1e-6
        elif normalise:
            advantage /= 1e-6
        found.append(advantage)
    return found


def test_group_sums_of_interleaved_groups() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    group = torch.tensor([7, -3, 7, 10**9, -3])
    assert group_sums(values, group).tolist() == [5.0, 18.0, 5.0, 8.0, 18.0]
    assert group_sums(values[:0], group[:0]).tolist() == []


def test_group_advantages_by_hand() -> None:
    reward = torch.tensor([1.0, 0.0, 5.0, 0.0, 1.0, 3.0])
    group = torch.tensor([4, 4, 9, 4, 4, 9])
    deviation = 1 / math.sqrt(3)  # n - 1 in the denominator
    wanted = [0.5 / deviation, -0.5 / deviation, 1 / math.sqrt(2), -0.5 / deviation]
    wanted += [0.5 / deviation, -1 / math.sqrt(2)]
    assert group_advantages(reward, group).tolist() == pytest.approx(wanted, rel=1e-5)
    centred = group_advantages(reward, group, normalise=False)
    assert centred.tolist() == [0.5, -0.5, 1.0, -0.5, 0.5, -1.0]


@given(st.lists(st.tuples(st.floats(-3, 3, width=16), st.integers(0, 3)), max_size=20))
def test_group_advantages_equal_the_plain_version(pairs: list[tuple[float, int]]) -> None:
    reward, group = [r for r, _ in pairs], [g for _, g in pairs]
    tensor, groups = torch.tensor(reward, dtype=torch.float64), torch.tensor(group).long()
    for normalise in (True, False):
        found = group_advantages(tensor, groups, normalise=normalise)
        wanted = plain_advantages(reward, group, normalise)
        assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
        sums = group_sums(found, groups)
        assert sums.abs().max().item() < 1e-6 if len(reward) else True


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 1.1, -1 / 3, 1234.567])
def test_equal_rewards_teach_nothing(count: int, value: float) -> None:
    # Float32 sums would leave 3e-8 of 0.3, and dividing by 1e-6 would make 0.03 of it.
    group = torch.zeros(count, dtype=torch.int64)
    for normalise in (True, False):
        found = group_advantages(torch.full((count,), value), group, normalise=normalise)
        assert found.dtype == torch.float32
        assert found.abs().max() < 1e-6


def test_integer_and_half_rewards_are_taken_as_floats() -> None:
    group = torch.tensor([0, 0])
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        found = group_advantages(torch.tensor([1, 0], dtype=dtype), group, normalise=False)
        assert found.tolist() == [0.5, -0.5]
        assert found.dtype == torch.float32


def test_informative_groups_are_those_whose_outcomes_differ() -> None:
    # Groups: mixed, all right, all wrong, alone, all 0.1 (whose mean is not exact in float32).
    result = outcomes(
        [1, 0, 1, 1, 0, 0, 1, 0.1, 0.1, 0.1], [0, 0, 1, 1, 2, 2, 3, 4, 4, 4], calls=[1, 0] * 5
    )
    plain, dropping = GRPO(), GRPO(drop_equal_groups=True, rounds=3, curiosity=0.5)
    assert plain.informative(result).tolist() == [True] * 10
    assert dropping.informative(result).tolist() == [True] * 2 + [False] * 8
    assert (
        plain.max_rollout_rounds,
        dropping.max_rollout_rounds,
        GRPO(rounds=3).max_rollout_rounds,
    ) == (1, 3, 1)
    # Curiosity makes rewards differ; DAPO looks at the outcome.
    assert dropping.advantages(result)[2:4].abs().min() > 0.1


# What is added to the reward


def test_curiosity_by_hand() -> None:
    # H 0.3, N 1, alpha 0.5, beta 0.05. Group 0: one in eight called a tool with success, so it is
    # short by 0.3 - 1/8; group 1: half of two did.
    calls = [1, 2, 0, 0, 0, 3, 0, 0, 1, 0]
    successes = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    group = [0] * 8 + [1] * 2
    result = outcomes([0.0] * 10, group, calls, successes)
    found = curiosity_reward(result, target=0.3, calls=1, bonus=0.5, penalty=0.05)
    short = 0.5 * (0.3 - 1 / 8)
    wanted = [short, short - 0.05, 0, 0, 0, short - 0.1, 0, 0, 0, 0]
    assert found.tolist() == pytest.approx(wanted, abs=1e-7)


def test_curiosity_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    calls = rng.integers(0, 4, 40)
    successes = np.minimum(rng.integers(0, 2, 40), calls)
    group, reward = rng.integers(0, 5, 40), rng.integers(0, 2, 40).astype(float)
    result = outcomes(reward, group, calls.tolist(), successes.tolist())
    objective = GRPO(curiosity=0.5, call_penalty=0.05, curiosity_target=0.9, normalise=False)
    wanted = []
    for own in range(40):
        members = [k for k in range(40) if group[k] == group[own]]
        share = sum(successes[k] > 0 for k in members) / len(members)
        bonus = 0.5 * max(0.9 - share, 0) * (calls[own] > 0)
        wanted.append(reward[own] + bonus + 0.05 * min(1 - calls[own], 0))
    assert objective.shaped_reward(result).tolist() == pytest.approx(wanted, abs=1e-6)
    assert objective.advantages(result).tolist() == pytest.approx(
        plain_advantages(wanted, group.tolist(), False), abs=1e-6
    )


def test_the_call_penalty_works_without_curiosity() -> None:
    result = outcomes([1.0, 1.0], [0, 0], calls=[1, 4], successes=[0, 0])
    assert GRPO(call_penalty=0.1).shaped_reward(result).tolist() == pytest.approx([1.0, 0.7])
    found = GRPO(call_penalty=0.1, free_calls=3).shaped_reward(result)
    assert found.tolist() == pytest.approx([1.0, 0.9])
    assert GRPO().shaped_reward(result).tolist() == [1.0, 1.0]


def test_overlong_penalty_at_its_corners() -> None:
    tokens = torch.tensor([0, 79, 80, 81, 90, 99, 100, 101, 500])
    found = overlong_penalty(tokens, longest=100, buffer=20)
    wanted = [0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1]
    assert found.tolist() == pytest.approx(wanted)
    result = outcomes([1.0, 1.0, 0.0], [0, 0, 0], tokens=[50, 90, 100])
    objective = GRPO(overlong_buffer=20).for_run(RunFacts(steps=1, max_response_tokens=100))
    assert objective.shaped_reward(result).tolist() == pytest.approx([1.0, 0.5, -1.0])


def test_long_observations_cost_reward_too_as_they_use_up_the_budget(
    random_trajectory: Callable[..., Trajectory],
) -> None:
    episode = random_trajectory(0, turns=2, turn_tokens=6)
    after = len(episode.ids) - episode.prompt_length
    assert after > episode.response_tokens  # an observation lies between the turns
    result = outcomes_of([Row(episode)])
    assert result.tokens.tolist() == [after]
    full = GRPO(overlong_buffer=4).for_run(RunFacts(steps=1, max_response_tokens=after))
    assert (full.shaped_reward(result) - result.reward).tolist() == [-1.0]


@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
def test_overlong_penalty_falls_from_nothing_to_minus_one(
    tokens: int, longest: int, buffer: int
) -> None:
    found = overlong_penalty(torch.tensor([tokens, tokens + 1]), longest, buffer).tolist()
    assert 0 >= found[0] >= found[1] >= -1
    if tokens >= longest:
        assert found[0] == -1
    if tokens <= longest - buffer:
        assert found[0] == 0


def test_the_budget_is_the_runs_unless_given() -> None:
    facts = RunFacts(steps=1, max_response_tokens=77)
    assert GRPO().for_run(facts).token_budget == 77
    assert GRPO(token_budget=5).for_run(facts).token_budget == 5
    batch, _ = token_batch(random_values(0))
    with pytest.raises(ValueError, match="token_budget"):
        whole_loss(GRPO(aggregate="budget"), batch)
    with pytest.raises(ValueError, match="token_budget"):
        GRPO(overlong_buffer=3).shaped_reward(outcomes([1.0], [0]))


def test_the_switch_is_a_share_of_the_run_rounded_half_up() -> None:
    for share, steps, switch in [(0.33, 40, 13), (0.5, 5, 3), (0.0, 9, 0), (1.0, 9, 9)]:
        ready = Reopold(switch_share=share).for_run(RunFacts(steps, 1))
        assert ready.switch_step == switch
        assert ready.phase(switch) == "refinement"
        assert switch == 0 or ready.phase(switch - 1) == "exploration"
    assert Reopold(switch_step=4).for_run(RunFacts(40, 1)).switch_step == 4
    with pytest.raises(ValueError, match="for_run"):
        Reopold().phase(0)


# What an objective asks for, and what it refuses


def test_needs() -> None:
    for name in ("rkl", "rkl_sg", "rkl_sg_clip", "rkl_sg_clip_entropy", "reopold", "skew_rkl"):
        assert make_objective(name, {}).needs == Needs.TEACHER
    assert GRPO().needs == Needs.OUTCOME
    assert make_objective("gkd", {}).needs == Needs.TEACHER | Needs.DISTRIBUTIONS
    assert SFT().needs == Needs.TEACHER | Needs.DEMONSTRATIONS
    assert SFT(source="recorded").needs == Needs.DEMONSTRATIONS


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        *[("rkl", "logp_teacher"), ("reopold", "logp_teacher"), ("skew_rkl", "logp_teacher")],
        *[("grpo", "advantage"), ("grpo", "response_length"), ("gkd", "divergence")],
    ],
)
def test_what_is_missing_is_named(name: str, lacks: str) -> None:
    batch, _ = token_batch(random_values(0))
    settings = {"switch_step": 0} if name == "reopold" else {}
    with pytest.raises(ValueError, match=f"needs {lacks}"):
        whole_loss(make_objective(name, settings), TokenBatch(**{**vars(batch), lacks: None}))


def test_the_entropy_mask_needs_its_threshold() -> None:
    batch, _ = token_batch(random_values(0))
    with pytest.raises(ValueError, match="threshold"):
        EntropyMaskedReverseKL().terms(batch, 0, None)


def test_an_objective_says_what_it_does_not_have() -> None:
    with pytest.raises(NotImplementedError, match="ReverseKL has no advantages"):
        ReverseKL().advantages(outcomes([1.0], [0]))
    with pytest.raises(NotImplementedError, match="GRPO uses no divergence"):
        _ = GRPO().divergence
    assert GRPO().threshold(torch.ones(1, 1), torch.ones(1, 1)) is None
    assert GRPO().floor is None
    assert GRPO().phase(3) == "training"
    assert ClippedReverseKL(mixture=0.1).floor == pytest.approx(-2.558, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rkl", {"mixture": 0.1}, r"unknown setting 'objective.mixture'"),
        ("rkl_sg_clip", {"mixtur": 0.1}, r"'objective.mixtur'.*Did you mean 'objective.mixture'"),
        ("rkl_sg_clip", {"mixture": 1.0}, r"^objective.mixture .*\(0, 1\), got 1.0"),
        ("rkl_sg_clip", {"mixture": "lots"}, "objective.mixture"),
        ("rkl_sg_clip_entropy", {"top_share": 0.0}, r"^objective.top_share .*\(0, 1\], got 0.0"),
        ("reopold", {"switch_share": 1.2}, r"^objective.switch_share .*got 1.2"),
        ("reopold", {"switch_step": -1}, r"^objective.switch_step must be >= 0, got -1"),
        ("reopold", {"switch_stop": 3}, "Did you mean 'objective.switch_step'"),
        ("skew_rkl", {"mixture": 0.0}, r"^objective.mixture"),
        ("skew_rkl", {"stop_grad": True}, "Did you mean 'objective.stop_gradient'"),
        ("gkd", {"beta": 1.5}, r"^objective.beta must lie in \[0, 1\], got 1.5"),
        ("gkd", {"beta": math.nan}, "objective.beta. must be a finite number"),
        ("gkd", {"top_k": 0}, r"^objective.top_k must be at least 1, got 0"),
        ("gkd", {"topk": 5}, "Did you mean 'objective.top_k'"),
        ("grpo", {"clip_low": 0.0}, r"^objective.clip_low .*got 0.0"),
        ("grpo", {"clip_high": -0.1}, r"clip_high above 0"),
        ("grpo", {"aggregate": "mean"}, r"^objective.aggregate must be sequence, token or budget"),
        ("grpo", {"curiosity": -0.5}, r"^objective.curiosity must be >= 0, got -0.5"),
        ("grpo", {"call_penalty": -1.0}, r"^objective.call_penalty"),
        ("grpo", {"overlong_buffer": -1}, r"^objective.overlong_buffer"),
        ("grpo", {"curiosity_target": 1.5}, r"^objective.curiosity_target .*got 1.5"),
        ("grpo", {"rounds": 0}, r"^objective.rounds"),
        ("grpo", {"token_budget": 0}, "token_budget"),
        ("grpo", {"normalize": True}, "Did you mean 'objective.normalise'"),
        ("sft", {"source": "me"}, r"^objective.source must be 'teacher' or 'recorded', got 'me'"),
        ("sft", {"only_success": True}, "Did you mean 'objective.only_successes'"),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(name, settings)


def test_an_unknown_objective_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(
        UnknownNameError, match=r"'reopolt'. Did you mean 'reopold'\? Known: eopd, "
    ):
        make_objective("reopolt", {})
    with pytest.raises(UnknownNameError, match=r"no objective is called 'ppo_clip'.*skew_rkl"):
        make_objective("ppo_clip", {})


@pytest.mark.parametrize("mixture", [math.nan, -0.1, 2.0])
def test_mixtures_outside_their_interval_are_refused(mixture: float) -> None:
    for kind in (ClippedReverseKL, EntropyMaskedReverseKL, Reopold, SkewReverseKL):
        with pytest.raises(ValueError, match="mixture"):
            kind(mixture=mixture)


def test_a_length_penalty_longer_than_the_budget_is_refused() -> None:
    facts = RunFacts(steps=10, max_response_tokens=64)
    assert GRPO(overlong_buffer=64).for_run(facts).token_budget == 64
    with pytest.raises(ConfigError, match="overlong_buffer=65 is more than the whole budget of 64"):
        GRPO(overlong_buffer=65).for_run(facts)
    assert GRPO(overlong_buffer=65, token_budget=80).for_run(facts).token_budget == 80
