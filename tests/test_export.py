"""Tasks written as verl's rows come back as the same tasks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from reopold_agent.data import load_tasks, write_verl
from reopold_agent.data.images import FileImage
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.errors import DataError
from reopold_agent.types import Task, TaskSource


def demo(count: int = 6) -> list[Task]:
    tasks = DemoTasks("train", size=count, seed=2, video_share=0.5)
    return [tasks[i] for i in range(count)]


def assert_same(read: TaskSource, written: list[Task]) -> None:
    assert len(read) == len(written)
    for i, task in enumerate(written):
        again = read[i]
        assert (again.id, again.question, again.answers, again.is_video) == (
            task.id,
            task.question,
            task.answers,
            task.is_video,
        )
        pictures = [np.asarray(image.open()) for image in again.images]
        originals = [np.asarray(image.open()) for image in task.images]
        assert len(pictures) == len(originals)
        assert all(map(np.array_equal, pictures, originals))


def test_tasks_come_back_as_they_were_even_after_a_move(tmp_path: Path) -> None:
    tasks = demo()
    assert {task.is_video for task in tasks} == {True, False}
    write_verl(tasks, tmp_path / "new" / "train.parquet", split="train")
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "new", moved)
    assert_same(load_tasks({"source": "verl", "path": str(moved / "train.parquet")}), tasks)


def test_the_columns_are_verls(tmp_path: Path) -> None:
    tasks = demo(3)
    file = tmp_path / "test.parquet"
    write_verl(tasks, file, split="test")
    row = pyarrow.parquet.read_table(file).to_pylist()[1]
    names = [f"test_pictures/000001_{k:02d}.png" for k in range(len(tasks[1].images))]
    assert row == {
        "data_source": "reopold",
        "prompt": [{"role": "user", "content": "<image>" * len(names) + tasks[1].question}],
        "images": [{"image": name} for name in names],
        "ability": "visual_reasoning",
        "reward_model": {"style": "rule", "ground_truth": tasks[1].answers[0]},
        "extra_info": {
            "split": "test",
            "index": 1,
            "qid": tasks[1].id,
            "is_video": tasks[1].is_video,
            "images": names,
        },
    }


def test_several_answers_make_every_ground_truth_a_list(tmp_path: Path) -> None:
    first, second = demo(2)
    second = replace(second, answers=("seven", "7"), id="a/../b")
    file = tmp_path / "train.parquet"
    write_verl([first, second], file, split="train")
    truths = [
        r["reward_model"]["ground_truth"] for r in pyarrow.parquet.read_table(file).to_pylist()
    ]
    assert truths == [list(first.answers), ["seven", "7"]]
    assert_same(load_tasks({"source": "verl", "path": str(file)}), [first, second])


def test_a_question_without_pictures(tmp_path: Path) -> None:
    task = Task("q", "How many?", ("3",))
    write_verl([task], tmp_path / "t.parquet", split="train")
    assert_same(load_tasks({"source": "verl", "path": str(tmp_path / "t.parquet")}), [task])


def test_what_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tasks"):
        write_verl([], tmp_path / "t.parquet", split="train")
    gone = Task("q", "?", ("1",), (FileImage(tmp_path / "gone.png"),))
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        write_verl([gone], tmp_path / "t.parquet", split="train")
    assert not (tmp_path / "t.parquet").exists()
