"""The embedded student with three specialist teachers: weights, recipe, settings, pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from running import composed, lines, train, train_rows
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.embedded_models.builder import WEIGHTS
from examples.embedded_models.generalist.build import PREFIX, TASKS, TINY, build, fingerprint
from reopold_agent.policies.loading import resolve_path
from reopold_agent.train import finish
from reopold_agent.train.teachers import run_teachers

MODELS = ("student", *TASKS)
WORDS = (f"env=[{','.join(TASKS)}]", "model=generalist")
MEGABYTE = 1_000_000
ROOT = Path(__file__).parents[1]


def report() -> dict[str, Any]:
    return json.loads((WEIGHTS / "generalist.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_small_and_load(name: str) -> None:
    folder = Path(resolve_path(f"demo:{PREFIX}{name}"))
    assert folder == WEIGHTS / f"{PREFIX}{name}"
    assert (folder / "model.safetensors").stat().st_size <= 2 * MEGABYTE
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_all_four_share_tokenizer_and_picture_processor() -> None:
    for file in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        assert len({(WEIGHTS / f"{PREFIX}{name}" / file).read_bytes() for name in MODELS}) == 1


def test_shipped_models_know_the_present_prompts() -> None:
    assert report()["prompts"] == fingerprint(), (
        "a prompt has changed since these models were made; "
        "run python -m examples.embedded_models generalist"
    )


def test_the_recipe_runs_and_makes_what_is_shipped(tmp_path: Path) -> None:
    said: list[str] = []
    figures = build(tmp_path, TINY, said.append)
    assert set(figures) == set(MODELS)
    assert all(set(row) == set(TASKS) for row in figures.values())
    for name in MODELS:
        for file in ("tokenizer.json", "config.json", "preprocessor_config.json"):
            made = (tmp_path / f"{PREFIX}{name}" / file).read_bytes()
            assert made == (WEIGHTS / f"{PREFIX}{name}" / file).read_bytes()


def test_specialists_fail_outside_their_own_task_and_the_student_has_much_to_learn() -> None:
    held_out = report()["held_out"]
    student = held_out["student"]
    for name in TASKS:
        for task in TASKS:
            success = held_out[name][task]["success"]
            if task == name:
                assert success >= student[task]["success"] + 0.30
            else:  # guesses are right as often; 66 of 256 figures are the most
                assert success <= (0.26 if (name, task) == ("math", "geometry") else 0.25)


def test_each_environment_has_its_data_its_limits_and_its_teacher() -> None:
    config, _ = composed(*WORDS)
    teachers = {each.names: each.model.path for each in run_teachers(config)}
    assert teachers == {(name,): f"demo:{PREFIX}{name}" for name in TASKS}
    assert config.model.student.path == f"demo:{PREFIX}student"
    sources = {name: each.data.train["source"] for name, each in config.mix.envs.items()}
    assert sources == {"pixel_reasoner": "demo", "math": "arithmetic", "geometry": "figures"}
    turns = {name: each.rollout.max_turns for name, each in config.mix.envs.items()}
    assert turns == {"pixel_reasoner": 3, "math": 1, "geometry": 1}


def test_two_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    small = ("steps=2", "batch.prompts=6", "batch.mini_batch=6", "evaluation.every=0")
    with torch.random.fork_rng(devices=[]):
        train(tmp_path, *WORDS, *small, "evaluation.tasks=4", "logging.trajectories=6")
    assert len(train_rows(tmp_path)) == 2
    played = {row["env"] for row in lines(tmp_path / "trajectories.jsonl")}
    assert played == set(TASKS)
    assert all(row["teacher_logp"] for row in lines(tmp_path / "trajectories.jsonl"))


def test_the_page_gives_the_recipe_s_figures() -> None:
    page = (ROOT / "docs" / "teachers.md").read_text("utf-8")
    held_out = report()["held_out"]
    for name in MODELS:
        [row] = re.findall(rf"^\| `demo:{PREFIX}{name}`.*$", page, re.MULTILINE)
        cells = [cell.strip(" *") for cell in row.split("|")[2:5]]
        assert cells == [f"{held_out[name][task]['success']:.2f}" for task in TASKS]


def in_words(share: dict[str, float]) -> str:
    return f"{share['success']:.2f} ({share['low']:.2f} to {share['high']:.2f})"


def reported(what: str) -> list[dict[str, Any]]:
    path = ROOT / "docs" / "results" / "generalist.json"
    return json.loads(path.read_text("utf-8"))[what]["runs"]


@pytest.mark.parametrize("objective", ["reopold", "gkd"])
def test_the_page_gives_the_runs_figures(objective: str) -> None:
    page = (ROOT / "docs" / "teachers.md").read_text("utf-8")
    runs, teachers = reported(objective), reported("teachers")
    held_out = report()["held_out"]
    single = max(sum(held_out[name][task]["success"] for task in TASKS) / 3 for name in TASKS)
    assert [run["seed"] for run in runs] == [each["seed"] for each in teachers] == [0, 1, 2]
    for run, same_tasks in zip(runs, teachers, strict=True):
        [row] = re.findall(rf"^.*on the tasks of seed {run['seed']} \|.*$", page, re.MULTILINE)
        teacher = same_tasks["teacher"]
        assert [cell.strip() for cell in row.split("|")[2:6]] == [
            in_words(teacher[task]) for task in (*TASKS, "mean")
        ]
        label = rf"^\| `objective={objective}`.* seed {run['seed']} \|.*$"
        [row] = re.findall(label, page, re.MULTILINE)
        cells = [cell.strip() for cell in row.split("|")[2:6]]
        after = run["after"]
        assert cells == [in_words(after[task]) for task in (*TASKS, "mean")]
        assert after["mean"]["low"] > single, "no single specialist is as good over the three tasks"
        for task in TASKS:
            assert held_out[task][task]["success"] - after[task]["success"] <= 0.10
            assert teacher[task]["success"] - after[task]["success"] <= 0.10


def test_the_readme_gives_the_first_run_s_mean() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    run = reported("reopold")[0]
    [row] = re.findall(r"^\|.*model=generalist.*$", readme, re.MULTILINE)
    for when, cell in zip(("before", "after"), row.split("|")[2:4], strict=True):
        assert cell.replace("*", "").strip() == in_words(run[when]["mean"])
