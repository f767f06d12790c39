"""The outcome beside the teacher, ``objective.outcome``: formula, schedule, masks, settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from running import composed
from torch import Tensor

from reopold_agent.config import OUTCOME_DEFAULTS, OutcomeConfig
from reopold_agent.errors import ConfigError
from reopold_agent.objectives import (
    OBJECTIVES,
    LossTerms,
    Objective,
    Outcomes,
    Reopold,
    RunFacts,
    TokenBatch,
    WithOutcome,
    make_objective,
    whole_loss,
)
from reopold_agent.objectives.pieces import reward_floor
from reopold_agent.train.banner import _objective, outcome_note
from reopold_agent.train.engine import run_objective

FLOOR = reward_floor(0.1)  # -2.558
TAUGHT = sorted({*OBJECTIVES.names()} - {"grpo", "sft"})
"""The objectives beside which an outcome may stand."""


def with_outcome(name: str, **settings: Any) -> WithOutcome:
    made = make_objective(name, settings)
    assert isinstance(made, WithOutcome)
    return made.for_run(RunFacts(10, 100))


def batch_of(**changes: Any) -> TokenBatch:
    """Two episodes: three tokens, of which the second is below the floor, and two."""
    values: dict[str, Any] = {
        "logp": [[-1.0, -1.0, -2.0], [-0.5, -3.0, -7.0]],
        "logp_old": [[-1.0, -1.0, -2.0], [-0.5, -3.0, -7.0]],
        "logp_teacher": [[-0.5, -9.0, -1.0], [-1.5, -1.0, -7.0]],
        "entropy": [[1.0, 0.2, 0.1], [0.3, 2.0, 9.0]],
        "loss_mask": [[1, 1, 1], [1, 1, 0]],
        "advantage": [[0.7, 0.7, 0.7], [-0.7, -0.7, -0.7]],
    }
    made = {
        name: value if value is None or isinstance(value, Tensor) else torch.tensor(value).double()
        for name, value in {**values, **changes}.items()
    }
    return TokenBatch(**made)


# The formula


def test_a_token_below_the_floor_is_masked_for_the_teacher_and_not_for_the_outcome() -> None:
    objective = with_outcome("reopold", outcome=2.0, switch_step=5)
    terms = objective.terms(batch_of(), 0, 0.0)
    outcome = 2.0 * 0.7
    rewards = [0.5 + outcome, outcome, 1.0 + outcome, -1.0 - outcome, 2.0 - outcome]
    assert float(terms.numerator) == pytest.approx(-sum(rewards))
    assert float(terms.denominator) == 5
    assert terms.clipped_reward[terms.mask].tolist() == pytest.approx(rewards)
    assert terms.reward[0, 1].item() == pytest.approx(-8.0)  # the log's, as without an outcome


def test_the_outcome_on_kept_tokens_only() -> None:
    objective = with_outcome("reopold", outcome=2.0, outcome_tokens="kept", switch_step=5)
    terms = objective.terms(batch_of(), 0, 0.0)
    rewards = [0.5 + 1.4, 1.0 + 1.4, -1.0 - 1.4, 2.0 - 1.4]
    assert float(terms.numerator) == pytest.approx(-sum(rewards))
    assert float(terms.denominator) == 4
    assert not terms.mask[0, 1]


def test_refinement_clips_and_masks_the_teacher_alone() -> None:
    batch = batch_of()
    objective = with_outcome("reopold", outcome=1.0, switch_step=0, top_share=0.4)
    terms = objective.terms(batch, 0, objective.threshold(batch.entropy, batch.loss_mask))
    # The two highest entropies: the first token of the first episode and the last of the second.
    assert float(terms.numerator) == pytest.approx(-(0.5 + 2.0 + 3 * 0.7 - 2 * 0.7))
    low = batch_of(entropy=[[1.0, 2.0, 0.1], [0.3, 0.2, 9.0]])
    terms = objective.terms(low, 0, objective.threshold(low.entropy, low.loss_mask))
    assert float(terms.numerator) == pytest.approx(-(0.5 + FLOOR + 0.7))


def test_with_rkl_sg_it_is_the_advantage_of_mopd() -> None:
    """``sg[log pi_T - log pi] + alpha A`` at every token (2601.02780, eq. 9)."""
    batch = batch_of(logp_old=[[-1.2, -0.9, -2.0], [-0.5, -2.5, -7.0]])
    loss = whole_loss(with_outcome("rkl_sg", outcome=0.3), batch)
    live = batch.loss_mask
    assert batch.logp_teacher is not None
    assert batch.advantage is not None
    advantage = batch.logp_teacher - batch.logp + 0.3 * batch.advantage
    ratio = (batch.logp - batch.logp_old).exp()
    assert float(loss) == pytest.approx(float(-(ratio * advantage)[live].mean()))


@pytest.mark.parametrize("mask", ["none", "response", "group"])
@pytest.mark.parametrize("name", TAUGHT)
def test_the_gradient_is_that_of_both_terms(name: str, mask: str) -> None:
    """By finite differences, rewards held where the objective holds them."""
    rng = np.random.default_rng(1)
    names = ("logp", "logp_old", "logp_teacher", "entropy", "divergence")
    values: dict[str, Any] = {n: torch.from_numpy(-rng.exponential(size=(3, 5))) for n in names}
    values["logp_old"] = values["logp"] + 0.1 * torch.from_numpy(rng.normal(size=(3, 5)))
    live = torch.ones(3, 5).bool()
    live[1, 3:] = False
    taught = torch.tensor([True, mask == "none", True])[:, None].expand(3, 5)
    advantage = torch.tensor([0.5, -1.0, 0.5]).double()[:, None].expand(3, 5)
    objective = with_outcome(name, outcome=0.6, outcome_mask=mask)
    parts = {"loss_mask": live, "advantage": advantage, "taught": taught}
    parts["episode"] = torch.arange(3)[:, None].expand(3, 5)
    parts["logp_reference"] = torch.from_numpy(-rng.exponential(size=(3, 5)))
    parts["turn"] = torch.tensor([0, 0, 1, 1, 1]).expand(3, 5)
    logp = values.pop("logp").requires_grad_()
    batch = TokenBatch(logp=logp, **values, **parts)
    threshold = objective.threshold(batch.entropy, live)
    terms = objective.terms(batch, 0, threshold)
    (found,) = torch.autograd.grad(terms.numerator, logp)

    own = objective.own.terms(replace(batch, loss_mask=live & taught), 0, threshold)
    if own.numerator.requires_grad and name != "gkd":
        (expected,) = torch.autograd.grad(own.numerator, logp)
    else:
        expected = torch.zeros_like(logp)  # of gkd, whose divergence is a constant here
    step = 1e-6

    def policy_gradient(at: Tensor) -> Tensor:
        return -((at - batch.logp_old).exp() * 0.6 * advantage * live)

    slope = (policy_gradient(logp + step) - policy_gradient(logp - step)) / (2 * step)
    torch.testing.assert_close(found, expected + slope, rtol=1e-6, atol=1e-8)
    assert float(terms.denominator) == live.sum()
    assert float(terms.numerator.detach()) == pytest.approx(
        float(own.numerator.detach() + policy_gradient(logp.detach()).sum())
    )
    assert slope[1, :3].abs().min() > 0.1  # the outcome acts where the teacher is masked


def test_micro_batches_add_up() -> None:
    whole = batch_of()
    objective = with_outcome("reopold", outcome=0.4, switch_step=0)
    threshold = objective.threshold(whole.entropy, whole.loss_mask)
    rows = [
        TokenBatch(**{k: None if v is None else v[i : i + 1] for k, v in vars(whole).items()})
        for i in range(2)
    ]
    for field in ("numerator", "denominator"):
        parts = [float(getattr(objective.terms(row, 1, threshold), field)) for row in rows]
        expected = float(getattr(objective.terms(whole, 1, threshold), field))
        assert sum(parts) == pytest.approx(expected)


def test_infinities_in_masked_places_do_no_harm() -> None:
    logp = torch.tensor([[-1.0, -math.inf], [-0.5, math.nan]]).double().requires_grad_()
    batch = batch_of(
        logp=logp,
        logp_old=[[-1.0, -1.0], [-0.5, -1.0]],
        logp_teacher=[[-0.5, -math.inf], [-1.0, -1.0]],
        entropy=[[1.0, 1.0], [1.0, 1.0]],
        loss_mask=[[1, 0], [1, 0]],
        advantage=[[0.7, 0.7], [-0.7, -0.7]],
    )
    loss = whole_loss(with_outcome("rkl_sg_clip", outcome=1.0), batch)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.isfinite().all()
    assert loss.isfinite()


# Advantages and masks


def outcomes() -> Outcomes:
    zeros = torch.zeros(6)
    return Outcomes(
        reward=torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5, 2.0]),
        group=torch.tensor([4, 4, 4, 1, 1, 7]),
        tool_calls=zeros,
        tool_successes=zeros,
        tokens=zeros,
        success=torch.tensor([True, False, False, False, False, True]),
    )


def test_advantages_are_of_the_group() -> None:
    one = with_outcome("rkl_sg", outcome=1.0).advantages(outcomes())
    std = math.sqrt(1 / 3)
    assert one.tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0, 0, 0], 1e-4)
    plain = with_outcome("rkl_sg", outcome=1.0, outcome_normalise=False).advantages(outcomes())
    assert plain.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


def test_reward_guided_masks() -> None:
    def taught(mask: str) -> list[bool] | None:
        found = with_outcome("rkl_sg", outcome=1.0, outcome_mask=mask).taught(outcomes())
        return None if found is None else found.tolist()

    assert taught("none") is None
    assert taught("response") == [False, True, True, True, True, False]
    assert taught("group") == [False, False, False, True, True, False]


# The schedule


def test_alpha_by_hand() -> None:
    linear = OutcomeConfig(outcome=0.2, outcome_end=1.0, outcome_from=2, outcome_until=6)
    steps = range(9)
    ramp = [0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert [linear.alpha(s) for s in steps] == pytest.approx(ramp)
    wave = [0.2 + 0.8 * (1 - math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    cosine = replace(linear, outcome_curve="cosine")
    assert [cosine.alpha(s) for s in steps] == pytest.approx([0.2, 0.2, *wave, 1.0, 1.0])
    assert [OutcomeConfig(outcome=0.5).alpha(s) for s in (0, 7)] == [0.5, 0.5]
    jump = replace(linear, outcome_until=2)
    assert [jump.alpha(s) for s in (2, 3)] == [0.2, 1.0]


def test_the_schedule_ends_with_the_run_that_was_started() -> None:
    words = ("objective.outcome=1", "objective.outcome_end=0", "steps=20")
    config, raw = composed(*words)
    objective = run_objective(config)
    assert isinstance(objective, WithOutcome)
    assert objective.setting("outcome_until") == 19
    assert objective.setting("switch_step") == 7  # of the objective itself
    assert objective.setting("nothing") is None
    assert objective.outcome.alpha(19) == 0
    terms = [objective.terms(batch_of(), step, 0.0) for step in (10, 19)]
    assert terms[0].clipped_reward[0, 0] > terms[1].clipped_reward[0, 0]
    assert terms[0].denominator == terms[1].denominator  # no jump where it reaches 0
    saved = {**raw, "objective": {**raw["objective"], "outcome_until": 19, "switch_step": 7}}
    longer = run_objective(replace(config, steps=40), saved)
    assert longer == objective
    assert (
        run_objective(composed("objective.outcome=1", "steps=1")[0]).setting("outcome_until")
        is None
    )
    short = run_objective(composed(*words[:2], "steps=1")[0])
    assert short.setting("outcome_until") == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("objective.outcome_from=5", "steps=2"), True),
        (("objective.outcome_from=1", "steps=2"), True),  # the last step still has outcome
        (("objective.outcome_from=1", "steps=3"), False),
        (("objective.outcome=1", "objective.outcome_from=5", "steps=2"), False),  # no change
        (("objective.outcome_from=5", "steps=0"), False),
    ],
)
def test_a_schedule_that_never_begins_is_warned_of(words: tuple[str, ...], told: bool) -> None:
    config = composed("objective.outcome_end=1", *words)[0]
    note = outcome_note(config)
    assert (note is not None) == told
    objective = run_objective(config)
    assert isinstance(objective, WithOutcome)
    assert told == ({objective.outcome.alpha(step) for step in range(config.steps)} == {0.0})
    if told:
        assert note is not None
        assert note.startswith(
            "warning: objective.outcome_end=1 has no effect: objective.outcome=0"
        )
        assert note.endswith("the run has 2 steps. Set an earlier step, or more steps.")


# The setting


def test_without_an_outcome_the_objective_is_itself() -> None:
    assert make_objective("reopold", {"outcome": 0.0, **OUTCOME_DEFAULTS}) == Reopold()
    assert make_objective("reopold", {"outcome": 0.0, "outcome_end": 0.0}) == Reopold()
    assert isinstance(make_objective("reopold", {"outcome_end": 0.1}), WithOutcome)


def test_an_outcome_takes_the_batch_of_groups() -> None:
    for words, expected in (
        ((), (32, 1, 32)),
        (("objective.outcome=0.5",), (4, 8, 4)),
        (("objective.outcome_end=0.5",), (4, 8, 4)),
        (("objective.outcome=1", "objective=gkd", "env=math"), (4, 8, 4)),
        (("objective.outcome=1", "batch.samples=2"), (4, 2, 4)),
    ):
        batch = composed(*words)[0].batch
        assert (batch.prompts, batch.samples, batch.mini_batch) == expected
    with pytest.raises(ConfigError) as caught:
        composed("objective.outcome=1", "batch.samples=1")
    first, second = str(caught.value).splitlines()
    assert "objective.outcome compares the episodes of one task" in first
    assert second.startswith("Set batch.samples to at least 2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outcome": -1}, r"objective\.outcome must not be negative, got -1"),
        ({"outcome": math.nan}, "finite"),
        ({"outcome": "much"}, r"'objective\.outcome' must be float"),
        ({"outcome": True}, r"'objective\.outcome' must be float"),
        ({"outcome": 1, "outcome_end": -0.5}, r"outcome_end must not be negative"),
        ({"outcome": 1, "outcome_end": 0, "outcome_curve": "sine"}, r"linear, cosine; got 'sine'"),
        ({"outcome": 1, "outcome_tokens": "some"}, r"must be one of all, kept"),
        ({"outcome": 1, "outcome_mask": "episode"}, r"must be one of none, response, group"),
        (
            {"outcome_tokens": "kept"},
            r"outcome_tokens=kept has no effect without obj.*outcome\.\nS",
        ),
        ({"outcome_mask": "group"}, r"outcome_mask=group has no effect"),
        ({"outcome_normalise": False}, r"outcome_normalise=False has no effect"),
        ({"outcome": 1, "outcome_until": 9}, r"no effect without objective\.outcome_end\.\nSet"),
        ({"outcome": 1, "outcome_end": 0, "outcome_from": 9, "outcome_until": 3}, r"=3 is before"),
        ({"outcome": 1, "outcome_mask": "group", "outcome_tokens": "kept"}, r"only their outcome"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    for make in (OutcomeConfig.of, lambda all_: make_objective("reopold", all_)):
        with pytest.raises(ConfigError, match=message):
            make(settings)


def test_objectives_without_a_place_for_it_say_so() -> None:
    for name, told in (("grpo", "learns from outcomes already"), ("sft", "an expert's")):
        with pytest.raises(ConfigError, match=told) as caught:
            make_objective(name, {"outcome": 0.1})
        assert str(caught.value).count("\n") == 1
        assert f"objective={name}" in str(caught.value)
        assert make_objective(name, {"outcome": 0.0}) == OBJECTIVES.get(name)()


@dataclass(frozen=True)
class Doubled(Objective):
    """A plugin's objective: a mean over tokens or, with ``odd``, over something else."""

    odd: bool = False

    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        assert batch.logp_teacher is not None
        reward = 2 * (batch.logp_teacher - batch.logp.detach())
        mask, ratio = batch.loss_mask, (batch.logp - batch.logp_old).exp()
        count = mask.sum() + int(self.odd)
        return LossTerms(-(ratio * reward)[mask].sum(), count, reward, reward, mask, ratio.detach())


def test_beside_a_plugin_s_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "get", lambda name: Doubled)
    objective = with_outcome("doubled", outcome=1.0)
    assert objective.own == Doubled()
    terms = objective.terms(batch_of(), 0, None)
    rewards = [1.0 + 0.7, -16.0 + 0.7, 2.0 + 0.7, -2.0 - 0.7, 4.0 - 0.7]
    assert float(terms.numerator) == pytest.approx(-sum(rewards))
    with pytest.raises(ConfigError, match="Doubled divides by something else"):
        with_outcome("doubled", outcome=1.0, odd=True).terms(batch_of(), 0, None)


def test_the_banner_shows_it_where_it_counts() -> None:
    for words, shown in ((("objective.outcome=0.5",), True), ((), False)):
        config = composed(*words)[0]
        line = _objective(config.objective, run_objective(config))
        assert ("outcome 0.5" in line) == shown
        assert ("outcome_tokens all" in line) == shown
        assert "importance_cap 2.0" in line
