"""Mixtures: several environments that train one student."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from reopold_agent.config import whole_weights
from reopold_agent.train.data_order import DataOrder, TaskOrder, turns

# Order of the draws


def test_environments_take_turns_by_weight() -> None:
    # By hand: (2, 1, 1): a has most and pays 4; (0, 2, 2): b; (2, -1, 3): c; (4, 0, 0): a.
    assert turns({"a": 2.0, "b": 1.0, "c": 1.0}) == ["a", "b", "c", "a"]
    assert turns({"a": 5.0, "b": 1.0, "c": 1.0}) == list("aabacaa")  # nginx's own example
    assert whole_weights({"a": 0.1, "b": 0.2, "c": 1.5}) == {"a": 1, "b": 2, "c": 15}
    assert Counter(turns({"a": 0.3, "b": 0.7})) == {"a": 3, "b": 7}


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0, "c": 0.5}])
def test_a_draw_depends_on_seed_and_position_only(weights: dict[str, float]) -> None:
    tasks = {name: 5 + number for number, name in enumerate(weights)}
    order = TaskOrder(tasks, 7, weights)
    drawn = [order[k] for k in range(400)]
    shuffled = np.random.default_rng(0).permutation(400)
    assert [TaskOrder(tasks, 7, weights)[int(k)] for k in shuffled[:40]] == [
        drawn[k] for k in shuffled[:40]
    ]
    for name, size in tasks.items():
        own = [index for env, index in drawn if env == name]
        for start in range(0, len(own) - size, size):  # pass after pass over all of its tasks
            assert sorted(own[start : start + size]) == list(range(size))
    assert [TaskOrder(tasks, 8, weights)[k] for k in range(400)] != drawn


def test_equal_environments_have_orders_of_their_own() -> None:
    order = TaskOrder({"a": 50, "b": 50}, 3, {"a": 1.0, "b": 1.0})
    drawn = [order[k] for k in range(100)]
    orders = [[index for env, index in drawn if env == name] for name in "ab"]
    assert orders[0] != orders[1]


def test_one_environment_has_the_order_that_it_always_had() -> None:
    order, before = TaskOrder({"math": 10}, 3, {"math": 2.0}), DataOrder(10, 3)
    assert [order[k] for k in range(25)] == [("math", before[k]) for k in range(25)]
