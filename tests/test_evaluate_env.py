"""Evaluation in environments: their settings, their tasks, and what training measures of them."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from running import SMALL, composed, train
from safetensors.torch import load_file, save_file

from reopold_agent.common.weights import weights_digest
from reopold_agent.data import loading
from reopold_agent.envs import ENVS, register_env
from reopold_agent.errors import CheckpointError, ConfigError, ModelError, UnknownNameError
from reopold_agent.evaluate.report import markdown
from reopold_agent.evaluate.run import Evaluation, load_config
from reopold_agent.evaluate.words import prepared_words
from reopold_agent.policies.loading import resolve_path
from reopold_agent.tracking.run_folder import run_settings
from reopold_agent.train.setup import LocalEngine

CPU = ("engine.device=cpu", "engine.threads=1")


def settings(*words: str) -> dict[str, Any]:
    """Composes an evaluation as ``reopold evaluate`` does."""
    ready = prepared_words(words)
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return load_config(compose("evaluate", ready))[1]


def evaluated(folder: Path, *words: str) -> dict[str, Any]:
    ready = prepared_words([*words, *CPU])
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, raw = load_config(compose("evaluate", ready))
    return Evaluation(config, raw, folder).run()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def test_a_folder_keeps_the_results_of_earlier_commands(tmp_path: Path) -> None:
    words = ("model=demo:arithmetic_student", "benchmarks.arithmetic.limit=3")
    first = evaluated(tmp_path, *words, "benchmark=arithmetic")
    assert "kept" not in first
    math = ("env=math", "evaluation.tasks=3")
    second = evaluated(tmp_path, *words, *math)
    assert json.loads((tmp_path / "results.json").read_text()) == second
    assert list(second["benchmarks"]) == ["arithmetic", "math"]
    assert second["benchmarks"]["arithmetic"] == first["benchmarks"]["arithmetic"]
    assert first["benchmarks"]["arithmetic"]["judge"] == "none"
    told = (tmp_path / "results.md").read_text()
    assert "Kept from earlier commands with this folder: arithmetic." in told
    assert told.count("| arithmetic |") == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count('"benchmark": "arithmetic"') == 3
    third = evaluated(tmp_path, *words, "benchmark=arithmetic")
    assert third["kept"] == ["math"]
    assert third["benchmarks"]["math"] == second["benchmarks"]["math"]
    # Its settings are remembered although the last command did not play it.
    with pytest.raises(
        CheckpointError, match=r"environments\.math\.sampling\.temperature: 1\.0 -> 0"
    ):
        evaluated(tmp_path, *words, *math, "sampling.temperature=0")


def test_an_evaluation_is_not_written_into_a_run_nor_a_run_into_an_evaluation(
    tmp_path: Path,
) -> None:
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    words = ["env=math", "evaluation.tasks=2"]
    trained = [*words, "steps=1", "evaluation.teacher=false", "evaluation.every=0"]
    asked = (*words, f"model={run}")
    LocalEngine(*composed(*trained, *CPU), run, []).run()
    evaluated(evaluation, *asked)

    def files(folder: Path) -> dict[Path, bytes]:
        return {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}

    before = files(tmp_path)
    overwrite = "would overwrite\\.\nGive another hydra\\.run\\.dir, or leave it out"
    for lost in ("", "config.yaml"):
        for folder in (run, evaluation):
            if lost:
                del before[folder / lost]
                (folder / lost).unlink()
        with pytest.raises(CheckpointError, match=f"run holds a training run, .*{overwrite}"):
            evaluated(run, *words)
        with pytest.raises(CheckpointError, match=f"evaluation holds an evaluation, .*{overwrite}"):
            LocalEngine(*composed(*trained, *CPU), evaluation, []).run()
        assert files(tmp_path) == before
    evaluated(evaluation, *asked)  # its own folder continues


def test_answers_to_other_tasks_of_an_environment_are_not_continued(tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    words = ("env=math", "data=math_jsonl", f"data.eval.path={file}")
    words += ("model=demo:arithmetic_student", "evaluation.tasks=3", "samples=2")

    def asked(*rows: tuple[str, str]) -> Any:
        lines = [json.dumps({"problem": q, "answer": a}) + "\n" for q, a in rows]
        file.write_text("".join(lines))
        loading._load.cache_clear()  # another process would read the file again
        return evaluated(out, *words)["benchmarks"]["math"]

    first = asked(("1 + 1?", "2"), ("3 - 1?", "2"))
    told = rf"{out} holds answers to other questions of math \(number 1 "
    for _ in range(2):
        with pytest.raises(CheckpointError, match=told + r"was '3 - 1\?', now it is '9 - 7\?'\)"):
            asked(("1 + 1?", "2"), ("9 - 7?", "2"))
        with pytest.raises(CheckpointError, match=told + r"'3 - 1\?', has other words, answers"):
            asked(("1 + 1?", "2"), ("3 - 1?", "4"))
        rows = rows_of(out)  # as an earlier version wrote them
        old = [{k: v for k, v in row.items() if k != "task_sha256"} for row in rows]
        (out / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert asked(("1 + 1?", "2"), ("3 - 1?", "2"))["accuracy"] == first["accuracy"]
    assert rows_of(out) == old


WEIGHTS = Path(str(resources.files("reopold_agent") / "demo" / "weights"))


def test_answers_of_other_weights_are_not_continued(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(WEIGHTS / "arithmetic_student", model)
    words = ("env=math", "evaluation.tasks=2", f"model={model}", "samples=1")
    first = evaluated(out, *words)["benchmarks"]
    shutil.rmtree(model)
    shutil.copytree(WEIGHTS / "arithmetic_student", model)  # a copy is the same
    os.utime(model / "model.safetensors", (1, 1))
    assert evaluated(out, *words)["benchmarks"]["math"]["low"] == first["math"]["low"]
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[-1] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    told = rf"answers of other weights: {model} then, which has changed since\.\nGive another"
    before = {each: each.read_bytes() for each in out.rglob("*") if each.is_file()}
    for more in ((), ("benchmark=arithmetic",)):
        with pytest.raises(CheckpointError, match=told):
            evaluated(out, *words, *more)
    assert before == {each: each.read_bytes() for each in out.rglob("*") if each.is_file()}
    (out / "model.json").unlink()  # as an earlier version left it
    evaluated(out, *words)
    weights[name].view(-1)[-1] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=told):
        evaluated(out, *words)
    (out / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.json.*\nRemove it if"):
        evaluated(out, *words)


def test_answers_of_an_earlier_checkpoint_are_not_continued(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step, which in ((3, "student"), (4, "student"), (5, "teacher")):
        folder = run / f"checkpoints/step-{step:06d}/model"
        shutil.copytree(WEIGHTS / f"arithmetic_{which}", folder)
        (run / "metrics.jsonl").touch()
        words = ("env=math", "evaluation.tasks=1", f"model={run}")
        if step < 5:  # step 4 has the weights of step 3
            assert evaluated(out, *words)["model"]["loaded"] == str(folder)
    then, now = (rf"{run}/checkpoints/step-00000{step}/model" for step in (4, 5))
    with pytest.raises(CheckpointError, match=f"of other weights: {then} then, {now} now\\.\n"):
        evaluated(out, *words)


def test_a_large_file_of_weights_is_told_by_each_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reopold_agent.common.weights._WHOLE", 100)
    weights = {name: torch.zeros(9000) for name in "abc"}

    def digest(**changes: float) -> str | None:
        changed = {**weights, **{name: torch.full((9000,), by) for name, by in changes.items()}}
        save_file(changed, tmp_path / "model.safetensors")
        return weights_digest(tmp_path)

    assert digest() == digest()
    assert len({digest(), digest(a=1), digest(b=1), digest(c=1), digest(c=2)}) == 5
    (tmp_path / "model.safetensors").write_bytes(b"damaged" * 100)
    assert weights_digest(tmp_path) is None


# What training measures


@pytest.mark.parametrize(("env", "tasks"), [("math", 12), ("pixel_reasoner", 6)])
def test_it_measures_what_trainings_held_out_evaluation_measures(
    env: str, tasks: int, tmp_path: Path
) -> None:
    words = [f"env={env}", f"evaluation.tasks={tasks}", *CPU]
    run = [*words, "steps=0", "seed=3", "evaluation.teacher=false"]
    trained = LocalEngine(*composed(*run), tmp_path / "run", run).run()["before"]
    sampled = evaluated(tmp_path / "a", *words, "seed=3", "samples=2")["benchmarks"][env]
    rows = rows_of(tmp_path / "a")
    first = [row["correct"] for row in rows if row["sample"] == 0]
    assert sum(first) / len(first) == trained["success"]
    assert (sampled["questions"], sampled["samples"]) == (trained["n"], 2)
    tools = [any(t["tool"] for t in row["turns"]) for row in rows if row["sample"] == 0]
    assert sum(tools) / len(tools) == trained["tool_rate"]
    assert set(sampled["pass_at_k"]) == set(sampled["maj_at_k"]) == {"1", "2"}
    assert sampled["how"] == {"environment": 2 * tasks}
    greedy = evaluated(tmp_path / "b", *words, "sampling.temperature=0")["benchmarks"][env]
    assert greedy["accuracy"] == trained["greedy"]["success"]
    assert sampled["questions_sha256"] == greedy["questions_sha256"]
    assert (tmp_path / "a" / "report.html").is_file()
    assert f"env={env} decides" in (tmp_path / "a" / "results.md").read_text()


def test_environments_and_benchmarks_in_one_folder_which_goes_on(tmp_path: Path) -> None:
    student = "model=demo:arithmetic_student"
    words = ["evaluation.tasks=3", student, "benchmarks.arithmetic.limit=2"]
    first = evaluated(tmp_path, *words, "env=math")["benchmarks"]
    before = rows_of(tmp_path)
    with pytest.raises(ModelError, match=r"cannot see the pictures of geometry\.\n"):
        evaluated(tmp_path, *words, "env=[math,geometry]", "benchmark=arithmetic")
    second = evaluated(tmp_path, *words, "env=[math]", "benchmark=arithmetic")["benchmarks"]
    assert set(second) == {"arithmetic", "math"}
    assert second["math"]["accuracy"] == first["math"]["accuracy"]
    assert rows_of(tmp_path)[:3] == before  # nothing is asked twice
    with pytest.raises(CheckpointError, match=r"math\.rollout\.max_response_tokens: 160 -> 20"):
        evaluated(tmp_path, *words, "env=math", "rollout.max_response_tokens=20")


class Parrot(gymnasium.Env[Any, str]):
    """An environment of its own kind: no tasks, no answers, a graded reward."""

    observation_space = gymnasium.spaces.Dict({})
    action_space = gymnasium.spaces.Text(1000)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.index = options["index"]
        assert options["split"] == "eval"
        return {"text": f"Say {self.index}.", "images": ()}, {"system_prompt": "You are a parrot."}

    def step(self, action: str) -> Any:
        reward = 0.25 + 0.5 * (self.index % 2)
        done = {"success": reward > 0.5}
        return {"text": "", "images": ()}, reward, True, False, done


@pytest.fixture
def parrot() -> Iterator[None]:
    name = "reopold_tests/Parrot-v0"
    register_env("parrot", id=name, entry_point=Parrot, config={"rollout": {"max_turn_tokens": 8}})
    yield
    gymnasium.registry.pop(name)
    del ENVS._things["parrot"]


@pytest.mark.usefixtures("parrot")
def test_an_environment_without_tasks_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["env=parrot", "model=demo:arithmetic_student", "evaluation.tasks=4", "samples=2"]
    results = evaluated(tmp_path, *words)
    figures = results["benchmarks"]["parrot"]
    assert (figures["accuracy"], figures["pass_at_k"]) == (0.5, {"1": 0.5, "2": 0.5})
    assert figures["maj_at_k"] == {}
    assert figures["extra"] == {"reward": 0.5}
    assert figures["prompt"] == {"system": "You are a parrot.", "first_question": "Say 0."}
    assert [row["question"] for row in rows_of(tmp_path) if row["index"] == 3] == ["Say 3."] * 2
    assert (tmp_path / "plots" / "scaling-parrot.png").is_file()
    assert "reward 0.500" in markdown(results)
    note = "parrot: env=parrot decides about success. Held-out tasks (its own), T 1"
    assert note in markdown(results)
    assert note in capsys.readouterr().out  # before anything is played


@pytest.mark.usefixtures("parrot")
def test_an_environment_without_tasks_that_asks_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["env=parrot", "model=demo:arithmetic_student", "evaluation.tasks=2"]
    evaluated(tmp_path, *words)
    evaluated(tmp_path, *words)
    reset, starts = Parrot.reset, itertools.count()

    def other(self: Parrot, **options: Any) -> Any:
        shown, info = reset(self, **options)
        return {**shown, "text": words[-1]}, info

    def random(self: Parrot, **options: Any) -> Any:
        shown, info = reset(self, **options)
        return {**shown, "text": str(next(starts))}, info

    monkeypatch.setattr(Parrot, "reset", other)
    with pytest.raises(CheckpointError, match=r"number 0 was 'Say 0\.', now it is 'evaluation\.t"):
        evaluated(tmp_path, *words)
    monkeypatch.setattr(Parrot, "reset", random)  # nothing can be said about its questions
    evaluated(tmp_path, *words)


@pytest.mark.usefixtures("parrot")
@pytest.mark.parametrize(("bad", "extra"), [([0], {"reward": 0.75}), ([0, 1], {})])
def test_rewards_that_are_no_numbers_are_counted(
    bad: list[int], extra: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Parrot.step

    def odd(self: Parrot, action: str) -> Any:
        shown, reward, *rest = step(self, action)
        return shown, math.nan if self.index in bad else reward, *rest

    monkeypatch.setattr(Parrot, "step", odd)
    words = ["env=parrot", "model=demo:arithmetic_student", "evaluation.tasks=2"]
    results = evaluated(tmp_path, *words)
    assert results["benchmarks"]["parrot"]["extra"] == {**extra, "rewards_not_finite": len(bad)}
    assert "nan" not in markdown(results)
    assert "NaN" not in (tmp_path / "results.json").read_text("utf-8")


# Settings


def test_its_settings_are_those_of_training() -> None:
    raw = settings("env=geometry", "data.eval.seed=7", "sampling.temperature=0.5")
    assert raw["checkpoint"] == "demo:figures_student"
    geometry = raw["environments"]["geometry"]
    trained = composed("env=geometry")[1]
    assert geometry["data"]["eval"] == {**trained["data"]["eval"], "seed": 7}
    assert "train" not in geometry["data"]
    assert geometry["env"] == trained["env"]
    assert geometry["pixels"] == trained["pixels"]
    assert geometry["sampling"] == {"temperature": 0.5, "top_p": 1.0}
    assert geometry["evaluation"] == {"tasks": 256, "max_turns": 1}
    assert prepared_words(["env=math", "--multirun", "seed=0,1"])[-2:] == ["--multirun", "seed=0,1"]
    real = settings("env=pixel_reasoner", "model=qwen2_5_vl_3b", "model.student.path=DIR")
    assert real["checkpoint"] == "DIR"
    assert real["environments"]["pixel_reasoner"]["rollout"]["max_response_tokens"] == 8192
    both = settings("env=[math,geometry]", "model=DIR", "pixels.prompt.max_pixels=999999")
    assert both["pixels"]["prompt"]["max_pixels"] == 999999
    assert [e["pixels"]["prompt"]["max_pixels"] for e in both["environments"].values()] == [
        999999,
        999999,
    ]


def test_a_runs_student_is_evaluated_with_the_runs_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    _, raw = composed(*SMALL, "env=math", "data.eval.seed=5", "evaluation.tasks=7")
    (run / "config.yaml").write_text(json.dumps(raw))
    for model in (run, run / "final"):
        found = settings("env=math", f"model={model}")["environments"]["math"]
        assert found["data"]["eval"]["seed"] == 5
        assert found["rollout"]["max_response_tokens"] == 110
        assert found["evaluation"] == {"tasks": 7, "max_turns": 2}
    given = settings("env=math", f"model={run}", "evaluation.tasks=9", "data=figures")
    assert given["environments"]["math"]["evaluation"]["tasks"] == 9
    assert given["environments"]["math"]["data"]["eval"]["source"] == "figures"
    other = settings("env=geometry", f"model={run}")["environments"]["geometry"]
    assert other["evaluation"]["tasks"] == 256


def test_a_runs_paths_are_those_of_the_folder_in_which_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    def write(folder: Path, name: str, first: int) -> None:
        rows = [{"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(first, first + 4)]
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        loading._load.cache_clear()  # another process would read the file

    for folder, first in ((here, 10), (there, 50)):
        write(folder, "tr.jsonl", first)
        write(folder, "ev.jsonl", first + 4)
    monkeypatch.chdir(here)
    run = tmp_path / "run"
    shutil.copytree(resolve_path("demo:arithmetic_student"), here / "student")
    data = ["data=math_jsonl", "data.train.path=tr.jsonl", "data.eval.path=ev.jsonl"]
    words = ["env=math", *data, "model.student.path=student", "steps=0", "evaluation.tasks=2"]
    train(run, *words)
    monkeypatch.chdir(there)
    loading._load.cache_clear()
    found = settings("env=math", f"model={run}")["environments"]["math"]["data"]["eval"]
    assert found["path"] == str(here / "ev.jsonl")
    assert run_settings(run)["model"]["student"]["path"] == str(here / "student")
    assert run_settings(run)["model"]["teacher"]["path"] == "demo:arithmetic_teacher"
    assert "not those that" not in caplog.text
    write(here, "ev.jsonl", 70)
    settings("env=math", f"model={run}")
    assert f"{here / 'ev.jsonl'}, are not those that {run} was started with.\n" in caplog.text
    caplog.clear()
    own = settings("env=math", f"model={run}", "data.eval.path=ev.jsonl")["environments"]["math"]
    assert own["data"]["eval"]["path"] == "ev.jsonl"
    assert not caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=maths"], "Did you mean 'math'"),
        (["env=vstar"], r"not an environment\.\nUse benchmark=vstar\."),
        (["benchmark=math"], r"not a benchmark\.\nUse suite=math or env=math\."),
        (["benchmark=pixel_reasoner"], r"Use env=pixel_reasoner\."),
        (["env=math,geometry"], r"Write 'env=\[math,geometry\]'"),
        (["env=[math,geometry]"], r"The defaults differ: .*figures_student\.\nGive model=DIR"),
        (["env=math", "benchmark=demo"], r"which checkpoint\?"),
        (["env=math", "evaluation.taks=3"], r"Did you mean 'evaluation\.tasks'"),
        (["env=math", "env.kwargs.guideline=x"], r"takes a \+: '\+env\.kwargs\.guideline=x'"),
        (["env=math", "data=arithmetc"], "Did you mean 'arithmetic'"),
        (["env=math", "rollout.max_turns=3"], r"\nLeave it out; use evaluation\.max_turns"),
        (["env=math", "data.train.path=x"], "does not matter in an evaluation"),
        (["env=math", "data.eval.split=train"], r"that training uses\.\nChoose held-out rows"),
        (["env=math", "data=math_jsonl"], r"must be given: data\.eval\.path"),
        (["data.eval.path=x"], r"Name the environment too \(env=NAME\)"),
        (["env=math", "environments.math.sampling.temprature=0"], "temprature"),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_do(words: Sequence[str], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError, HydraException), match=message):
        settings(*words)


@pytest.mark.parametrize("tasks", [0, -1])
def test_an_evaluation_needs_tasks(tasks: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.tasks"):
        evaluated(tmp_path, "env=math", f"evaluation.tasks={tasks}")


@pytest.mark.usefixtures("parrot")
def test_data_for_an_environment_that_takes_none_is_refused() -> None:
    for word in ("data=arithmetic", "data.eval.path=x"):
        with pytest.raises(ConfigError, match=r"takes no data\.\n.*\+env\.kwargs\.NAME=VALUE"):
            settings("env=parrot", word)
