"""Generation ahead of the update (``engine.ahead=1``): whose weights, errors, ends, resuming."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from running import assert_same_weights, composed, results, train, train_rows, without_timings
from test_engine_objectives import crash_before
from test_policy_roles import Elsewhere, elsewhere  # noqa: F401 (a fixture)

from reopold_agent.errors import CheckpointError, ConfigError, ModelError
from reopold_agent.policies.transformers_policy import CopiedPolicy, TransformersPolicy
from reopold_agent.rollout.runner import RolloutCancelledError, RolloutRunner
from reopold_agent.train import evaluation, finish
from reopold_agent.train import loop as loop_module
from reopold_agent.train.collect import Collector
from reopold_agent.train.engine import run_objective
from reopold_agent.train.resume import RunState
from reopold_agent.train.roles import check_roles
from reopold_agent.train.rollouts import RolloutsAhead
from reopold_agent.train.rows import Row, StepBatch
from reopold_agent.train.timing import Clock, step_times
from reopold_agent.train.update import Updater
from reopold_agent.train.verl.supported import check_settings, student_gpus

AHEAD = (
    *("engine.ahead=1", "batch.prompts=2", "batch.mini_batch=2", "batch.samples=2"),
    *("evaluation.tasks=1", "evaluation.curve_tasks=1", "evaluation.teacher=false"),
    "objective.switch_step=1",
)


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)


def fingerprint(model: torch.nn.Module) -> float:
    return sum(float(each.detach().double().abs().sum()) for each in model.parameters())


def model_of(policy: Any) -> torch.nn.Module:
    own: TransformersPolicy = policy.policy if isinstance(policy, Elsewhere) else policy
    return own.adapter.model


@pytest.mark.parametrize("sampler", ["transformers", "elsewhere"])
def test_a_steps_episodes_have_the_weights_before_the_last_update(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probs before the update are the trainer's, and the difference reaches the loss."""
    generated: dict[int, tuple[float, float]] = {}
    trained: dict[int, float] = {}
    evaluated: list[tuple[float, float]] = []
    threads, rows = set(), dict[int, list[Row]]()
    trainer: list[torch.nn.Module] = []
    collect, update, play = Collector.collect, Updater.step, evaluation.play_held_out

    def collecting(self: Collector, step: int, *arguments: Any) -> StepBatch:
        threads.add(threading.current_thread().name)
        first = fingerprint(model_of(self.student))
        batch = collect(self, step, *arguments)
        generated[step] = first, fingerprint(model_of(self.student))
        return batch

    def updating(self: Updater, batches: Any, step: int, threshold: Any) -> Any:
        trainer[:] = [self.policy.adapter.model]
        trained[step] = fingerprint(trainer[0])
        rows[step] = [row for batch in batches for row in batch]
        return update(self, batches, step, threshold)

    def evaluating(runner: Any, policy: Any, *arguments: Any, **others: Any) -> Any:
        if trainer:
            evaluated.append((fingerprint(model_of(policy)), fingerprint(trainer[0])))
        return play(runner, policy, *arguments, **others)

    monkeypatch.setattr(Collector, "collect", collecting)
    monkeypatch.setattr(Updater, "step", updating)
    monkeypatch.setattr(evaluation, "play_held_out", evaluating)
    train(tmp_path, *AHEAD, f"policy.student.name={sampler}", f"policy.teacher.name={sampler}")

    assert threads == {"reopold-ahead"}
    assert sorted(generated) == [0, 1, 2, 3], "the last step generates nothing more"
    assert len(set(trained.values())) == 4
    for step, (first, last) in generated.items():
        assert first == last == trained[max(0, step - 1)], "no new weights in the middle"
    assert len(evaluated) == 3  # a point of the curve, and two at the end
    assert all(own == current for own, current in evaluated)

    logged = train_rows(tmp_path)
    assert [row["rollout/staleness"] for row in logged] == [0, 1, 1, 1]
    for step, row in enumerate(logged):
        gaps = []
        for each in rows[step]:
            assert each.weight is not None
            old, _ = each.behaviour
            gap = (old - each.trajectory.logp)[each.trajectory.loss_mask]
            gaps.append(np.abs(gap).max())
            expected = np.minimum(np.exp(gap), 2.0)
            np.testing.assert_allclose(each.weight[each.trajectory.loss_mask], expected, 1e-5)
        assert row["sync/logp_gap_max"] == pytest.approx(max(gaps))
        assert max(gaps) < 1e-4 if step == 0 else max(gaps) > 1e-2
        assert 0 <= row["importance/capped_share"] < 1
        here = ("wait", "teacher", "old_logp", "update", "sync", "other")
        assert sum(row[f"time/{part}"] for part in here) == pytest.approx(row["time/step"])


# Resuming: the episodes that were being generated are generated again, with the same weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "make_plots", lambda folder: None)
        train(folder, *AHEAD)
    return folder


def lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_before(monkeypatch, 3)
    with pytest.raises(SystemExit):
        train(folder, *AHEAD, "checkpoint.every=2")


def stopped_in_the_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the sampler has other weights than those of the episodes that wait for training."""
    play = evaluation.play_held_out

    def interrupted(*arguments: Any, **others: Any) -> Any:
        if len(train_rows(folder)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return play(*arguments, **others)

    monkeypatch.setattr(evaluation, "play_held_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(folder, *AHEAD, "checkpoint.every=0")


@pytest.mark.parametrize("ended", [lost, stopped_in_the_evaluation])
def test_a_run_that_ended_early_continues_bit_for_bit(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ended: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    with monkeypatch.context() as patch:
        ended(tmp_path, patch)
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    train(tmp_path, *AHEAD)
    assert results(tmp_path) == results(whole)
    assert_same_weights(tmp_path / "final", whole / "final")


def test_a_run_that_gets_more_steps_equals_one_that_had_them(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, *AHEAD, "steps=2", "evaluation.tasks=0")
    train(tmp_path, *AHEAD, "steps=4", "evaluation.tasks=0")
    assert without_timings(train_rows(tmp_path)) == without_timings(train_rows(whole))


def test_a_run_of_an_earlier_version_may_go_on(whole: Path) -> None:
    config, raw = composed("engine.ahead=0")
    saved = {**raw, "engine": {k: v for k, v in raw["engine"].items() if k != "ahead"}}

    def state(now: dict[str, Any]) -> RunState:
        folder = SimpleNamespace(
            path=whole, config=whole / "before.yaml", same_template=lambda *arguments: None
        )
        return RunState(config, now, folder)  # type: ignore[arg-type]

    (whole / "before.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(saved)))
    assert state(raw).check(whole) is not None
    with pytest.raises(CheckpointError, match=r"engine\.ahead: 0 -> 1"):
        state({**raw, "engine": {**raw["engine"], "ahead": 1}}).check(whole)


# The thread


class Episodes:
    """Stands in for the collector: each step's rows are the sampler's weight, once it may end."""

    def __init__(self, roles: Any) -> None:
        self.runner = RolloutRunner.__new__(RolloutRunner)
        self.runner._cancelled = False
        self.roles, self.end = roles, threading.Event()
        self.error: Exception | None = None
        self.begun: list[int] = []

    def collect(self, step: int, position: int, on_done: Any) -> Any:
        self.begun.append(step)
        before = self.roles.sampler.weight.item()
        while not self.end.wait(0.005):
            if self.runner._cancelled:
                raise RolloutCancelledError
        if self.error is not None:
            raise self.error
        assert self.roles.sampler.weight.item() == before
        return SimpleNamespace(weight=before, position=position + 1)


class Pair:
    """Roles whose trainer and sampler have one weight each, and the updates of the trainer."""

    def __init__(self) -> None:
        self.model, self.sampler = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, False)
        self.trainer = SimpleNamespace(adapter=SimpleNamespace(model=self.model))
        self.done = 0
        self.set(0.0)
        self.sync()

    def set(self, weight: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(weight)

    def sync(self) -> None:
        with torch.no_grad():
            self.sampler.weight.copy_(self.model.weight)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def ahead(pair: Pair, episodes: Episodes, steps: int = 3) -> RolloutsAhead:
    return RolloutsAhead(episodes, pair, None, pair, steps)  # type: ignore[arg-type]


def update(pair: Pair, rollouts: RolloutsAhead) -> None:
    pair.done += 1
    pair.set(float(pair.done))
    rollouts.after_update(changed=True)


def test_the_next_episodes_begin_before_the_update_and_end_whenever(pair: Pair) -> None:
    episodes = Episodes(pair)
    rollouts = ahead(pair, episodes, steps=4)
    episodes.end.set()
    assert rollouts.collect(0, 0).weight == 0  # type: ignore[attr-defined]
    episodes.end.clear()
    rollouts.before_update(0, 1)
    update(pair, rollouts)
    assert episodes.begun == [0, 1]
    assert pair.sampler.weight.item() == 0, "it still generates"
    assert rollouts.state(1)["weights"]["weight"].item() == 0  # type: ignore[index]
    assert rollouts.state(0) is rollouts.state(2) is None
    threading.Timer(0.05, episodes.end.set).start()
    rollouts.use_current()  # an evaluation
    assert pair.sampler.weight.item() == 1
    batch: Any = rollouts.collect(1, 1)
    assert (batch.weight, batch.staleness) == (0, 1)
    rollouts.before_update(1, 2)
    update(pair, rollouts)
    batch = rollouts.collect(2, 2)
    assert (batch.weight, batch.staleness) == (1, 1)
    rollouts.before_update(2, 3)
    update(pair, rollouts)
    batch = rollouts.collect(3, 3)
    assert (batch.weight, batch.staleness) == (2, 1), "without an evaluation in between"
    rollouts.before_update(3, 4)
    assert episodes.begun == [0, 1, 2, 3], "there is no step 4"


def test_an_error_of_the_thread_is_raised_where_its_step_begins(pair: Pair) -> None:
    episodes = Episodes(pair)
    rollouts = ahead(pair, episodes)
    episodes.end.set()
    rollouts.collect(0, 0)
    episodes.error = ModelError("its own words")
    rollouts.before_update(0, 1)
    update(pair, rollouts)
    rollouts.use_current()  # the evaluation after step 0 is made all the same
    assert pair.sampler.weight.item() == 1
    with pytest.raises(ModelError, match="its own words"):
        rollouts.collect(1, 1)


def test_closing_ends_the_thread(pair: Pair) -> None:
    episodes = Episodes(pair)
    rollouts = ahead(pair, episodes)
    episodes.end.set()
    rollouts.collect(0, 0)
    episodes.end.clear()
    rollouts.before_update(0, 1)
    rollouts.close()
    assert not [each for each in threading.enumerate() if each.name == "reopold-ahead"]


def test_a_failed_update_ends_the_run_and_what_it_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is at a turn of an episode, and no thread is left when the error is told."""

    def failing(*arguments: Any) -> Any:
        raise ModelError("in the update")

    monkeypatch.setattr(loop_module, "set_behaviour", failing)
    with pytest.raises(ModelError, match="in the update"):
        train(tmp_path, *AHEAD, "evaluation.tasks=0")
    assert not [each for each in threading.enumerate() if each.name == "reopold-ahead"]


def test_a_copy_shares_what_is_not_trained(make_model: Any, make_policy: Any) -> None:
    adapter = make_policy(make_model()).adapter
    first, *others = adapter.model.parameters()
    first.requires_grad_(False)
    policy = CopiedPolicy(adapter.copied(), allowed_ids=9, forbidden_ids=(), stop_ids=(1,))
    shared, *copied = policy.adapter.model.parameters()
    assert shared is first
    assert len(copied) == len(others)
    for own, trainers in zip(copied, others, strict=True):
        assert own is not trainers
        assert torch.equal(own, trainers)
    with torch.no_grad():
        kept = copied[0].clone()
        others[0].add_(1)
        assert torch.equal(copied[0], kept)
        policy.sync(adapter.model)
        assert torch.equal(copied[0], others[0])


# What cannot be is said before anything is loaded


@pytest.mark.parametrize(("overrides", "message"), [
    (["objective=sft"], "does not train on them"),
    (["engine.old_logp=rollout"], "engine.old_logp=recompute"),
    (["policy.student.name=elsewhere", "+policy.student.sleep=true"], "policy.student.sleep"),
])  # fmt: skip
def test_runs_that_cannot_be_ahead(overrides: list[str], message: str) -> None:
    config, _ = composed("engine.ahead=1", *overrides)
    with pytest.raises(ConfigError, match=message) as caught:
        check_roles(config, run_objective(config))
    assert str(caught.value).count("\n") == 1


def test_more_than_one_step_ahead_and_verl_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.ahead is by how many"):
        composed("engine.ahead=2")
    config, _ = composed("engine=verl", "engine.ahead=1")
    with pytest.raises(
        ConfigError, match=r"GPUs needs them alone\.\nGive it GPUs .*_node=N\)"
    ) as told:
        check_settings(config)
    assert str(told.value).count("\n") == 1
    for words in (["engine.teacher_gpus_per_node=1"], ["objective=grpo", "model.teacher=null"]):
        config, _ = composed("engine=verl", "engine.ahead=1", "engine.gpus_per_node=2", *words)
        check_settings(config)


def test_gpus_that_only_generate_are_taken_from_those_that_train() -> None:
    words = ["engine=verl", "engine.gpus_per_node=8", "engine.rollout_gpus_per_node=2"]
    config, _ = composed(*words, "engine.teacher_gpus_per_node=2")
    check_settings(config)
    assert student_gpus(config.engine, with_teacher=True) == 4
    assert student_gpus(config.engine, with_teacher=False) == 6
    shared, _ = composed(*words)
    with pytest.raises(ConfigError, match=r"teacher's need some, too\.\nSet engine\.teacher_gpus"):
        student_gpus(shared.engine, with_teacher=True)
    assert student_gpus(shared.engine, with_teacher=False) == 6
    for rollout, parallel, told in (
        (6, 1, r"beside engine\.rollout_gpus_per_node=6 and engine\.teacher_gpus_per_node=2\.\n"),
        (2, 4, r"tensor_parallel=4 does not divide the 2 GPUs per node"),
    ):
        engine = replace(
            config.engine,
            rollout_gpus_per_node=rollout,
            student_server=replace(config.engine.student_server, tensor_parallel=parallel),
        )
        with pytest.raises(ConfigError, match=told):
            student_gpus(engine, with_teacher=True)
    with pytest.raises(ConfigError, match="rollout_gpus_per_node must not be negative"):
        composed("engine=verl", "engine.rollout_gpus_per_node=-1")


def test_waiting_is_a_part_of_the_step_and_generation_is_not() -> None:
    clock = Clock()
    clock.laps = dict.fromkeys(("old_logp", "teacher"), 1.0)
    clock.laps |= {"rollout": 0.5, "sync": 0.25, "update": 2.0, "other": 0.25}
    stats: Any = SimpleNamespace(generate_seconds=3.0, env_wait_seconds=1.0)
    found = step_times(clock, stats, ahead=True)
    assert found["time/generate"] == 3.0
    assert found["time/wait"] == 0.5
    assert found["time/step"] == 5.0
    assert found["time/other"] == pytest.approx(0.25)
