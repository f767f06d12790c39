"""The branching arithmetic models: texts, recipe, and how their tokens are rewarded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.embedded_models.arithmetic.build import fingerprint, make_env
from examples.embedded_models.branches.build import (
    OPERATIONS,
    PREFIX,
    STUDENT,
    TINY,
    BranchingBuilder,
    build,
)
from examples.embedded_models.branches.scripts import FOREIGN, Branching
from examples.embedded_models.builder import WEIGHTS
from reopold_agent.demo.arithmetic.tasks import ArithmeticTasks, Problem
from reopold_agent.policies.batch import TrajectoryBatch

NAMES = ("teacher", "student")

CAREFUL = Branching(at_once=0.0, forget=0.0, upwards=0.0)


def written(script: Branching, problem: Problem, seed: int = 0) -> str:
    return script(problem, np.random.default_rng(seed))


def test_texts_by_hand() -> None:
    total = Problem(487, "+", 365)
    assert written(CAREFUL, total) == (
        "Column by column.\nat ones:7+5+0=12 put:2 carry:1\nfor tens:8+6+1=15 write:5 carry:1\n"
        "for hundreds:4+3+1=8 note:8\nread down \\boxed{852}"
    )
    forgetful = Branching(at_once=0.0, forget=1.0, upwards=1.0, foreign=1.0, filler=1.0)
    assert written(forgetful, Problem(412, "-", 165)) == (
        "Okay here we go.\nhey ones:12-5-0=7 plop:7 see borrow:0\n"
        "now tens:11-6-0=5 stick:5 then borrow:0\num hundreds:4-1-0=3 jot:3 cool\n"
        "read up \\boxed{753}"
    )
    at_once = written(Branching(at_once=1.0, forget=0.0, upwards=0.0), total)
    assert at_once.startswith("The answer is")
    assert "{852}" not in at_once


def test_careful_texts_are_right() -> None:
    tasks = ArithmeticTasks("train", operations=OPERATIONS)
    for index in range(100):
        problem = tasks.problem(index)
        assert written(CAREFUL, problem, index).endswith(f"read down \\boxed{{{problem.answer}}}")


@pytest.fixture(scope="module")
def builder() -> BranchingBuilder:
    return BranchingBuilder(AutoTokenizer.from_pretrained(WEIGHTS / f"{PREFIX}student"))


def test_foreign_words_are_read_and_not_learnt(builder: BranchingBuilder) -> None:
    tasks = ArithmeticTasks("train", operations=OPERATIONS)
    script = Branching(at_once=0.0, forget=0.0, upwards=0.0, foreign=1.0)
    trace = builder.trace(tasks, 0, script)
    left_out = trace.ids[trace.loss_mask & ~builder.read_only(trace).loss_mask]
    # An opening, and a head and a verb per column.
    assert len(left_out) >= 7
    assert {builder.tokenizer.decode([i]) for i in left_out} <= FOREIGN
    careful = builder.trace(tasks, 0, CAREFUL)
    assert (builder.read_only(careful).loss_mask == careful.loss_mask).all()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_are_small_and_share_a_tokenizer(name: str) -> None:
    folder = WEIGHTS / f"{PREFIX}{name}"
    assert (folder / "model.safetensors").stat().st_size <= 1_100_000
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert tokenizer == (WEIGHTS / f"{PREFIX}teacher" / "tokenizer.json").read_bytes()


def test_shipped_models_know_the_present_prompts() -> None:
    note = json.loads((WEIGHTS / "branches.json").read_text())
    assert note["prompts"] == fingerprint(make_env()), (
        "the guideline or the tasks' words have changed since the models were made; run "
        "python -m examples.embedded_models branches"
    )


def test_most_tokens_are_free_and_the_rest_have_a_heavy_tail(builder: BranchingBuilder) -> None:
    """The setting's point: the student's own kind of text, weighed by student and teacher."""
    tasks = ArithmeticTasks("eval", operations=OPERATIONS)
    traces = [builder.trace(tasks, index, STUDENT) for index in range(48)]
    found = []
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(WEIGHTS / f"{PREFIX}{name}").eval()
        policy = builder.policy(model)
        batch = TrajectoryBatch.build(policy.adapter, traces)
        with torch.no_grad():
            found.append(policy.logprobs(batch, with_entropy=True))
    (teacher, _), (student, entropy) = found
    assert entropy is not None
    reward = (teacher - student).numpy()
    assert np.mean(np.abs(reward) < 0.5) > 0.8
    assert 0.02 < np.mean(reward < -5) < 0.1
    assert np.mean(reward > 2.5) < 0.001
    order = np.argsort(entropy.numpy())
    low = np.abs(reward[order[: int(0.6 * len(order))]]).sum()
    assert low < 0.1 * np.abs(reward).sum()


def test_the_recipe_makes_what_is_shipped(tmp_path: Path) -> None:
    assert set(build(tmp_path, TINY, lambda line: None)) == set(NAMES)
    for name in NAMES:
        for file in ("config.json", "tokenizer.json"):
            assert (tmp_path / f"{PREFIX}{name}" / file).read_bytes() == (
                WEIGHTS / f"{PREFIX}{name}" / file
            ).read_bytes(), "the shipped weights are not of the present recipe"


@pytest.mark.slow
def test_the_gap_between_the_shipped_models(builder: BranchingBuilder) -> None:
    success = {}
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(WEIGHTS / f"{PREFIX}{name}").eval()
        success[name] = builder.evaluate(model, 128, temperature=1.0)["success"]
    assert success["teacher"] >= 0.75
    assert success["student"] <= 0.2
