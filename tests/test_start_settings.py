"""Settings by the student's size, refusals of the embedded models' settings, and the banner."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from running import command, words

from reopold_agent.errors import ConfigError
from reopold_agent.policies.loading import load_processing, resolve_path, student_spec
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train.banner import banner
from reopold_agent.train.engine import run_objective
from reopold_agent.train.settings import billions, check_student, load_config


def composed(*overrides: str) -> Any:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return compose("train", list(overrides))


def checkpoint(folder: Path, name: str, width: int) -> str:
    """An embedded checkpoint whose config.json says that its layers are ``width`` wide."""
    shutil.copytree(resolve_path(f"demo:{name}"), folder)
    config = json.loads((folder / "config.json").read_text())
    (config.get("text_config") or config)["intermediate_size"] = width
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "env", "told"),
    [
        (
            "student",
            "pixel_reasoner",
            r"has 7\dM parameters, but .*prompt\.max_pixels=12544, pixels\.observation\.max_pixels="
            r"3136, .*lr=0.0003.*\nAdd model=qwen2_5_vl, or",
        ),
        (
            "arithmetic_student",
            "math",
            r"but [^\n]*lr=0.0002[^\n]*\nAdd model=causal_lm",
        ),
    ],
)
def test_a_real_checkpoint_is_not_trained_with_toy_settings(
    tmp_path: Path, name: str, env: str, told: str
) -> None:
    path = checkpoint(tmp_path / "model", name, 200_000)
    with pytest.raises(ConfigError, match=told) as caught:
        check_student(composed(f"env={env}", f"model.student.path={path}"))
    assert name == "student" or "pixels" not in str(caught.value)
    explicit = ["optimizer.lr=0.0003", "rollout.max_response_tokens=256"]
    explicit += ["rollout.max_turn_tokens=64", "pixels.prompt.max_pixels=12544"]
    explicit += ["pixels.observation.max_pixels=3136"]
    check_student(composed(f"env={env}", f"model.student.path={path}", *explicit))


def test_only_what_is_left_of_the_embedded_settings_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", "arithmetic_student", 200_000)
    given = ["env=math", f"model.student.path={path}", "optimizer.lr=1e-5"]
    told = r"but rollout\.max_response_tokens=160, rollout\.max_turn_tokens=160 are settings"
    with pytest.raises(ConfigError, match=told):
        check_student(composed(*given), given)
    # A value of `toy` that the command line sets is the user's, even the same one.
    given.append("toy.max_turn_tokens=160")
    with pytest.raises(ConfigError, match=r"but rollout\.max_response_tokens=160 are settings"):
        check_student(composed(*given), given)
    given.append("++toy.max_response_tokens=320")
    check_student(composed(*given), given)


@pytest.mark.parametrize("word", ["model.student.path=[a,b]", "model.student.path=7"])
def test_a_path_of_another_type_is_told_in_two_lines(word: str) -> None:
    check_student(composed(word))
    with pytest.raises(ConfigError, match=r"'model\.student\.path' must be str, got"):
        load_config(composed("model=causal_lm", "model.teacher.path=x", "data=arithmetic", word))
    check_student(composed("model.student=null"))
    with pytest.raises(ConfigError, match=r"'model\.student' must be a group of settings"):
        load_config(composed("model.student=null"))


def test_a_size_that_does_not_exist_names_those_that_do() -> None:
    given = ("model=causal_lm", "data=arithmetic", "model.student.path=a", "model.teacher.path=b")
    told = r"size must be one of small, medium, large, auto; got 'larg'\.\nDid you mean 'large'\?"
    with pytest.raises(ConfigError, match=told):
        load_config(composed(*given, "size=larg"))
    with pytest.raises(ConfigError, match="default_batch must be one of single, group; got 'x'"):
        load_config(composed("default_batch=x"))


def test_small_checkpoints_may_have_toy_settings(tmp_path: Path) -> None:
    check_student(composed())
    path = checkpoint(tmp_path / "model", "student", 192)
    check_student(composed(f"model.student.path={path}"))


@pytest.mark.parametrize(
    ("model", "name", "width", "lr", "recompute", "tokens"),
    [
        ("qwen2_5_vl", "student", 200_000, 5e-6, False, 16384),
        ("qwen2_5_vl", "student", 10_000_000, 1e-6, True, 8192),
        ("causal_lm", "arithmetic_student", 50_000_000, 1e-6, True, 4096),
    ],
)
def test_settings_follow_the_size_of_the_student(
    tmp_path: Path, model: str, name: str, width: int, lr: float, recompute: bool, tokens: int
) -> None:
    path = checkpoint(tmp_path / "model", name, width)
    given = [f"model={model}", "data=demo", f"model.student.path={path}"]
    given.append(f"model.teacher.path={path}")
    check_student(composed(*given))
    config, raw = load_config(composed(*given))
    assert config.optimizer.lr == lr
    assert config.model.student.gradient_checkpointing is recompute
    assert config.engine.max_tokens_per_micro_batch == tokens
    assert not {"size", "sizes", "toy"} & set(raw)
    if model == "qwen2_5_vl":
        assert config.pixels.prompt.max_pixels == 1003520
    own, _ = load_config(composed(*given, "optimizer.lr=3e-6", "size=large"))
    assert own.optimizer.lr == 3e-6
    assert own.engine.max_tokens_per_micro_batch == 4096


def test_the_checkpoints_and_data_of_neutral_models_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"given: model\.student\.path, model\.teacher\.path"):
        load_config(composed("model=causal_lm", "data=arithmetic"))


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(312_000, "0.3M"), (494_000_000, "494M"), (999_600_000, "1.0B"), (3_754_000_000, "3.8B")],
)
def test_numbers_of_parameters_are_short(parameters: int, text: str) -> None:
    assert billions(parameters) == text


@pytest.mark.slow
def test_a_run_begins_with_a_banner(tmp_path: Path) -> None:
    done = command(words(tmp_path / "run", "steps=1", "evaluation.tasks=2"), tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n\n")[0].splitlines()
    # A long line goes on below its own words.
    assert [line[:11].strip() for line in lines if line[:11].strip()] == [
        *("student", "teacher", "data", "held out", "objective", "optimizer", "pixels", "tokens"),
        *("steps", "engine", "run"),
    ]
    told = {line[:11].strip(): line[11:] for line in lines}
    assert told["student"] == "demo:student, 0.3M parameters, float32 weights"
    assert told["held out"] == "4,096 rows of demo (embedded), 2 played"
    assert told["optimizer"] == "AdamW, lr 0.0003, 1 update a step"
    assert told["steps"] == "1 x 4 prompts x 1 sample"
    assert told["engine"] == "local on cpu, float32"
    assert told["run"] == str(tmp_path / "run")
    assert all(len(line) <= 80 for line in lines[:-1])
    log = (tmp_path / "run" / "train.log").read_text()
    assert all(line in log for line in lines)


def banner_of(folder: Path, *words: str) -> str:
    config, _ = load_config(composed(*words))
    lines = banner(
        config,
        RunFolder(folder),
        load_processing(student_spec(config.model), "student"),
        {"pixel_reasoner": {"train": 9, "eval": 9}},
        device="cpu",
        precision="float32",
        objective=run_objective(config),
        teacher=True,
    )
    return " ".join(" ".join(lines).split())


def test_the_banner_names_the_reference_and_what_chooses_teachers(tmp_path: Path) -> None:
    teachers = "{far: demo:self_student, default: demo:teacher}"
    words = ("objective=exopd", "model.teacher=null", f"model.teachers={teachers}")
    told = banner_of(tmp_path, *words, "model.teacher_key=domain")
    reference = "reference demo:student, 0.3M parameters, float32 weights, frozen"
    assert f"each task's by 'domain' {reference} data" in told


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (("optimizer.warmup_steps=1",), "0.0003 after a warm-up of 1 update"),
        (("optimizer.lr_scheduler_type=cosine",), "0.0003, falling to 0 (cosine)"),
        (
            ("optimizer.lr_scheduler_type=cosine", "optimizer.warmup_steps=9"),
            "0.0003 after a warm-up of 9 updates (the run has 3)",
        ),
    ],
)
def test_the_banner_tells_how_the_learning_rate_goes(
    words: tuple[str, ...], rate: str, tmp_path: Path
) -> None:
    told = banner_of(tmp_path, "model.student.lora={}", *words, "steps=3")
    assert f"optimizer AdamW, lr {rate}, 1 update a step" in told
    assert "float32 weights, LoRA teacher" in told


@pytest.mark.slow
def test_the_embedded_student_on_other_data_is_warned_of(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "problem": "1 + 1?", "answer": "2"}) + "\n")
    given = ["env=math", "data=math_jsonl", f"data.train.path={rows}", "evaluation.tasks=0"]
    done = command(words(tmp_path / "run", *given, "steps=1"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: demo:arithmetic_student is made for the embedded tasks" in done.stdout
    assert "model=causal_lm" in (tmp_path / "run" / "train.log").read_text()
