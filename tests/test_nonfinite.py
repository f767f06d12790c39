"""NaN, infinities and garbage: no update uses them, messages name them, and a run can continue."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import assert_same_weights, lines, results, train, train_rows
from step_rows import make_updates, rows_of, update_rows

from reopold_agent.config import OptimizerConfig
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError, ModelError, ModelServerError, NonFiniteError
from reopold_agent.objectives import LossTerms, Reopold, TokenBatch
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train import finish, loop, resume
from reopold_agent.train.checkpoint import save_checkpoint
from reopold_agent.train.loop import TrainingLoop
from reopold_agent.train.nonfinite import NOTE, NonFiniteGuard, invalid_entropy, invalid_logp
from reopold_agent.train.rows import Row, trajectories_of
from reopold_agent.train.scoring import Scoring
from reopold_agent.train.update import Updater
from reopold_agent.types import TokenScores, Trajectory


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    monkeypatch.setattr(resume, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        yield


# What is no log-prob


def lengthened(trajectory: Trajectory, response: int) -> Trajectory:
    """A copy with so many tokens of the student behind the prompt."""
    longer = copy.copy(trajectory)
    prompt = trajectory.prompt_length
    longer.ids = np.arange(prompt + response, dtype=np.int64)
    longer.loss_mask = longer.ids >= prompt
    longer.logp = scores_for(longer, 1)
    return longer


def scores_for(trajectory: Trajectory, seed: int = 0) -> Any:
    values = -np.random.default_rng(seed).exponential(size=len(trajectory.ids))
    return np.where(trajectory.loss_mask, values, 0.0).astype(np.float32)


GARBAGE: dict[str, tuple[Callable[[Any, Trajectory], Any], str]] = {
    "none": (lambda v, t: None, "not an array of numbers but NoneType"),
    "text": (lambda v, t: "no", "not an array of numbers but str"),
    "a list": (lambda v, t: v.tolist(), "not an array of numbers but list"),
    "ids": (lambda v, t: t.ids, "not an array of numbers"),
    "fewer": (lambda v, t: v[:-1], "are {less} for {L} ids"),
    "more": (lambda v, t: np.append(v, v[-1]), "are {more} for {L} ids"),
    "other shape": (lambda v, t: v[:, None], r"in 2-d"),
    "nan": (lambda v, t: _with(v, t, np.nan), r"not finite \(nan at id {last}, 1 in all\)"),
    "inf": (lambda v, t: _with(v, t, np.inf), r"not finite \(inf"),
    "-inf": (lambda v, t: _with(v, t, -np.inf), r"not finite \(-inf"),
    "positive": (lambda v, t: _with(v, t, 0.5), "0.5 at id {last} is above 0"),
    "zeros": (lambda v, t: np.zeros_like(v), "all 20 are 0"),
    "constant": (lambda v, t: np.where(t.loss_mask, np.float32(-2), v), "all 20 are -2"),
}


def _with(values: Any, trajectory: Trajectory, value: float) -> Any:
    changed = values.copy()
    changed[np.flatnonzero(trajectory.loss_mask)[-1]] = value
    return changed


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_distinguished_from_log_probs(random_trajectory: Any, kind: str) -> None:
    trajectory = lengthened(random_trajectory(0), 20)
    values = scores_for(trajectory)
    assert invalid_logp(values, trajectory, "teacher's") is None
    spoil, words = GARBAGE[kind]
    length = len(trajectory.ids)
    words = words.format(L=length, less=length - 1, more=length + 1, last=length - 1)
    found = invalid_logp(spoil(values, trajectory), trajectory, "teacher's")
    assert found is not None
    assert found.startswith("the teacher's log-probs are ")
    assert re.search(words, found), found


def test_what_rounding_and_short_answers_make_is_no_garbage(random_trajectory: Any) -> None:
    trajectory = lengthened(random_trajectory(0), 20)
    rounded = _with(scores_for(trajectory), trajectory, 1e-6)
    assert invalid_logp(rounded, trajectory, "teacher's") is None
    collapsed = lengthened(trajectory, 40)  # its student, then its teacher: nothing is open
    collapsed.logp = np.full(len(collapsed.ids), -1e-3, np.float32)
    zeros = np.zeros(len(collapsed.ids), np.float32)
    assert invalid_logp(zeros, collapsed, "teacher's") is None
    assert invalid_logp(zeros - 2, collapsed, "teacher's") is not None
    short = lengthened(trajectory, 15)  # a sure teacher of a few tokens
    assert invalid_logp(np.zeros(len(short.ids), np.float32), short, "teacher's") is None


def test_entropies_are_looked_at_where_they_count(random_trajectory: Any) -> None:
    trajectory = lengthened(random_trajectory(0), 4)
    entropy = np.ones(len(trajectory.ids), np.float32)
    entropy[0] = np.nan  # of the prompt
    assert invalid_entropy(entropy, trajectory) is None
    entropy[-1] = np.inf
    assert "not finite (inf at id" in str(invalid_entropy(entropy, trajectory))
    assert invalid_entropy(entropy[1:], trajectory) is not None


# A teacher that is no good


class Teacher:
    """Scores one after the other in this thread."""

    def __init__(self, answer: Callable[[Trajectory], Any]) -> None:
        self.answer = answer

    def score(self, trajectories: Sequence[Trajectory], **_: Any) -> list[Any]:
        return [self.answer(t) for t in trajectories]


class BesideTeacher(Teacher):
    """Scores while others generate."""

    scoring_threads = 2


def sound(trajectory: Trajectory) -> TokenScores:
    return TokenScores(scores_for(trajectory), np.zeros(len(trajectory.ids), np.float32))


@pytest.mark.parametrize("kind", [Teacher, BesideTeacher])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_teacher_s_garbage_is_named_and_the_rest_kept(
    random_trajectory: Any, kind: type[Teacher], garbage: str
) -> None:
    trajectories = [lengthened(random_trajectory(n), 20) for n in range(3)]

    def answer(trajectory: Trajectory) -> Any:
        good = sound(trajectory)
        if trajectory is not trajectories[1]:
            return good
        spoiled = GARBAGE[garbage][0](good.logp, trajectory)
        return TokenScores(spoiled, good.entropy)

    for each in trajectories:
        each.teacher_logp = None
    scoring = Scoring(kind(answer), "vllm, big-model")
    problems = scoring.finish(rows_of(trajectories), 3)
    scoring.close()
    assert problems.failed == []
    ((who, what),) = problems.invalid
    assert who.trajectory is trajectories[1]
    assert what.startswith("the teacher's (vllm, big-model) log-probs are ")
    for each in (trajectories[0], trajectories[2]):
        np.testing.assert_array_equal(each.teacher_logp, scores_for(each))


@pytest.mark.parametrize("answer", [None, 3, "no scores"])
@pytest.mark.parametrize("kind", [Teacher, BesideTeacher])
def test_an_answer_without_scores(random_trajectory: Any, kind: type[Teacher], answer: Any) -> None:
    trajectory = random_trajectory(0)
    scoring = Scoring(kind(lambda t: answer))
    ((who, what),) = scoring.finish(rows_of([trajectory]), 0).invalid
    scoring.close()
    assert who.trajectory is trajectory
    assert type(answer).__name__ in what


def test_fewer_scores_than_trajectories_are_refused(random_trajectory: Any) -> None:
    class Lazy(Teacher):
        def score(self, trajectories: Sequence[Trajectory], **_: Any) -> list[Any]:
            return [sound(t) for t in trajectories[:-1]]

    trajectories = [random_trajectory(n) for n in range(3)]
    with pytest.raises(ModelError, match=r"step 5: the teacher's \(me\) scores are 2 for 3"):
        Scoring(Lazy(sound), "me").finish(rows_of(trajectories), 5)


def test_a_teacher_that_raises_is_named(random_trajectory: Any) -> None:
    trajectory = random_trajectory(4)

    def broken(trajectory: Trajectory) -> Any:
        raise KeyError("logits")

    scoring = Scoring(BesideTeacher(broken), "mine")
    with pytest.raises(
        ModelError, match=r"teacher's \(mine\) scoring of task .* \(index .*KeyError: 'logits'"
    ):
        scoring.finish(rows_of([trajectory]), 0)
    scoring.close()


def test_invalid_numbers_of_a_server_are_garbage_not_failure(
    random_trajectory: Any,
) -> None:
    trajectories = [lengthened(random_trajectory(n), 20) for n in range(3)]

    def answer(trajectory: Trajectory) -> Any:
        if trajectory is trajectories[0]:
            raise NonFiniteError("http://gpu2:8100 gave log-probs that are not finite (nan)")
        if trajectory is trajectories[1]:
            raise ModelServerError("http://gpu2:8100 did not answer within 600 s")
        return sound(trajectory)

    scoring = Scoring(BesideTeacher(answer))
    problems = scoring.finish(rows_of(trajectories), 0)
    scoring.close()
    assert trajectories_of(problems.failed) == [trajectories[1]]
    ((who, what),) = problems.invalid
    assert who.trajectory is trajectories[0]
    assert "http://gpu2:8100" in what


# The update


LINEAR = OptimizerConfig(lr=0.01, warmup_steps=4)


def state_of(updater: Updater) -> tuple[Any, Any, Any]:
    weights = {n: p.detach().clone() for n, p in updater.policy.adapter.model.named_parameters()}
    optimizer = copy.deepcopy(updater.optimizer.state_dict())
    return weights, optimizer, copy.deepcopy(updater.scheduler.state_dict())


def assert_same_state(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    torch.testing.assert_close(one[1]["state"], other[1]["state"], rtol=0, atol=0)
    assert one[2]["last_epoch"] == other[2]["last_epoch"]


@pytest.fixture
def scored(random_trajectory: Any, make_policy: Any, make_model: Any) -> list[Trajectory]:
    policy = make_policy(make_model(seed=1))
    teacher = make_policy(make_model(seed=2))
    trajectories = [random_trajectory(n) for n in range(6)]
    for t, own, his in zip(
        trajectories,
        policy.score(trajectories, with_entropy=True),
        teacher.score(trajectories),
        strict=True,
    ):
        t.logp, t.entropy, t.teacher_logp = own.logp, own.entropy, his.logp
    return trajectories


@pytest.fixture
def new_updater(make_policy: Any, make_model: Any) -> Callable[..., Updater]:
    def make(**settings: Any) -> Updater:
        policy = make_policy(make_model(seed=1))
        return Updater(policy, Reopold(switch_step=5), LINEAR, **{"max_tokens": 100, **settings})

    return make


class NanGradient(Reopold):
    """A finite loss without a finite gradient: the derivative of a root at 0."""

    def terms(self, batch: TokenBatch, step: int, threshold: float | None) -> LossTerms:
        made = super().terms(batch, step, threshold)
        values = {**vars(made), "numerator": made.numerator + (batch.logp * 0).sum().sqrt()}
        return LossTerms(**values)


def spoil_loss(trajectories: list[Trajectory]) -> None:
    assert trajectories[1].teacher_logp is not None
    trajectories[1].teacher_logp = trajectories[1].teacher_logp.copy()
    trajectories[1].teacher_logp[trajectories[1].loss_mask] = np.inf


@pytest.mark.parametrize("max_tokens", [100, 100_000], ids=["micro-batches", "one pass"])
def test_a_bad_mini_batch_changes_nothing_and_reaches_no_other(
    scored: list[Trajectory], new_updater: Callable[..., Updater], max_tokens: int
) -> None:
    first, bad, last = scored[:2], scored[2:4], scored[4:]
    spoil_loss(bad)
    first_rows, bad_rows, last_rows = rows_of(first), rows_of(bad), rows_of(last)
    # Fail: the first update was made, the second was not, the third is not tried.
    failing = new_updater(max_tokens=max_tokens)
    alone = new_updater(max_tokens=max_tokens)
    make_updates(alone, [first], 0)
    with pytest.raises(NonFiniteError, match=r"step 0, task .*not made") as caught:
        make_updates(failing, [first, bad, last], 0)
    assert bad[1].task_id in str(caught.value)
    assert first[0].task_id not in str(caught.value)
    assert failing.updates == 1
    assert_same_state(state_of(failing), state_of(alone))
    assert not failing.policy.adapter.model.training
    assert all(p.grad is None for p in failing.policy.adapter.model.parameters())
    # Skip: as if the second had not been there at all.
    skipping = new_updater(max_tokens=max_tokens, skip_nonfinite=True)
    without = new_updater(max_tokens=max_tokens)
    stats = update_rows(skipping, [first_rows, bad_rows, last_rows], 0)
    expected = make_updates(without, [first, last], 0)
    assert_same_state(state_of(skipping), state_of(without))
    assert stats.skipped == 1
    assert (stats.loss, stats.grad_norm, stats.lr) == (
        expected.loss,
        expected.grad_norm,
        expected.lr,
    )
    assert {row for row, _ in skipping.rejected} <= set(bad_rows)
    # Found before it is in a gradient, and no more are rejected than shared its pass.
    assert all("the loss of its micro-batch is" in what for _, what in skipping.rejected)
    assert all(row.use is not None for row in [*first_rows, *last_rows])
    assert all(row.use is None for row in bad_rows)


def test_a_gradient_that_is_not_finite_names_its_mini_batch(
    scored: list[Trajectory], make_policy: Any, make_model: Any
) -> None:
    policy = make_policy(make_model(seed=1))
    updater = Updater(
        policy, NanGradient(switch_step=5), LINEAR, max_tokens=10_000, skip_nonfinite=True
    )
    before = state_of(updater)
    stats = make_updates(updater, [scored[:3]], 0)
    assert stats.skipped == 1
    assert np.isnan(stats.loss)
    assert [id(row.trajectory) for row, _ in updater.rejected] == [id(t) for t in scored[:3]]
    assert all("gradient norm of its mini-batch is nan" in what for _, what in updater.rejected)
    assert_same_state(state_of(updater), before)


def test_the_student_s_own_nan_is_found_where_it_is(
    scored: list[Trajectory],
    new_updater: Callable[..., Updater],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = TransformersPolicy.logprobs

    def logprobs(self: TransformersPolicy, batch: Any) -> Any:
        values_N, entropy_N = original(self, batch)
        values_N = values_N.clone()
        values_N[scored[0].response_tokens] = np.nan  # the first of the second trajectory
        return values_N, entropy_N

    monkeypatch.setattr(TransformersPolicy, "logprobs", logprobs)
    updater = new_updater(max_tokens=10_000, skip_nonfinite=True)
    # In refinement every kept token counts; NaN is above no floor in exploration.
    for trajectory in scored[:3]:
        trajectory.entropy = np.ones_like(trajectory.entropy)
    make_updates(updater, [scored[:3]], 5)
    ((who, what),) = updater.rejected
    assert who.trajectory is scored[1]
    assert "the student's log-probs in the update are not finite (1 of" in what


# Whole runs


RUN = ("steps=3", "evaluation.tasks=1", "evaluation.every=0", "checkpoint.every=0")


def spoiled_scores(
    monkeypatch: pytest.MonkeyPatch, value: float, when: Callable[[int, Trajectory], bool]
) -> None:
    """The teacher's score of a token is ``value`` in calls (from 1) and trajectories chosen."""
    original = TransformersPolicy.score
    calls: list[int] = []

    def score(self: TransformersPolicy, trajectories: Any, **settings: Any) -> Any:
        scores = original(self, trajectories, **settings)
        calls.append(1)
        for trajectory, each in zip(trajectories, scores, strict=True):
            if when(len(calls), trajectory):
                each.logp[np.flatnonzero(trajectory.loss_mask)[0]] = value
        return scores

    monkeypatch.setattr(TransformersPolicy, "score", score)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *RUN)
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.0])
def test_fail_saves_what_is_good_and_names_the_cause(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    folder = tmp_path / "run"
    blamed: list[str] = []

    def second(call: int, trajectory: Trajectory) -> bool:
        if call == 2 and not blamed:
            blamed.append(trajectory.task_id)
            return True
        return False

    with monkeypatch.context() as patch:
        spoiled_scores(patch, value, second)
        with pytest.raises(NonFiniteError) as caught:
            train(folder, *RUN)
    first, then = str(caught.value).splitlines()
    assert first.startswith(f"step 1, task {blamed[0]} (pixel_reasoner, index ")
    assert "the teacher's (transformers, demo:teacher) log-probs are" in first
    assert "on_nonfinite=skip" in then
    # The state before the step is saved, although no checkpoint was due.
    assert os.listdir(folder / "checkpoints") == ["step-000001"]
    assert str(folder / "checkpoints" / "step-000001") in then
    assert len(train_rows(folder)) == 1
    (row,) = [r for r in lines(folder / "trajectories.jsonl") if r["step"] == 1]
    assert row["task_id"] == blamed[0]
    assert "log-probs are" in row["info"][NOTE]
    assert len(row["logp"]) == len(row["ids"]) == len(row["teacher_logp"])
    # It was an accident: the same command goes on, to the same end.
    train(folder, *RUN)
    assert results(folder) == results(whole)
    assert_same_weights(folder / "final", whole / "final")


def test_a_failed_run_continues_with_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    bad: list[int] = []

    def one_of_the_second(call: int, trajectory: Trajectory) -> bool:
        if call == 2 and not bad:
            bad.append(trajectory.index)
        return trajectory.index in bad

    spoiled_scores(monkeypatch, np.nan, one_of_the_second)
    with pytest.raises(NonFiniteError):
        train(folder, *RUN)
    train(folder, *RUN, "on_nonfinite=skip")
    rows = train_rows(folder)
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert "nonfinite/trajectories" not in rows[0]
    assert [r["nonfinite/trajectories"] for r in rows[1:]] == [1, 0]
    assert [r["update/skipped"] for r in rows[1:]] == [0, 0]
    assert [r["rollout/trained_share"] for r in rows] == [1.0, 0.75, 1.0]
    noted = [r for r in lines(folder / "trajectories.jsonl") if NOTE in r["info"]]
    assert [r["index"] for r in noted] == bad
    assert all(r["kept"] is None for r in noted)  # nothing was made of it


def test_skip_changes_nothing_where_all_is_well(whole: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *RUN, "on_nonfinite=skip")
    rows = train_rows(tmp_path / "run")
    assert {r.pop("nonfinite/trajectories") for r in rows} == {0}
    assert {r.pop("update/skipped") for r in rows} == {0}
    assert [r["loss"] for r in rows] == [r["loss"] for r in train_rows(whole)]
    assert_same_weights(tmp_path / "run/final", whole / "final")


@pytest.mark.parametrize("what", ["logp", "entropy"])
@pytest.mark.parametrize("mode", ["fail", "skip"])
def test_the_student_s_numbers_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, mode: str
) -> None:
    original = loop.set_behaviour
    bad: list[Trajectory] = []

    def behaviour(rows: Any, *arguments: Any) -> Any:
        if not bad:
            bad.append(rows[2].trajectory)
            values = getattr(bad[0], what).copy()
            values[np.flatnonzero(bad[0].loss_mask)[0]] = np.nan
            setattr(bad[0], what, values)
        return original(rows, *arguments)

    monkeypatch.setattr(loop, "set_behaviour", behaviour)
    folder, settings = tmp_path / "run", (*RUN, "steps=1", f"on_nonfinite={mode}")
    if mode == "fail":
        with pytest.raises(NonFiniteError, match=r"step 0, task .*the student's .* not finite"):
            train(folder, *settings)
        assert os.listdir(folder / "checkpoints") == ["step-000000"]
        assert train_rows(folder) == []
        return
    train(folder, *settings)
    (row,) = train_rows(folder)
    assert row["nonfinite/trajectories"] == 1
    assert row["rollout/trained_share"] == 0.75
    assert np.isfinite([row["loss"], row["grad_norm"], row["entropy/mean"]]).all()


GRPO = (
    *RUN,
    "steps=1",
    "objective=grpo",
    "batch.samples=3",
    "model.teacher=null",
    "evaluation.teacher=false",
)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", ["fail", "skip"])
def test_an_invalid_reward_is_refused_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, value: float
) -> None:
    original = ToolEnv.step
    spoiled: list[int] = []

    def step(self: ToolEnv, action: str) -> Any:
        observation, reward, terminated, truncated, info = original(self, action)
        if (terminated or truncated) and armed and not spoiled:
            spoiled.append(1)
            reward = value
        return observation, reward, terminated, truncated, info

    armed: list[int] = []
    collect = loop.Collector.collect

    def collected(self: Any, *arguments: Any) -> Any:
        armed.append(1)
        return collect(self, *arguments)

    monkeypatch.setattr(ToolEnv, "step", step)
    monkeypatch.setattr(loop.Collector, "collect", collected)
    folder, settings = tmp_path / "run", (*GRPO, f"on_nonfinite={mode}")
    if mode == "fail":
        with pytest.raises(NonFiniteError, match=r"step 0, task .*reward \((nan|inf)\) is not fin"):
            train(folder, *settings)
        assert train_rows(folder) == []
        return
    train(folder, *settings)
    (row,) = train_rows(folder)
    assert row["nonfinite/trajectories"] == 1
    assert row["update/skipped"] == 0
    assert np.isfinite(row["loss"])
    (noted,) = [r for r in lines(folder / "trajectories.jsonl") if NOTE in r["info"]]
    assert "the environment's reward" in noted["info"][NOTE]


@pytest.mark.parametrize("mode", ["fail", "skip"])
def test_a_later_mini_batch_that_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Its step cannot be taken back, so the last checkpoint is valid; skip continues."""
    original = Updater._gradient
    seen: list[int] = []

    def gradient(self: Updater, batch: Any, step: int, *arguments: Any) -> Any:
        seen.append(step)
        made = original(self, batch, step, *arguments)
        if seen.count(1) == 2 and step == 1:
            return [(batch[0], "the loss of its micro-batch is nan")]
        return made

    monkeypatch.setattr(Updater, "_gradient", gradient)
    folder = tmp_path / "run"
    settings = (*RUN, "batch.mini_batch=2", "checkpoint.every=1", f"on_nonfinite={mode}")
    if mode == "fail":
        with pytest.raises(NonFiniteError, match="the last checkpoint is valid"):
            train(folder, *settings)
        assert os.listdir(folder / "checkpoints") == ["step-000001"]
        return
    train(folder, *settings)
    rows = train_rows(folder)
    assert [r["update/skipped"] for r in rows] == [0, 1, 0]
    assert [r["nonfinite/trajectories"] for r in rows] == [0, 1, 0]


def test_five_steps_in_a_row_end_the_run_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One good step between them begins the count anew.
    spoiled_scores(monkeypatch, np.nan, lambda call, t: call not in (1, 4))
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="5 steps in a row made no update; the last one: step"):
        train(folder, *RUN, "steps=12", "on_nonfinite=skip")
    rows = train_rows(folder)
    assert [r["nonfinite/trajectories"] for r in rows] == [0, 4, 4, 0, 4, 4, 4, 4, 4]
    assert os.listdir(folder / "checkpoints") == ["step-000008"]
    assert all(r["loss"] is None for r in rows if r["nonfinite/trajectories"])


def test_the_saved_state_is_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the checkpoint of a failed step equals the one that the step began from."""
    spoiled_scores(monkeypatch, np.nan, lambda call, t: call == 2)
    before: list[Path] = []

    def saving(self: TrainingLoop, step: int, position: int) -> Any:
        if step == 1:
            before.append(
                save_checkpoint(
                    tmp_path / "before",
                    step=step,
                    position=position,
                    phase="",
                    student=self.recovery._student,
                    updater=self.updater,
                    keep=1,
                )
            )
        return original(self, step, position)

    original = TrainingLoop.step
    monkeypatch.setattr(TrainingLoop, "step", saving)
    with pytest.raises(NonFiniteError):
        train(tmp_path / "run", *RUN)
    saved = tmp_path / "run/checkpoints/step-000001"
    assert_same_weights(saved / "model", before[0] / "model")
    one, other = (torch.load(p / "state.pt", weights_only=True) for p in (saved, before[0]))
    torch.testing.assert_close(one["optimizer"], other["optimizer"], rtol=0, atol=0)
    assert one["scheduler"] == other["scheduler"]


def test_the_setting_has_two_values(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_nonfinite must be one of fail, skip"):
        train(tmp_path, *RUN, "on_nonfinite=ignore")


def test_many_are_named_and_counted(random_trajectory: Any) -> None:
    guard = NonFiniteGuard("fail")
    guard.begin(2)
    found = [(Row(random_trajectory(n)), "the x is y") for n in range(9)]
    with pytest.raises(NonFiniteError) as caught:
        guard.reject(found)
    said = str(caught.value)
    assert said.count("(index ") == 6
    assert "and 3 more; the update was not made" in said
