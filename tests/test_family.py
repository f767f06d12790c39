"""Objectives beyond the paper's: IW-OPD, SOD, ExOPD and EOPD."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reopold_agent.objectives import (
    EOPD,
    IWOPD,
    SOD,
    ExOPD,
    Objective,
    ReverseKLStopGradient,
    TokenBatch,
    make_objective,
    whole_loss,
)
from reopold_agent.objectives.divergence import topk_divergence
from reopold_agent.objectives.pieces import prefix_weights, step_weights, turns


def batch_of(seed: int = 0, **changes: Any) -> TokenBatch:
    """Three trajectories of 8 places with observations between turns, float64."""
    rng = np.random.default_rng(seed)
    names = ("logp", "logp_teacher", "entropy", "divergence")
    values: dict[str, Any] = {n: torch.from_numpy(-rng.exponential(size=(3, 8))) for n in names}
    mask = torch.tensor(
        [[1, 1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 1, 0]]
    )
    values["logp_old"] = values["logp"] + 0.05 * torch.from_numpy(rng.normal(size=(3, 8)))
    values |= {"loss_mask": mask, "turn": turns(mask)}
    values["episode"] = torch.arange(3)[:, None].expand(3, 8)
    return TokenBatch(**{**values, **changes})


def joined(batch: TokenBatch) -> TokenBatch:
    """The tokens of the batch in one row, as the local engine has them."""
    live = batch.loss_mask
    return TokenBatch(**{k: None if v is None else v[live][None] for k, v in vars(batch).items()})


def one(objective: Objective, batch: TokenBatch) -> Tensor:
    terms = objective.terms(batch, 0, None)
    return terms.clipped_reward[batch.loss_mask]


def test_turns_are_runs_of_the_student_s_tokens() -> None:
    assert turns(torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 1]))[[2, 3, 5, 8]].tolist() == [0, 0, 1, 2]
    assert turns(torch.tensor([[1, 0, 1], [0, 1, 1]]))[[0, 0, 1, 1], [0, 2, 1, 2]].tolist() == [
        0, 1, 0, 0,
    ]  # fmt: skip


# IW-OPD


def test_prefix_weights_by_hand() -> None:
    gap = torch.tensor([1.0, 3.0, 0.0, 4.0, 2.0, 2.0, 0.0])
    episode = torch.tensor([5, 5, 5, 5, 1, 1, 9])
    found = prefix_weights(gap, episode, 0.5)
    expected = [1.5, 1 + 0.5 * 7 / 8, 1.25, 1.25, 1.5, 1.25, 1.5]
    assert found.tolist() == pytest.approx(expected)
    assert prefix_weights(gap, episode, 0.0).tolist() == [1.0] * 7
    assert prefix_weights(gap[:0], episode[:0], 0.5).shape == (0,)
    # The sums of one episode do not depend on those before it.
    far = torch.cat([torch.full((1000,), 1e4), gap])
    behind = torch.cat([torch.zeros(1000).long(), episode])
    torch.testing.assert_close(prefix_weights(far, behind, 0.5)[1000:], found)


# SOD


def test_step_weights_by_hand() -> None:
    gap = torch.tensor([1.0, 3.0, 4.0, 0.5, 1.5, 7.0, 7.0])
    episode = torch.tensor([2, 2, 2, 2, 2, 3, 3])
    turn = torch.tensor([0, 0, 1, 2, 2, 0, 0])
    found = step_weights(gap, episode, turn, delta=0.2)
    assert found.tolist() == pytest.approx([1, 1, 0.5, 1.2, 1.2, 1, 1], rel=1e-5)
    assert step_weights(gap, episode, turn, delta=3.0)[3].item() == pytest.approx(2.0, rel=1e-5)


def test_step_weights_are_the_product_of_the_source() -> None:
    """``w_k = min(prod_u (d_u + e) / (d_{u+1} + e), 1 + delta)``, turn by turn."""
    batch = joined(batch_of(4))
    assert batch.logp_teacher is not None
    assert batch.turn is not None
    assert batch.episode is not None
    gap = (batch.logp_teacher - batch.logp_old).abs()[0]
    found = step_weights(gap, batch.episode[0], batch.turn[0], 0.2)
    for episode in range(3):
        inside = batch.episode[0] == episode
        product, before = 1.0, None
        for turn in batch.turn[0][inside].unique().tolist():
            live = inside & (batch.turn[0] == turn)
            mean = float(gap[live].mean()) + 1e-6
            product *= 1.0 if before is None else before / mean
            before = mean
            assert found[live].tolist() == pytest.approx([min(product, 1.2)] * int(live.sum()))


def test_one_turn_weighs_one() -> None:
    mask = torch.ones(3, 8)
    batch = batch_of(loss_mask=mask, turn=turns(mask))
    plain, found = (one(each, batch) for each in (ReverseKLStopGradient(), SOD()))
    assert torch.equal(found, plain)
    assert torch.equal(whole_loss(SOD(), batch), whole_loss(ReverseKLStopGradient(), batch))


# Both


@pytest.mark.parametrize("objective", [IWOPD(), SOD(), IWOPD(gamma=2.0), SOD(delta=0.0)])
def test_loss_and_gradient_of_weighted_distillation(objective: Objective) -> None:
    batch = batch_of()
    assert batch.logp_teacher is not None
    logp = batch.logp.clone().requires_grad_()
    loss = whole_loss(objective, replace(batch, logp=logp))
    (gradient,) = torch.autograd.grad(loss, logp)
    live = batch.loss_mask
    flat = joined(batch)
    assert flat.logp_teacher is not None
    gap = (flat.logp_teacher - flat.logp_old).abs()[0]
    if isinstance(objective, IWOPD):
        weight = prefix_weights(gap, flat.episode[0], objective.gamma)  # type: ignore[index]
    else:
        assert isinstance(objective, SOD)
        weight = step_weights(gap, flat.episode[0], flat.turn[0], objective.delta)  # type: ignore[index]
    assert (weight - 1).abs().max() > 0.1
    reward = (batch.logp_teacher - batch.logp)[live]
    step = 1e-6

    def value(at: Tensor) -> Tensor:  # rewards and weights held
        return -((at - batch.logp_old)[live].exp() * weight * reward) / live.sum()

    slope = (value(batch.logp + step) - value(batch.logp - step)) / (2 * step)
    assert float(loss.detach()) == pytest.approx(float(value(batch.logp).sum()))
    torch.testing.assert_close(gradient[live], slope, rtol=1e-6, atol=1e-8)
    assert not gradient[~live].any()


@pytest.mark.parametrize("objective", [IWOPD(), SOD()])
def test_rows_may_be_joined_split_and_unknown_where_masked(objective: Objective) -> None:
    batch = batch_of(2)
    expected = one(objective, batch)
    torch.testing.assert_close(one(objective, joined(batch)), expected, rtol=1e-12, atol=0)
    parts = [
        TokenBatch(**{k: None if v is None else v[i : i + 1] for k, v in vars(batch).items()})
        for i in range(3)
    ]
    found = torch.cat([one(objective, part) for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert batch.logp_teacher is not None
    holes = batch.logp_teacher.masked_fill(~batch.loss_mask, -math.inf)
    assert torch.equal(one(objective, replace(batch, logp_teacher=holes)), expected)
    with pytest.raises(ValueError, match=r"needs (turn|episode)"):
        objective.terms(replace(batch, turn=None, episode=None), 0, None)


def test_the_outcome_stands_beside_them() -> None:
    """SOD's whole advantage: ``A + w (log pi_T - log pi)``."""
    batch = batch_of(3)
    advantage = torch.tensor([0.5, -1.0, 0.2]).double()[:, None].expand(3, 8)
    whole = make_objective("sod", {"outcome": 1.0})
    found = one(whole, replace(batch, advantage=advantage))
    torch.testing.assert_close(found, one(SOD(), batch) + advantage[batch.loss_mask])


# ExOPD


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_exopd_by_hand_and_by_finite_differences(scale: float) -> None:
    """The authors' ``-(old - base - (teacher - base) lambda)``, on policy."""
    batch = batch_of(5)
    reference = batch.logp - 0.3 * torch.arange(8)
    assert batch.logp_teacher is not None
    logp = batch.logp.clone().requires_grad_()
    given = replace(batch, logp=logp, logp_old=batch.logp, logp_reference=reference)
    loss = whole_loss(ExOPD(scale=scale), given)
    (gradient,) = torch.autograd.grad(loss, logp)
    live = batch.loss_mask
    kl = batch.logp - reference - (batch.logp_teacher - reference) * scale
    assert float(loss.detach()) == pytest.approx(float(kl[live].mean()))
    step = 1e-6

    def value(at: Tensor) -> Tensor:  # rewards held
        return ((at - batch.logp).exp() * kl)[live] / live.sum()

    slope = (value(batch.logp + step) - value(batch.logp - step)) / (2 * step)
    torch.testing.assert_close(gradient[live], slope, rtol=1e-6, atol=1e-8)


def test_a_scale_of_one_forgets_the_reference() -> None:
    batch = batch_of(6, logp_reference=-torch.ones(3, 8).double())
    plain, one_times = (
        whole_loss(each, batch) for each in (ReverseKLStopGradient(), ExOPD(scale=1))
    )
    torch.testing.assert_close(one_times, plain)
    with pytest.raises(ValueError, match="needs logp_reference"):
        whole_loss(ExOPD(), replace(batch, logp_reference=None))


# EOPD


def test_eopd_by_hand() -> None:
    """The divergence is given: 0 where the teacher is certain."""
    batch = batch_of(
        1, divergence=torch.tensor([[0.5, 0.0, 9.0, 0.0, 0.25, 9.0, 9.0, 0.0]] * 3).double()
    )
    forward = (0.5 + 0.25) + (0.5 + 9.0) + (0.5 + 3 * 9.0)  # of the student's tokens
    plain = ReverseKLStopGradient().terms(batch, 0, None)
    terms = EOPD(alpha=2.0).terms(batch, 0, None)
    assert float(terms.numerator) == pytest.approx(float(plain.numerator) + 2 * forward)
    assert terms.denominator == plain.denominator == 13
    settings = EOPD(tau=0.6, top_k=4).divergence
    assert (settings.beta, settings.top_k, settings.rest, settings.min_entropy) == (
        0,
        4,
        False,
        0.6,
    )


def test_eopd_s_gradient_has_both_terms() -> None:
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    teacher = torch.log_softmax(
        2 * torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1)).double(), -1
    )
    ids = torch.tensor([[0, 3, 5, 1]])
    entropy = -(teacher.exp() * teacher).sum(-1)
    tau = float(entropy.median())

    def loss(at: Tensor, held: Tensor) -> Tensor:
        """The source's, with the reward of the log-probs ``held``."""
        own = torch.log_softmax(at, -1)
        top, places = teacher.topk(3, -1)
        forward = (top.exp() * (top - own.gather(-1, places))).sum(-1)
        forward = torch.where(entropy >= tau, forward, 0.0)
        logp = own.gather(-1, ids[..., None])[..., 0]
        given = teacher.gather(-1, ids[..., None])[..., 0]
        batch = TokenBatch(logp, held, given, entropy, torch.ones(1, 4), divergence=forward)
        return whole_loss(EOPD(tau=tau, top_k=3), batch)

    leaf = logits.clone().requires_grad_()
    held = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    (found,) = torch.autograd.grad(loss(leaf, held), leaf)
    own = torch.log_softmax(logits, -1)
    given = teacher.gather(-1, ids[..., None])[..., 0]
    onehot = torch.nn.functional.one_hot(ids, 6).double()
    expected = -(given - held)[..., None] * (onehot - own.exp())
    top, places = teacher.topk(3, -1)
    kept = torch.zeros_like(own).scatter(-1, places, top.exp())
    forward = kept.sum(-1, keepdim=True) * own.exp() - kept
    expected += torch.where((entropy >= tau)[..., None], forward, 0.0)
    torch.testing.assert_close(found, expected / 4)


def test_eopd_s_gradient_equals_finite_differences() -> None:
    """Of the engine's own divergence, with a ratio, and a token that is not the student's."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(1, 5, 6))).requires_grad_()
    teacher = torch.log_softmax(torch.from_numpy(2 * rng.normal(size=(1, 5, 6))), -1)
    ids, live = torch.tensor([[0, 3, 5, 1, 2]]), torch.tensor([[1, 1, 0, 1, 1]])
    entropy = -(teacher.exp() * teacher).sum(-1)
    tau = float(entropy[0, [0, 1, 3, 4]].median())
    top, places = teacher.topk(3, -1)
    given = teacher.gather(-1, ids[..., None])[..., 0]

    def chosen(at: Tensor) -> Tensor:
        return torch.log_softmax(at, -1).gather(-1, ids[..., None])[..., 0]

    held = chosen(logits).detach()
    old = held + 0.1 * torch.from_numpy(rng.normal(size=(1, 5)))
    forward = topk_divergence(torch.log_softmax(logits, -1).gather(-1, places), top, 0, rest=False)
    gated = torch.where(entropy >= tau, forward, 0.0)
    batch = TokenBatch(chosen(logits), old, given, entropy, live, divergence=gated)
    loss = whole_loss(EOPD(tau=tau, alpha=0.7, top_k=3), batch)
    (found,) = torch.autograd.grad(loss, logits)

    def value(at: Tensor) -> float:  # rewards held
        own, total = torch.log_softmax(at, -1)[0], 0.0
        for t in (0, 1, 3, 4):
            token = int(ids[0, t])
            reward = float(given[0, t] - held[0, t])
            total -= math.exp(float(own[t, token] - old[0, t])) * reward
            if entropy[0, t] >= tau:
                for k in teacher[0, t].argsort(descending=True)[:3].tolist():
                    p = float(teacher[0, t, k])
                    total += 0.7 * math.exp(p) * (p - float(own[t, k]))
        return total / 4

    assert 0 < int((entropy >= tau)[live > 0].sum()) < 4
    assert float(loss.detach()) == pytest.approx(value(logits.detach()))
    step, slope = 1e-5, torch.zeros_like(found)
    for place in range(slope.numel()):
        shift = torch.zeros_like(found)
        shift.view(-1)[place] = step
        more, less = value(logits.detach() + shift), value(logits.detach() - shift)
        slope.view(-1)[place] = (more - less) / (2 * step)
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


# Settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("iw_opd", {"gamma": -0.1}, r"objective\.gamma must not be negative"),
        ("exopd", {"scale": 0.0}, r"objective\.scale must be positive"),
        ("sod", {"delta": -1}, r"objective\.delta must not be negative"),
        ("eopd", {"tau": -1}, r"objective\.tau must not be negative"),
        ("eopd", {"alpha": -1}, r"objective\.alpha must not be negative"),
        ("eopd", {"top_k": 0}, r"objective\.top_k must be at least 1"),
    ],
)
def test_settings_that_cannot_work(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, settings)
