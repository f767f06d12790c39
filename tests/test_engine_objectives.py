"""Every objective in the local engine: its inputs, and that it learns."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import Env, spaces
from PIL import Image
from running import (
    assert_same_weights,
    composed,
    lines,
    results,
    train,
    train_rows,
)
from step_rows import make_updates

from examples.embedded_models.digits.scripts import expert_turns, record
from reopold_agent.cli.groups import prepare_groups
from reopold_agent.config import OptimizerConfig
from reopold_agent.data.demonstrations import load_demonstrations
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.envs import ENVS, register_env
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.from_config import make_env
from reopold_agent.errors import CheckpointError, ConfigError, DataError, EnvironmentCodeError
from reopold_agent.objectives import GKD, GRPO, OBJECTIVES, Objective
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.loading import ModelSpec, load_model, resolve_path
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.tracking.plots import make_plots
from reopold_agent.train import finish, resume
from reopold_agent.train.rows import Row, trajectories_of
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.teachers import Teachers
from reopold_agent.train.update import Updater, UpdateStats
from reopold_agent.types import IMAGE_MARK, Task, Trajectory

STUDENT = Path(resolve_path("demo:student"))
TINY = ("steps=2", "evaluation.tasks=1", "evaluation.every=0", "evaluation.teacher=false")
GROUPS = ("batch.prompts=2", "batch.mini_batch=2", "batch.samples=4")
ALONE = ("model.teacher=null", "evaluation.teacher=false")
BUILT_IN = ("eopd", "exopd", "gkd", "grpo", "iw_opd", "reopold", "rkl", "rkl_sg", "rkl_sg_clip",
            "rkl_sg_clip_entropy", "sft", "skew_rkl", "sod")  # fmt: skip


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plots but where a test makes them; global random state kept."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    monkeypatch.setattr(resume, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Updater, list[list[Trajectory]]]]:
    """The updater and the mini-batches of every update of the runs in a test."""
    calls: list[tuple[Updater, list[list[Trajectory]]]] = []
    original = Updater.step

    def step(self: Updater, mini_batches: Any, *arguments: Any) -> UpdateStats:
        calls.append((self, [trajectories_of(batch) for batch in mini_batches]))
        return original(self, mini_batches, *arguments)

    monkeypatch.setattr(Updater, "step", step)
    return calls


def rewarded(monkeypatch: pytest.MonkeyPatch, reward: Callable[[str, str], float]) -> None:
    """Episodes end with ``reward(task id, last words)``, and succeed where it is positive."""
    original = ToolEnv.step

    def step(self: ToolEnv, action: str) -> Any:
        assert self._state is not None  # the answer ends it
        task = self._state.task.id
        observation, _, terminated, truncated, info = original(self, action)
        gain = reward(task, action) if terminated or truncated else 0.0
        return observation, gain, terminated, truncated, {**info, "success": gain > 0}

    monkeypatch.setattr(ToolEnv, "step", step)


def coin(task: str, words: str) -> float:
    return float(zlib.crc32(words.encode()) % 2)


def crash_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process is lost when this step has been rolled out and nothing of it is written."""
    original = StepLog.write_trajectories

    def dying(self: StepLog, at: int, rows: Any) -> None:
        original(self, at, rows)
        if at == step:
            raise SystemExit("lost")

    monkeypatch.setattr(StepLog, "write_trajectories", dying)


def resumes(monkeypatch: pytest.MonkeyPatch, place: Path, *words: str) -> Path:
    """A run of 4 steps is the same whether or not it is lost in its third; returns its folder."""
    words = (*TINY, "steps=4", "checkpoint.every=2", *words)
    train(place / "whole", *words)
    with monkeypatch.context() as patch:
        crash_before(patch, 3)
        with pytest.raises(SystemExit):
            train(place / "broken", *words)
    assert [r["step"] for r in train_rows(place / "broken")] == [0, 1, 2]
    torch.rand(5)
    train(place / "broken", *words)
    assert results(place / "broken") == results(place / "whole")
    assert_same_weights(place / "broken/final", place / "whole/final")
    return place / "broken"


def states(folder: Path) -> list[int]:
    """Positions in the order of the tasks, of the checkpoints that are there."""
    found = sorted((folder / "checkpoints").glob("*/trainer.json"))
    return [json.loads(path.read_text())["position"] for path in found]


# All of them


def test_the_list_of_objectives() -> None:
    assert tuple(OBJECTIVES.names()) == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_objective_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rewarded(monkeypatch, coin)
    words = GROUPS if name == "grpo" else ()
    passes: list[TransformersPolicy] = []
    original = TransformersPolicy._states

    def counted(self: TransformersPolicy, batch: TrajectoryBatch) -> Any:
        if not self.adapter.head.weight.requires_grad:
            passes.append(self)
        return original(self, batch)

    monkeypatch.setattr(TransformersPolicy, "_states", counted)
    train(tmp_path, *TINY, f"objective={name}", *words)
    # The teacher, and exopd's reference model, read each step's episodes in one pass.
    assert len(passes) == 2 * {"grpo": 0, "sft": 0, "exopd": 2}.get(name, 1)
    rows = train_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 1]
    keys = ["loss", "grad_norm", "lr", "mask/kept_share", "entropy/mean", "ratio/mean"]
    keys += ["rollout/success", "rollout/reward", "rollout/trained_share"]
    if name != "grpo":
        keys += ["reward/mean", "reward/min", "reward/max"]
    for row in rows:
        for key in keys:
            assert isinstance(row[key], float), key
            assert np.isfinite(row[key]), key
        assert row["grad_norm"] > 0
        assert 0 < row["mask/kept_share"] <= 1
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-3)  # one update a step
        assert row["phase"] in (
            ("exploration", "refinement") if name == "reopold" else ("training",)
        )
        masked = name in ("reopold", "rkl_sg_clip_entropy")
        assert ("entropy/threshold" in row) == masked
        assert (row.get("importance/mean") == 1.0) == (name not in ("gkd", "sft"))
        assert ("reward/floor" in row) == (masked or name == "rkl_sg_clip")
        assert ("reward/mean" in row) == (name != "grpo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots = {path.name for path in make_plots(tmp_path)}
    expected = {"success.png", "reward_histogram.png", "entropy_and_masks.png", "time.png"}
    assert plots == expected - ({"reward_histogram.png"} if name == "grpo" else set())


# GRPO: outcomes, and no teacher


GRPO_RUN = (*TINY, "objective=grpo", *GROUPS)


def test_outcomes_reach_the_loss_and_the_teacher_does_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    updates: list[tuple[Updater, list[list[Trajectory]]]],
) -> None:
    monkeypatch.setattr(TransformersPolicy, "score", lambda *a, **k: pytest.fail("scored"))
    with monkeypatch.context() as patch:
        rewarded(patch, coin)
        train(tmp_path / "teacher", *GRPO_RUN)
        train(tmp_path / "alone", *GRPO_RUN, *ALONE)
        # A teacher that is only evaluated changes nothing either.
        train(tmp_path / "shown", *GRPO_RUN, "evaluation.teacher=true")
    for name in ("alone", "shown"):
        assert_same_weights(tmp_path / "teacher/final", tmp_path / name / "final")
        assert train_rows(tmp_path / name)[1]["loss"] == train_rows(tmp_path / "teacher")[1]["loss"]
    written = lines(tmp_path / "alone/trajectories.jsonl")
    assert all((row["teacher_logp"], row["who"]) == (None, "student") for row in written)
    assert any(row["advantage"] for row in written)
    _, batches = updates[0]
    with monkeypatch.context() as patch:
        rewarded(patch, lambda task, words: 1 - coin(task, words))
        train(tmp_path / "other", *GRPO_RUN, *ALONE)
    one, other = (train_rows(tmp_path / name)[0] for name in ("alone", "other"))
    assert one["rollout/reward"] == pytest.approx(1 - other["rollout/reward"])
    assert one["loss"] == pytest.approx(-other["loss"], abs=1e-6)  # on policy: the sign turns
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_weights(tmp_path / "alone/final", tmp_path / "other/final")
    # The advantage of each episode is its reward compared with the others of its task.
    (batch,) = batches
    assert len(batch) == 8
    for index in {t.index for t in batch}:
        group = [t for t in batch if t.index == index]
        rewards = np.array([t.reward for t in group])
        assert len(group) == 4
        assert set(rewards) <= {0, 1}
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        assert [t.advantage for t in group] == pytest.approx(expected, abs=1e-5)


def test_without_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective=reopold needs model\.teacher, which is null"):
        train(tmp_path, *TINY, *ALONE)
    with pytest.raises(ConfigError, match=r"objective=grpo; set evaluation\.teacher=false"):
        train(tmp_path, "objective=grpo", *GROUPS, "model.teacher=null")
    assert not (tmp_path / "config.yaml").exists()


def test_a_group_of_one_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch\.samples must be at least 2 \(8, say"):
        train(tmp_path, *TINY, "objective=grpo", "batch.samples=1", *ALONE)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("settings", [
    ("objective.normalise=false", "objective.aggregate=budget"),
    ("objective.clip_high=0.28", "objective.aggregate=token", "objective.overlong_buffer=60"),
    ("objective.curiosity=0.5", "objective.call_penalty=0.05", "objective.free_calls=1"),
])  # fmt: skip
def test_the_switches_of_grpo_s_successors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    rewarded(monkeypatch, coin)
    train(tmp_path / "plain", *GRPO_RUN, *ALONE, "steps=1")
    train(tmp_path / "other", *GRPO_RUN, *ALONE, "steps=1", *settings)
    plain, other = (train_rows(tmp_path / name)[0] for name in ("plain", "other"))
    assert plain["rollout/reward"] == other["rollout/reward"]  # the environment's own is logged
    assert np.isfinite(other["loss"])
    assert other["grad_norm"] > 0
    assert plain["grad_norm"] != other["grad_norm"]


# The outcome beside the teacher


@pytest.mark.parametrize("name", ["reopold", "gkd"])
def test_an_outcome_changes_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = (*TINY, *GROUPS, f"objective={name}", "steps=1", "evaluation.tasks=0")
    words = (*words, "logging.trajectories=99")
    gradients = {}
    for place, reward, more in (
        ("none", coin, ()),
        ("some", coin, ("objective.outcome=2",)),
        ("turned", lambda task, words: 1 - coin(task, words), ("objective.outcome=2",)),
        ("masked", coin, ("objective.outcome=2", "objective.outcome_mask=response")),
    ):
        if name == "gkd" and place == "masked":
            continue
        with monkeypatch.context() as patch:
            rewarded(patch, reward)
            train(tmp_path / place, *words, *more)
        gradients[place] = train_rows(tmp_path / place)[0]["grad_norm"]
    with_outcome, turned = (lines(tmp_path / p / "trajectories.jsonl") for p in ("some", "turned"))
    for one, other in zip(with_outcome, turned, strict=True):
        assert one["advantage"] == pytest.approx(-other["advantage"], abs=1e-5)
        assert one["ids"] == other["ids"]
    assert any(row["advantage"] for row in with_outcome)
    assert len({round(value, 7) for value in gradients.values()}) == len(gradients)
    if name == "gkd":
        return
    row = train_rows(tmp_path / "masked")[0]
    assert (row["outcome/alpha"], row["mask/kept_share"]) == (2.0, 1.0)
    assert row["outcome/taught_share"] == 1 - row["rollout/success"]


def test_a_schedule_of_the_outcome_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarded(monkeypatch, coin)
    words = ("objective.outcome=2", "objective.outcome_end=0", "objective.outcome_curve=cosine")
    folder = resumes(monkeypatch, tmp_path, *GROUPS, *words, "objective.outcome_mask=group")
    alphas = [row["outcome/alpha"] for row in train_rows(folder)]
    assert alphas == pytest.approx([2, 1.5, 0.5, 0])
    assert "outcome_until: 3" in (folder / "config.yaml").read_text()
    # For more steps the schedule stays as it was; the outcome itself may not be changed.
    longer = (*TINY, *GROUPS, *words, "objective.outcome_mask=group", "checkpoint.every=2")
    train(folder, *longer, "steps=5")
    assert train_rows(folder)[-1]["outcome/alpha"] == 0
    with pytest.raises(CheckpointError, match=r"objective\.outcome: 2.* -> 1"):
        train(folder, *longer, "steps=6", "objective.outcome=1")


def test_a_run_of_a_version_without_outcomes_goes_on(tmp_path: Path) -> None:
    words = (*TINY, "checkpoint.every=2")
    train(tmp_path, *words, "steps=2")
    config = tmp_path / "config.yaml"
    kept = [s for s in config.read_text().splitlines() if not s.startswith("  outcome")]
    assert len(kept) == len(config.read_text().splitlines()) - 8
    config.write_text("\n".join(kept))
    train(tmp_path, *words, "steps=3")
    assert [row["step"] for row in train_rows(tmp_path)] == [0, 1, 2]


# The reference of exopd


def test_the_reference_is_the_student_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Row]] = []
    original = Updater.step

    def step(self: Updater, mini_batches: Any, *arguments: Any) -> UpdateStats:
        seen.append([row for batch in mini_batches for row in batch])
        return original(self, mini_batches, *arguments)

    monkeypatch.setattr(Updater, "step", step)
    words = (*TINY, "objective=exopd", "evaluation.tasks=0", "optimizer.lr=1e-2")
    train(tmp_path, *words, "checkpoint.every=1", "steps=1")
    train(tmp_path, *words, "checkpoint.every=1", "steps=2")  # goes on with the same reference
    gaps = []
    for rows in seen:
        pairs = [(row.reference_logp, row.behaviour[0]) for row in rows]
        gaps.append(max(float(np.abs(one - other).max()) for one, other in pairs))
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]
    start = load_model(ModelSpec("demo:student"), "student", torch.device("cpu"))
    chat = ChatRenderer(start.tokenizer)
    policy = start.policy(forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids)
    (score,) = policy.score([seen[1][0].trajectory])
    np.testing.assert_allclose(seen[1][0].reference_logp, score.logp, atol=1e-4)


# DAPO's dynamic sampling


DYNAMIC = ("objective=grpo", *GROUPS, *ALONE, "objective.drop_equal_groups=true")


def sometimes(task: str, words: str) -> float:
    """Half of the tasks are hopeless; in the others a coin decides."""
    return coin(task, words) if zlib.crc32(task.encode()) % 2 else 0.0


def test_further_prompts_are_drawn_for_groups_that_teach_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    updates: list[tuple[Updater, list[list[Trajectory]]]],
) -> None:
    rewarded(monkeypatch, sometimes)
    run = (*TINY, *DYNAMIC, "objective.rounds=3", "checkpoint.every=1", "checkpoint.keep=9")
    run = (*run, "batch.prompts=4", "batch.mini_batch=4", "logging.trajectories=99")
    train(tmp_path, *run, "steps=4")
    rows = train_rows(tmp_path)
    rounds = [round(row["rollout/episodes"] / 16) for row in rows]
    assert max(rounds) > 1
    # The order of the tasks goes on where a step, with all its rounds, stopped.
    assert states(tmp_path) == [4 * int(n) for n in np.cumsum(rounds)]
    written = lines(tmp_path / "trajectories.jsonl")
    seen: list[str] = []
    informative = []
    for step, (row, (_, batches)) in enumerate(zip(rows, updates, strict=True)):
        rewards: dict[str, list[float]] = {}
        for each in written:
            if each["step"] == step:
                rewards.setdefault(each["task_id"], []).append(each["reward"])
        assert len(rewards) == 4 * rounds[step]
        seen += rewards
        wanted = [task for task, group in rewards.items() if len(set(group)) == 2]
        informative.append(len(wanted))
        (batch,) = batches
        # The first groups that teach something, whole; it stops when there are enough.
        assert [t.task_id for t in batch] == [task for task in wanted[:4] for _ in range(4)]
        assert len(wanted) >= 4 or rounds[step] == 3
        assert row["rollout/trained_share"] == len(batch) / row["rollout/episodes"]
    assert len(set(seen)) == 4 * sum(rounds)  # no task twice
    assert max(informative) > 4


def test_dynamic_sampling_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarded(monkeypatch, sometimes)
    folder = resumes(monkeypatch, tmp_path, *DYNAMIC, "objective.rounds=3", "data.train.size=11")
    assert states(folder)[-1] > 8


def test_a_step_without_usable_tokens_makes_no_update_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        rewarded(patch, lambda task, words: 1.0)
        train(tmp_path / "run", *TINY, *DYNAMIC, "objective.rounds=2", "checkpoint.every=1")
    rows = train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["loss"], row["lr"], row["grad_norm"], row["mask/kept_share"]) == (
            None, None, 0, 0,
        )  # fmt: skip
        assert (row["rollout/episodes"], row["rollout/trained_share"]) == (16, 0)
    assert_same_weights(STUDENT, tmp_path / "run/final")
    state = torch.load(tmp_path / "run/checkpoints/step-000002/state.pt", weights_only=True)
    assert state["optimizer"]["state"] == {}
    assert state["scheduler"]["last_epoch"] == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["before"] is not None
    assert summary["after"] is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plots(tmp_path / "run")


# SFT on the teacher's trajectories


SFT = (*TINY, "objective=sft")


def test_the_teacher_plays_and_the_student_learns_its_tokens(
    tmp_path: Path, updates: list[tuple[Updater, list[list[Trajectory]]]]
) -> None:
    scored: list[bool] = []
    original = Updater.step
    with pytest.MonkeyPatch.context() as patch:

        def step(self: Updater, mini_batches: Any, at: int, threshold: Any) -> UpdateStats:
            (rows,) = mini_batches
            batch = trajectories_of(rows)
            teacher = self._teachers.only
            assert teacher is not None
            taught, own = (p.score(batch) for p in (teacher, self.policy))
            for row, t, teacher, student in zip(rows, batch, taught, own, strict=True):
                assert np.abs(teacher.logp - t.logp).max() < 1e-4
                assert np.abs(student.logp - t.logp).max() > 1e-2
                assert np.array_equal(t.teacher_logp, t.logp)  # its own: not computed again
                # The policy before the update, for the logs.
                assert np.array_equal(row.old_logp, student.logp)
                scored.append(True)
            total = sum(float(s.logp.sum()) for s in own)
            stats = original(self, mini_batches, at, threshold)
            count = sum(t.response_tokens for t in batch)
            assert stats.loss == pytest.approx(-total / count, rel=1e-4)
            return stats

        patch.setattr(Updater, "step", step)
        train(tmp_path, *SFT, "steps=1")
    assert {row["who"] for row in lines(tmp_path / "trajectories.jsonl")} == {"teacher"}
    assert len(scored) == 4
    with pytest.raises(ConfigError, match=r"objective=sft needs model\.teacher"):
        train(tmp_path / "none", *SFT, *ALONE)


def test_only_successes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    updates: list[tuple[Updater, list[list[Trajectory]]]],
) -> None:
    rewarded(monkeypatch, lambda task, words: float(zlib.crc32(task.encode()) % 2))
    train(tmp_path / "some", *SFT, "objective.only_successes=true", "batch.prompts=6",
          "batch.mini_batch=3")  # fmt: skip
    rows = train_rows(tmp_path / "some")
    trained = [[t for part in batches for t in part] for _, batches in updates]
    assert all(t.success for batch in trained for t in batch)
    for row, batch in zip(rows, trained, strict=True):
        assert 0 < len(batch) < 6
        assert row["rollout/success"] == row["rollout/trained_share"] == len(batch) / 6
    rewarded(monkeypatch, lambda task, words: 0.0)
    train(tmp_path / "none", *SFT, "objective.only_successes=true", "steps=1")
    assert train_rows(tmp_path / "none")[0]["loss"] is None
    assert_same_weights(STUDENT, tmp_path / "none/final")


def test_sft_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumes(monkeypatch, tmp_path, "objective=sft", "data.train.size=7")


# SFT on recorded conversations


def conversation(env: Env[Any, str], task: Task, folder: Path, form: str) -> dict[str, Any]:
    """The demo expert's episode as a row: LLaMA-Factory's ``messages`` or Pixel-Reasoner's
    ``message_list``. Pictures are written as PNG, which loses nothing."""
    names: list[str] = []

    def content(text: str, images: Sequence[Any]) -> Any:
        fresh = []
        for image in images:
            name = f"images/{task.id}-{len(names)}.png"
            Image.fromarray(image).save(folder / name)
            names.append(name)
            fresh.append(name)
        if form == "messages":
            return text.replace(IMAGE_MARK, "<image>")
        parts: list[dict[str, str]] = []
        for position, piece in enumerate(text.split(IMAGE_MARK)):
            parts += [{"type": "image", "image": fresh[position - 1]}] if position else []
            parts += [{"type": "text", "text": piece}] if piece else []
        return parts

    observation, info = env.reset(options={"task": task})
    said: list[dict[str, Any]] = [
        {"role": "system", "content": content(info["system_prompt"], [])},
        {"role": "user", "content": content(observation["text"], observation["images"])},
    ]
    for text in expert_turns(task):
        said.append({"role": "assistant", "content": content(text, [])})
        observation, _, terminated, _, _ = env.step(text)
        if not terminated:
            words = content(observation["text"], observation["images"])
            said.append({"role": "user", "content": words})
    if form == "messages":
        return {"id": task.id, "messages": said, "images": names}
    return {"qid": task.id, "message_list": said}


@pytest.fixture(scope="module")
def demo_env() -> Env[Any, str]:
    return make_env(composed("env=pixel_reasoner")[0], max_turns=3)


@pytest.fixture(scope="module")
def expert(
    tmp_path_factory: pytest.TempPathFactory, demo_env: Env[Any, str]
) -> Callable[[str], tuple[Path, list[Task]]]:
    """``expert(form)``: a file of seven recorded episodes, and their tasks."""
    found = [DemoTasks("train", 64, 0, video_share=0.4, small_share=0.4)[i] for i in range(64)]
    kinds = ("image", "video", "small_video")
    tasks = [[t for t in found if t.metadata["kind"] == kind][n] for n in (0, 1) for kind in kinds]
    tasks.append(next(t for t in found if t not in tasks))

    def write(form: str) -> tuple[Path, list[Task]]:
        folder = tmp_path_factory.mktemp(form)
        (folder / "images").mkdir()
        rows = [conversation(demo_env, task, folder, form) for task in tasks]
        path = folder / "expert.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path, tasks

    return write


RECORDED = (*SFT, *ALONE, "objective.source=recorded", "rollout.max_response_tokens=256")


@pytest.mark.parametrize("form", ["messages", "message_list"])
def test_recorded_conversations_are_what_a_rollout_would_have_been(
    tmp_path: Path,
    expert: Callable[[str], tuple[Path, list[Task]]],
    demo_env: Env[Any, str],
    updates: list[tuple[Updater, list[list[Trajectory]]]],
    form: str,
) -> None:
    path, tasks = expert(form)
    train(tmp_path, *RECORDED, f"+data.demonstrations={{path: {path}}}", "steps=2")
    seen = {t.index: t for _, batches in updates for batch in batches for t in batch}
    assert set(seen) == set(range(7))  # two steps of four draws: a pass and one more
    model = load_model(ModelSpec("demo:student"), "student", torch.device("cpu"))
    assert model.vision is not None
    chat = ChatRenderer(model.tokenizer)
    for index, task in enumerate(tasks):
        mine = seen[index]
        wanted = record(demo_env, task, expert_turns(task), chat, model.vision)
        assert mine.task_id == wanted.task_id == task.id
        assert mine.ids.tolist() == wanted.ids.tolist()
        assert mine.loss_mask.tolist() == wanted.loss_mask.tolist()
        assert mine.prompt_length == wanted.prompt_length
        assert [(t.start, t.end, t.text) for t in mine.turns] == [
            (t.start, t.end, t.text) for t in wanted.turns
        ]
        assert [i.grid for i in mine.images] == [i.grid for i in wanted.images]
        for own, his in zip(mine.images, wanted.images, strict=True):
            assert np.array_equal(own.pixels, his.pixels)
    for row in train_rows(tmp_path):
        assert np.isfinite(row["loss"])
        # Nobody played: success is not 0, it is not known.
        assert "rollout/success" not in row
        assert row["rollout/turns"] >= 2
    assert states(tmp_path) == [8]


def test_the_loss_on_recorded_conversations_falls(
    tmp_path: Path, expert: Callable[[str], tuple[Path, list[Task]]]
) -> None:
    path, tasks = expert("messages")
    words = (f"+data.demonstrations={{path: {path}, limit: 4}}", "optimizer.lr=1e-3", "steps=6")
    train(tmp_path, *RECORDED, *words)
    losses = [row["loss"] for row in train_rows(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]
    seen = [row["task_id"] for row in lines(tmp_path / "trajectories.jsonl")]
    assert set(seen) == {task.id for task in tasks[:4]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plots(tmp_path)


def test_recorded_conversations_resume_bit_for_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expert: Callable[[str], tuple[Path, list[Task]]],
) -> None:
    path, _ = expert("messages")
    words = RECORDED[len(TINY) :]
    folder = resumes(monkeypatch, tmp_path, *words, f"+data.demonstrations={{path: {path}}}")
    assert states(folder) == [8, 16]


def test_recorded_conversations_that_do_not_fit_are_refused_before_the_first_step(
    tmp_path: Path, expert: Callable[[str], tuple[Path, list[Task]]]
) -> None:
    path, tasks = expert("messages")
    where = f"+data.demonstrations={{path: {path}}}"
    with pytest.raises(DataError, match=rf"{tasks[0].id} has \d+ tokens .*tokens is 9:"):
        train(tmp_path, *RECORDED, where, "rollout.max_response_tokens=9")
    with pytest.raises(ConfigError, match=r"data\.demonstrations, for example"):
        train(tmp_path, *RECORDED)
    with pytest.raises(ConfigError, match="needs a path"):
        train(tmp_path, *RECORDED, "+data.demonstrations={limit: 3}")
    next((path.parent / "images").iterdir()).unlink()
    with pytest.raises(
        DataError, match=r"expert\.jsonl, row \d: message \d: the picture 'images/.*' is n"
    ):
        train(tmp_path, *RECORDED, where)
    assert train_rows(tmp_path) == []


def said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "?"} for role in roles]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "'messages' must be a list of turns"),
        ({"messages": "hello"}, "'messages' must be a list of turns"),
        ({"messages": said("user", "assistant", "user")}, "must take turns, got user, assistant"),
        ({"messages": said("assistant")}, "must take turns"),
        ({"messages": said("system")}, "must take turns"),
        ({"messages": said("user", "user", "assistant")}, "must take turns"),
        ({"messages": said("user", "tool")}, "must take turns, got user, tool"),
        ({"messages": said("user", "critic")}, "the role must be one of system, .*, got 'critic'"),
        ({"messages": [{"role": "user", "content": "<image>?"}]}, "1 picture mark in the text"),
        ({"messages": said("user", "assistant"), "images": ["a.png"]}, "1 pictures, but"),
        ({"messages": [{"role": "user", "content": [{"image": "../a.png"}]}]}, "a.png"),
        (
            {"messages": [{"role": "user", "content": [{"image": "a.png", "text": "Here"}]}]},
            "has both text and a picture",
        ),
        ({"messages": [{"role": "user", "content": [{"audio": "a.wav"}]}]}, "'audio' of a part"),
        ({"messages": [{"role": "user", "content": None}]}, "has no 'content'"),
    ],
)
def test_a_row_without_a_conversation_is_named(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"messages": said("user", "assistant")}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n", "utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: .*{words}"):
        load_demonstrations({"path": str(path)})
    (kept,) = load_demonstrations({"path": str(path), "limit": 1})
    assert [(t.role, t.parts) for t in kept.turns] == [("user", ("?",)), ("assistant", ("?",))]
    with pytest.raises(ConfigError, match="takes path, split, revision, limit"):
        load_demonstrations({"path": str(path), "pth": 1})


# GKD


@pytest.mark.parametrize(
    "settings",
    [(), ("objective.top_k=5",), ("objective.top_k=5", "objective.rest=false", "objective.beta=0"),
     ("objective.beta=1",)],
)  # fmt: skip
def test_the_distance_to_the_teacher_s_distributions_falls(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    words = (*TINY, "objective=gkd", "steps=6", "optimizer.lr=1e-3", "data.train.size=4")
    train(tmp_path, *words, *settings)
    losses = [row["loss"] for row in train_rows(tmp_path)]
    assert min(losses) > 0
    assert np.mean(losses[-2:]) < 0.8 * losses[0]


# Micro-batches


def linear() -> OptimizerConfig:
    """AdamW whose huge epsilon makes a step proportional to the gradient."""
    return OptimizerConfig(lr=0.01, eps=1.0, weight_decay=0.0, max_grad_norm=1e6)


@pytest.mark.parametrize(
    "objective",
    [
        GKD(),
        GKD(beta=1.0, top_k=4),
        GKD(beta=0.0, top_k=4, rest=False),
        GRPO(aggregate="sequence"),
        GRPO(aggregate="token", clip_high=0.28),
        GRPO(aggregate="budget", token_budget=40),
    ],
    ids=["gkd", "gkd-top", "gkd-top-alone", "sequence", "token", "budget"],
)
def test_micro_batches_do_not_change_the_update(
    objective: Objective,
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., Any],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    pictures = [[encode(1)], [], [encode(2), encode(3, 28, 56)], [], [], []]
    batch = [random_trajectory(i, each, turns=1 + i % 3) for i, each in enumerate(pictures)]
    scores = make_policy(make_model(seed=1)).score(batch, with_entropy=True)
    rng = np.random.default_rng(0)
    for t, score in zip(batch, scores, strict=True):
        old = score.logp + rng.normal(0, 0.2, len(t.ids))
        t.logp = np.where(t.loss_mask, old, 0).astype(np.float32)
        t.entropy, t.advantage = score.entropy, float(rng.normal())
    assert len({t.response_tokens for t in batch}) > 3

    def updated(trajectories: list[Trajectory], most: int) -> tuple[torch.Tensor, UpdateStats]:
        policy, teacher = make_policy(make_model(seed=1)), make_policy(make_model(seed=2))
        updater = Updater(
            policy, objective, linear(), max_tokens=most, teachers=Teachers({"default": teacher})
        )
        stats = make_updates(updater, [trajectories], 0, teacher)
        assert all(p.grad is None for p in teacher.adapter.model.parameters())
        flat = [p.detach().flatten() for p in policy.adapter.model.parameters()]
        return torch.cat(flat), stats

    before = torch.cat([p.detach().flatten() for p in make_model(seed=1).parameters()])
    whole, stats = updated(batch, 10**6)
    assert (whole - before).abs().max() > 1e-5
    for order, most in ((batch, 1), (batch, 70), (batch[::-1], 1)):
        again, other = updated(order, most)
        assert (again - whole).abs().max() < 1e-6
        assert other.loss == pytest.approx(stats.loss, abs=1e-5)
        assert other.grad_norm == pytest.approx(stats.grad_norm, rel=1e-4)
        assert other.ratio_mean == pytest.approx(stats.ratio_mean, rel=1e-5)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "budget"])
def test_the_loss_of_grpo_by_hand(
    aggregate: str,
    random_trajectory: Callable[..., Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    """Over whole responses, one after the other, from the papers' sums."""
    policy = make_policy(make_model(seed=1))
    batch = [random_trajectory(i, turns=1 + i % 3) for i in range(4)]
    rng = np.random.default_rng(0)
    total, lengths = 0.0, []
    for t, advantage in zip(batch, (1.0, -0.5, 0.25, -1.5), strict=True):
        (score,) = policy.score([t])
        t.logp = np.where(t.loss_mask, score.logp + rng.normal(0, 0.4, len(t.ids)), 0)
        t.logp = t.logp.astype(np.float32)
        t.advantage = advantage
        ratio = np.exp(score.logp - t.logp)[t.loss_mask].astype(float)
        gain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        lengths.append(len(gain))
        total += gain.sum() / {"sequence": len(gain), "token": 1, "budget": 30}[aggregate]
    objective = GRPO(aggregate=aggregate, token_budget=30)
    updater = Updater(policy, objective, linear(), max_tokens=60)
    stats = make_updates(updater, [batch], 0)
    count = sum(lengths) if aggregate == "token" else 4
    assert len(set(lengths)) > 2
    assert stats.loss == pytest.approx(-total / count, rel=1e-4)


class Asks(Env[Any, str]):
    """Asks for a sum, or shows a picture; ``asked`` counts those that a seed does not decide."""

    observation_space = spaces.Dict({})
    action_space = spaces.Text(1000)
    asked, by = itertools.count(), "seed"

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        number = int(self.np_random.integers(1, 200))
        words, shade = f"{number} + 1", number
        if self.by == "words":
            words = f"{next(self.asked)} + 1"
        if self.by == "picture":
            shade = next(self.asked) % 256
        picture = np.full((56, 56, 3), shade, np.uint8)
        return {"text": f"{IMAGE_MARK}{words}", "images": (picture,)}, {}

    def step(self, action: str) -> Any:
        return {"text": "", "images": ()}, coin("", action), True, False, {}


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Asks]]:
    monkeypatch.setattr(Asks, "asked", itertools.count())
    register_env("asks", id="reopold_tests/Asks-v0", entry_point=Asks)
    prepare_groups(["env=asks"])
    yield Asks
    gymnasium.registry.pop("reopold_tests/Asks-v0")
    del ENVS._things["asks"]


@pytest.mark.parametrize(
    ("by", "objective"),
    [
        ("words", ["objective=grpo", *ALONE]),
        ("picture", ["objective=grpo", *ALONE]),
        ("words", ["objective=rkl", "objective.outcome=0.5"]),
    ],
)
def test_a_group_of_different_questions_ends_the_run(
    by: str,
    objective: list[str],
    asks: type[Asks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["env=asks", *objective, *TINY, *GROUPS]
    train(tmp_path / "same", *words)
    monkeypatch.setattr(asks, "by", by)
    told = (
        r"^env=asks: samples 0 and \d+ of task index \d+ had different prompts or pictures, .*\.\n"
        r"Let reset\(seed=\.\.\.\) alone decide the task .*; load_tasks must give the same .*\.$"
    )
    with pytest.raises(EnvironmentCodeError, match=told):
        train(tmp_path / "other", *words)


@pytest.mark.parametrize("words", [["objective=grpo", *ALONE], ["objective.outcome=1"]])
def test_greedy_samples_cannot_be_compared(words: list[str], tmp_path: Path) -> None:
    told = r"^sampling\.temperature=0 gives all samples .*\.\nSet sampling\.temperature=1, or .*\.$"
    with pytest.raises(ConfigError, match=told):
        train(tmp_path / "run", *words, "sampling.temperature=0")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_greedy_distillation_is_evaluated_greedily_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["env=math", "objective=rkl", "steps=1", "sampling.temperature=0"]
    summary = train(tmp_path, *words, "evaluation.tasks=2")
    rows = [row for row in lines(tmp_path / "metrics.jsonl") if row["kind"] == "eval"]
    assert [(r["who"], r["step"], r["sampling"]) for r in rows] == [
        ("student", 0, "greedy"),
        ("teacher", 0, "greedy"),
        ("student", 1, "greedy"),
    ]
    for name, row in zip(("before", "teacher", "after"), rows, strict=True):
        assert summary[name]["success"] == summary[name]["greedy"]["success"] == row["success"]
    out = capsys.readouterr().out
    assert "Held-out success" in out
    assert "T 0" in out
    assert "T 1 " not in out


def test_demonstrations_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    words = ["env=math", "+data.demonstrations={path: /nowhere/foo.jsonl}"]
    told = r"^data\.demonstrations has no effect without objective\.source=recorded\.\nSet "
    for objective in ("sft", "rkl"):
        with pytest.raises(ConfigError, match=told):
            train(tmp_path / "run", *words, f"objective={objective}")
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(DataError, match="foo"):
        train(tmp_path / "run", *words, "objective=sft", "objective.source=recorded")


def test_samples_that_are_not_compared_may_be_asked_anything(
    asks: type[Asks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks, "by", "words")
    train(tmp_path, "env=asks", "objective=rkl", *TINY, *GROUPS)


def test_held_out_tasks_that_change_are_warned_of(
    asks: type[Asks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["env=asks", "objective=rkl", *TINY]
    train(tmp_path / "same", *words)
    assert "were asked otherwise" not in capsys.readouterr().out
    monkeypatch.setattr(asks, "by", "picture")
    train(tmp_path / "other", *words)
    told = "warning: 1 of 1 held-out tasks (first: index 0 of env=asks) were asked otherwise"
    assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_of_gkd_by_hand(
    beta: float,
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., Any],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    """From the logits of whole forward passes, over the ids that can be sampled."""
    student, teacher = make_policy(make_model(seed=1)), make_policy(make_model(seed=2))
    batch = [random_trajectory(0, [encode(1)]), random_trajectory(1)]
    total, count = 0.0, 0

    def distributions(policy: TransformersPolicy, t: Trajectory) -> torch.Tensor:
        hidden_ND, _ = policy._states(TrajectoryBatch.build(policy.adapter, [t]))
        logits_NV = hidden_ND.double() @ policy.adapter.head.weight.double().T
        logits_NV[:, policy.banned] = -torch.inf
        return logits_NV.softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)

    with torch.no_grad():
        for t in batch:
            own, his = distributions(student, t), distributions(teacher, t)
            middle = beta * his + (1 - beta) * own
            if beta in (0, 1):
                each = kl(his, own) if beta == 0 else kl(own, his)
            else:
                each = beta * kl(his, middle) + (1 - beta) * kl(own, middle)
            total, count = total + float(each.sum()), count + t.response_tokens
    updater = Updater(
        student, GKD(beta=beta), linear(), max_tokens=60, teachers=Teachers({"default": teacher})
    )
    with pytest.raises(ValueError, match="needs the teacher's states"):
        make_updates(updater, [batch], 0)
    stats = make_updates(updater, [batch], 0, teacher)
    assert stats.loss == pytest.approx(total / count, rel=1e-4)


def test_an_update_without_what_its_objective_needs_is_refused(
    random_trajectory: Callable[..., Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    bare = copy.deepcopy(random_trajectory(0))
    bare.teacher_logp = None
    for objective, words in ((GRPO(), "no advantage"), (GKD(), "needs the teacher")):
        updater = Updater(make_policy(make_model(seed=1)), objective, linear(), max_tokens=100)
        with pytest.raises(ValueError, match=words):
            make_updates(updater, [[bare]], 0)
