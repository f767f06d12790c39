"""Runs in which a policy other than the trainer's generates or scores, and their failures.

The other policies here are copies of the models in this process, registered as a plugin would.
"""

from __future__ import annotations

import copy
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import composed, train, train_rows, without_timings

from reopold_agent.config import PixelConfig, PixelsConfig, ViewPixels
from reopold_agent.errors import (
    ConfigError,
    MissingExtraError,
    ModelServerError,
    UnknownNameError,
)
from reopold_agent.policies.base import PolicyRole
from reopold_agent.policies.loading import load_model
from reopold_agent.policies.registry import POLICIES, PolicyKind
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.engine import run_objective
from reopold_agent.train.roles import check_roles
from reopold_agent.train.rows import Row
from reopold_agent.train.scoring import Scoring, ScoringProblems
from reopold_agent.types import Completion, Request, Sampling, TokenScores, Trajectory


class Elsewhere:
    """A copy of the role's model that is not the trainer's: generates, scores, takes weights."""

    scoring_threads = 3
    made: list[Elsewhere]

    def __init__(self, role: PolicyRole) -> None:
        self.model = load_model(role.processing.spec, role.role, torch.device("cpu"))
        self.policy: TransformersPolicy = self.model.policy(
            forbidden_ids=role.forbidden_ids, stop_ids=role.stop_ids, max_tokens_per_pass=4096
        )
        self.settings, self.syncs, self.calls = dict(role.settings), 0, list[str]()
        self.role = role
        self.threads: set[str] = set()
        self._lock = threading.Lock()
        Elsewhere.made.append(self)

    def generator(self, sampling: Sampling) -> Any:
        return FailingGenerator(self.policy.generator(sampling), self.settings.get("fails", ()))

    def score(
        self, trajectories: Sequence[Trajectory], *, with_entropy: bool = False
    ) -> list[TokenScores]:
        (trajectory,) = trajectories
        if trajectory.sample in self.settings.get("unscored", ()):
            raise ModelServerError("no answer")
        with self._lock:
            self.threads.add(threading.current_thread().name)
            return self.policy.score(trajectories)

    def sync(self, model: torch.nn.Module) -> None:
        self.calls.append("sync")
        if not self.settings.get("stale"):
            self.model.adapter.model.load_state_dict(copy.deepcopy(model.state_dict()))

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        self.calls.append("close")


class FailingGenerator:
    """Gives up the first turns of some keys; otherwise the generator it holds."""

    runs_beside = True

    def __init__(self, inner: Any, fails: Sequence[int]) -> None:
        self._inner, self._fails = inner, set(fails)
        self._given_up: list[int] = []

    @property
    def in_flight(self) -> int:
        return int(self._inner.in_flight) + len(self._given_up)

    def submit(self, requests: Sequence[Request]) -> None:
        self._given_up += [r.key for r in requests if r.key in self._fails]
        sound = [r for r in requests if r.key not in self._fails]
        if sound:
            self._inner.submit(sound)

    def step(self) -> list[Completion]:
        failed = [Completion(k, (), (), (), "length", error="no luck") for k in self._given_up]
        self._given_up = []
        return [*failed, *self._inner.step()]

    def release(self, key: int) -> None:
        if key not in self._fails:
            self._inner.release(key)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[Elsewhere]:
    monkeypatch.setitem(POLICIES._things, "elsewhere", PolicyKind(Elsewhere))
    Elsewhere.made = []
    return Elsewhere.made


BOTH = ("policy.student.name=elsewhere", "policy.teacher.name=elsewhere")


def assert_same_step(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to rounding, which depends on who shares a batch."""
    row, expected = without_timings(row), without_timings(expected)
    assert row.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, float) and not key.startswith("sync/"):
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_run_is_the_same_whoever_generates_and_scores(
    tmp_path: Path, elsewhere: list[Elsewhere]
) -> None:
    """A sampler that missed one update would sample other tokens from the next step on."""
    train(tmp_path / "own", "env=pixel_reasoner")
    train(tmp_path / "other", "env=pixel_reasoner", *BOTH)
    own, other = train_rows(tmp_path / "own"), train_rows(tmp_path / "other")
    sampler, teacher = elsewhere
    assert sampler.calls[:2] == ["wake", "sync"], "it has the weights before the first step"
    assert sampler.calls.count("sync") == 1 + len(own)
    assert sampler.calls.count("sleep") == len(own)
    assert sampler.calls[-1] == "close" == teacher.calls[-1]
    for each in elsewhere:  # what an engine is sized by
        assert (each.role.max_pixels, each.role.seed) == (12_544, 0)
    assert teacher.threads
    assert all(name.startswith("reopold-teacher") for name in teacher.threads)
    for first, second in zip(own, other, strict=True):
        second = dict(second)
        assert second.pop("rollout/dropped") == second.pop("teacher/dropped") == 0
        assert second.pop("sync/logp_gap_mean") <= second.pop("sync/logp_gap_max") < 1e-4
        assert second["time/sync"] > 0
        assert_same_step(second, first)


def test_a_sampler_with_old_weights_shows(tmp_path: Path) -> None:
    train(
        tmp_path,
        "env=pixel_reasoner",
        "policy.student.name=elsewhere",
        "+policy.student.stale=true",
    )
    rows = train_rows(tmp_path)
    assert rows[0]["sync/logp_gap_max"] < 1e-4
    assert rows[1]["sync/logp_gap_max"] > 1e-2


def test_a_resumed_sampler_has_the_checkpoints_weights(tmp_path: Path) -> None:
    run = ("env=pixel_reasoner", "policy.student.name=elsewhere", "checkpoint.every=2")
    train(tmp_path, *run)
    whole = train_rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    (tmp_path / "summary.json").unlink()
    train(tmp_path, *run)
    again = train_rows(tmp_path)
    assert len(whole) == len(again) == 4
    assert again[2]["sync/logp_gap_max"] < 1e-4
    assert_same_step(again[2], whole[2])
    assert_same_step(again[3], whole[3])


def test_failed_turns_and_scores_are_dropped_and_counted(tmp_path: Path) -> None:
    train(
        tmp_path,
        "env=pixel_reasoner",
        "batch.prompts=2",
        "batch.mini_batch=2",
        "batch.samples=3",
        "evaluation.tasks=1",
        "evaluation.every=0",
        "evaluation.teacher=false",
        *BOTH,
        "+policy.student.fails=[1]",
        "+policy.teacher.unscored=[2]",
    )
    for row in train_rows(tmp_path):
        assert row["rollout/dropped"] == 1
        assert row["rollout/stop/policy_error"] == pytest.approx(1 / 6)
        assert row["teacher/dropped"] == 2
        assert row["rollout/trained_share"] == pytest.approx(3 / 6)
        assert np.isfinite(row["loss"])


def test_a_step_in_which_everything_fails_is_reported(tmp_path: Path) -> None:
    few = ("env=pixel_reasoner", "batch.samples=1", "evaluation.tasks=1", "evaluation.every=0",
           "evaluation.teacher=false", *BOTH)  # fmt: skip
    with pytest.raises(ConfigError, match="no luck"):
        train(tmp_path / "a", *few, "+policy.student.fails=[0,1,2,3]")
    with pytest.raises(ModelServerError, match="no answer"):
        train(tmp_path / "b", *few, "+policy.teacher.unscored=[0]")
    assert all(made.calls[-1] == "close" for made in Elsewhere.made), "nothing is left running"


# What cannot be is said before anything is loaded


@pytest.mark.parametrize(("overrides", "message"), [
    (["policy.student.name=elsewhere", "engine.old_logp=rollout"], "old_logp=recompute"),
    (["policy.teacher.name=elsewhere", "objective=gkd"], "policy.teacher.name=transformers"),
    (["policy.teacher.name=elsewhere", "model.teacher.follow=0.5"], "model.teacher.follow"),
])  # fmt: skip
def test_policies_that_do_not_suit_the_run(overrides: list[str], message: str) -> None:
    config, _ = composed("env=pixel_reasoner", *overrides)
    with pytest.raises(ConfigError, match=message):
        check_roles(config, run_objective(config))


def test_unknown_policies_and_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = composed("env=pixel_reasoner", "policy.teacher.name=vlm")
    with pytest.raises(UnknownNameError, match="vllm"):
        check_roles(config, run_objective(config))
    monkeypatch.setattr("reopold_agent.train.roles.find_spec", lambda name: None)
    config, _ = composed("env=pixel_reasoner", "policy=vllm")
    with pytest.raises(MissingExtraError, match=r"pip install -e \"\.\[vllm\]\""):
        check_roles(config, run_objective(config))


def test_the_largest_picture_is_that_of_the_limits_and_of_the_teachers_own() -> None:
    small, large = PixelConfig(784, 12_544), PixelConfig(784, 25_088)
    pixels = PixelsConfig(small, large)
    assert pixels.most() == pixels.most(ViewPixels()) == 25_088
    assert pixels.most(ViewPixels(observation=small)) == 12_544
    assert pixels.most(ViewPixels(prompt=PixelConfig(784, 50_176))) == 50_176


def test_each_role_is_chosen_alone() -> None:
    config, _ = composed("env=pixel_reasoner", "policy=vllm", "policy.teacher.name=transformers")
    assert config.policy.student["name"] == "vllm"
    assert config.policy.teacher["name"] == "transformers"
    check_roles(config, run_objective(config)) if "vllm" in sys.modules else None
    with pytest.raises(ConfigError, match=r"policy\.student\.name"):
        composed("env=pixel_reasoner", "policy.student.name=null")


# Scoring beside generation


class SlowTeacher:
    """Later trajectories are answered first."""

    scoring_threads = 8

    def __init__(self, fault: Callable[[Trajectory], float] = lambda t: 0.0) -> None:
        self.fault = fault

    def score(self, trajectories: Sequence[Trajectory], **_: Any) -> list[TokenScores]:
        (trajectory,) = trajectories
        time.sleep(0.02 * (8 - trajectory.index))
        value = self.fault(trajectory)
        logp = np.where(trajectory.loss_mask, -1.0 - trajectory.index + value, 0.0)
        return [TokenScores(logp.astype(np.float32), np.zeros_like(trajectory.logp))]


def test_scores_land_at_their_trajectories(random_trajectory: Any) -> None:
    trajectories = [random_trajectory(index) for index in range(8)]
    for each in trajectories:
        each.teacher_logp = None
    scoring = Scoring(SlowTeacher())  # type: ignore[arg-type]
    started = time.perf_counter()
    rows = [Row(each) for each in trajectories]
    for row in rows[:5]:
        scoring.begin(row)
    assert time.perf_counter() - started < 0.1, "begin does not wait"
    assert scoring.finish(rows, 0) == ScoringProblems()
    scoring.close()
    for each in trajectories:
        assert set(np.unique(each.teacher_logp[each.loss_mask])) == {-1.0 - each.index}


def test_a_score_that_is_not_finite_stops_the_step(random_trajectory: Any) -> None:
    trajectories = [random_trajectory(index) for index in range(3)]
    scoring = Scoring(SlowTeacher(lambda t: np.nan if t.index == 1 else 0.0))  # type: ignore[arg-type]
    ((row, wrong),) = scoring.finish([Row(each) for each in trajectories], 7).invalid
    assert row.trajectory is trajectories[1]
    assert "teacher's log-probs are not finite (nan at id" in wrong
    scoring.close()
