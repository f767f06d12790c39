"""The loss with a teacher of another vocabulary: each token has the reward of its whole span."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from step_rows import make_updates, rows_of

from reopold_agent.config import OptimizerConfig
from reopold_agent.objectives import Reopold
from reopold_agent.objectives.pieces import distillation_reward, span_teacher_logp
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.rows import entropy_threshold, spans_of
from reopold_agent.train.update import Updater, UpdateStats
from reopold_agent.types import Reading, Trajectory


def linear() -> OptimizerConfig:
    """AdamW whose huge epsilon makes a step proportional to the gradient."""
    return OptimizerConfig(lr=0.01, eps=1.0, weight_decay=0.0, max_grad_norm=1e6)


def test_every_token_has_its_spans_reward_under_the_current_student() -> None:
    sampler = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    spans = torch.tensor([0, 0, 1, -1])
    teacher_sums = torch.tensor([-2.5, -2.5, -7.0])
    reward = torch.tensor([0.5, 0.5, -4.0, 0.0])  # -2.5 + 3; -7 + 3; none
    scores = reward + sampler
    assert torch.equal(span_teacher_logp(scores, sampler, sampler, spans), scores)
    logp = torch.tensor([-1.5, -1.0, -2.0, -0.25], requires_grad=True)
    now = distillation_reward(logp, span_teacher_logp(scores, sampler, logp, spans))
    expected = [-2.5 + 2.5, -2.5 + 2.5, float(teacher_sums[2]) + 2.0]
    assert now[:3].tolist() == pytest.approx(expected)
    assert not now.requires_grad


def test_spans_of_one_token_change_no_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    teacher, sampler, logp = torch.randn(3, 1000, generator=rng).mul(9)
    assert torch.equal(span_teacher_logp(teacher, sampler, logp, torch.arange(1000)), teacher)


def test_rows_number_their_spans_through() -> None:
    def spanned(length: int, spans: list[int] | None) -> Any:
        mask = np.array([False] + [True] * length)
        trajectory = copy.copy(EMPTY)
        trajectory.loss_mask = mask
        trajectory.entropy = np.arange(length + 1, dtype=np.float32)
        trajectory.logp = np.zeros(length + 1, np.float32)
        trajectory.reading = None
        if spans is not None:
            trajectory.reading = Reading(trajectory, student_spans=np.array([-1, *spans]))
        return rows_of([trajectory])[0]

    rows = [spanned(3, [0, 0, -1]), spanned(2, None), spanned(2, [-1, 0])]
    found = spans_of(rows)
    assert found is not None
    assert [each.tolist() for each in found] == [[-1, 0, 0, -1], [-1, 1, 2], [-1, -1, 3]]
    assert spans_of(rows[1:2]) is None
    assert rows[0].span_entropy.tolist() == [0, 2, 2, 3]
    assert rows[0].learned.tolist() == [False, True, True, False]
    # Of the entropies 2, 2, 1, 2, 2 the most uncertain fifth begins at 2.
    assert entropy_threshold(Reopold(switch_step=0, top_share=0.2), rows) == 2


EMPTY = Trajectory.__new__(Trajectory)


@pytest.fixture(scope="module")
def batch(
    random_trajectory: Callable[..., Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> list[Trajectory]:
    """Trajectories with random spans of one to three tokens, some tokens without one."""
    made = [random_trajectory(i, turns=1 + i % 2) for i in range(5)]
    rng = np.random.default_rng(0)
    scores = make_policy(make_model(seed=1)).score(made, with_entropy=True)
    for t, score in zip(made, scores, strict=True):
        noise = rng.normal(0, 0.2, len(t.ids))
        t.logp = np.where(t.loss_mask, score.logp + noise, 0).astype(np.float32)
        t.entropy = score.entropy
        spans = np.full(len(t.ids), -1)
        at = np.flatnonzero(t.loss_mask)
        spans[at] = np.cumsum(rng.random(len(at)) < 0.6)
        spans[at[rng.random(len(at)) < 0.1]] = -1
        _, numbered = np.unique(spans[spans >= 0], return_inverse=True)
        spans[spans >= 0] = numbered
        t.reading = Reading(t, student_spans=spans)
        reward = np.zeros(len(t.ids))
        inside = spans >= 0
        reward[inside] = rng.normal(-0.5, 2.0, spans.max() + 1)[spans[inside]]
        t.teacher_logp = (t.logp + reward).astype(np.float32)
    return made


def test_the_loss_by_hand_and_by_micro_batches(
    batch: list[Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    total, count = 0.0, 0
    objective = Reopold(switch_step=5)
    (current,) = [make_policy(make_model(seed=1)).score(batch)]
    for t, score in zip(batch, current, strict=True):
        assert t.teacher_spans is not None
        assert t.teacher_logp is not None
        for span in range(int(t.teacher_spans.max()) + 1):
            at = np.flatnonzero(t.teacher_spans == span)
            teacher_sum = float(t.teacher_logp[at[0]] - t.logp[at[0]]) + float(t.logp[at].sum())
            reward = teacher_sum - float(score.logp[at].sum())
            if reward <= objective.floor:
                continue
            ratio = np.exp((score.logp - t.logp)[at]).sum()
            total, count = total + ratio * reward, count + len(at)

    def updated(most: int) -> tuple[torch.Tensor, UpdateStats]:
        policy = make_policy(make_model(seed=1))
        stats = make_updates(Updater(policy, objective, linear(), max_tokens=most), [batch], 0)
        return torch.cat([p.detach().flatten() for p in policy.adapter.model.parameters()]), stats

    whole, stats = updated(10**6)
    assert stats.loss == pytest.approx(-total / count, rel=1e-4)
    split, again = updated(40)
    assert (split - whole).abs().max() < 1e-6
    assert again.loss == pytest.approx(stats.loss, abs=1e-5)


# The bias on a toy that can be enumerated


def test_the_surrogates_gradient_on_a_toy() -> None:
    """Texts of two letters, a student of letters and a teacher that also has the token "ab".

    The immediate-reward surrogate gives each token its span's reward, and leaves out what later
    spans earn. Where the cuts are fixed it is the gradient of the sum of the spans' KLs with the
    earlier text given; where a span's end depends on a later token (here: "a" is a span alone, or
    the beginning of "ab") the expected reward of the first token mixes both cases.
    """
    first = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.1, 0.4], [-0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    teacher = {"aa": 0.3, "ab": 0.35, "ba": 0.15, "bb": 0.2}
    # The teacher's tokens: a, b and ab (written canonically): p(a...) then p(a | a) = 1.
    begins = {"a": teacher["aa"], "b": teacher["ba"] + teacher["bb"], "ab": teacher["ab"]}

    def logps() -> tuple[torch.Tensor, torch.Tensor]:
        return first.log_softmax(-1), second.log_softmax(-1)

    surrogate = torch.zeros((), dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64)
    for letters in itertools.product("ab", repeat=2):
        text = "".join(letters)
        one, two = logps()
        i, j = "ab".index(text[0]), "ab".index(text[1])
        pair = one[i], two[i, j]
        p = (pair[0] + pair[1]).exp()
        if text == "ab":
            rewards = [np.log(begins["ab"]) - pair[0] - pair[1]] * 2
        else:
            after = teacher[text] / (begins["a"] if text[0] == "a" else begins["b"])
            rewards = [np.log(begins[text[0]]) - pair[0], np.log(after) - pair[1]]
        surrogate = surrogate + p.detach() * sum(
            logp * reward.detach() for logp, reward in zip(pair, rewards, strict=True)
        )
        kl = kl + p * (pair[0] + pair[1] - np.log(teacher[text]))
    of_surrogate = torch.autograd.grad(-surrogate, (first, second), retain_graph=True)
    of_kl = torch.autograd.grad(kl, (first, second))
    # After "b" all cuts are fixed, and the last token has no later one: the KL's gradient.
    assert torch.allclose(of_surrogate[1][1], of_kl[1][1])
    # After "a" the span "ab" counts the first letter's log-ratio, and "aa" leaves it to the first
    # span: a difference between the second letters that the KL does not make. By hand:
    (a, _), (aa, _) = first.softmax(-1).tolist(), second[0].softmax(-1).tolist()
    bias = a * aa * (1 - aa) * (np.log(0.3) - np.log(a))
    assert bias == pytest.approx(-0.1111, abs=1e-4)
    assert (of_surrogate[1][0] - of_kl[1][0]).tolist() == pytest.approx([bias, -bias], abs=1e-12)
    assert torch.dot(of_surrogate[1][0], of_kl[1][0]) > 0
    # For the first letter it even points the other way: 0.65 of the teacher's texts begin with the
    # letter a, but only 0.3 with the token "a", and what the next letter then gains (its log-prob
    # is 0) does not return to the first. With a teacher of letters it points as the KL does.
    assert torch.dot(of_surrogate[0], of_kl[0]) < 0
    letters_reward = [float(np.log(0.65 / a)), float(np.log(0.35 / (1 - a)))]
    of_letters = a * (1 - a) * (letters_reward[1] - letters_reward[0])
    assert of_letters * float(of_kl[0][0]) > 0
