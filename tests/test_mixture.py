"""Mixtures: several environments that train one student."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from rich.console import Console
from running import (
    assert_same_weights,
    command,
    lines,
    results,
    start,
    train,
    train_rows,
    wait_until,
    words,
)

from reopold_agent.common.statistics import wilson_interval
from reopold_agent.config import BatchConfig, TrainConfig, ViewConfig, build, whole_weights
from reopold_agent.doctor.run import environment
from reopold_agent.errors import ConfigError, DataError, ReopoldError, UnknownNameError
from reopold_agent.evaluate.words import prepared_words
from reopold_agent.objectives import TokenBatch
from reopold_agent.objectives.distillation import EntropyMaskedReverseKL, ReverseKLStopGradient
from reopold_agent.plan.workload import assumed_workload
from reopold_agent.play.session import play
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.demonstrations import unsampled
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.reading import Reader
from reopold_agent.study.probe import load_config
from reopold_agent.tracking.history import History
from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.tracking.plots import success_figure
from reopold_agent.tracking.summary import print_summary
from reopold_agent.train import finish
from reopold_agent.train.collect import mini_batches, read_demonstrations
from reopold_agent.train.data_order import DataOrder, TaskOrder, turns
from reopold_agent.train.engine import run_objective
from reopold_agent.train.environments import Environments, environment_counts, environments
from reopold_agent.train.evaluation import EvaluationResult
from reopold_agent.train.mixture import as_typed, mixed_words
from reopold_agent.train.roles import check_roles
from reopold_agent.train.rows import Row, entropy_threshold
from reopold_agent.train.settings import compose_run
from reopold_agent.train.update import Updater, UpdateStats
from reopold_agent.types import Trajectory
from reopold_agent.view.run import Run

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
        for first in range(0, len(own) - size, size):  # pass after pass over all of its tasks
            assert sorted(own[first : first + size]) == list(range(size))
    assert [TaskOrder(tasks, 8, weights)[k] for k in range(400)] != drawn


def test_equal_environments_have_orders_of_their_own() -> None:
    order = TaskOrder({"a": 50, "b": 50}, 3, {"a": 1.0, "b": 1.0})
    drawn = [order[k] for k in range(100)]
    orders = [[index for env, index in drawn if env == name] for name in "ab"]
    assert orders[0] != orders[1]


def test_one_environment_has_the_order_that_it_always_had() -> None:
    order, before = TaskOrder({"math": 10}, 3, {"math": 2.0}), DataOrder(10, 3)
    assert [order[k] for k in range(25)] == [("math", before[k]) for k in range(25)]


# Words


def test_each_environment_keeps_what_a_run_of_it_alone_has() -> None:
    words = ["model=demo", "mix.weights={geometry: 2}", "optimizer.lr=0.5"]
    run = compose_run(["env=[pixel_reasoner,math,geometry]", *words])
    assert run.env.name == "pixel_reasoner+math+geometry"
    assert run.weights == {"pixel_reasoner": 1, "math": 1, "geometry": 2}
    for name, member in run.members.items():
        alone = compose_run([f"env={name}"])
        assert (member.env, member.data, member.pixels) == (alone.env, alone.data, alone.pixels)
        assert member.rollout == alone.rollout
        assert member.evaluation.max_turns == alone.evaluation.max_turns
        assert (member.model, member.optimizer) == (run.model, run.optimizer)
    assert run.optimizer.lr == 0.5
    assert run.model == compose_run(["env=pixel_reasoner"]).model
    assert run.data.train is None
    assert (run.rollout.max_response_tokens, run.rollout.max_turns) == (256, 3)  # the largest
    assert (run.pixels.prompt.min_pixels, run.pixels.prompt.max_pixels) == (3136, 19600)
    assert run.rollout.stop_at_tool_call
    assert not run.members["math"].rollout.stop_at_tool_call


def test_words_reach_all_environments_or_one() -> None:
    words = ["model=demo", "rollout.max_turns=2", "rollout.concurrency=5", "evaluation.tasks=7"]
    own = ["mix.envs.math.rollout.max_turns=4", "mix.envs.geometry.data=demo"]
    own += ["mix.envs.geometry.data.train.size=9", "+mix.envs.math.env.kwargs.max_pictures=3"]
    run = compose_run(["env=[math,geometry]", *words, *own])
    math, geometry = run.members.values()
    assert (math.rollout.max_turns, geometry.rollout.max_turns, run.rollout.max_turns) == (4, 2, 4)
    assert (math.rollout.concurrency, math.evaluation.tasks) == (5, 7)
    assert geometry.data.train is not None
    assert (geometry.data.train["source"], geometry.data.train["size"]) == ("demo", 9)
    assert (math.env.kwargs, geometry.env.kwargs) == ({"max_pictures": 3}, {})


def test_a_model_of_the_users_brings_the_settings_of_its_environments() -> None:
    words = ["model=qwen2_5_vl_3b", "mix.envs.math.data=openr1_math"]
    run = compose_run(["env=[math,geometry]", *words, "mix.envs.geometry.data=geometry3k"])
    alone = compose_run(["env=math", "model=qwen2_5_vl_3b", "data=openr1_math"])
    assert run.members["math"].rollout == alone.rollout
    assert run.members["math"].data == alone.data
    recipe = compose_run(["env=[math,geometry]", "recipe=paper_agentic", *words[1:],
                          "mix.envs.geometry.data=geometry3k"])  # fmt: skip
    assert recipe.engine.name == "verl"
    assert recipe.members["geometry"].rollout.concurrency == recipe.rollout.concurrency == 128


def test_a_list_of_one_is_that_environment() -> None:
    assert compose_run(["env=[math]", "seed=3"]) == compose_run(["env=math", "seed=3"])
    assert compose_run(["env=math"]).members == {"math": compose_run(["env=math"])}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("env=[math,math]", r"names math twice\.\nName each once; mix\.weights="),
        ("env=[]", r"names no environment\.\nName"),
        ("env=[math,geometri]", r"geometri.*\n?.*geometry"),
        ("env=[math,geometry]", r"model of its own: math with arithmetic, .*\nChoose one student"),
        ("env=[math,geometry] model=demo mix.weights={math: 0}", r"positive number, got 0\.\nTo"),
        ("env=[math,geometry] model=demo mix.weights.math=-2", r"positive number, got -2\.\n"),
        ("env=[math,geometry] model=demo mix.weights={maths: 2}", r"no such env.*\nDid you mean"),
        ("env=[math,geometry] model=demo mix.weights=2", r"must name environments, got 2\.\nWri"),
        ("env=[math,geometry] model=demo mix.weights.math=0.33333", r"133,333 draws.*\nRound"),
        ("env=[math,geometry] model=demo data=demo", r"'data' leaves open .*\nWrite mix\.envs\.m"),
        ("env=[math,geometry] model=demo data.train.size=9", r"leaves open .*\nWrite mix\.envs\.m"),
        ("env=[math,geometry] model=demo mix.envs.math.optimizer.lr=1", r"no optimizer\.lr .*\nIt"),
        ("env=[math,geometry] model=demo mix.envs.mat.rollout.max_turns=1", r"no setting .*\n"),
        (
            "env=[math,geometry] model=demo mix.envs.math.rollout.max_turn=1",
            r"mix\.envs\.math: unk",
        ),
        ("env=[math,geometry] model=qwen2_5_vl", r"mix\.envs\.math: data=NAME must be given\.\n"),
        ("env=math mix.weights={math: 2}", r"a setting of a mixture\.\nName its environments"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_two_lines(words: str, told: str) -> None:
    listed = re.split(r" (?=[\w.]+=)", words)
    with pytest.raises(ReopoldError, match=told) as raised:
        compose_run(listed)
    assert "\n" in str(raised.value) or raised.type is UnknownNameError


# Environments of the user's


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of configurations with two environments."""
    folder = tmp_path / "my, [own] configs/env"
    folder.mkdir(parents=True)
    for name, base, size in (("mine", "geometry", 9), ("other", "math", 7)):
        text = (
            f"# @package _global_\ndefaults: [{base}, _self_]\ndata: {{train: {{size: {size}}}}}\n"
        )
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder.parent


@pytest.mark.parametrize("names", [("mine", "pixel_reasoner"), ("mine", "other")])
def test_environments_of_a_folder_are_composed_as_alone(own: Path, names: Sequence[str]) -> None:
    flag = ["--config-dir", str(own)]
    run = compose_run([*flag, f"env=[{','.join(names)}]", "model=demo", "mix.weights.mine=2"])
    assert list(run.members) == list(names)
    for name, member in run.members.items():
        alone = compose_run([f"env={name}", *flag])
        assert (member.env, member.data, member.rollout) == (alone.env, alone.data, alone.rollout)
    assert run.members["mine"].data.train is not None
    assert run.members["mine"].data.train["size"] == 9
    if "other" not in names:
        place = f"hydra.searchpath=['file://{own}']"
        assert compose_run([place, "env=[mine,pixel_reasoner]", "model=demo"]).members == {
            name: replace(member, mix=None) for name, member in run.members.items()
        }


def test_the_flag_for_a_folder_stays_where_it_was(own: Path) -> None:
    # Hydra takes no settings behind a flag that stands behind settings.
    flag = [f"--config-dir={own}"]
    made = mixed_words([*flag, "model=demo", "env=[mine,other]", "seed=2", "--multirun"])
    assert [*made[:2], *made[-2:]] == [*flag, "model=demo", "seed=2", "--multirun"]
    assert made[2] == "env=mine+other"


def test_an_unknown_environment_is_looked_for_in_both_places(own: Path) -> None:
    told = rf"'mime' in the package's configs/env or {re.escape(str(own))}/env\. Did you .*'mine'"
    for chosen in (["env=[mime,math]", "model=demo"], ["env=mime"]):
        with pytest.raises(UnknownNameError, match=told):
            compose_run(["--config-dir", str(own), *chosen])
    for place in ([f"--config-dir={own}/no"], ["--config-dir"]):
        with pytest.raises(ConfigError, match=r"configurations '.*' is not there\.\nName one"):
            compose_run(["env=[mine,math]", "model=demo", *place])
    with pytest.raises(ConfigError, match=r"no list of folders\.\nWrite 'hydra\.searchpath=\[DIR"):
        compose_run(["env=math", "hydra.searchpath=3"])


def test_messages_have_the_option_s_name_and_its_folder(own: Path) -> None:
    flag = f"--config-dir={own}"
    config = compose_run([flag, "env=[mine,pixel_reasoner]", "model=demo"])
    splits = [(name, split) for name in config.members for split in ("train", "eval")]
    for found, (name, split) in zip(environment(config), splits, strict=True):
        assert found.text.startswith(f"{name}, {split}: ")
    advice = re.escape(f"""`reopold evaluate 'hydra.searchpath=["{own}"]' env=mine --cfg job`""")
    with pytest.raises(ConfigError, match=rf"unknown setting 'rollout\.turn'.*\n.*{advice} shows"):
        prepared_words([flag, "env=mine", "rollout.turn=3"])


def test_a_teachers_form_follows_the_name_in_the_mixture(own: Path) -> None:
    # The option `mine` has the environment that is registered as `geometry`.
    run = compose_run([f"--config-dir={own}", "env=[mine,pixel_reasoner]", "model=demo"])
    student = load_processing(ModelSpec("demo:student"), "student")
    chat = ChatRenderer(student.tokenizer)
    readers = {name: Reader(ViewConfig(), chat, None, pixels=run.pixels) for name in run.members}
    runner = make_runner(run, chat, student.vision, reader=readers)
    assert {name: each.reader for name, each in runner._members.items()} == readers


def test_a_mixture_with_an_environment_of_a_folder_goes_on(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = (f"--config-dir={own}", "env=[mine,pixel_reasoner]", "model=demo", "checkpoint.every=1")
    less = ("mix.envs.mine.rollout.max_turn_tokens=33", "evaluation.tasks=0")
    for steps in (1, 2):
        train(folder, *more, *less, "evaluation.teacher=false", f"steps={steps}")
    assert [row["step"] for row in train_rows(folder)] == [0, 1]
    prepared_words([more[0], "env=mine", f"model={folder}"])
    chosen = ConfigStore.instance().repo["environments"]["chosen.yaml"].node
    assert chosen["mine"].rollout.max_turn_tokens == 33  # those of `mine`, registered as geometry


# Runs

ENVS = ("pixel_reasoner", "geometry")
MIXTURE = (
    *("env=[pixel_reasoner,geometry]", "model=demo", "mix.weights={geometry: 3}"),
    *("batch.prompts=8", "batch.mini_batch=4", "evaluation.every=0", "evaluation.teacher=false"),
    *("checkpoint.every=1", "steps=3", "logging.trajectories=8"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "run"
    train(folder, *MIXTURE)
    return folder


def test_a_step_has_each_environments_share_and_rules(whole: Path) -> None:
    for row in train_rows(whole):
        assert (row["env/geometry/episodes"], row["env/pixel_reasoner/episodes"]) == (6, 2)
        shares = [row[f"env/{name}/kept_share"] for name in ("geometry", "pixel_reasoner")]
        assert sum(shares) == pytest.approx(1)
        both = [row[f"env/{name}/success"] for name in ("geometry", "pixel_reasoner")]
        assert row["rollout/success"] == pytest.approx((6 * both[0] + 2 * both[1]) / 8)
    drawn = [(row["env"], row["index"]) for row in lines(whole / "trajectories.jsonl")]
    order = TaskOrder(dict.fromkeys(("pixel_reasoner", "geometry"), 4096), 0,
                      {"pixel_reasoner": 1, "geometry": 3})  # fmt: skip
    assert drawn == [order[k] for k in range(24)]
    for row in lines(whole / "trajectories.jsonl"):
        zooms = "zoom" in row["prompt"]
        assert zooms == (row["env"] == "pixel_reasoner")


def test_the_held_out_figures_are_means_over_environments(whole: Path) -> None:
    rows = [row for row in lines(whole / "metrics.jsonl") if row["kind"] == "eval"]
    for row in rows:
        parts = [row[f"env/{name}/success"] for name in ("pixel_reasoner", "geometry")]
        assert row["success"] == pytest.approx(sum(parts) / 2)
        assert (row["n"], row["env/geometry/n"]) == (6, 3)
        assert row["low"] <= row["success"] <= row["high"]
    summary = json.loads((whole / "summary.json").read_text("utf-8"))
    after = next(row for row in rows if (row["step"], row["sampling"]) == (3, "sampled"))
    assert summary["env"] == "pixel_reasoner+geometry"
    assert summary["after"]["envs"]["geometry"]["success"] == after["env/geometry/success"]
    assert "'env=[pixel_reasoner,geometry]'" in summary["next"][1]
    shown = io.StringIO()
    print_summary(summary, Console(file=shown, width=60))
    assert re.search(r"geometry after +\| 0\.\d\d", shown.getvalue())


def test_the_mean_weighs_environments_alike() -> None:
    def episodes(env: str, successes: int, n: int) -> list[Any]:
        return [
            replace(unsampled("task", 1, [1, 2], [False, True]), env=env, success=i < successes)
            for i in range(n)
        ]

    both = EvaluationResult.of([*episodes("a", 2, 4), *episodes("b", 1, 12)])
    assert both.success == pytest.approx((2 / 4 + 1 / 12) / 2)
    assert (both.n, both.envs["b"].n) == (16, 12)
    # Four over the sum of 1/4 and 1/12: as many as 12 tasks of one kind.
    assert (both.low, both.high) == wilson_interval(round(both.success * 12), 12)
    alone = EvaluationResult.of(episodes("a", 2, 4))
    assert alone == both.envs["a"]
    assert not any(key.startswith("env/") for key in alone.row())


def test_a_killed_mixture_goes_on_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    typed = words(folder, *MIXTURE)
    process = start(typed, tmp_path)
    wait_until(lambda: (folder / "checkpoints/step-000001/trainer.json").is_file(), process)
    process.kill()
    process.wait()
    done = command(typed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(folder / "final", whole / "final")
    assert results(folder)["metrics.jsonl"] == results(whole)["metrics.jsonl"]
    assert results(folder)["trajectories.jsonl"] == results(whole)["trajectories.jsonl"]


# The loss


def test_means_over_environments_by_hand() -> None:
    logp = torch.zeros(1, 4, requires_grad=True)
    reward = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    batch = TokenBatch(logp, torch.zeros(1, 4), reward, torch.zeros(1, 4), mask)
    env = torch.tensor([[0, 0, 1, 1]])
    objective = ReverseKLStopGradient()

    def loss(envs: Environments, parts: Sequence[TokenBatch]) -> torch.Tensor:
        terms = [envs.terms(objective, part, env, 0) for part in parts]
        total = sum((each.denominator for each in terms), torch.tensor(0.0)).clamp(min=1)
        return sum((each.numerator for each in terms), torch.tensor(0.0)) / total

    together = Environments(["a", "b"], None)
    assert loss(together, [batch]).item() == pytest.approx(-(1 + 3 + 5) / 3)
    alike = Environments(["a", "b"], None, [2.0, 1.0])
    parts = [replace(batch, loss_mask=mask & torch.tensor([[*keep, False]]))
             for keep in ([True, False, False], [False, True, True])]  # fmt: skip
    for split in ([batch], parts):  # micro-batches change nothing
        value = loss(alike, split)
        assert value.item() == pytest.approx(-((1 + 3) / 2 + 5) / 2)
        (gradient,) = torch.autograd.grad(value, logp)
        assert gradient[0].tolist() == pytest.approx([-1 / 4, -3 / 4, -5 / 2, 0])
    nothing = Environments(["a", "b"], None, [2.0, 0.0])  # an environment that keeps no token
    alone = replace(batch, loss_mask=mask & (env == 0))
    assert loss(nothing, [alone]).item() == pytest.approx(-(1 + 3) / 2)


def test_thresholds_over_environments_by_hand() -> None:
    def row(env: str, entropy: list[float]) -> Row:
        n = len(entropy)
        trajectory = replace(unsampled("t", 1, [0] * (n + 1), [False] + [True] * n), env=env)
        trajectory.teacher_logp = np.zeros(n + 1, np.float32)
        values = np.array([0.0, *entropy], np.float32)
        return Row(trajectory, old_logp=np.zeros(n + 1, np.float32), entropy=values)

    rows = [row("a", [1, 2]), row("b", [10, 20]), row("a", [3, 4])]
    objective = EntropyMaskedReverseKL(top_share=0.5)
    assert entropy_threshold(objective, rows) == 4.0  # the half of 1, 2, 3, 4, 10, 20
    apart = entropy_threshold(objective, rows, by_environment=True)
    assert apart == {"a": 3.0, "b": 20.0}
    assert environment_counts(objective, rows, 0, 4.0) == {"a": 1.0, "b": 2.0}
    assert environment_counts(objective, rows, 0, apart) == {"a": 2.0, "b": 1.0}
    envs = environments(objective, rows, 0, apart, means=False)
    batch = TokenBatch(
        torch.zeros(1, 6), torch.zeros(1, 6), torch.zeros(1, 6),
        torch.tensor([[1.0, 2, 10, 20, 3, 4]]), torch.ones(1, 6),
    )  # fmt: skip
    terms = envs.terms(objective, batch, torch.tensor([[0, 0, 1, 1, 0, 0]]), 0)
    assert terms.mask[0].tolist() == [False, False, False, True, True, True]


def test_a_run_with_means_and_thresholds_of_environments(tmp_path: Path) -> None:
    over = [f"objective.{key}=environment" for key in ("threshold_over", "normalise_over")]
    short = ["steps=2", "batch.mini_batch=8", "evaluation.tasks=0", "objective.switch_step=1"]
    train(tmp_path / "run", *MIXTURE, *short, *over, "engine.max_tokens_per_micro_batch=400")
    recorded = lines(tmp_path / "run/trajectories.jsonl")
    for metrics in train_rows(tmp_path / "run"):
        means = []
        for env in ("pixel_reasoner", "geometry"):
            rows = [r for r in recorded if (r["step"], r["env"]) == (metrics["step"], env)]
            values, kept, entropy = (
                np.concatenate([np.array(r[key])[np.array(r["loss_mask"]) == 1] for r in rows])
                for key in ("token_reward", "kept", "entropy")
            )
            means.append(values[kept == 1].mean())
            if metrics["step"] == 1:  # refinement: the fifth of its own tokens
                threshold = metrics[f"env/{env}/threshold"]
                assert (entropy[kept == 1] >= np.float32(threshold)).all()
                assert kept.sum() >= 0.2 * len(kept)
        assert metrics["loss"] == pytest.approx(-np.mean(means), abs=1e-4)
        assert "entropy/threshold" not in metrics


def test_mini_batches_keep_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples of a task are in one mini-batch."""
    seen: list[list[tuple[str, int]]] = []
    original = Updater.step

    def step(self: Updater, mini_batches: Any, *arguments: Any) -> UpdateStats:
        seen.extend([row.trajectory.group for row in batch] for batch in mini_batches)
        return original(self, mini_batches, *arguments)

    monkeypatch.setattr(Updater, "step", step)
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    short = ["steps=1", "batch.prompts=4", "batch.mini_batch=2", "batch.samples=3"]
    short += ["evaluation.tasks=0", "objective.outcome=1.0", "checkpoint.every=0"]
    train(tmp_path / "run", *MIXTURE, *short)
    order = TaskOrder(dict.fromkeys(("pixel_reasoner", "geometry"), 4096), 0,
                      {"pixel_reasoner": 1, "geometry": 3})  # fmt: skip
    updates = [Counter(part) for part in seen]
    assert [list(found.values()) for found in updates] == [[3, 3]] * 2
    assert {group for found in updates for group in found} == {order[k] for k in range(4)}


def test_tasks_of_two_environments_at_one_position_are_two_groups(
    random_trajectory: Callable[..., Trajectory],
) -> None:
    episode = random_trajectory(0)
    rows = [
        Row(replace(episode, env=env, index=index, sample=sample))
        for sample, index, env in itertools.product(range(2), range(3), ("one", "other"))
    ]
    for seed in range(5):
        parts = mini_batches(rows, BatchConfig(prompts=6, mini_batch=1, samples=2), (seed,))
        groups = [Counter(row.trajectory.group for row in part) for part in parts]
        assert [list(found.values()) for found in groups] == [[2]] * 6
        assert len({group for found in groups for group in found}) == 6


@pytest.mark.parametrize("key", ["threshold_over", "normalise_over"])
def test_other_words_for_what_is_taken_together_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{key} must be one of batch, environment"):
        compose_run([f"objective.{key}=env"])
    one = compose_run(["env=math", f"objective.{key}=environment"])
    assert not one.by_environment(key)  # one environment is the whole batch


# Readers of a run


def test_plots_and_the_viewer_tell_environments_apart(whole: Path) -> None:
    figure = success_figure(History(read_metrics(whole / "metrics.jsonl")))
    assert figure is not None
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert {f"held-out, sampled, {name}" for name in ("pixel_reasoner", "geometry")} <= set(labels)
    run = Run(whole)
    run.load_all()
    assert {row["env"] for row in run.summaries} == {"pixel_reasoner", "geometry"}
    assert len({row["key"] for row in run.summaries}) == len(run.summaries) == 24
    assert not any(row["key"].endswith("/2") for row in run.summaries)


def test_an_evaluation_plays_each_environment_as_the_run_does(whole: Path) -> None:
    prepared_words([f"env=[{','.join(ENVS)}]", f"model={whole}", "evaluation.tasks=5"])
    chosen = ConfigStore.instance().repo["environments"]["chosen.yaml"].node
    run = build(TrainConfig, yaml.safe_load((whole / "config.yaml").read_text("utf-8")))
    for name, member in run.members.items():
        assert chosen[name].env.id == member.env.id
        assert chosen[name].data.eval == member.data.eval
        assert chosen[name].pixels.prompt.max_pixels == member.pixels.prompt.max_pixels
        assert chosen[name].evaluation == {"max_turns": 2, "tasks": 5}
        assert chosen[name].rollout.stop_at_tool_call == (name == "pixel_reasoner")


def test_a_plan_has_the_mean_episode() -> None:
    run = compose_run(["env=[pixel_reasoner,geometry]", "model=demo", "mix.weights.geometry=3"])
    parts = [assumed_workload(member, True, {}) for member in run.members.values()]
    mean = assumed_workload(run, True, {})
    assert mean.response == pytest.approx((parts[0].response + 3 * parts[1].response) / 4)
    assert mean.length == pytest.approx((parts[0].length + 3 * parts[1].length) / 4)
    assert mean.response_max == 256


def test_what_plays_one_environment_refuses_a_mixture(whole: Path) -> None:
    with pytest.raises(DataError, match=r"a probe plays one\.\nUse `reopold evaluate 'env=\[pix"):
        load_config(whole)
    with pytest.raises(ConfigError, match=r"one environment, got env=\[pix.*\nGive env=NAME"):
        play(["env=[pixel_reasoner,geometry]", "model=demo"], io.StringIO(), Console())
    words = ["env=[pixel_reasoner,geometry]", "model=demo", "objective=sft"]
    config = compose_run([*words, "objective.source=recorded"])
    with pytest.raises(ConfigError, match=r"train in one environment.*\nGive one \(env=pixel"):
        read_demonstrations(config, run_objective(config))
    config = compose_run([*words[:2], "policy=server", "policy.teacher.urls=[http://a:1]"])
    with pytest.raises(ConfigError, match=r"ends all turns alike.*\nSet it for all, or eval"):
        check_roles(config, run_objective(config))
    alike = compose_run([*words[:2], "policy=server", "policy.teacher.urls=[http://a:1]",
                         "rollout.stop_at_tool_call=true"])  # fmt: skip
    check_roles(alike, run_objective(alike))


def test_the_words_of_a_mixture_are_repeated_as_they_were_typed() -> None:
    given = ["seed=3", "env=[pixel_reasoner,geometry]", "model=demo", "rollout.max_turns=2"]
    given += ["mix.weights={geometry: 2}", "+mix.envs.geometry.env.kwargs.max_pictures=2"]
    words = mixed_words(given)
    assert not any(word.startswith("mix.") for word in words)
    # Hydra writes the words of a sweep anew.
    for now in (words, [word.replace("=true", "=True") for word in words]):
        assert sorted(as_typed(now)) == sorted(given)
    assert as_typed(["env=math", "model=demo", "rollout.max_turns=2"]) == [
        "env=math", "model=demo", "rollout.max_turns=2",
    ]  # fmt: skip
