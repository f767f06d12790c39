"""Checks of a run before any model is loaded: chat template, prompts and pictures of its rows."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from running import SMALL, composed, lines, train
from test_text_checkpoints import QWEN3

from reopold_agent.config import TrainConfig
from reopold_agent.data import load_tasks
from reopold_agent.data.checks import BadRowsError
from reopold_agent.data.fingerprint import tasks_in_common
from reopold_agent.envs import ENVS, register_env
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError, DataError, ModelError
from reopold_agent.policies.loading import ModelSpec, load_processing, resolve_path
from reopold_agent.rollout.checks import checked_run, checked_runner
from reopold_agent.rollout.lengths import prompt_limit
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train import setup
from reopold_agent.train.banner import leak_note
from reopold_agent.train.resume import RunState
from reopold_agent.train.settings import compose_run
from reopold_agent.types import Task, TaskSource

MATH = ("env=math", "data=math_jsonl", "steps=1", "evaluation.tasks=0", "rollout.max_turns=1")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))


def with_template(folder: Path, name: str, template: str) -> str:
    """Copies an embedded checkpoint with another chat template."""
    shutil.copytree(resolve_path(f"demo:{name}"), folder)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return str(folder)


def checked(config: TrainConfig, report: Path) -> tuple[TrainConfig, dict[str, int]]:
    student = load_processing(ModelSpec(config.model.student.path), "student")
    config, tasks = checked_run(config, student, [1024], report)
    return config, tasks[config.env.name]


# Chat templates


def test_a_template_that_rewrites_turns_is_found_at_the_start(
    tmp_path: Path, no_model: None
) -> None:
    path = with_template(tmp_path / "student", "student", QWEN3)
    told = r"rewrites earlier turns .*several turns\.\nAdd .*play one turn \(rollout\.max_turns=1"
    with pytest.raises(ModelError, match=told):
        train(tmp_path / "run", f"model.student.path={path}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_one_turn_is_enough_for_such_a_template(tmp_path: Path) -> None:
    path = with_template(tmp_path / "student", "student", QWEN3)
    words = [*SMALL, f"model.student.path={path}", "rollout.max_turns=1"]
    student = load_processing(ModelSpec(path), "student")
    with pytest.raises(ModelError, match="rewrites"):  # in the held-out evaluation
        checked_runner(composed(*words, "evaluation.max_turns=2")[0], student)
    for more in (["evaluation.max_turns=1"], ["evaluation.tasks=0"]):
        checked_runner(composed(*words, *more)[0], student).close()
    # An environment of one turn, whatever the budget.
    checked_runner(composed(*SMALL, "env=math", f"model.student.path={path}")[0], student).close()


def test_an_evaluation_finds_such_a_template_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose, initialize_config_module

    from reopold_agent.evaluate import run

    monkeypatch.setattr(run, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    path = with_template(tmp_path / "student", "student", QWEN3)
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, raw = run.load_config(
            compose("evaluate", ["benchmark=demo", f"checkpoint={path}", "engine.device=cpu"])
        )
    with pytest.raises(ModelError, match=r"rewrites earlier turns .*\n.*agentic\.max_turns=1"):
        run.Evaluation(config, raw, tmp_path / "out").run()


# Prompts


def math_rows(path: Path, *sizes: int) -> Path:
    rows = [
        {"id": f"row-{i}", "problem": "What is 1 + 1? " + "one " * size, "answer": "2"}
        for i, size in enumerate(sizes)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_prompt_beyond_the_context_is_a_row_problem(tmp_path: Path, no_model: None) -> None:
    path = math_rows(tmp_path / "rows.jsonl", 1, 2000, 1)
    with pytest.raises(BadRowsError) as caught:
        train(tmp_path / "run", *MATH, f"data.train.path={path}")
    first, row, advice = str(caught.value).split("\n")
    assert first == f"1 of 3 rows of {path} cannot be used:"
    assert "long prompt" in row
    assert "row-1: " in row
    assert "at most 913 fit the models' context of 1024 beside rollout.max_resp" in row
    assert advice.endswith("leave them out with data.train.on_bad_row=skip.")
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
    assert (report["rows"], report["usable"]) == (3, 2)
    assert report["problems"]["long prompt"]["rows"] == 1


def test_long_prompts_can_be_left_out(tmp_path: Path) -> None:
    path = math_rows(tmp_path / "rows.jsonl", 1, 2000, 1)
    words = [*MATH, f"data.train.path={path}", "data.train.on_bad_row=skip"]
    train(tmp_path / "run", *words, "batch.prompts=4", "logging.trajectories=4")
    played = {row["task_id"] for row in lines(tmp_path / "run" / "trajectories.jsonl")}
    assert played == {"row-0", "row-2"}
    assert {row["stop_reason"] for row in lines(tmp_path / "run" / "trajectories.jsonl")} <= {
        "answer",
        "max_tokens",
    }


def test_max_prompt_tokens_holds_for_both_engines(tmp_path: Path) -> None:
    path = math_rows(tmp_path / "rows.jsonl", 1, 200, 1)
    words = [*SMALL, *MATH, f"data.train.path={path}", "data.train.on_bad_row=skip"]
    verl = ["engine=verl", "engine.gpus_per_node=2", "engine.teacher_gpus_per_node=1"]
    for engine in ([], verl):
        config, _ = composed(*words, *engine, "engine.max_prompt_tokens=150")
        made, counts = checked(config, tmp_path / "report.json")
        assert counts == {"train": 2}
        assert made.data.left_out == {"train": [1]}
        assert made.engine.max_prompt_tokens == 150
    with pytest.raises(BadRowsError, match=r"engine\.max_prompt_tokens is 150"):
        checked(composed(*words[:-1], "engine.max_prompt_tokens=150")[0], tmp_path / "report.json")


@pytest.mark.parametrize(
    ("env", "split"), [("pixel_reasoner", "train"), ("math", "eval"), ("geometry", "train")]
)
def test_a_generated_prompt_longer_than_the_limit_is_found_at_the_start(
    env: str, split: str, tmp_path: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, f"env={env}", "evaluation.tasks=1", "engine.max_prompt_tokens=20"]
    told = (
        rf"^the prompt of the first task of '{split}' in env={env} has \d+ tokens; "
        r"engine\.max_prompt_tokens is 20\.\nChange these settings, or make .*\.$"
    )
    if split == "eval":
        shorter = EpisodeSpec("train", 0)
        measure = RolloutRunner.prompt_tokens
        monkeypatch.setattr(
            RolloutRunner, "prompt_tokens", lambda s, e: 1 if e == shorter else measure(s, e)
        )
    with pytest.raises(DataError, match=told):
        train(tmp_path / "run", *words)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_episode_with_a_longer_prompt_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutRunner, "prompt_tokens", lambda *a: 1)
    told = r"first was: prompt too long: \d+ tokens; engine\.max_prompt_tokens is 20\ntrain\.log"
    with pytest.raises(ConfigError, match=told):
        train(tmp_path / "run", *SMALL, "engine.max_prompt_tokens=20")


def test_a_run_whose_episodes_all_fail_ends_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the simulator is down")

    monkeypatch.setattr(ToolEnv, "reset", broken)
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", *SMALL, "evaluation.tasks=0", "evaluation.teacher=false")
    first, second = str(caught.value).splitlines()
    assert first.endswith("the first was: RuntimeError: the simulator is down")
    assert second.startswith("train.log has all of it")


@pytest.mark.parametrize(
    ("settings", "context", "told"),
    [
        (["engine.max_prompt_tokens=1000"], 1024, "1000 and a response of 110 tokens do not fit"),
        (["rollout.max_response_tokens=1024"], 1024, r"leaves no room .* of 1024\.\nLower rollout"),
    ],
)
def test_prompt_and_response_must_fit_the_context(
    settings: list[str], context: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        prompt_limit(composed(*SMALL, *settings)[0], context)


# Pictures


def test_a_row_with_more_pictures_than_can_be_shown_names_the_setting(
    tmp_path: Path, no_model: None
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (60, 60), (60 * i, 0, 0)).save(folder / f"{i}.png")
    video = {"question": "?", "answer": "1", "is_video": True}
    rows = [{**video, "qid": f"video-{n}", "image": [f"{i}.png" for i in range(n)]} for n in (2, 4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=pixel_reasoner_rl", f"data.train.path={folder}", "evaluation.tasks=0"]
    words += ["data.train.part=null", "data.train.split=null", "+env.kwargs.max_pictures=3"]
    with pytest.raises(BadRowsError, match=r"video-4: 4 pictures; env\.kwargs\.max_pictures is 3"):
        train(tmp_path / "run", *words)
    config, _ = composed(*SMALL, *words, "data.train.on_bad_row=skip")
    assert checked(config, tmp_path / "report.json")[1] == {"train": 1}


def test_rows_with_pictures_need_a_model_that_sees_them(tmp_path: Path, no_model: None) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    row = {"qid": "a", "question": "?", "answer": "1", "is_video": False, "image": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["env=math", "data=pixel_reasoner_rl", f"data.train.path={tmp_path}"]
    words += ["data.train.part=null", "data.train.split=null", "evaluation.tasks=0"]
    words.append("~data.env_kwargs.tools")
    with pytest.raises(ModelError, match=r"cannot see the pictures of a\.\nGive a vision-lang"):
        train(tmp_path / "run", *words)


@pytest.mark.parametrize(("own", "common"), [("train", 4), ("other", 0), ("half", 2)])
def test_held_out_tasks_that_are_training_tasks_are_warned_of(
    own: str, common: int, tmp_path: Path
) -> None:
    rows = [{"id": str(n), "problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(6)]
    used = {"train": "train", "eval": own}
    splits = {"train": rows[:4], "other": rows[4:], "half": [{**r, "id": "x"} for r in rows[2:]]}
    for name, part in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = [f"data.{split}.path={tmp_path / name}.jsonl" for split, name in used.items()]
    config, _ = composed(*MATH, *paths, "evaluation.tasks=2")
    checked(config, tmp_path / "report.json")
    told = leak_note(tmp_path / "report.json")
    if common:
        assert told is not None
        assert told.startswith(f"warning: {common} of {len(splits[own])} held-out tasks are train")
        assert told.endswith("Give data.eval other rows.")  # 2 % of these would be none
    else:
        assert told is None


class Sums(ToolEnv):
    """Makes its own tasks: ``common`` of the four held-out ones are those of training."""

    common, named = 4, False

    def load_tasks(self, split: str) -> list[Task]:
        first = 4 - self.common if split == "eval" else 0
        return [
            Task(
                str(n) if self.named else f"{split}-{n}",
                f"{n} + 1",
                () if self.named else (str(n),),
            )
            for n in range(first, first + 4)
        ]

    def reward(self, task: Task, answer: str, *args: Any, **kwargs: Any) -> tuple[float, bool]:
        return 0.0, False


@pytest.mark.parametrize("named", [False, True], ids=["answers", "state decides"])
@pytest.mark.parametrize(
    ("common", "tasks", "told"), [(4, 9, "4 of 4"), (1, 3, "1 of 3"), (0, 3, "")]
)
def test_held_out_tasks_that_an_environment_makes_for_training_too_are_warned_of(
    named: bool,
    common: int,
    tasks: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sums, "common", common)
    monkeypatch.setattr(Sums, "named", named)
    register_env("sums", id="reopold_tests/Sums-v0", entry_point=Sums)
    try:
        config = compose_run(["env=sums", f"evaluation.tasks={tasks}"])
        checked(config, tmp_path / "report.json")
    finally:
        gymnasium.registry.pop("reopold_tests/Sums-v0")
        del ENVS._things["sums"]
    note = leak_note(tmp_path / "report.json")
    assert (note is not None) == bool(told)
    if note is not None:
        assert note.startswith(f"warning: {told} held-out tasks are training tasks, so")
        assert note.endswith("Let the environment's load_tasks(split) make other tasks for 'eval'.")


def test_a_run_that_goes_on_with_other_tasks_of_its_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_env("sums", id="reopold_tests/Sums-v0", entry_point=Sums)
    config, raw = composed("env=sums", "evaluation.tasks=4")
    folder = RunFolder(tmp_path)

    def told(continues: bool) -> str | None:
        checked(config, folder.data_report)
        return RunState(config, raw, folder).check_data(continues)

    try:
        assert [told(False), told(True)] == [None, None]
        monkeypatch.setattr(Sums, "common", 2)  # which moves the held-out tasks
        warned = told(True)
        assert warned is not None
        assert warned.startswith("warning: the environment makes other tasks than when this run")
        assert told(True) is None  # it is said once
    finally:
        gymnasium.registry.pop("reopold_tests/Sums-v0")
        del ENVS._things["sums"]


def test_a_large_file_can_be_split_as_the_warning_says(tmp_path: Path) -> None:
    rows = [{"id": str(n), "problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(500)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*MATH, f"data.train.path={file}", f"data.eval.path={file}", "evaluation.tasks=2"]
    checked(composed(*words)[0], tmp_path / "report.json")
    told = leak_note(tmp_path / "report.json")
    assert told is not None
    advice = told.rstrip(".").split(": ")[-1].split()
    assert advice == ["++data.train.part=train", "++data.eval.part=held_out"]
    checked(composed(*words, *advice)[0], tmp_path / "report.json")
    assert leak_note(tmp_path / "report.json") is None


def test_a_part_without_rows_is_not_called_an_empty_file(tmp_path: Path) -> None:
    rows = [{"id": str(n), "problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(16)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*MATH, f"data.train.path={file}", f"data.eval.path={file}", "evaluation.tasks=2"]
    words += ["++data.train.part=train", "++data.eval.part=held_out"]
    with pytest.raises(BadRowsError, match="none of its 16 rows falls into part=held_out") as told:
        checked(composed(*words)[0], tmp_path / "report.json")
    assert "empty" not in str(told.value)
    words += re.findall(r"\+\+data\S+share=[\d.]+", str(told.value))
    checked(composed(*words)[0], tmp_path / "report.json")


def test_pictures_that_are_asked_the_same_are_other_tasks() -> None:
    tasks = [Task(str(n), "Which digit?", ("7",), images=("a.png",)) for n in range(4)]
    assert tasks_in_common(tasks[:2], tasks[2:]) == 0
    assert tasks_in_common(tasks[:3], tasks[2:]) == 1


@pytest.mark.parametrize("named", [False, True], ids=["no ids", "other ids"])
@pytest.mark.parametrize("form", ["path", "zip", "bytes"])
def test_held_out_tasks_with_the_pictures_of_training_tasks_are_found(
    form: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split(name: str, numbers: Sequence[int], form: str) -> TaskSource:
        folder = tmp_path / name
        folder.mkdir()
        rows: list[dict[str, Any]] = []
        for place, number in enumerate(numbers):
            buffer = io.BytesIO()
            Image.new("RGB", (30, 30), (number, 0, 0)).save(buffer, "PNG")
            data, file = buffer.getvalue(), f"{name}-{number}.png"
            if form == "zip":
                with zipfile.ZipFile(folder / "images.zip", "a") as archive:
                    archive.writestr(file, data)
            elif form == "path":
                (folder / file).write_bytes(data)
            image = {"bytes": data, "path": "image.png"} if form == "bytes" else {"path": file}
            ids = {"qid": f"{name}-{place}"} if named else {}
            rows.append({"question": "Which?", "answer": "A", "images": [image], **ids})
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return load_tasks({"source": "pixel_reasoner", "path": str(folder)})

    train, held_out = split("train", [1, 2, 3], "path"), split("test", [9, 3, 2, 8], form)
    opened: list[object] = []
    monkeypatch.setattr("reopold_agent.data.images.decode", lambda *given: opened.append(given))
    assert tasks_in_common(train, held_out) == 2
    assert tasks_in_common(held_out, train) == 2
    assert not opened
