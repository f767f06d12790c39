"""Truncated importance sampling, ``objective.importance_cap``: weights, gradients, runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import assert_same_weights, composed, results, train, train_rows
from step_rows import rows_of, update_rows

from reopold_agent.config import OptimizerConfig, importance_cap
from reopold_agent.errors import CheckpointError, ConfigError, NonFiniteError
from reopold_agent.objectives import (
    GRPO,
    OBJECTIVES,
    LossTerms,
    Objective,
    ReverseKL,
    ReverseKLStopGradient,
    TokenBatch,
    make_objective,
)
from reopold_agent.objectives.pieces import (
    distillation_reward,
    importance_ratio,
    importance_weight,
    scale_gradient,
)
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train import finish, loop
from reopold_agent.train.banner import _objective, importance_note
from reopold_agent.train.engine import effective_importance_cap
from reopold_agent.train.rows import Row
from reopold_agent.train.update import Updater
from reopold_agent.types import FloatArray, Trajectory

BFLOAT16 = ("engine.precision=bfloat16", "engine.old_logp=recompute")
SHORT = ("steps=2", "evaluation.tasks=0", "objective.switch_step=1")


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plots; global random state kept."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        yield


@dataclass(frozen=True)
class Limited(Objective):
    """A plugin's objective with a setting of its own, whose loss is a sum that we cannot see."""

    limit: float

    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        assert batch.logp_teacher is not None
        reward_BT = distillation_reward(batch.logp, batch.logp_teacher).clamp(max=self.limit)
        ratio_BT = importance_ratio(batch.logp, batch.logp_old)
        mask_BT = batch.loss_mask
        return LossTerms(
            -(ratio_BT * reward_BT)[mask_BT].sum(),
            mask_BT.sum(),
            reward_BT,
            reward_BT,
            mask_BT,
            ratio_BT.detach(),
        )


# Weights and gradients


def test_weights_by_hand() -> None:
    old = torch.tensor([-1.0, -1.0, -0.5, -3.0])
    sampler = torch.tensor([-1.0, -1.0 - math.log(1.5), -2.5, -1.0])
    expected = [1.0, 1.5, 2.0, math.exp(-2.0)]  # the third would be e^2
    assert importance_weight(old, sampler, 2.0).tolist() == pytest.approx(expected, rel=1e-6)
    assert importance_weight(old, sampler, 10.0)[2].item() == pytest.approx(math.exp(2), rel=1e-6)
    assert torch.equal(importance_weight(old, old, 1.0), torch.ones(4))
    assert importance_weight(old.bfloat16(), sampler, 2.0).dtype == torch.float32


def test_weights_of_infinite_gaps() -> None:
    minus = -math.inf
    old = torch.tensor([minus, -1.0, -1.0, minus, math.nan])
    sampler = torch.tensor([-1.0, minus, -2e3, minus, -1.0])
    weight = importance_weight(old, sampler, 2.0)
    assert weight[:3].tolist() == [0.0, 2.0, 2.0]
    assert weight[3:].isnan().all()


def losses(
    objective: Objective, batch: dict[str, FloatArray]
) -> Callable[[FloatArray], FloatArray]:
    """The loss of each token as a function of its log-prob, in numpy, rewards held where the
    objective holds them."""
    reward = batch["logp_teacher"] - batch["logp"]

    def each(logp: FloatArray) -> FloatArray:
        ratio = np.exp(logp - batch["logp_old"])
        if isinstance(objective, GRPO):
            gain = batch["advantage"]
            return -np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
        if isinstance(objective, ReverseKL):
            return -ratio * (batch["logp_teacher"] - logp)
        limit = objective.limit if isinstance(objective, Limited) else np.inf
        return -ratio * np.minimum(reward, limit)

    return each


@pytest.mark.parametrize("cap", [1.2, 2.0, 50.0])
@pytest.mark.parametrize(
    "objective",
    [ReverseKLStopGradient(), ReverseKL(), GRPO(aggregate="token"), Limited(limit=0.3)],
    ids=lambda each: type(each).__name__,
)
def test_each_tokens_gradient_is_that_of_its_weighted_loss(
    objective: Objective, cap: float
) -> None:
    rng = np.random.default_rng(0)
    names = ("logp", "logp_old", "logp_teacher", "entropy", "advantage", "sampler")
    batch: dict[str, Any] = {name: -rng.exponential(size=(2, 6)) for name in names}
    gap = batch["logp_old"] - batch["sampler"]
    weight = np.minimum(np.exp(gap), cap)
    assert (weight == cap).any() or cap == 50.0
    assert (weight < cap).any()

    leaves = {name: torch.from_numpy(value) for name, value in batch.items()}
    logp = leaves["logp"].requires_grad_()
    scaled = scale_gradient(logp, importance_weight(leaves["logp_old"], leaves.pop("sampler"), cap))
    assert torch.equal(scaled, logp)
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    tokens = TokenBatch(**{**leaves, "logp": scaled}, loss_mask=mask)
    objective.terms(tokens, 0, None).numerator.backward()

    each, step = losses(objective, batch), 1e-6
    slope = (each(batch["logp"] + step) - each(batch["logp"] - step)) / (2 * step)
    assert logp.grad is not None
    np.testing.assert_allclose(logp.grad, weight * slope * mask.numpy(), rtol=1e-6, atol=1e-8)
    assert np.abs(logp.grad.numpy() - slope * mask.numpy()).max() > 0.1  # the weights do matter


def test_which_objectives_are_weighted() -> None:
    """Those whose terms are expectations over the student's draw of a token."""
    unweighted = {n for n in OBJECTIVES.names() if not make_objective(n, {}).weighs_tokens}
    assert unweighted == {"gkd", "sft"}
    assert Limited(limit=1.0).weighs_tokens


def test_a_cap_without_effect_is_told_and_not_shown() -> None:
    for name in ("gkd", "sft", "grpo", "reopold"):
        given = composed(f"objective={name}", "objective.importance_cap=1.5")[0]
        made = make_objective(name, given.objective)
        note = importance_note(given, made)
        shown = "importance_cap 1.5" in _objective(given.objective, made)
        assert shown == made.weighs_tokens == (note is None)
        assert effective_importance_cap(given, made) == (1.5 if shown else None)
        if note is not None:
            assert f"importance_cap=1.5 has no effect with objective={name}" in note
        for words in ((), ("objective.importance_cap=null",)):
            usual = composed(f"objective={name}", *words)[0]
            assert importance_note(usual, made) is None


# The setting


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.99, r"importance_cap must be at least 1.*got 0\.99\.\nSet null for no weights\."),
        (-1, "at least 1"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        ("two", r"'objective\.importance_cap' must be"),
        (True, r"'objective\.importance_cap' must be"),
    ],
)
def test_a_cap_that_cannot_be_is_refused(value: Any, message: str) -> None:
    for make in (importance_cap, lambda settings: make_objective("grpo", settings)):
        with pytest.raises(ConfigError, match=message):
            make({"importance_cap": value})


def test_the_cap_is_taken_before_the_class_s_own_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "get", lambda name: Limited)
    assert make_objective("limited", {"limit": 2.0, "importance_cap": None}) == Limited(2.0)
    assert composed("objective=grpo", "objective.importance_cap=3")[0].importance_cap == 3.0
    assert composed("objective.importance_cap=null")[0].importance_cap is None
    config, _ = composed()
    assert config.importance_cap == 2.0
    assert replace(config, objective={"name": "rkl"}).importance_cap == 2.0  # a plugin's own file

    @dataclass(frozen=True)
    class Clashing(Limited):
        importance_cap: float = 5.0

    monkeypatch.setattr(OBJECTIVES, "get", lambda name: Clashing)
    with pytest.raises(ConfigError, match=r"has a field 'importance_cap', .*\nRename the field"):
        make_objective("clashing", {"limit": 2.0})


# The update


def updated(
    policy: TransformersPolicy, trajectories: list[Trajectory], weight: FloatArray | float | None
) -> tuple[torch.Tensor, float]:
    """The step of an optimizer that steps by the gradient, and the gradient's norm."""
    rows = rows_of(trajectories)
    if weight is not None:
        for row in rows:
            row.weight = np.full(len(row.trajectory.ids), weight, np.float32)
    config = OptimizerConfig(lr=0.01, eps=1.0, weight_decay=0.0, max_grad_norm=1e6)
    updater = Updater(policy, ReverseKLStopGradient(), config, max_tokens=60)
    before = torch.cat([p.detach().flatten().clone() for p in policy.adapter.model.parameters()])
    norm = update_rows(updater, [rows], 0).grad_norm
    after = torch.cat([p.detach().flatten() for p in policy.adapter.model.parameters()])
    return after - before, norm


def test_an_update_weighs_its_tokens(
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
    random_trajectory: Callable[..., Trajectory],
) -> None:
    batch = [random_trajectory(seed, turns=1 + seed) for seed in range(3)]

    def update(weight: float | None) -> tuple[torch.Tensor, float]:
        return updated(make_policy(make_model(seed=1)), batch, weight)

    plain, norm = update(None)
    ones, norm_of_ones = update(1.0)
    assert torch.equal(ones, plain)  # bit for bit
    assert norm_of_ones == norm > 0
    assert update(1.5)[1] == pytest.approx(1.5 * norm, rel=1e-5)
    assert not update(0.0)[0].any()


# Runs


def test_with_the_samplers_own_log_probs_nothing_changes(tmp_path: Path) -> None:
    """float32 on the CPU: the sampler's log-probs are the old ones, so all weights are 1."""
    train(tmp_path / "weighted", *SHORT)
    train(tmp_path / "plain", *SHORT, "objective.importance_cap=null")
    assert_same_weights(tmp_path / "weighted/final", tmp_path / "plain/final")
    rows = train_rows(tmp_path / "weighted")
    assert [row.pop("importance/mean") for row in rows] == [1.0, 1.0]
    assert [row.pop("importance/capped_share") for row in rows] == [0.0, 0.0]
    left = [{k: v for k, v in row.items() if not k.startswith("importance/")}
            for row in results(tmp_path / "weighted")["metrics.jsonl"]]  # fmt: skip
    assert left == results(tmp_path / "plain")["metrics.jsonl"]
    # A finished run goes on with the cap that it had, and no other.
    with pytest.raises(CheckpointError, match=r"objective\.importance_cap: 2\.0 -> None"):
        train(tmp_path / "weighted", *SHORT, "steps=3", "objective.importance_cap=null")


def test_in_bfloat16_tokens_count_by_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Row] = []
    original = loop.set_behaviour

    def behaviour(rows: Any, *arguments: Any) -> Any:
        found = original(rows, *arguments)
        seen.extend(rows)
        return found

    monkeypatch.setattr(loop, "set_behaviour", behaviour)
    words = ("objective=rkl_sg", "steps=1", "evaluation.tasks=0", *BFLOAT16)
    train(tmp_path / "weighted", *words, "objective.importance_cap=1")
    weights = [row.weight[row.trajectory.loss_mask] for row in seen if row.weight is not None]
    assert len(weights) == len(seen) == 4
    every = np.concatenate(weights).astype(float)
    assert every.max() == 1.0
    assert every.min() < 0.99
    for row, weight in zip(seen, weights, strict=True):
        gap = (row.behaviour[0] - row.trajectory.logp)[row.trajectory.loss_mask]
        np.testing.assert_allclose(weight, np.minimum(np.exp(gap), 1.0), rtol=1e-6)
    (logged,) = train_rows(tmp_path / "weighted")
    assert logged["importance/mean"] == pytest.approx(every.mean(), rel=1e-6)
    assert logged["importance/mean"] < 1.0
    assert 0 < logged["importance/capped_share"] < 1

    train(tmp_path / "plain", *words, "objective.importance_cap=null")
    (plain,) = train_rows(tmp_path / "plain")
    assert plain["loss"] == logged["loss"]  # of the sampled tokens as they are
    assert plain["grad_norm"] != logged["grad_norm"]
    assert not [key for key in plain if key.startswith("importance/")]


def test_a_samplers_number_that_gives_no_weight_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.set_behaviour

    def behaviour(rows: Any, *arguments: Any) -> Any:
        trajectory = rows[1].trajectory
        logp = trajectory.logp.copy()
        logp[np.flatnonzero(trajectory.loss_mask)[2]] = -math.inf
        trajectory.logp = logp
        return original(rows, *arguments)

    monkeypatch.setattr(loop, "set_behaviour", behaviour)
    with pytest.raises(NonFiniteError, match=r"step 0, task .*the sampler's log-probs .*finite"):
        train(tmp_path, *SHORT, *BFLOAT16)
