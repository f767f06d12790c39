"""The learning rate of each update against transformers' schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from reopold_agent.config import CONSTANT, COSINE
from reopold_agent.train.learning_rate import LearningRate

UPDATES = 12


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.3)


@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
@pytest.mark.parametrize("kind", [CONSTANT, COSINE])
def test_the_rates_are_those_of_transformers_after_the_warm_up(kind: str, warmup: int) -> None:
    own, other = optimizer(), optimizer()
    rates = LearningRate(own, kind, warmup, UPDATES)
    if kind == CONSTANT:
        theirs = get_constant_schedule_with_warmup(other, warmup)
    else:
        theirs = get_cosine_schedule_with_warmup(other, warmup, UPDATES)
    for done in range(UPDATES):
        # Theirs begins the warm-up at 0, so that the first update would do nothing.
        expected = 0.3 * (done + 1) / warmup if done < warmup else other.param_groups[0]["lr"]
        assert own.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
        for each in (own, other):
            each.step()
        rates.step()
        theirs.step()
    if kind == COSINE and warmup < UPDATES:
        assert own.param_groups[0]["lr"] == 0
        rates.step()
        assert own.param_groups[0]["lr"] == 0  # theirs rises again


def test_restored_rates_are_those_of_the_run_s_present_length() -> None:
    shorter = LearningRate(optimizer(), COSINE, 0, 4)
    for _ in range(4):
        shorter.optimizer.step()
        shorter.step()
    assert shorter.optimizer.param_groups[0]["lr"] == 0
    longer = LearningRate(optimizer(), COSINE, 0, 8)
    longer.optimizer.load_state_dict(shorter.optimizer.state_dict())
    longer.load_state_dict(shorter.state_dict())
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)
