"""Our objectives against verl's and TRL's on the same tensors, and the differences.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``. The differences are listed
in ``docs/objective.md``.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reopold_agent.objectives import GRPO, Objective, TokenBatch, make_objective, whole_loss
from reopold_agent.objectives.divergence import (
    divergence_of_states,
    generalised_jsd,
    topk_divergence,
)
from reopold_agent.objectives.grpo import group_advantages
from reopold_agent.objectives.pieces import importance_weight, scale_gradient, turns

pytestmark = pytest.mark.full_env
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

ROOT = Path(__file__).parents[1]
ROWS, TIME = 6, 9


@pytest.fixture(scope="module")
def algos() -> Any:
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs the full environment")


@pytest.fixture(scope="module")
def distillation(algos: Any) -> Any:
    from verl.trainer.distillation import losses

    return losses


@pytest.fixture(scope="module")
def jsd() -> Any:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs trl")
    return gkd.GKDTrainer.generalized_jsd_loss


def batch_of(seed: int = 0, *, spread: float = 0.3) -> dict[str, Tensor]:
    """Responses of different lengths, as the engine gives them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logp = -normal(ROWS, TIME).exp()
    lengths = torch.tensor([9, 1, 4, 7, 9, 2])
    mask = torch.arange(TIME)[None] < lengths[:, None]
    return {
        "logp": logp.requires_grad_(),
        "logp_old": (logp + spread * normal(ROWS, TIME)).detach(),
        "logp_teacher": -normal(ROWS, TIME).exp(),
        "entropy": normal(ROWS, TIME).abs(),
        "loss_mask": mask,
        "advantage": normal(ROWS, 1).expand(ROWS, TIME),
        "response_length": lengths[:, None].expand(ROWS, TIME).double(),
    }


def ours(objective: Objective, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    loss = whole_loss(objective, TokenBatch(**values))
    return loss.detach(), torch.autograd.grad(loss, values["logp"])[0]


def same(found: tuple[Tensor, Tensor], loss: Tensor, leaf: Tensor, tolerance: float = 1e-7) -> bool:
    """Whether value and gradient agree."""
    gradient = torch.autograd.grad(loss, leaf)[0]
    close = torch.isclose(found[0], loss.detach(), rtol=tolerance, atol=tolerance)
    return bool(close) and torch.allclose(found[1], gradient, rtol=tolerance, atol=tolerance)


# verl: GRPO


@pytest.mark.parametrize("normalise", [True, False])
def test_verl_advantages(algos: Any, normalise: bool) -> None:
    rng = np.random.default_rng(0)
    group = np.array([3, 3, 1, 1, 1, 7, 3, 5, 5, 5, 5])  # one alone, one group all equal
    reward = torch.tensor(rng.normal(size=11), dtype=torch.float64)
    reward[7:] = 1.0
    token_rewards = torch.zeros(11, 4, dtype=torch.float64)
    token_rewards[:, 2] = reward
    theirs, _ = algos.compute_grpo_outcome_advantage(
        token_rewards, torch.ones(11, 4), group, norm_adv_by_std_in_grpo=normalise
    )
    found = group_advantages(reward, torch.from_numpy(group), normalise=normalise)
    # A group of one keeps its reward as its advantage there; we have nothing to compare it with.
    alone = group == 7
    assert theirs[alone, 0].item() == pytest.approx(reward[5].item(), rel=1e-5)
    assert found[alone].item() == 0.0
    np.testing.assert_allclose(found[~alone], theirs[~alone, 0], rtol=1e-9, atol=1e-12)


def test_verl_advantages_of_equal_rewards_in_float32(algos: Any) -> None:
    # Off their float32 mean by 3e-8, of which their 1e-6 makes an advantage.
    reward, group = torch.full((8,), 0.3), np.zeros(8, dtype=int)
    theirs, _ = algos.compute_grpo_outcome_advantage(
        reward[:, None].clone(), torch.ones(8, 1), group
    )
    assert theirs.abs().max() > 0.01
    assert group_advantages(reward, torch.from_numpy(group)).abs().max() < 1e-6


AGGREGATES = {
    "token-mean": GRPO(aggregate="token"),
    "seq-mean-token-mean": GRPO(aggregate="sequence"),
    "seq-mean-token-sum-norm": GRPO(aggregate="budget", token_budget=64),
}


def actor(mode: str, **clip: float) -> Any:
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, **clip)
    config.global_batch_info.clear()
    if mode == "seq-mean-token-sum-norm":
        config.global_batch_info["loss_scale_factor"] = 64
    return config


@pytest.mark.parametrize("mode", AGGREGATES)
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_verl_policy_loss_and_aggregation(algos: Any, mode: str, high: float) -> None:
    for seed in range(5):
        values = batch_of(seed)
        ratio = (values["logp"] - values["logp_old"]).exp()
        assert ((ratio > 1.3) & (values["advantage"] > 0)).any()  # the clip matters
        assert ((ratio < 0.8) & (values["advantage"] < 0)).any()
        config = actor(mode, clip_ratio_low=0.2, clip_ratio_high=high)
        theirs, _ = algos.compute_policy_loss_vanilla(
            values["logp_old"],
            values["logp"],
            values["advantage"],
            values["loss_mask"].double(),
            loss_agg_mode=mode,
            config=config,
        )
        objective = replace(AGGREGATES[mode], clip_high=high)
        # Their token mean divides by length + 1e-8, their float64 sums differ in order.
        assert same(ours(objective, values), theirs, values["logp"])


def weighted(
    objective: Objective, values: dict[str, Tensor], sampler: Tensor, cap: float
) -> Tensor:
    """Our gradient with importance weights."""
    weight = importance_weight(values["logp_old"], sampler, cap)
    scaled = {**values, "logp": scale_gradient(values["logp"], weight)}
    loss = whole_loss(objective, TokenBatch(**scaled))
    return torch.autograd.grad(loss, values["logp"])[0]


@pytest.mark.parametrize("mode", AGGREGATES)
@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_verl_importance_weights(algos: Any, mode: str, cap: float) -> None:
    from verl.trainer.ppo import rollout_corr_helper as correction

    values = batch_of(5)
    generator = torch.Generator().manual_seed(0)
    gap = torch.randn(ROWS, TIME, generator=generator, dtype=torch.float64)
    gap[0, :2] = torch.tensor([-math.inf, math.inf])  # their limits are e^-20 and e^20
    sampler, mask = values["logp_old"] - gap, values["loss_mask"].double()
    weight = importance_weight(values["logp_old"], sampler, cap)
    theirs, figures = correction.compute_rollout_correction_weights(
        gap, mask, rollout_is="token", rollout_is_threshold=cap
    )
    torch.testing.assert_close(weight * mask, theirs, rtol=1e-12, atol=3e-9)
    assert 0.1 < figures["rollout_is_ratio_fraction_high"] < 0.9
    loss, _ = algos.compute_policy_loss_vanilla(
        values["logp_old"],
        values["logp"],
        values["advantage"],
        mask,
        loss_agg_mode=mode,
        config=actor(mode),
        rollout_is_weights=theirs,
    )
    (gradient,) = torch.autograd.grad(loss, values["logp"])
    found = weighted(AGGREGATES[mode], values, sampler, cap)
    torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(ours(AGGREGATES[mode], values)[1], gradient, atol=1e-4)


def test_verl_weighs_the_rows_of_its_engine(algos: Any) -> None:
    """Rows of different lengths on their way from verl's table to our loss."""
    from omegaconf import OmegaConf
    from tensordict import TensorDict

    from reopold_agent.objectives import Needs
    from reopold_agent.train.verl.loss import WEIGHTS, token_batch
    from reopold_agent.train.verl.trainer import importance_weights

    values = {name: value.detach() for name, value in batch_of(6).items()}
    lengths, mask = values["loss_mask"].sum(1).tolist(), values["loss_mask"].clone()
    mask[0, 3] = False  # an observation
    sampler = values["logp_old"] - torch.linspace(-1, 1, ROWS * TIME).reshape(ROWS, TIME)

    def nested(rows: Tensor, prompt: int = 0) -> Tensor:
        parts = [
            torch.cat([row.new_zeros(prompt), row[:n]])
            for row, n in zip(rows, lengths, strict=True)
        ]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    prompt = torch.zeros(2, dtype=torch.int64)
    fields = {
        "prompts": torch.nested.as_nested_tensor([prompt] * ROWS, layout=torch.jagged),
        "responses": nested(torch.zeros(ROWS, TIME, dtype=torch.int64)),
        "response_mask": nested(mask.long()),
        "rollout_log_probs": nested(sampler),
        "old_log_probs": nested(values["logp_old"]),
        "entropy": nested(values["entropy"]),
    }
    table = TensorDict(fields, batch_size=ROWS)
    off = OmegaConf.create({"rollout_is": None})
    assert importance_weights(table, off) == {}
    settings = OmegaConf.create({"rollout_is": "token", "rollout_is_threshold": 2.0})
    made = importance_weights(table, settings)
    data = TensorDict({**fields, **made}, batch_size=ROWS)

    whole = nested(values["logp"], 2)
    leaf = whole.values().clone().requires_grad_()
    logp = torch.nested.nested_tensor_from_jagged(leaf, whole.offsets())
    tokens = token_batch(logp, data, Needs.OUTCOME & Needs.TEACHER, weighted=True)
    tokens.logp[tokens.loss_mask].sum().backward()
    expected = importance_weight(values["logp_old"], sampler, 2.0)[mask]
    got = leaf.grad
    assert got is not None
    torch.testing.assert_close(got[got != 0], expected)
    assert (expected == 2.0).any()
    plain = token_batch(logp, data, Needs.OUTCOME & Needs.TEACHER, weighted=False)
    assert torch.equal(plain.logp, tokens.logp)
    data.pop(WEIGHTS)  # lost on the way: an error, not plain tokens
    with pytest.raises(KeyError, match=WEIGHTS):
        token_batch(logp, data, Needs.OUTCOME & Needs.TEACHER, weighted=True)


def test_verl_s_rows_carry_the_outcome_beside_the_teacher(algos: Any) -> None:
    """Advantages and masks of episodes, and a padding row, on their way to our loss."""
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_to_nested

    from reopold_agent.train.verl.loss import ADVANTAGES, TAUGHT, token_batch
    from reopold_agent.train.verl.trainer import _spread

    values = {name: value.detach() for name, value in batch_of(7).items()}
    values["loss_mask"][0, 3] = False  # an observation
    lengths = torch.tensor([9, 1, 4, 7, 9, 2]).tolist()
    live = [True] * (ROWS - 1) + [False]  # verl fills the last rank up
    taught = [1.0, 0.0, 1.0, 1.0, 0.0]
    mask = values["loss_mask"] & torch.tensor(live)[:, None]

    def nested(rows: Tensor, before: int = 0) -> Tensor:
        parts = [
            torch.cat([row.new_zeros(before), row[:n]])
            for row, n in zip(rows, lengths, strict=True)
        ]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    masks = nested(mask.long())
    advantages = values["advantage"][:, 0].tolist()[: ROWS - 1]
    shifted = torch.cat([values["logp_teacher"], torch.zeros(ROWS, 1)], dim=1)
    prompt = torch.zeros(2, dtype=torch.int64)
    data = TensorDict(
        {
            "prompts": torch.nested.as_nested_tensor([prompt] * ROWS, layout=torch.jagged),
            "responses": nested(torch.zeros(ROWS, TIME, dtype=torch.int64)),
            "response_mask": masks,
            "old_log_probs": nested(values["logp_old"]),
            "entropy": nested(values["entropy"]),
            "teacher_logprobs": nested(shifted[:, :TIME], 1),
            **{
                name: response_to_nested(_spread(each, live, masks.to_padded_tensor(0)), masks)
                for name, each in ((ADVANTAGES, advantages), (TAUGHT, taught))
            },
        },
        batch_size=ROWS,
    )
    data["teacher_logprobs"] = torch.nested.as_nested_tensor(
        [torch.cat([row, row.new_zeros(1)]) for row in data["teacher_logprobs"].unbind()],
        layout=torch.jagged,
    )
    objective = make_objective(
        "rkl_sg_clip", {"outcome": 0.7, "outcome_mask": "response", "mixture": 0.5}
    )
    whole = nested(values["logp"], 1)
    leaf = torch.cat([torch.cat([row, row.new_zeros(1)]) for row in whole.unbind()])
    leaf = leaf.double().requires_grad_()
    offsets = torch.tensor([0, *(n + 2 for n in lengths)]).cumsum(0)
    logp = torch.nested.nested_tensor_from_jagged(leaf, offsets)
    tokens = token_batch(logp, data, objective.needs, weighted=False)
    terms = objective.terms(tokens, 0, None)

    logp_BT = values["logp"].requires_grad_()
    flags = torch.tensor([*taught, 0.0]).bool()[:, None].expand(ROWS, TIME)
    plain = TokenBatch(**{**values, "logp": logp_BT, "loss_mask": mask, "taught": flags})
    expected = objective.terms(plain, 0, None)
    assert float(terms.denominator) == float(expected.denominator) == float(mask.sum())
    torch.testing.assert_close(terms.numerator, expected.numerator, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(terms.numerator, leaf)
    (wanted,) = torch.autograd.grad(expected.numerator, logp_BT)
    torch.testing.assert_close(got[got != 0].double(), wanted[wanted != 0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(wanted, torch.autograd.grad(
        make_objective("rkl_sg_clip", {"mixture": 0.5}).terms(plain, 0, None).numerator, logp_BT
    )[0])  # fmt: skip


def test_verl_has_a_second_clip_for_bad_responses(algos: Any) -> None:
    # Dual-clip PPO: with a negative advantage, a ratio above clip_ratio_c = 3 has no gradient.
    values = batch_of(1)
    values["logp_old"] = values["logp"].detach() - math.log(4.0)
    values["advantage"] = -torch.ones(ROWS, TIME, dtype=torch.float64)
    for limit, agree in [(3.0, False), (5.0, True)]:
        config = actor("token-mean", clip_ratio_c=limit)
        theirs, _ = algos.compute_policy_loss_vanilla(
            values["logp_old"],
            values["logp"],
            values["advantage"],
            values["loss_mask"].double(),
            loss_agg_mode="token-mean",
            config=config,
        )
        assert same(ours(GRPO(aggregate="token"), values), theirs, values["logp"]) == agree


def test_verl_aggregation_of_any_loss(algos: Any) -> None:
    # The same sums as the objectives': a token mean is rkl's, too.
    values = batch_of(2)
    reward = (values["logp_teacher"] - values["logp"]).detach()
    ratio = (values["logp"] - values["logp_old"]).exp()
    theirs = algos.agg_loss(-ratio * reward, values["loss_mask"].double(), "token-mean")
    assert same(ours(make_objective("rkl_sg", {}), values), theirs, values["logp"])


# verl: distillation


def verl_distillation_loss(distillation: Any, values: dict[str, Tensor], **settings: Any) -> Tensor:
    """Their loss from the sampled tokens' log-probs. Model outputs are flat, one token of prompt
    before each response, and predict the token after them."""
    from verl.workers.config import DistillationLossConfig

    def flat(values_BT: Tensor) -> Tensor:
        return torch.nn.functional.pad(values_BT, (0, 1)).flatten()

    ones = torch.ones(ROWS, 1 + TIME, dtype=torch.int64)
    loss = DistillationLossConfig(use_task_rewards=False, **settings)
    theirs, _ = distillation.distillation_loss(
        actor("token-mean"),
        SimpleNamespace(distillation_loss=loss),
        {"log_probs": flat(values["logp"])},
        {
            "prompts": ones[:, :1],
            "responses": ones[:, 1:],
            "attention_mask": ones,
            "response_mask": values["loss_mask"],
            "old_log_probs": values["logp_old"],
            "teacher_logprobs": flat(values["logp_teacher"])[:, None],
            "dp_size": 1,
            "batch_num_tokens": int(values["loss_mask"].sum()),
            "global_batch_size": ROWS,
        },
    )
    return theirs


def on_policy(values: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Ratio 1, and rewards within ``largest``: where PPO's clip and verl's clamp do nothing."""
    logp = values["logp"].detach()
    reward = (values["logp_teacher"] - logp).clamp(-largest, largest)
    return {**values, "logp_old": logp, "logp_teacher": logp + reward}


def test_verl_k1_as_a_reward_is_rkl_sg(distillation: Any) -> None:
    for seed in range(3):
        values = on_policy(batch_of(seed), 9.0)
        theirs = verl_distillation_loss(distillation, values, loss_mode="k1")
        assert same(ours(make_objective("rkl_sg", {}), values), theirs, values["logp"])
        # No entropy mask, no phases and no one-sided floor there: Reopold is another loss.
        for name, settings in [("reopold", {"switch_step": 0}), ("rkl_sg_clip", {"mixture": 0.5})]:
            theirs = verl_distillation_loss(distillation, values, loss_mode="k1")
            assert not same(ours(make_objective(name, settings), values), theirs, values["logp"])


def test_verl_clamps_on_both_sides(distillation: Any) -> None:
    values = on_policy(batch_of(3), 3.0)
    logp = values["logp"].detach()
    far = torch.zeros_like(logp)
    far[0, 0], far[3, 1] = 14.0, -14.0
    values["logp_teacher"] = values["logp_teacher"] * (far == 0) + (logp + far) * (far != 0)
    theirs = verl_distillation_loss(distillation, values, loss_mode="k1")
    assert not same(ours(make_objective("rkl_sg", {}), values), theirs, values["logp"])
    values["logp_teacher"] = logp + (values["logp_teacher"] - logp).clamp(-10, 10)
    theirs = verl_distillation_loss(distillation, values, loss_mode="k1")
    assert same(ours(make_objective("rkl_sg", {}), values), theirs, values["logp"])


def test_verl_clips_the_ratio_and_we_do_not(distillation: Any) -> None:
    values = batch_of(4)
    values["logp_teacher"] = values["logp"].detach() + 1.0
    wide = {"clip_ratio_low": 0.999999, "clip_ratio_high": 1e9}
    for settings, agree in [({}, False), (wide, True)]:
        theirs = verl_distillation_loss(distillation, values, loss_mode="k1", **settings)
        assert same(ours(make_objective("rkl_sg", {}), values), theirs, values["logp"]) == agree


def test_verl_refuses_to_backpropagate_k1(distillation: Any) -> None:
    # Without the policy gradient the ratio is missing; only remark 3.1's useless term is left.
    from verl.workers.config import DistillationLossConfig

    with pytest.raises(ValueError, match="k1"):
        DistillationLossConfig(loss_mode="k1", use_policy_gradient=False)


def test_verl_kl_penalties(algos: Any) -> None:
    values = batch_of(5)
    own, his = values["logp"].detach(), values["logp_teacher"]
    terms = make_objective("rkl", {}).terms(TokenBatch(**values), 0, None)
    torch.testing.assert_close(algos.kl_penalty(own, his, "k1"), -terms.reward)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("clamp", [None, -10.0])
def test_verl_forward_kl_topk(algos: Any, chunked: bool, clamp: float | None) -> None:
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.workers.config import DistillationLossConfig

    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(1, 20, 40, generator=generator)).requires_grad_()
    teacher = torch.log_softmax(3 * torch.randn(20, 40, generator=generator), -1)
    top = teacher.topk(5)
    config = DistillationLossConfig(
        loss_mode="forward_kl_topk",
        topk=5,
        use_policy_gradient=False,
        log_prob_min_clamp=clamp,
        use_chunked_topk=chunked,
    )
    nested = [
        torch.nested.nested_tensor([x], layout=torch.jagged) for x in (top.values, top.indices)
    ]
    theirs = compute_forward_kl_topk(
        logits, *nested, SimpleNamespace(distillation_loss=config), "thd"
    )["distillation_losses"][0]
    student = torch.log_softmax(logits[0], -1).gather(1, top.indices)
    found = topk_divergence(student, top.values, 0.0, rest=False)
    if clamp is None:
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
        one = torch.autograd.grad(found.sum(), logits, retain_graph=True)[0]
        other = torch.autograd.grad(theirs.sum(), logits)[0]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    else:
        # Their default cuts log-probs at -10; ours are as they are.
        far = (student < clamp).any(-1) | (top.values < clamp).any(-1)
        assert far.any()
        assert (~far).any()
        torch.testing.assert_close(found[~far], theirs[~far], rtol=1e-5, atol=1e-5)
        assert (found[far] - theirs[far]).abs().max() > 1e-3
    # With "any other token" as one more outcome it is a divergence, which theirs is not.
    assert (topk_divergence(student, top.values, 0.0, rest=True) > 0).all()


# TRL


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_generalised_jsd(jsd: Any, beta: float) -> None:
    # TRL's beta is ours: the teacher's weight in the mixture; 0 is forward KL and 1 reverse KL.
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(12, 8, generator=generator).requires_grad_()
    weight = torch.randn(31, 8, generator=generator).requires_grad_()
    his = torch.randn(12, 8, generator=generator) * 2
    logits, teacher = own @ weight.T, his @ weight.detach().T
    labels = torch.where(torch.arange(12) % 3 == 0, -100, 1)
    theirs = jsd(logits[None], teacher[None], labels[None], beta=beta)
    mask = (labels != -100)[None]
    plain = generalised_jsd(torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1), beta)
    chunked, _ = divergence_of_states(
        own, weight, his, weight, labels.clamp(min=0), beta, slice_elements=100
    )
    zero = torch.zeros(1, 12)
    for divergence in (plain, chunked):
        batch = TokenBatch(zero, zero, zero, zero, mask, divergence=divergence[None])
        loss = whole_loss(make_objective("gkd", {"beta": beta}), batch)
        torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
        for leaf in (own, weight):
            one = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            other = torch.autograd.grad(theirs, leaf, retain_graph=True)[0]
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


TRL_LOSSES = {
    "grpo": GRPO(aggregate="sequence"),
    "bnpo": GRPO(aggregate="token"),
    "dr_grpo": GRPO(aggregate="budget", token_budget=64),
    "dapo": GRPO(aggregate="token", clip_high=0.28),
}


@pytest.mark.parametrize("kind", TRL_LOSSES)
def test_trl_grpo_losses(jsd: Any, kind: str) -> None:
    # `_compute_loss` reads its trainer's settings and nothing else, so an object with just those
    # stands in for it. TRL's advantages cannot be called: they are made in the middle of
    # generation, with 1e-4 added to the standard deviation where verl and we add 1e-6.
    from trl import GRPOTrainer

    for seed in range(3):
        values = batch_of(seed)
        objective = TRL_LOSSES[kind]
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, v=values, **__: (
                v["logp"],
                v["entropy"],
                None,
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            beta=0.0,
            loss_type=kind,
            epsilon_low=objective.clip_low,
            epsilon_high=objective.clip_high,
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=64,
            _entropy_bonus_enabled=False,
            entropy_coef=0.0,
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            accelerator=SimpleNamespace(
                num_processes=1,
                sync_gradients=False,
                reduce=lambda x, reduction: x,
                gather=lambda x: x,
            ),
            _metrics={"train": defaultdict(list)},
        )
        ids, mask = torch.ones(ROWS, TIME, dtype=torch.int64), values["loss_mask"].double()
        theirs = GRPOTrainer._compute_loss(
            trainer,
            None,
            {
                "prompt_ids": ids[:, :1],
                "prompt_mask": ids[:, :1],
                "completion_ids": ids,
                "completion_mask": mask,
                "advantages": values["advantage"][:, 0],
                "old_per_token_logps": values["logp_old"],
                "num_items_in_batch": mask.sum(),
            },
        )
        assert same(ours(objective, values), theirs, values["logp"])


# Our environments in TRL's trainer


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_trl_iw_opd(jsd: Any, gamma: float) -> None:
    """Its gradient, on policy; its value is another function with that gradient."""
    trainer = pytest.importorskip("trl.experimental.iw_opd").IWOPDTrainer
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, TIME, 7, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 7, (ROWS, TIME), generator=generator)
    teacher = -torch.randn(ROWS, TIME, generator=generator, dtype=torch.float64).exp()
    values = batch_of(8)
    mask = values["loss_mask"].clone()
    mask[0, 4:6] = False  # observations
    this = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=gamma,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    theirs = trainer._compute_iw_opd_loss(this, logits, ids, torch.where(mask, ids, -100), teacher)
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    batch = TokenBatch(
        logp=logp,
        logp_old=logp.detach(),
        logp_teacher=teacher,
        entropy=values["entropy"],
        loss_mask=mask,
        episode=torch.arange(ROWS)[:, None].expand(ROWS, TIME),
        turn=turns(mask),
    )
    found = whole_loss(make_objective("iw_opd", {"gamma": gamma}), batch)
    (got,) = torch.autograd.grad(found, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    weights = this._metrics["train"]["iw_opd/max_weight"]
    assert weights == [pytest.approx(1 + gamma)]


@pytest.fixture
def trl_checkpoint(tmp_path: Path) -> Path:
    """The embedded text model with the chat template of Qwen3, which can show tools."""
    trl = pytest.importorskip("trl", reason="needs trl")
    copied = tmp_path / "model"
    shutil.copytree(ROOT / "reopold_agent" / "demo" / "weights" / "arithmetic_student", copied)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    shutil.copy(template, copied / "chat_template.jinja")
    return copied


def test_the_example_in_trl_runs(trl_checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "in_trl.py"), str(trl_checkpoint), "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'rewards/reward/mean': '0'" in done.stdout  # the model calls no tool


def test_trl_calls_our_tools_and_takes_our_rewards(
    trl_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from test_state_decides import Walk, move
    from trl import GRPOConfig, GRPOTrainer

    from reopold_agent.envs.trl import environment_factory, reward, rows

    trainer = GRPOTrainer(
        model=str(trl_checkpoint),
        args=GRPOConfig(
            str(tmp_path / "out"),
            max_steps=1,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=256,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows(Walk) * 4),
        environment_factory=environment_factory(Walk),
        reward_funcs=reward,
    )
    shown: list[str] = []
    tokenizer = trainer.processing_class

    def turns(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Generates for the student: the first sample wins in one move, the others stop at 2."""
        shown.extend(tokenizer.decode(ids) for ids in prompt_ids)
        first = not any("tool_response" in tokenizer.decode(ids) for ids in prompt_ids)
        said = [
            (move(3) if n == 0 else move(2)) if first else "Done." for n in range(len(prompt_ids))
        ]
        ids = [tokenizer(f"{text}<|im_end|>").input_ids for text in said]
        return ids, [[-1.0] * len(each) for each in ids]

    monkeypatch.setattr(trainer, "_generate_single_turn", turns)
    trainer.train()
    assert '"name": "move"' in shown[0]  # TRL tells the tools
    assert "Walk to 3." in shown[0]
    assert "You are at 3." in shown[4]
    logged = next(row for row in trainer.state.log_history if "rewards/reward/mean" in row)
    # 1 for the winner; the others paid 0.1 for a move, and the state decides: 0.5 at 2.
    assert float(logged["rewards/reward/mean"]) == pytest.approx((1.0 + 3 * 0.4) / 4, abs=1e-4)
    assert float(logged["tools/call_frequency"]) == 1


def test_spans_end_where_gold_cuts() -> None:
    """TRL's ``gold`` groups the tokens of two tokenizers by the byte offsets that both share."""
    from test_spans import aligner, byte_level, groups

    gold = pytest.importorskip("trl.experimental.gold.gold_trainer", reason="needs trl")
    student = byte_level([(b"t", b"h"), (b"th", b"e"), (b" ", b"c"), (b"a", b"t")])
    teacher = byte_level([(b"h", b"e"), (b"e", b" "), (b"c", b"a"), (b"\xc3", b"\xa9")])
    made = aligner(student, teacher)
    for text in ("the cat", "café the", "a cat thé theme", "hehe cacat"):
        ids = student(text, add_special_tokens=False)["input_ids"]
        aligned = made.align(ids)

        def offsets(table: Any, tokens: Any) -> list[tuple[int, int]]:
            ends = np.cumsum([len(table.of(int(i))) for i in tokens]).tolist()
            return list(zip([0, *ends[:-1]], ends, strict=True))

        ours, theirs = offsets(made.student, ids), offsets(made.teacher, aligned.ids)
        student_groups, teacher_groups = gold.ULDLoss._align_by_byte_offsets(ours, theirs)
        found = [
            ([ids[i] for i in a], [int(aligned.ids[i]) for i in b])
            for a, b in zip(student_groups, teacher_groups, strict=True)
        ]
        assert groups(aligned, ids) == found
        assert len(found) > 1
