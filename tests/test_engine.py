"""The local engine in this process: updates, steps, checkpoints, resuming, loading."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from running import (
    SMALL,
    assert_same_weights,
    composed,
    lines,
    results,
    snapshot,
    train,
    train_rows,
    weights,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from step_rows import make_updates
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

from reopold_agent.common import files
from reopold_agent.config import OptimizerConfig, config_differences
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    NonFiniteError,
    VocabularyMismatchError,
)
from reopold_agent.objectives import Reopold
from reopold_agent.policies import loading
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.loading import (
    ModelSpec,
    check_available,
    check_vocabularies,
    load_model,
    load_processing,
    resolve_path,
)
from reopold_agent.policies.registry import reads_weights
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.trackers.feed import Trackers
from reopold_agent.train import collect, finish, loop, recovery, resume, setup, update
from reopold_agent.train.banner import learning_rate_note
from reopold_agent.train.data_order import DataOrder
from reopold_agent.train.evaluation import HeldOutEvaluation
from reopold_agent.train.resume import FREE_TO_CHANGE
from reopold_agent.train.rows import trajectories_of
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.update import Updater, UpdateStats
from reopold_agent.types import Trajectory

CPU = torch.device("cpu")
STUDENT = Path(resolve_path("demo:student"))


# The update


def linear(**settings: Any) -> OptimizerConfig:
    """AdamW whose huge epsilon makes a step proportional to the gradient, so that a rounding
    error of a gradient near zero is not blown up to a whole learning rate."""
    return OptimizerConfig(
        **{"lr": 0.01, "eps": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e6, **settings}
    )


def parameters(policy: TransformersPolicy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.adapter.model.parameters()])


@pytest.fixture
def updated(
    make_policy: Callable[..., TransformersPolicy], make_model: Callable[..., Any]
) -> Callable[..., tuple[torch.Tensor, UpdateStats]]:
    """``updated(mini_batches, switch_step=..., max_tokens=...)``: parameters after the updates."""

    def run(
        mini_batches: Sequence[Sequence[Trajectory]],
        *,
        switch_step: int = 5,
        top_share: float = 0.3,
        max_tokens: int = 10**6,
        **settings: Any,
    ) -> tuple[torch.Tensor, UpdateStats]:
        policy = make_policy(make_model(seed=1))
        objective = Reopold(switch_step=switch_step, top_share=top_share)
        updater = Updater(policy, objective, linear(**settings), max_tokens=max_tokens)
        stats = make_updates(updater, mini_batches, 0)
        return parameters(policy), stats

    return run


@pytest.fixture(scope="module")
def trajectories(
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., Any],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> list[Trajectory]:
    """Seven of different lengths, some with pictures, as if sampled a little while ago by the
    student of `updated`; the teacher thinks little of some tokens."""
    pictures = [[encode(1)], [], [encode(2), encode(3, 28, 56)], [], [encode(4)], [], []]
    made = [
        random_trajectory(seed, images, turns=1 + seed % 3) for seed, images in enumerate(pictures)
    ]
    scores = make_policy(make_model(seed=1)).score(made, with_entropy=True)
    rng = np.random.default_rng(0)
    for t, score in zip(made, scores, strict=True):
        old = score.logp + rng.normal(0, 0.1, len(t.ids))
        teacher = score.logp + rng.normal(-1, 2, len(t.ids))
        t.logp = np.where(t.loss_mask, old, 0).astype(np.float32)
        t.teacher_logp = np.where(t.loss_mask, teacher, 0).astype(np.float32)
        t.entropy = score.entropy
    return made


@pytest.mark.parametrize("switch_step", [5, 0], ids=["exploration", "refinement"])
def test_neither_micro_batches_nor_order_change_the_update(
    updated: Callable[..., Any],
    trajectories: list[Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
    switch_step: int,
) -> None:
    before = parameters(make_policy(make_model(seed=1)))
    whole, stats = updated([trajectories], switch_step=switch_step)
    assert (whole - before).abs().max() > 1e-4
    assert 0 < stats.kept_share < 1
    shuffled = [trajectories[i] for i in (3, 6, 0, 5, 1, 4, 2)]
    for batch, most in ((trajectories, 1), (trajectories, 60), (shuffled, 10**6), (shuffled, 1)):
        again, other = updated([batch], switch_step=switch_step, max_tokens=most)
        assert (again - whole).abs().max() < 1e-6
        assert other.threshold == stats.threshold
        assert other.kept_share == stats.kept_share
        assert other.loss == pytest.approx(stats.loss, abs=1e-5)
        assert other.grad_norm == pytest.approx(stats.grad_norm, rel=1e-4)


def test_the_loss_is_the_mean_over_kept_tokens_of_the_objective(
    updated: Callable[..., Any],
    trajectories: list[Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    """The update's loss and gradient by hand, from the definition, on the whole batch at once."""
    policy = make_policy(make_model(seed=1))
    total, kept = torch.zeros(()), 0
    floor = np.log(0.1) / 0.9
    for t in trajectories:
        logp, _ = policy.logprobs(TrajectoryBatch.build(policy.adapter, [t]))
        assert t.teacher_logp is not None
        old, teacher = (torch.from_numpy(v[t.loss_mask]) for v in (t.logp, t.teacher_logp))
        reward = teacher - logp.detach()
        keep = reward > floor
        total = total - (torch.exp(logp - old) * reward.clamp(min=floor))[keep].sum()
        kept += int(keep.sum())
    (total / kept).backward()
    norm = torch.stack([p.grad.norm() for p in policy.adapter.model.parameters()]).norm()  # type: ignore[union-attr]
    _, stats = updated([trajectories], max_tokens=50)
    assert stats.loss == pytest.approx(float(total.detach()) / kept, rel=1e-4)
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_the_entropy_threshold_is_that_of_the_whole_step(
    updated: Callable[..., Any], trajectories: list[Trajectory]
) -> None:
    """All of the most uncertain tokens are in one mini-batch: the other must not move anything."""
    sure, unsure = copy.deepcopy(trajectories[:3]), copy.deepcopy(trajectories[3:])
    for t in sure:
        t.entropy = np.where(t.loss_mask, 0.1, 0).astype(np.float32)
    for t in unsure:
        t.entropy = np.where(t.loss_mask, 0.9, 0).astype(np.float32)
    share = sum(t.response_tokens for t in unsure) / sum(
        t.response_tokens for t in (*sure, *unsure)
    )
    settings = {"switch_step": 0, "top_share": share, "beta1": 0.0}
    both, stats = updated([unsure, sure], **settings)
    alone, _ = updated([unsure], **{**settings, "top_share": 1.0})
    assert stats.threshold == pytest.approx(0.9)
    assert stats.kept_share == pytest.approx(share)
    assert torch.equal(both, alone)


def test_clipping_and_the_learning_rate_that_is_reported(
    updated: Callable[..., Any],
    trajectories: list[Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
) -> None:
    before = parameters(make_policy(make_model(seed=1)))
    whole, free = updated([trajectories])
    cut, stats = updated([trajectories], max_grad_norm=free.grad_norm / 100)
    assert stats.grad_norm == pytest.approx(free.grad_norm)  # as it was before clipping
    assert float((cut - before).norm()) < 0.05 * float((whole - before).norm())
    # The third of four warm-up updates runs at three quarters of the rate, and says so.
    _, warm = updated([trajectories[:3], trajectories[3:5], trajectories[5:]], warmup_steps=4)
    assert warm.lr == pytest.approx(0.75 * 0.01)


def test_large_models_learn_the_same(
    updated: Callable[..., Any], trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, settings = [trajectories[:4], trajectories[4:]], {"weight_decay": 0.1}
    expected, _ = updated(batches, **settings)
    freed: list[bool] = []
    monkeypatch.setattr(update, "LARGE", 0)
    monkeypatch.setattr(update, "return_freed_memory", lambda: freed.append(True))
    found, _ = updated(batches, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert len(freed) == 1 + len(batches)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing(
    trajectories: list[Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
    bad: float,
) -> None:
    policy = make_policy(make_model(seed=1))
    before = parameters(policy)
    updater = Updater(policy, Reopold(switch_step=5), linear(), max_tokens=100)
    broken = copy.deepcopy(trajectories)
    assert broken[3].teacher_logp is not None
    # Not NaN in exploration: NaN is above no floor, so such a token would just be masked.
    broken[3].teacher_logp[broken[3].loss_mask] = bad
    step = 0 if np.isinf(bad) else 5
    with pytest.raises(NonFiniteError, match="not made"):
        make_updates(updater, [broken], step)
    assert torch.equal(parameters(policy), before)
    assert not updater.optimizer.state
    # And the updater is as good as new.
    make_updates(updater, [trajectories], 0)
    assert torch.isfinite(parameters(policy)).all()
    assert not torch.equal(parameters(policy), before)


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    trajectories: list[Trajectory], checkpoint_folder: Callable[..., Path]
) -> None:
    folder = checkpoint_folder("model")
    after, calls = [], []
    for on in (False, True):
        loaded = load_model(ModelSpec(str(folder), gradient_checkpointing=on), "student", CPU)
        policy = loaded.policy(forbidden_ids=[], stop_ids=[], max_tokens_per_pass=10**6)
        count = [0]
        layer = loaded.adapter.model.model.language_model.layers[0].self_attn
        layer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        updater = Updater(policy, Reopold(switch_step=5), linear(), max_tokens=10**6)
        make_updates(updater, [trajectories], 0)
        after.append(parameters(policy))
        calls.append(count[0])
    assert calls == [1, 2]
    assert (after[0] - after[1]).abs().max() < 1e-7


def test_a_frozen_vision_tower_is_not_differentiated(
    trajectories: list[Trajectory], checkpoint_folder: Callable[..., Path]
) -> None:
    pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ".*language_model.*q_proj"}
    folder, gradients = checkpoint_folder("model"), []
    for on in (False, True):
        spec = ModelSpec(str(folder), lora=lora, gradient_checkpointing=on)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loaded = load_model(spec, "student", CPU)
        model: Any = loaded.adapter.model
        needed: list[bool] = []
        model.get_base_model().model.visual.register_forward_hook(
            lambda _module, _inputs, output, needed=needed: needed.append(
                output.pooler_output.requires_grad
            )
        )
        policy = loaded.policy(forbidden_ids=[], stop_ids=[], max_tokens_per_pass=10**6)
        updater = Updater(policy, Reopold(switch_step=5), linear(), max_tokens=10**6)
        updater.optimizer.register_step_pre_hook(
            lambda *_, updater=updater: gradients.append(
                torch.cat([p.grad.flatten() for p in updater._parameters if p.grad is not None])
            )
        )
        make_updates(updater, [trajectories], 0)
        assert needed
        assert not any(needed)
        assert all(p.grad is None for p in updater._parameters)
    assert gradients[0].abs().max() > 0
    assert (gradients[0] - gradients[1]).abs().max() < 1e-7


# Order of the data


def test_every_pass_takes_every_task_once_in_its_own_order() -> None:
    order = DataOrder(10, seed=3)
    passes = [[order[10 * n + k] for k in range(10)] for n in range(3)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert [DataOrder(10, 3)[k] for k in (25, 3, 11)] == [passes[2][5], passes[0][3], passes[1][1]]
    assert [DataOrder(10, 4)[k] for k in range(10)] != passes[0]
    with pytest.raises(ValueError, match="no training tasks"):
        DataOrder(0, 1)


# Whole runs


class Recorded:
    """What every update of the runs in a test was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        original = Updater.step

        def step(
            updater: Updater, mini_batches: Any, step: int, threshold: float | None
        ) -> UpdateStats:
            rows = [row for batch in mini_batches for row in batch]
            everything = trajectories_of(rows)
            scores = updater.policy.score(everything, with_entropy=True)
            call = {
                "indices": [[row.trajectory.index for row in batch] for batch in mini_batches],
                "old": [row.old_logp for row in rows],
                "entropy": [row.entropy for row in rows],
                "sampled": [t.logp for t in everything],
                "scored": [s.logp for s in scores],
                "scored_entropy": [s.entropy for s in scores],
            }
            call["stats"] = original(updater, mini_batches, step, threshold)
            call["updates"] = int(next(iter(updater.optimizer.state.values()))["step"])
            self.calls.append(call)
            return call["stats"]  # type: ignore[no-any-return]

        monkeypatch.setattr(Updater, "step", step)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plots (a second each; the command's tests look at them); global random state kept."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    monkeypatch.setattr(resume, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        yield


SHORT = ("steps=1", "evaluation.tasks=1", "evaluation.every=0", "evaluation.teacher=false")


def close(one: Sequence[Any], other: Sequence[Any], most: float) -> bool:
    return all(np.abs(a - b).max() <= most for a, b in zip(one, other, strict=True))


def test_several_updates_per_rollout(tmp_path: Path, recorded: Recorded) -> None:
    train(tmp_path / "one", *SHORT)
    train(tmp_path / "two", *SHORT, "batch.mini_batch=2", "batch.samples=2")
    train(tmp_path / "again", *SHORT, "batch.mini_batch=2", "batch.samples=2", "steps=2")
    one, two, again, second = recorded.calls
    assert one["stats"].ratio_max == pytest.approx(1, abs=1e-4)
    assert one["updates"] == 1
    assert two["stats"].ratio_max > 1 + 1e-3  # the second update's policy has moved on
    assert (two["updates"], second["updates"]) == (2, 4)
    # Whole groups, each once; the shuffle depends on seed and step only.
    assert [len(batch) for batch in two["indices"]] == [4, 4]
    for batch in two["indices"]:
        assert all(batch.count(index) == 2 for index in batch)
    assert len({i for batch in two["indices"] for i in batch}) == 4
    assert again["indices"] == two["indices"]
    row = train_rows(tmp_path / "two")[0]
    assert row["ratio/max"] == two["stats"].ratio_max
    assert row["rollout/episodes"] == 8


@pytest.mark.parametrize("mode", ["rollout", "recompute", "auto"])
def test_where_the_old_log_probs_come_from(tmp_path: Path, recorded: Recorded, mode: str) -> None:
    train(tmp_path / "run", *SHORT, f"engine.old_logp={mode}")
    (call,) = recorded.calls
    expected = "scored" if mode == "recompute" else "sampled"
    assert close(call["old"], call[expected], 0)
    assert close(call["sampled"], call["scored"], 1e-4)
    assert not close(call["sampled"], call["scored"], 0)  # else the modes cannot be told apart
    assert close(call["entropy"], call["scored_entropy"], 1e-4)


def test_phases_switch_at_the_configured_step(tmp_path: Path) -> None:
    train(tmp_path / "run", *SHORT, "steps=3", "objective.switch_step=1")
    rows = train_rows(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["exploration", "refinement", "refinement"]
    for row in rows:
        assert row["mask/exploration_share"] != row["mask/refinement_share"]
        assert row["mask/kept_share"] == pytest.approx(row[f"mask/{row['phase']}_share"])
    states = [
        json.loads(p.read_text()) for p in (tmp_path / "run/checkpoints").glob("*/trainer.json")
    ]
    assert [(s["step"], s["phase"], s["position"]) for s in states] == [(3, "refinement", 12)]


def test_neither_rewards_nor_answers_reach_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "honest", *SHORT, "steps=2")
    original, flips = ToolEnv.step, iter(range(1, 10**6))

    def lying(self: ToolEnv, action: str) -> Any:
        observation, _, terminated, truncated, info = original(self, action)
        number = next(flips)
        return observation, float(number), terminated, truncated, {**info, "success": number % 2}

    monkeypatch.setattr(ToolEnv, "step", lying)
    train(tmp_path / "lying", *SHORT, "steps=2")
    honest, lied = train_rows(tmp_path / "honest"), train_rows(tmp_path / "lying")
    assert honest[0]["rollout/reward"] != lied[0]["rollout/reward"]
    assert [r["loss"] for r in honest] == [r["loss"] for r in lied]
    assert_same_weights(tmp_path / "honest/final", tmp_path / "lying/final")


@pytest.mark.parametrize(("whose", "bad"), [("teacher", np.nan), ("teacher", -np.inf)])
def test_teacher_scores_that_are_not_finite_end_the_run_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str, bad: float
) -> None:
    original = TransformersPolicy.score
    calls: list[int] = []

    def score(self: TransformersPolicy, trajectories: Any, **settings: Any) -> Any:
        scores = original(self, trajectories, **settings)
        calls.append(1)
        if len(calls) == 2:  # the second step's
            scores[-1].logp[np.flatnonzero(trajectories[-1].loss_mask)[-1]] = bad
        return scores

    monkeypatch.setattr(TransformersPolicy, "score", score)
    updates: list[int] = []
    update = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *a: (updates.append(1), update(self, *a))[1])
    with pytest.raises(NonFiniteError, match=f"step 1, task .*: the {whose}'s .* not finite"):
        train(tmp_path / "run", *SHORT, "steps=3", "checkpoint.every=1")
    assert len(updates) == 1
    assert len(train_rows(tmp_path / "run")) == 1
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


# Checkpoints and resuming


def crash_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process is lost when this step has been rolled out and nothing of it is written."""
    original = StepLog.write_trajectories

    def dying(self: StepLog, at: int, rows: Any) -> None:
        original(self, at, rows)
        if at == step:
            raise SystemExit("lost")

    monkeypatch.setattr(StepLog, "write_trajectories", dying)


RESUMED = ("data.train.size=8", "checkpoint.every=2", "steps=5", "optimizer.warmup_steps=4")


def test_a_crashed_run_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", *RESUMED)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        crash_before(patch, 3)
        with pytest.raises(SystemExit):
            train(folder, *RESUMED)
    assert [r["step"] for r in train_rows(folder)] == [0, 1, 2]  # one more than the checkpoint
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    torch.rand(7)  # random state of the process must not matter
    summary = train(folder, *RESUMED, "logging.trajectories=4", "checkpoint.keep=5")
    assert results(folder) == results(tmp_path / "whole")
    assert_same_weights(folder / "final", tmp_path / "whole/final")
    for name in ("optimizer", "scheduler", "torch_rng"):
        state = [
            torch.load(run / "checkpoints/step-000005/state.pt", weights_only=True)[name]
            for run in (folder, tmp_path / "whole")
        ]
        torch.testing.assert_close(*state, rtol=0, atol=0)
    # Eight tasks, four a step: each once in two steps, whatever was interrupted.
    seen = [row["task_id"] for row in lines(folder / "trajectories.jsonl")]
    assert len(set(seen[:8])) == len(set(seen[8:16])) == 8
    assert [row["lr"] / 3e-4 for row in train_rows(folder)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1]
    )
    assert summary["before"] is not None
    assert summary["train_seconds"] == pytest.approx(
        sum(row["time/step"] for row in train_rows(folder)), abs=0.06
    )


@pytest.mark.parametrize(("warmup", "told"), [(4, False), (5, True), (1000, True)])
def test_a_warm_up_longer_than_the_run_is_told(warmup: int, told: bool) -> None:
    config, _ = composed("steps=2", "batch.mini_batch=16", f"optimizer.warmup_steps={warmup}")
    assert config.updates == 4
    note = learning_rate_note(config, None)
    assert (note is not None) == told
    if note is not None:
        assert note.endswith(f"and the run has 4: it ends at {4 / warmup:.2g} of optimizer.lr.")


def test_a_falling_learning_rate_ends_with_the_run_also_where_it_gets_more_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("data.train.size=8", "optimizer.lr_scheduler_type=cosine", "evaluation.every=0")
    note = "note: the learning rate goes on higher than it was: it falls to 0 over 4 steps now, not"
    for steps in (2, 4):
        assert note not in caplog.text
        train(tmp_path, *words, f"steps={steps}")
    assert note in caplog.text
    # Half a cosine over two updates, then what is left of one over four.
    shares = [row["lr"] / 3e-4 for row in train_rows(tmp_path)]
    assert shares == pytest.approx([1, 0.5, 0.5, 0.5 - 0.5**1.5])


def test_a_run_lost_before_its_first_checkpoint_starts_over_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*SHORT, "steps=2", "checkpoint.every=0")
    train(tmp_path / "whole", *settings)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        crash_before(patch, 1)
        with pytest.raises(SystemExit):
            train(folder, *settings, "seed=1")  # nothing of it may stay, its evaluation neither
    assert len(lines(folder / "metrics.jsonl")) == 3
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(folder, *settings, "resume=never")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(folder, *settings, "resume=must")
    caplog.clear()
    anew: list[Trackers] = []
    monkeypatch.setattr(Trackers, "begin_anew", lambda self: anew.append(self))
    train(folder, *settings)
    assert len(anew) == 1
    assert (
        "of a run with other settings, are removed (saved -> now):\n  seed: 1 -> 0" in caplog.text
    )
    assert results(folder) == results(tmp_path / "whole")


def test_a_run_lost_after_its_last_step_evaluates_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", *SHORT)
    folder = tmp_path / "broken"
    original = HeldOutEvaluation._evaluate
    with monkeypatch.context() as patch:

        def dying(self: HeldOutEvaluation, who: str, step: int, *a: Any, **k: Any) -> Any:
            result = original(self, who, step, *a, **k)
            if step == 1:
                raise SystemExit("lost")
            return result

        patch.setattr(HeldOutEvaluation, "_evaluate", dying)
        with pytest.raises(SystemExit):
            train(folder, *SHORT)
    summary = train(folder, *SHORT)
    assert results(folder) == results(tmp_path / "whole")
    assert summary["after"] == whole["after"]
    assert_same_weights(folder / "final", tmp_path / "whole/final")


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = train(folder, *SHORT)
    before = snapshot(folder)
    monkeypatch.setattr(setup, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    capsys.readouterr()
    assert train(folder, *SHORT) == first
    assert snapshot(folder) == before
    assert "student after" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(folder, *SHORT, "resume=never")


def test_another_configuration_is_refused_with_the_differences(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    train(folder, *SHORT)
    before = snapshot(folder)
    with pytest.raises(CheckpointError) as caught:
        train(folder, *SHORT, "optimizer.lr=0.001", "seed=5", "+env.kwargs.max_turns=3")
    for line in (
        "optimizer.lr: 0.0003 -> 0.001",
        "seed: 0 -> 5",
        "env.kwargs.max_turns: unset -> 3",
    ):
        assert f"  {line}\n" in str(caught.value)
    assert "batch" not in str(caught.value)
    assert snapshot(folder) == before


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    owner = f"in use by process {os.getpid()}"
    with RunFolder(tmp_path).lock(), pytest.raises(CheckpointError, match=owner):
        train(tmp_path, *SHORT)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, *SHORT, "steps=2", "data.train.size=8", f"seed={seed}")
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert_same_weights(tmp_path / "a/final", tmp_path / "b/final")
    mine, theirs = (
        [row["task_id"] for row in lines(tmp_path / name / "trajectories.jsonl")]
        for name in ("a", "c")
    )
    assert sorted(mine) == sorted(theirs)  # the same eight tasks in another order
    assert mine != theirs
    said = [
        {row["task_id"]: row["ids"] for row in lines(tmp_path / name / "trajectories.jsonl")}
        for name in ("a", "c")
    ]
    assert all(said[0][task] != said[1][task] for task in mine)


def test_differences_are_of_what_influences_the_result() -> None:
    old = {"a": {"b": 1, "c": {}}, "checkpoint": {"every": 2}, "resume": "auto", "logging": {}}
    new = {"a": {"b": 2, "c": {"d": 1}}, "checkpoint": {"every": 3}, "resume": "must", "e": None}
    assert config_differences(old, new, FREE_TO_CHANGE)[:2] == [
        "a.b: 1 -> 2",
        "a.c: {} -> unset",
    ]
    assert config_differences(old, old, FREE_TO_CHANGE) == []
    assert not [
        d
        for d in config_differences(old, new, FREE_TO_CHANGE)
        if d.startswith(("checkpoint", "resume"))
    ]


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _torch_error(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")


def _safetensors_error(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("torch.save", _no_space),
        ("torch.save", _torch_error),
        ("LoadedModel.save", _safetensors_error),
        ("flush_tree", _no_space),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: Callable[..., None]
) -> None:
    folder = tmp_path / "run"
    settings = (*SHORT, "steps=3", "checkpoint.every=1")
    save = recovery.save_checkpoint

    def failing(*arguments: Any, step: int, **settings: Any) -> Path:
        if step < 2:
            return save(*arguments, step=step, **settings)
        with monkeypatch.context() as patch:
            owner = {
                "torch.save": (torch, "save"),
                "LoadedModel.save": (loading.LoadedModel, "save"),
                "flush_tree": (files, "flush_tree"),
            }[where]
            patch.setattr(*owner, what)
            return save(*arguments, step=step, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "save_checkpoint", failing)
        with pytest.raises(
            CheckpointError, match=r"last good checkpoint is .*step-000001"
        ) as caught:
            train(folder, *settings)
    assert "space" in str(caught.value)
    assert os.listdir(folder / "checkpoints") == ["step-000001"]
    # With space again it goes on.
    train(folder, *settings)
    assert [row["step"] for row in train_rows(folder)] == [0, 1, 2]


def test_only_whole_checkpoints_count_and_leftovers_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = (*SHORT, "steps=3", "checkpoint.every=1", "checkpoint.keep=2")
    checkpoints = folder / "checkpoints"
    stale = checkpoints / ".step-000007.123.tmp"
    (stale / "model").mkdir(parents=True)
    (stale / "trainer.json").write_text("{}")
    train(folder, *settings)
    assert sorted(os.listdir(checkpoints)) == ["step-000002", "step-000003"]
    for each in checkpoints.iterdir():
        assert {p.name for p in each.iterdir()} == {"model", "state.pt", "trainer.json"}
        AutoTokenizer.from_pretrained(each / "model")
        Qwen2_5_VLForConditionalGeneration.from_pretrained(each / "model")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = (*SHORT, "steps=2", "checkpoint.every=1")
    train(folder, *settings)
    newest = folder / "checkpoints" / "step-000002"
    (folder / "summary.json").unlink()
    (newest / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        train(folder, *settings)
    (newest / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        train(folder, *settings)
    shutil.rmtree(newest)
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        train(folder, *settings)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_saves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    folder = tmp_path / "a run"
    settings = (*SHORT, "steps=3", "checkpoint.every=0")
    before = signal.getsignal(number)
    original = loop.set_behaviour

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "set_behaviour", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *settings)
    assert signal.getsignal(number) == before
    assert [row["step"] for row in train_rows(folder)] == [0]
    assert os.listdir(folder / "checkpoints") == ["step-000001"]
    error = capsys.readouterr().err
    assert "Finishing this step, then saving" in error
    assert f"'hydra.run.dir={folder}'" in error  # quoted: there is a space in it
    if number == signal.SIGINT:
        train(folder, *settings)
        train(tmp_path / "whole", *settings)
        assert results(folder) == results(tmp_path / "whole")


# LoRA


# Dropout draws from PyTorch's generator, which a resumed run must find where it was.
LORA = (
    "model.student.lora={r: 4, lora_alpha: 16, lora_dropout: 0.2, target_modules: [q_proj, v_proj]}"
)


def test_lora_trains_resumes_and_leaves_a_complete_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    settings = (*SHORT, "steps=3", "checkpoint.every=2", "optimizer.lr=0.01", LORA)
    trained: list[list[str]] = []
    init = Updater.__init__

    def recording(self: Updater, policy: Any, *arguments: Any, **k: Any) -> None:
        init(self, policy, *arguments, **k)
        trained.append([n for n, p in policy.adapter.model.named_parameters() if p.requires_grad])

    monkeypatch.setattr(Updater, "__init__", recording)
    train(tmp_path / "whole", *settings)
    assert trained[0]
    assert all("lora_" in name for name in trained[0])
    model_folder = tmp_path / "whole/checkpoints/step-000002/model"
    assert not (model_folder / "model.safetensors").exists()  # adapters only
    adapter = load_file(model_folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any(bool((v != 0).any()) for name, v in adapter.items() if "lora_B" in name)

    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        crash_before(patch, 2)
        with pytest.raises(SystemExit):
            train(folder, *settings)
    train(folder, *settings)
    assert results(folder) == results(tmp_path / "whole")
    assert_same_weights(folder / "final", tmp_path / "whole/final")

    final = folder / "final"
    start, end = weights(STUDENT), weights(final)
    assert start.keys() == end.keys()  # a complete model under the usual names
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in moved)

    merged: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(final).eval()
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(STUDENT)
    adapted = peft.PeftModel.from_pretrained(
        base, str(folder / "checkpoints/step-000003/model")
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which digit is it?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert torch.allclose(merged(**prompt).logits, adapted(**prompt).logits, atol=1e-4)
    said = [
        tokenizer.decode(m.generate(**prompt, do_sample=False, max_new_tokens=12)[0])
        for m in (merged, adapted)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, "rank"),
        ({"r": 4, "target_modules": ["nothing_like_it"]}, "nothing_like_it"),
        ({"r": 4, "target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_lora_settings_that_do_not_fit_are_refused(lora: dict[str, Any], words: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelError, match=words):
        load_model(ModelSpec(str(STUDENT), lora=lora), "student", CPU)


# Loading


@pytest.fixture(scope="module")
def checkpoint_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    tokenizer: Any,
    vision: Any,
) -> Callable[..., Path]:
    """``checkpoint_folder(name, seed=0, **text_config)``: a random model in Hugging Face layout."""

    def make(name: str, seed: int = 0, **text: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints") / name
        make_model(seed, **text).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        vision.processor.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def folder(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return checkpoint_folder("whole")


def test_a_vocabulary_that_differs_shows_the_first_ids(
    folder: Path, checkpoint_folder: Callable[..., Path]
) -> None:
    other = checkpoint_folder("other")
    saved = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = saved["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    first, second = sorted(names)[200:202]
    vocabulary[names[first]], vocabulary[names[second]] = second, first
    (other / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    student, teacher = (
        load_model(ModelSpec(str(f)), role, CPU) for f, role in ((folder, "s"), (other, "t"))
    )
    with pytest.raises(VocabularyMismatchError) as caught:
        check_vocabularies(student, teacher)
    message = str(caught.value)
    assert f"id {first}: student {names[first]!r}, teacher {names[second]!r}" in message
    assert f"id {second}: student {names[second]!r}, teacher {names[first]!r}" in message
    assert "2 token ids" in message
    check_vocabularies(student, student)


def test_a_token_more_is_a_difference(folder: Path, checkpoint_folder: Callable[..., Path]) -> None:
    other = checkpoint_folder("more")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(other)
    student, teacher = (
        load_model(ModelSpec(str(f)), role, CPU) for f, role in ((folder, "s"), (other, "t"))
    )
    for pair in ((student, teacher), (teacher, student)):
        with pytest.raises(VocabularyMismatchError, match=r"<\|extra\|>"):
            check_vocabularies(*pair)


def test_a_teacher_padded_wider_is_fine(
    folder: Path,
    checkpoint_folder: Callable[..., Path],
    tokenizer: Any,
    trajectories: list[Trajectory],
) -> None:
    wide = checkpoint_folder("wide", seed=0, vocab_size=len(tokenizer) + 77)
    student, teacher = (
        load_model(ModelSpec(str(f)), role, CPU) for f, role in ((folder, "s"), (wide, "t"))
    )
    assert teacher.adapter.vocabulary_rows == student.adapter.vocabulary_rows + 64
    check_vocabularies(student, teacher)
    # The rows that no token has get no probability: with equal other weights, scores are equal.
    narrow: Any = student.adapter.model
    wider: Any = teacher.adapter.model
    rows = student.adapter.vocabulary_rows
    state = narrow.state_dict()
    for name, value in wider.state_dict().items():
        value[: len(state[name])].copy_(state[name]) if value.dim() else value.copy_(state[name])
    with torch.no_grad():
        wider.get_input_embeddings().weight[rows:] = 5.0
    one, other = (
        m.policy(forbidden_ids=[], stop_ids=[], max_tokens_per_pass=10**6).score(trajectories)
        for m in (student, teacher)
    )
    assert close([s.logp for s in one], [s.logp for s in other], 1e-5)


def test_a_tokenizer_larger_than_the_model_is_refused(
    checkpoint_folder: Callable[..., Path], tokenizer: Any
) -> None:
    small = checkpoint_folder("small")
    more = AutoTokenizer.from_pretrained(small)
    more.add_tokens([f"<extra{i}>" for i in range(40)])
    more.save_pretrained(small)
    with pytest.raises(ModelError, match=f"knows {len(tokenizer) + 40} ids"):
        load_model(ModelSpec(str(small)), "student", CPU)


def text_only(folder: Path, tokenizer: Any) -> Path:
    from transformers import Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_teacher_that_cannot_see_is_refused(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    blind = load_model(ModelSpec(str(text_only(tmp_path / "t", tokenizer))), "teacher", CPU)
    seeing = load_model(ModelSpec(str(folder)), "student", CPU)
    with pytest.raises(ModelError, match="reads text only"):
        check_vocabularies(seeing, blind)
    check_vocabularies(blind, blind)


def test_pictures_must_be_prepared_alike(
    folder: Path, checkpoint_folder: Callable[..., Path]
) -> None:
    other = checkpoint_folder("other")
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))
    student, teacher = (
        load_model(ModelSpec(str(f)), role, CPU) for f, role in ((folder, "s"), (other, "t"))
    )
    with pytest.raises(ModelError, match="image_mean"):
        check_vocabularies(student, teacher)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["config.json"], r"lacks config\.json"),
        (["model.safetensors"], r"lacks weights"),
        (["tokenizer.json"], r"lacks a tokenizer"),
        (["config.json", "tokenizer.json"], r"lacks config\.json, a tokenizer"),
    ],
)
def test_missing_files_of_a_folder_are_named(folder: Path, missing: list[str], words: str) -> None:
    check_available(ModelSpec(str(folder)), "teacher")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=f"the teacher's folder .*{words}"):
        check_available(ModelSpec(str(folder)), "teacher")


def run_as_told(told: str) -> None:
    """Runs the Python lines of a message, those that are indented."""
    lines = [line.removeprefix("  ") for line in told.split("\n") if line.startswith("  ")]
    exec("\n".join(lines), {})


def test_weights_in_pickles_are_converted_as_the_message_says(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks weights .*; its \*\.bin are pickles") as caught:
        check_available(ModelSpec(str(folder)), "teacher")
    run_as_told(str(caught.value))
    check_available(ModelSpec(str(folder)), "teacher")
    assert load_file(folder / "model.safetensors").keys() == weights.keys()


def test_an_adapter_is_told_from_a_model_and_merged_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec("demo:arithmetic_student", lora={"r": 2, "target_modules": "all-linear"})
    adapter = tmp_path / "run" / "checkpoints" / "step-000001" / "model"
    load_model(spec, "student", CPU).save(adapter)
    given = ModelSpec(str(adapter))
    with pytest.raises(ModelError, match=r"holds a LoRA adapter, not a whole model\.\nM") as caught:
        check_available(given, "student")
    run_as_told(str(caught.value))
    check_available(ModelSpec("./DIR"), "student")
    run = tmp_path / "run"
    (run / "metrics.jsonl").touch()
    export = rf"python -m reopold_agent\.train\.export {run} DIR$"
    with pytest.raises(ModelError, match=export):
        check_available(given, "student")
    with pytest.raises(ConfigError, match=rf"only LoRA adapters\.\n.*{export}"):
        check_available(ModelSpec(str(run)), "student")
    shutil.copytree("DIR", run / "final")
    with pytest.raises(ModelError, match=rf"Give the run, .* model\.student\.path={run}$"):
        check_available(given, "student")
    check_available(ModelSpec(str(run)), "student")


@pytest.mark.parametrize("shards", [False, True])
def test_a_whole_model_with_an_adapter_beside_it_is_refused(tmp_path: Path, shards: bool) -> None:
    peft = pytest.importorskip("peft")
    base = resolve_path("demo:arithmetic_teacher")
    shutil.copytree(base, tmp_path / "merged")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").unlink()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="300KB" if shards else "5GB")
    spec = ModelSpec(str(tmp_path / "merged"))
    told = (
        r"^the (\w+)'s folder '.*' holds a whole model and a LoRA adapter .*\nIf they are, delete"
    )
    for role in ("student", "teacher"):
        with pytest.raises(ModelError, match=told):
            load_model(spec, role, CPU)
    (tmp_path / "adapter").mkdir()
    for file in (tmp_path / "merged").glob("adapter_*"):
        file.rename(tmp_path / "adapter" / file.name)
    loaded = load_model(spec, "teacher", CPU).adapter.model.state_dict()
    assert all(torch.equal(loaded[name], each) for name, each in merged.state_dict().items())
    with pytest.raises(ModelError, match=r"holds a LoRA adapter, not a whole model\.\nMerge it"):
        check_available(ModelSpec(str(tmp_path / "adapter")), "student")
    assert load_processing(spec, "teacher", weights=False).config.model_type == "qwen2"


def test_an_adapter_that_the_hub_has_beside_a_whole_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the folder is not seen before; transformers notes that it has applied the adapter."""
    found = AutoModelForCausalLM.from_pretrained

    def applied(*args: Any, **settings: Any) -> Any:
        model, report = found(*args, **settings)
        model._hf_peft_config_loaded = True
        return model, report

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", applied)
    with pytest.raises(ModelError, match=r"holds a whole model and a LoRA adapter"):
        load_model(ModelSpec("demo:arithmetic_student"), "teacher", CPU)


def test_where_a_server_has_the_weights_a_folder_need_not(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = ModelSpec(str(folder))
    assert len(load_processing(spec, "teacher", weights=False).tokenizer) > 0
    with pytest.raises(ModelError, match="lacks weights"):
        load_processing(spec, "teacher")
    assert not reads_weights({"name": "server", "urls": []})
    assert reads_weights({"name": "vllm"})
    assert reads_weights({"name": "transformers"})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="lacks a tokenizer"):
        load_processing(spec, "teacher", weights=False)


def test_an_incomplete_download_is_reported(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2]}
    missing = "model-00002-of-00002.safetensors"
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
    index = {name: next((s for s, p in shards.items() if name in p), missing) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of 2 weight files, the first is {missing}"):
        check_available(ModelSpec(str(folder)), "student")
    for broken in ('{"weight_map": {', "[]", "{}", '{"weight_map": null}'):
        (folder / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(ModelError, match=r"index .* cannot be read .* download .* again"):
            check_available(ModelSpec(str(folder)), "student")


def test_weights_that_are_absent_or_cut_off_are_not_replaced_by_random_ones(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "down_proj" in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, the first is .*down_proj"):
        load_model(ModelSpec(str(folder)), "student", CPU)
    tensors[gone] = tensors[gone][:5].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="cannot load the student"):
        load_model(ModelSpec(str(folder)), "student", CPU)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ModelError, match="cannot load the student"):
        load_model(ModelSpec(str(folder)), "student", CPU)


def test_a_checkpoint_without_its_picture_processor_is_reported(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    file.unlink()
    with pytest.raises(
        ModelError, match=r"folder '.*' lacks a picture processor \(preprocessor_co"
    ):
        load_model(ModelSpec(str(folder)), "student", CPU)
    for text in ("{", "[]"):
        file.write_text(text)
        told = r"^the student '.*' has no preprocessor_config\.json that can be read.*\nCopy .*\.$"
        with pytest.raises(ModelError, match=told):
            load_model(ModelSpec(str(folder)), "student", CPU)
    file.unlink()  # as of a hub id without one, whose files are not listed beforehand
    (folder / "processor_config.json").write_text("{}")
    with pytest.raises(ModelError, match=told):
        load_model(ModelSpec(str(folder)), "student", CPU)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such", "a/b/c", "plain"])
def test_a_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(ModelError, match=r"does not exist; set model\.student\.path"):
        check_available(ModelSpec(path), "student")


def test_a_hub_id_without_a_network_says_what_to_download() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # conftest sets it
    with pytest.raises(ModelError) as caught:
        check_available(ModelSpec("Qwen/Qwen2.5-VL-7B-Instruct"), "teacher")
    message = str(caught.value)
    assert (
        "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir models/Qwen2.5-VL-7B-Instruct"
        in message
    )
    assert "model.teacher.path=models/Qwen2.5-VL-7B-Instruct" in message


def test_real_checkpoints_that_are_not_here_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download VerlTool/pixel-reaoner-qwen2-5vl-3b-sft"):
        train(tmp_path, "model=qwen2_5_vl_3b")


def test_an_unknown_demo_model_lists_what_is_shipped() -> None:
    with pytest.raises(ModelError, match="demo:student, demo:teacher"):
        check_available(ModelSpec("demo:pupil"), "student")


def test_everything_is_looked_at_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr(setup, "checked_run", lambda *a, **k: pytest.fail("read the data"))
    with pytest.raises(ModelError, match="the teacher's folder '/nowhere' does not exist"):
        train(tmp_path / "run", "model.teacher.path=/nowhere")
    monkeypatch.undo()
    monkeypatch.setattr(setup, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(Exception, match="data path /nowhere does not exist"):
        train(tmp_path / "run", "data=verl", "data.train.path=/nowhere", "data.eval.path=/")
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Exception, match="PyTorch sees none"):
        train(tmp_path / "run", "engine.device=cuda")


def test_the_configuration_of_a_run_is_what_it_ran(tmp_path: Path) -> None:
    train(tmp_path / "run", *SHORT, "seed=3")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text("utf-8"))
    _, raw = composed(*[*SMALL, *SHORT, "seed=3"])
    # Resolved, so that a run that goes on for more steps does not explore again.
    raw["objective"]["switch_step"] = int(raw["objective"]["switch_share"] * raw["steps"] + 0.5)
    assert saved == raw


def test_a_task_drawn_twice_gets_other_samples() -> None:
    drawn = [("a", 4), ("a", 7), ("b", 4), ("a", 4)]
    assert [(e.env, e.index, e.sample) for e in collect.step_episodes(drawn, samples=2)] == [
        ("a", 4, 0), ("a", 4, 1), ("a", 7, 0), ("a", 7, 1),
        ("b", 4, 0), ("b", 4, 1), ("a", 4, 2), ("a", 4, 3),
    ]  # fmt: skip
