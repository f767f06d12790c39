"""The objective against hand calculations, a NumPy version of the spec and finite differences."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reopold_agent.objectives import Needs, Reopold, TokenBatch, reopold_loss, whole_loss
from reopold_agent.objectives.pieces import (
    distillation_reward,
    entropy_threshold,
    exploration_mask,
    importance_ratio,
    refinement_mask,
    reward_floor,
)

FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EXPLORE = {"step": 0, "switch_step": 1}
REFINE = {"step": 1, "switch_step": 1}


def numpy_reopold(
    logp: Any,
    logp_old: Any,
    logp_teacher: Any,
    entropy: Any,
    loss_mask: Any,
    *,
    step: int,
    switch_step: int,
    mixture: float = 0.1,
    top_share: float = 0.2,
) -> tuple[float, Any, Any]:
    """The spec in plain loops and float64: loss, its gradient by logp, and the token mask."""
    floor = math.log(mixture) / (1 - mixture)
    logp, logp_old, logp_teacher, entropy = (
        np.asarray(x, dtype=np.float64) for x in (logp, logp_old, logp_teacher, entropy)
    )
    tokens = [index for index in np.ndindex(logp.shape) if loss_mask[index]]
    # The least k with k / n >= rho, found by counting instead of by a ceiling.
    k = next((k for k in range(1, len(tokens) + 1) if k / len(tokens) >= top_share - 1e-12), 1)
    tau = sorted((entropy[i] for i in tokens), reverse=True)[k - 1] if tokens else math.inf
    kept = np.zeros(logp.shape, dtype=bool)
    total = 0.0
    gradient = np.zeros(logp.shape)
    for index in tokens:
        reward = logp_teacher[index] - logp[index]
        keep = reward > floor if step < switch_step else entropy[index] >= tau
        if not keep:
            continue
        kept[index] = True
        ratio = math.exp(logp[index] - logp_old[index])
        clipped = reward if reward > floor else floor
        total += ratio * clipped
        gradient[index] = ratio * clipped
    count = max(1, int(kept.sum()))
    return -total / count, -gradient / count, kept


def tensors(values: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    logp, old, teacher, entropy, mask = values
    return (
        torch.tensor(logp, dtype=dtype, requires_grad=True),
        torch.tensor(old, dtype=dtype),
        torch.tensor(teacher, dtype=dtype),
        torch.tensor(entropy, dtype=dtype),
        torch.tensor(mask, dtype=dtype),
    )


def random_values(seed: int, shape: tuple[int, int] = (5, 7), share: float = 0.7) -> Any:
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, shape)
    return (
        logp,
        logp + rng.normal(0, 0.2, shape),
        -rng.exponential(3.0, shape),
        rng.exponential(1.0, shape),
        rng.random(shape) < share,
    )


def gradient_of(loss: Tensor, logp: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logp)[0]


# Hand calculations


def test_floor_has_the_values_of_the_spec() -> None:
    for mixture, expected in [(0.01, -4.652), (0.1, -2.558), (0.5, -1.386), (0.9, -1.054)]:
        assert reward_floor(mixture) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("mixture", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("student_logp", [-0.01, -2.0, -20.0])
def test_floor_is_the_limit_of_the_mixture_bound(mixture: float, student_logp: float) -> None:
    student, teacher = math.exp(student_logp), 0.0
    bound = math.log((mixture * student + (1 - mixture) * teacher) / student) / (1 - mixture)
    assert reward_floor(mixture) == pytest.approx(bound)


@pytest.mark.parametrize("mixture", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_floor_refuses_a_mixture_outside_the_open_interval(mixture: float) -> None:
    with pytest.raises(ValueError, match="mixture"):
        reward_floor(mixture)
    with pytest.raises(ValueError, match="mixture"):
        reopold_loss(*tensors(random_values(0)), **EXPLORE, mixture=mixture)


@pytest.mark.parametrize("top_share", [0.0, -0.2, 1.0001, math.nan])
def test_top_share_outside_its_interval_is_refused(top_share: float) -> None:
    with pytest.raises(ValueError, match="top_share"):
        Reopold(switch_step=1, top_share=top_share)
    with pytest.raises(ValueError, match="top_share"):
        entropy_threshold(torch.ones(1, 2), torch.ones(1, 2), top_share)


def test_negative_switch_step_is_refused() -> None:
    with pytest.raises(ValueError, match="switch_step"):
        Reopold(switch_step=-1)


def test_exploration_by_hand() -> None:
    # R = 0.5, -2, -3 (below the floor of -2.558), 9 (not the student's). Two tokens count.
    logp, old, teacher, entropy, mask = tensors(
        ([[-1.0, -1.0, -1.0, -9.0]],) * 2
        + ([[-0.5, -3.0, -4.0, 0.0]], [[0.0, 0.1, 5.0, 9.0]], [[1, 1, 1, 0]])
    )
    loss, metrics = reopold_loss(logp, old, teacher, entropy, mask, **EXPLORE)
    assert loss.item() == pytest.approx(-(0.5 - 2.0) / 2)
    assert gradient_of(loss, logp).tolist() == [[-0.25, 1.0, 0.0, 0.0]]
    assert metrics["tokens"] == 3
    assert metrics["kept_tokens"] == 2
    assert metrics["share_below_floor"] == pytest.approx(1 / 3)
    assert metrics["refinement"] == 0.0


def test_refinement_by_hand() -> None:
    # rho 0.5 of four tokens keeps the two most uncertain: R = -10 clipped, and R = 2.
    logp, old, teacher, entropy, mask = tensors(
        (
            [[-1.0, -1.0, -1.0, -3.0, -1.0]],
            [[-1.0, -1.0, -1.0, -2.0, -1.0]],
            [[-2.0, 0.0, -11.0, -1.0, 0.0]],
            [[0.1, 0.2, 3.0, 2.0, 9.0]],
            [[1, 1, 1, 1, 0]],
        )
    )
    loss, metrics = reopold_loss(logp, old, teacher, entropy, mask, **REFINE, top_share=0.5)
    floor = math.log(0.1) / 0.9
    expected = -(floor + math.exp(-1.0) * 2.0) / 2
    assert loss.item() == pytest.approx(expected)
    gradient = gradient_of(loss, logp)
    assert gradient[0].tolist() == pytest.approx([0, 0, -floor / 2, -math.exp(-1.0), 0])
    assert metrics["entropy_threshold"] == 2.0
    assert metrics["reward_min"] == -10.0
    assert metrics["refinement"] == 1.0
    assert metrics["kept_share"] == 0.5


def test_one_token_gradient_is_minus_the_clipped_reward() -> None:
    for teacher, expected in [(-0.25, -0.75), (-2.0, 1.0), (-50.0, 2.558428)]:
        values = ([[-1.0]], [[-1.0]], [[teacher]], [[1.0]], [[1]])
        logp, *rest = tensors(values)
        loss, _ = reopold_loss(logp, *rest, **REFINE)
        assert gradient_of(loss, logp).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("phase", [EXPLORE, REFINE])
def test_a_token_the_teacher_likes_more_becomes_more_likely(phase: Any) -> None:
    logits = torch.zeros(4, requires_grad=True)
    teacher_logp = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    for token, direction in [(0, 1), (1, -1)]:
        before = torch.log_softmax(logits, -1)[token]
        logp = before[None, None]
        old = logp.detach()
        loss, _ = reopold_loss(
            logp, old, teacher_logp[token][None, None], torch.ones(1, 1), torch.ones(1, 1), **phase
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        after = torch.log_softmax(logits - 0.1 * gradient, -1)[token]
        assert direction * (after - before).item() > 0.001


def test_gradient_steps_move_the_student_to_the_teacher() -> None:
    torch.manual_seed(0)
    teacher_logp = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]), -1)
    logits = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    for step in range(300):
        logp_V = torch.log_softmax(logits, -1)
        tokens = torch.multinomial(logp_V.detach().exp(), 512, replacement=True)
        logp = logp_V[tokens][None]
        entropy = torch.ones_like(logp)
        loss, _ = reopold_loss(
            logp,
            logp.detach(),
            teacher_logp[tokens][None],
            entropy,
            torch.ones_like(logp),
            step=step,
            switch_step=100,
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.3 * gradient
    distance = (torch.log_softmax(logits, -1).exp() - teacher_logp.exp()).abs().sum() / 2
    assert distance < 0.05


# The floor


def test_floor_is_one_sided_and_reward_detached() -> None:
    logp = torch.full((1, 3), -20.0, requires_grad=True)
    teacher = torch.tensor([[-0.001, -19.0, -60.0]], requires_grad=True)
    terms = Reopold(switch_step=0, top_share=1.0).terms(
        TokenBatch(logp, logp.detach(), teacher, torch.ones(1, 3), torch.ones(1, 3)), 0, 0.0
    )
    assert terms.clipped_reward[0].tolist() == pytest.approx([19.999, 1.0, reward_floor(0.1)])
    assert terms.reward[0, 2].item() == -40.0
    assert not terms.reward.requires_grad
    assert not terms.clipped_reward.requires_grad
    assert not terms.ratio.requires_grad
    terms.numerator.backward()
    assert teacher.grad is None
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([-19.999, -1.0, -reward_floor(0.1)], rel=1e-6)


def test_a_reward_equal_to_the_floor_is_not_explored() -> None:
    reward = torch.tensor([[-2.0, -2.0 + 1e-6, -2.0 - 1e-6, math.inf, -math.inf]])
    assert exploration_mask(reward, torch.ones(1, 5), -2.0).tolist() == [
        [False, True, False, True, False]
    ]
    # Through the public function, in float64, which holds the floor exactly.
    floor = torch.tensor([[reward_floor(0.1)]], dtype=torch.float64)
    logp = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1)
    for teacher, kept in [(floor, 0.0), (floor + 1e-9, 1.0)]:
        _, metrics = reopold_loss(logp, logp.detach(), teacher, ones, ones, **EXPLORE)
        assert metrics["kept_share"] == kept
        assert metrics["share_below_floor"] == 1.0 - kept


def test_masks_ignore_tokens_that_are_not_the_students() -> None:
    reward = torch.zeros(1, 3)
    mask = torch.tensor([[0, 1, 0]])
    assert exploration_mask(reward, mask, -1.0).tolist() == [[False, True, False]]
    assert refinement_mask(torch.tensor([[9.0, 1.0, 9.0]]), mask, 0.5).tolist() == [
        [False, True, False]
    ]


# The entropy threshold


def test_threshold_is_the_kth_largest_with_ties_kept() -> None:
    entropy = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.5]])
    ones = torch.ones_like(entropy)
    for share, tau, kept in [(1 / 6, 3.0, 1), (2 / 6, 2.0, 4), (0.5, 2.0, 4), (5 / 6, 1.0, 5)]:
        found = entropy_threshold(entropy, ones, share)
        assert found == tau
        assert refinement_mask(entropy, ones, found).sum() == kept
    assert entropy_threshold(entropy, torch.tensor([[0, 1, 1, 0, 0, 1]]), 0.2) == 2.0


@pytest.mark.parametrize(
    ("share", "count", "k"),
    [
        *[(0.07, 100, 7), (0.2, 5, 1), (0.2, 6, 2), (0.2, 15, 3), (0.1, 30, 3), (0.29, 100, 29)],
        *[(0.57, 100, 57), (0.001, 10, 1), (0.2, 1, 1), (0.999, 10, 10), (1.0, 17, 17)],
        *[(0.07, 100_000, 7000), (1e-9, 3, 1)],
    ],
)
def test_threshold_counts_without_float_trouble(share: float, count: int, k: int) -> None:
    entropy = torch.randperm(count).float()[None]
    tau = entropy_threshold(entropy, torch.ones_like(entropy), share)
    assert int((entropy >= tau).sum()) == k


def test_top_share_one_keeps_every_token_also_those_of_zero_entropy() -> None:
    values = list(random_values(3))
    values[3] = np.zeros((5, 7))
    values[3][0, :3] = 1.0
    _, metrics = reopold_loss(*tensors(values), **REFINE, top_share=1.0)
    assert metrics["kept_share"] == 1.0


def test_threshold_without_tokens_keeps_nothing() -> None:
    entropy = torch.ones(2, 3)
    assert entropy_threshold(entropy, torch.zeros(2, 3), 0.2) == math.inf


@pytest.mark.parametrize("phase", [EXPLORE, REFINE])
@pytest.mark.parametrize("shape", [(2, 3), (0, 0), (1, 0)])
def test_no_loss_token_gives_a_zero_loss_with_a_gradient(phase: Any, shape: Any) -> None:
    logp = torch.full(shape, -1.0, requires_grad=True)
    other = torch.full(shape, -2.0)
    loss, metrics = reopold_loss(logp, other, other, torch.ones(shape), torch.zeros(shape), **phase)
    assert loss.item() == 0.0
    loss.backward()
    assert logp.grad is not None
    assert not logp.grad.any()
    assert metrics["tokens"] == 0.0


def test_all_tokens_below_the_floor_give_a_zero_loss_in_exploration() -> None:
    logp = torch.full((1, 4), -0.1, requires_grad=True)
    far = torch.full((1, 4), -30.0)
    loss, metrics = reopold_loss(logp, logp.detach(), far, far, torch.ones(1, 4), **EXPLORE)
    loss.backward()
    assert loss.item() == 0.0
    assert logp.grad is not None
    assert not logp.grad.any()
    assert metrics["kept_tokens"] == 0.0
    assert metrics["share_below_floor"] == 1.0


# Phases


def test_phase_switches_at_the_step() -> None:
    values = random_values(5)
    objective = Reopold(switch_step=3)
    phases = {0: "exploration", 2: "exploration", 3: "refinement", 9: "refinement"}
    for step, phase in phases.items():
        assert objective.phase(step) == phase
        loss, metrics = reopold_loss(*tensors(values), step=step, switch_step=3)
        expected, _, _ = numpy_reopold(*values, step=step, switch_step=3)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert metrics["refinement"] == float(phase == "refinement")
    explored, refined = (numpy_reopold(*values, step=step, switch_step=3)[0] for step in (2, 3))
    assert abs(explored - refined) > 0.1  # otherwise the test could not tell them apart


def test_entropy_selection_is_off_in_exploration() -> None:
    values = random_values(6)
    changed = (*values[:3], values[3][::-1].copy(), values[4])
    losses = [reopold_loss(*tensors(v), **EXPLORE)[0].item() for v in (values, changed)]
    assert losses[0] == losses[1]
    losses = [reopold_loss(*tensors(v), **REFINE)[0].item() for v in (values, changed)]
    assert losses[0] != losses[1]


# Against NumPy

EIGHTHS = st.integers(-96, 0).map(lambda n: n / 8)  # exact in every dtype, so masks must agree


@st.composite
def batches(draw: st.DrawFn) -> Any:
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    size = shape[0] * shape[1]

    def grid(element: st.SearchStrategy[Any]) -> Any:
        return np.array(draw(st.lists(element, min_size=size, max_size=size))).reshape(shape)

    logp = grid(EIGHTHS)
    old = np.minimum(logp + grid(st.integers(-8, 8)) / 8, 0)
    return logp, old, grid(EIGHTHS), grid(st.integers(0, 24)) / 8, grid(st.booleans())


@given(
    batches(),
    st.sampled_from(FLOAT_DTYPES),
    st.booleans(),
    st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    st.sampled_from([0.07, 0.2, 0.5, 0.9, 1.0]),
)
def test_loss_gradient_and_mask_equal_the_numpy_version(
    values: Any, dtype: torch.dtype, refine: bool, mixture: float, top_share: float
) -> None:
    settings = {"step": 4 if refine else 3, "switch_step": 4}
    settings |= {"mixture": mixture, "top_share": top_share}
    logp, *rest = tensors(values, dtype)
    loss, metrics = reopold_loss(logp, *rest, **settings)
    expected, gradient, kept = numpy_reopold(*values, **settings)
    assert loss.dtype in (torch.float32, torch.float64)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-6)
    found = gradient_of(loss, logp)
    assert found.dtype == dtype
    rounding = {torch.float16: 2e-3, torch.bfloat16: 8e-3}.get(dtype, 2e-5)
    np.testing.assert_allclose(
        found.double().numpy(), gradient, rtol=rounding, atol=1e-6 if rounding < 1e-3 else 1e-5
    )
    if values[4].any():
        assert metrics["kept_tokens"] == kept.sum()
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("settings", [EXPLORE, REFINE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_floats_equal_the_numpy_version(settings: Any, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    for seed in range(20):
        values = random_values(seed, (8, 33))
        logp, *rest = tensors(values, dtype)
        loss, _ = reopold_loss(logp, *rest, **settings)
        expected, gradient, _ = numpy_reopold(*values, **settings)
        assert loss.item() == pytest.approx(expected, rel=max(tolerance, 1e-12), abs=tolerance)
        np.testing.assert_allclose(gradient_of(loss, logp).numpy(), gradient, atol=tolerance)


@pytest.mark.parametrize("settings", [EXPLORE, REFINE])
def test_gradient_equals_finite_differences(settings: Any) -> None:
    # The reward is a constant for the gradient: moving student and teacher by the same amount
    # changes the ratio and nothing else.
    values = random_values(11, (3, 6))
    logp, old, teacher, entropy, mask = tensors(values, torch.float64)
    loss, _ = reopold_loss(logp, old, teacher, entropy, mask, **settings)
    analytic = gradient_of(loss, logp)
    step = 1e-6
    for index in np.ndindex(*logp.shape):
        losses = []
        for sign in (1, -1):
            moved, other = logp.detach().clone(), teacher.clone()
            moved[index] += sign * step
            other[index] += sign * step
            losses.append(reopold_loss(moved, old, other, entropy, mask, **settings)[0].item())
        numeric = (losses[0] - losses[1]) / (2 * step)
        assert numeric == pytest.approx(analytic[index].item(), abs=1e-7)
    assert (analytic != 0).sum() >= 2


def test_autograd_gradcheck_through_the_ratio() -> None:
    logp = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    old = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: importance_ratio(x, old), (logp,))


# Splits and orders


def split_loss(
    objective: Reopold, columns: Any, groups: list[Any], step: int
) -> tuple[Tensor, Tensor, int]:
    """What an engine does: the threshold once, numerators and denominators summed."""
    logp, old, teacher, entropy, mask = columns
    logp = logp.detach().requires_grad_()
    threshold = objective.threshold(entropy, mask)
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0
    for rows in groups:
        batch = TokenBatch(logp[rows], old[rows], teacher[rows], entropy[rows], mask[rows])
        terms = objective.terms(batch, step, threshold)
        numerator = numerator + terms.numerator
        denominator += int(terms.denominator)
    loss = numerator / max(1, denominator)
    return loss.detach(), gradient_of(loss, logp), denominator


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    "groups", [[[0], [1], [2], [3], [4]], [[4, 2], [0, 3, 1]], [[1, 0, 2, 3, 4]]]
)
def test_micro_batches_and_their_order_change_nothing(step: int, groups: list[Any]) -> None:
    for seed in range(5):
        columns = tensors(random_values(seed), torch.float64)
        loss, _ = reopold_loss(*columns, step=step, switch_step=1)
        gradient = gradient_of(loss, columns[0])
        objective = Reopold(switch_step=1)
        split, split_gradient, count = split_loss(objective, columns, groups, step)
        assert split.item() == pytest.approx(loss.item(), rel=1e-12)
        assert torch.allclose(split_gradient, gradient, rtol=1e-12, atol=0)
        assert count > 2


@pytest.mark.parametrize("settings", [EXPLORE, REFINE])
def test_permuting_rows_and_time_permutes_the_gradient(settings: Any) -> None:
    columns = tensors(random_values(8), torch.float64)
    loss, metrics = reopold_loss(*columns, **settings)
    gradient = gradient_of(loss, columns[0])
    rows, times = torch.randperm(5), torch.randperm(7)
    moved = [c.detach()[rows][:, times] for c in columns]
    moved[0].requires_grad_()
    other, other_metrics = reopold_loss(*moved, **settings)
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(gradient_of(other, moved[0]), gradient[rows][:, times], rtol=1e-12)
    assert other_metrics == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("settings", [EXPLORE, REFINE])
def test_padding_changes_nothing_even_when_it_holds_infinities_and_nans(settings: Any) -> None:
    columns = tensors(random_values(9, share=0.9))
    loss, metrics = reopold_loss(*columns, **settings)
    gradient = gradient_of(loss, columns[0])
    for garbage in (0.0, math.inf, -math.inf, math.nan, 1e30, -1e30):
        for place in range(4):
            padded = [torch.nn.functional.pad(c.detach(), (0, 3)) for c in columns]
            padded[place][:, -3:] = garbage
            padded[0].requires_grad_()
            other, other_metrics = reopold_loss(*padded, **settings)
            assert other.item() == pytest.approx(loss.item(), rel=1e-6)
            found = gradient_of(other, padded[0])
            assert torch.allclose(found[:, :-3], gradient, rtol=1e-6)
            assert torch.equal(found[:, -3:], torch.zeros(5, 3)), (garbage, place)
            assert other_metrics == pytest.approx(metrics, rel=1e-5)


# Extremes


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("settings", [EXPLORE, REFINE])
def test_a_token_the_teacher_excludes_gives_a_finite_loss(dtype: Any, settings: Any) -> None:
    logp, old, teacher, entropy, mask = tensors(
        ([[-0.5, -1.0]], [[-0.5, -1.0]], [[-math.inf, -0.5]], [[2.0, 1.0]], [[1, 1]]), dtype
    )
    loss, metrics = reopold_loss(logp, old, teacher, entropy, mask, **settings, top_share=1.0)
    gradient = gradient_of(loss, logp)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if settings is EXPLORE:
        assert gradient[0].tolist() == [0.0, -0.5]
    else:
        expected = [-reward_floor(0.1) / 2, -0.25]
        assert gradient[0].tolist() == pytest.approx(expected, rel=5e-3)
    assert metrics["reward_min"] == -math.inf
    assert math.isfinite(metrics["clipped_reward_mean"])


def test_half_precision_is_only_a_container() -> None:
    # 0.001 + 8 is lost in bfloat16 arithmetic, and so is a sum of 3,000 terms.
    logp = torch.full((1, 3000), -0.125, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.full((1, 3000), -0.126953125, dtype=torch.bfloat16)
    ones = torch.ones(1, 3000, dtype=torch.bfloat16)
    loss, metrics = reopold_loss(logp, logp.detach(), teacher, ones, ones, **EXPLORE)
    assert loss.item() == pytest.approx(0.001953125, rel=1e-4)
    assert metrics["tokens"] == 3000


def test_ratio_weighs_the_gradient_without_a_clip() -> None:
    for old, ratio in [(-1.0, 1.0), (-3.0, math.e**2), (-0.2, math.exp(-0.8))]:
        values = ([[-1.0]], [[old]], [[-0.5]], [[1.0]], [[1]])
        logp, *rest = tensors(values)
        loss, metrics = reopold_loss(logp, *rest, **REFINE)
        assert loss.item() == pytest.approx(-ratio * 0.5, rel=1e-6)
        assert gradient_of(loss, logp).item() == pytest.approx(-ratio * 0.5, rel=1e-6)
        assert metrics["ratio_mean"] == pytest.approx(ratio, rel=1e-6)


def test_would_be_ppo_clip_share() -> None:
    # PPO cuts a ratio above 1.2 for a gain, one below 0.8 for a loss, and nothing else.
    ratio = [1.3, 1.1, 0.7, 1.3, 0.7, 1.0]
    reward = [1.0, 1.0, 1.0, -1.0, -1.0, 0.5]
    logp = torch.full((1, 6), -1.0)
    old = logp - torch.tensor([ratio]).log()
    _, metrics = reopold_loss(
        logp, old, logp + torch.tensor([reward]), torch.ones(1, 6), torch.ones(1, 6), **EXPLORE
    )
    assert metrics["ppo_clip_share"] == pytest.approx(2 / 6)


# The public surface


def test_public_signature() -> None:
    parameters = inspect.signature(reopold_loss).parameters
    positional = ["logp", "logp_old", "logp_teacher", "entropy", "loss_mask"]
    keywords = ["step", "switch_step", "mixture", "top_share"]
    assert list(parameters) == positional + keywords
    for name in positional:
        assert parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name in keywords:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["mixture"].default == 0.1
    assert parameters["top_share"].default == 0.2
    assert parameters["step"].default is inspect.Parameter.empty
    assert parameters["switch_step"].default is inspect.Parameter.empty


def test_no_label_or_outcome_can_reach_the_loss() -> None:
    for name in inspect.signature(reopold_loss).parameters:
        for word in ("reward", "label", "answer", "advantage", "success", "score"):
            assert word not in name
    # The engine's batch has room for outcomes, for GRPO; Reopold does not look at them.
    columns = tensors(random_values(4))
    assert not Reopold(switch_step=1).needs & Needs.OUTCOME
    for step in (0, 1):
        plain = whole_loss(Reopold(switch_step=1), TokenBatch(*columns), step)
        advantage = torch.full((5, 7), math.nan)
        other = TokenBatch(*columns, advantage=advantage, response_length=advantage)
        assert torch.equal(whole_loss(Reopold(switch_step=1), other, step), plain)


def test_inputs_are_left_alone() -> None:
    columns = tensors(random_values(4))
    copies = [c.detach().clone() for c in columns]
    reopold_loss(*columns, **REFINE)[0].backward()
    for column, copy in zip(columns, copies, strict=True):
        assert torch.equal(column.detach(), copy)


def test_different_shapes_are_refused_by_name() -> None:
    logp, old, teacher, entropy, mask = tensors(random_values(4))
    with pytest.raises(ValueError, match="logp_teacher has shape"):
        reopold_loss(logp, old, teacher[:, :1], entropy, mask, **EXPLORE)
    with pytest.raises(ValueError, match="loss_mask has shape"):
        reopold_loss(logp, old, teacher, entropy, mask[0], **EXPLORE)


def test_every_dtype_of_mask_is_a_mask() -> None:
    values = random_values(7)
    losses = set()
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        logp, old, teacher, entropy, _ = tensors(values)
        mask = torch.tensor(values[4]).to(dtype)
        losses.add(reopold_loss(logp, old, teacher, entropy, mask, **REFINE)[0].item())
    assert len(losses) == 1


def test_reward_is_teacher_minus_student() -> None:
    reward = distillation_reward(torch.tensor([[-3.0]]), torch.tensor([[-1.0]]))
    assert reward.item() == 2.0
