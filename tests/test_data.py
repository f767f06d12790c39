"""Data: row formats, files and pictures; errors are named, counted and contained."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reopold_agent.common.pictures import to_rgb
from reopold_agent.data import images as images_module
from reopold_agent.data import load_tasks
from reopold_agent.data.fingerprint import tasks_digest
from reopold_agent.data.formats import verl_row
from reopold_agent.data.images import BytesImage, FileImage, ZipImage, safe_join
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from reopold_agent.types import Task, TaskSource

Rows = list[dict[str, Any]]


def photo(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(other))


def write_rows(rows: Rows, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        file.write_text(json.dumps(rows), encoding="utf-8")


def load(**spec: Any) -> TaskSource:
    return load_tasks({"source": "pixel_reasoner", **spec})


IMAGE_ROW = {"question": "<image>Which?", "answer": ["A", "a cat"], "image": ["images/1.png"],
             "is_video": False, "qid": "q-1"}  # fmt: skip
VIDEO_ROW = {"question": "When? ", "answer": ["3"], "image": ["videos/v/1.png", "videos/v/2.png"],
             "is_video": True, "qid": "q-2"}  # fmt: skip
PICTURES = {"images/1.png": 1, "videos/v/1.png": 2, "videos/v/2.png": 3}


def store(folder: Path, how: str) -> None:
    """The three pictures: extracted, or in the two archives, with or without their top folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in PICTURES.items():
        data = png(photo(seed))
        if how == "extracted":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        else:
            top, rest = name.split("/", 1)
            with zipfile.ZipFile(folder / f"{top}.zip", "a") as archive:
                archive.writestr(name if how == "zip with top" else rest, data)


# Pixel-Reasoner's layout


@pytest.mark.parametrize("how", ["extracted", "zip with top", "zip without top"])
@pytest.mark.parametrize("name", ["train.parquet", "data/train-00000-of-00001.parquet",
                                  "train.json", "train.jsonl"])  # fmt: skip
def test_pixel_reasoners_layout(tmp_path: Path, how: str, name: str) -> None:
    store(tmp_path, how)
    write_rows([IMAGE_ROW, VIDEO_ROW], tmp_path / name)
    tasks = load(path=str(tmp_path), split="train")
    assert len(tasks) == 2
    first, second = tasks[0], tasks[1]
    assert (first.id, first.question, first.answers) == ("q-1", "Which?", ("A", "a cat"))
    assert (second.id, second.question, second.answers) == ("q-2", "When?", ("3",))
    assert (first.is_video, second.is_video) == (False, True)
    assert [same(i.open(), photo(1)) for i in first.images] == [True]
    shown = [same(i.open(), photo(s)) for i, s in zip(second.images, (2, 3), strict=True)]
    assert shown == [True, True]


@pytest.mark.parametrize("how", ["extracted", "zip with top", "zip without top"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_paths_without_their_top_folder_are_found_too(
    tmp_path: Path, how: str, prefix: str
) -> None:
    store(tmp_path, how)
    write_rows([{**IMAGE_ROW, "image": f"{prefix}1.png"}], tmp_path / "rows.json")
    assert same(load(path=str(tmp_path))[0].images[0].open(), photo(1))


@pytest.mark.parametrize("top", [True, False])
def test_a_name_of_different_pictures_in_two_archives_is_refused(tmp_path: Path, top: bool) -> None:
    members = {}
    for name, seed in (("train", 1), ("val", 2)):
        members[name] = f"{name}/0.png" if top else "0.png"
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(members[name], png(photo(seed)))
            archive.writestr("same.png", png(photo(3)))
            archive.writestr("images/", b"")
    write_rows([{**IMAGE_ROW, "image": "0.png"}], tmp_path / "rows.json")
    both = f"'0.png' is train.zip:{members['train']} or val.zip:{members['val']}"
    with pytest.raises(DataError, match=both):
        load(path=str(tmp_path))
    name = "val/0.png" if top else "same.png"
    write_rows([{**IMAGE_ROW, "image": name}], tmp_path / "other.json")
    (picture,) = load(path=str(tmp_path / "other.json"))[0].images
    assert same(picture.open(), photo(2 if top else 3))


def test_the_full_name_in_an_archive_comes_before_one_without_its_top(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train/0.png", png(photo(1)))
        archive.writestr("0.png", png(photo(2)))
    write_rows([{**IMAGE_ROW, "image": "0.png"}], tmp_path / "rows.json")
    assert same(load(path=str(tmp_path))[0].images[0].open(), photo(2))


@pytest.mark.parametrize("source", ["math_jsonl", "geometry3k", "vlmevalkit"])
@pytest.mark.parametrize("empty", [None, "", float("nan")])
def test_a_row_without_an_id_is_named_by_its_number(
    tmp_path: Path, source: str, empty: str | float | None
) -> None:
    row = {"problem": "?", "question": "?", "answer": "1"}
    rows: Rows = [{**row, "id": empty, "index": empty}] * 2
    write_rows(rows, tmp_path / "rows.json")
    tasks = load(source=source, path=str(tmp_path / "rows.json"))
    assert [task.id for task in tasks] == ["0", "1"]  # type: ignore[attr-defined]
    write_rows([{**row, "id": 0, "index": 0}], tmp_path / "zero.json")
    assert load(source=source, path=str(tmp_path / "zero.json"))[0].id == "0"


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"system_message": "Think."}},
        {"metadata": {"options": ["1", "2"]}},
        {"is_video": True},
    ],
)
def test_a_fingerprint_depends_on_how_a_task_is_asked(change: dict[str, Any]) -> None:
    task = Task("a", "?", ("1",))
    assert tasks_digest([replace(task, **change)]) != tasks_digest([task])
    assert tasks_digest([replace(task, metadata={"category": "x"})]) == tasks_digest([task])


def test_a_row_file_may_be_named_itself_and_a_path_object_will_do(tmp_path: Path) -> None:
    store(tmp_path, "zip with top")
    write_rows([IMAGE_ROW], tmp_path / "mine.json")
    assert load(path=tmp_path / "mine.json")[0].id == "q-1"
    assert load(path=str(tmp_path / "mine.json")) is load(path=tmp_path / "mine.json")


def test_answers_and_ids_of_other_types(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": 7, "qid": 0},
        {"question": "b", "answer": [7.5, " x ", None, ""], "qid": None, "image": None},
        {"question": "c", "answer": "yes", "image": []},
    ]
    write_rows(rows, tmp_path / "rows.json")
    tasks = load(path=str(tmp_path))
    assert [t.answers for t in tasks] == [("7",), ("7.5", "x"), ("yes",)]  # type: ignore[attr-defined]
    assert [t.id for t in tasks] == ["0", "1", "2"]  # type: ignore[attr-defined]
    assert all(t.images == () for t in tasks)  # type: ignore[attr-defined]


def test_splits_by_file_name(tmp_path: Path) -> None:
    for name, qid in (("train-0", "a"), ("train-1", "b"), ("test", "c"), ("my_val", "d")):
        write_rows([{"question": "?", "answer": "1", "qid": qid}], tmp_path / f"{name}.jsonl")

    def ids(split: str | None) -> list[str]:
        return [task.id for task in load(path=str(tmp_path), split=split)]  # type: ignore[attr-defined]

    assert ids("train") == ["a", "b"]
    assert ids("test") == ["c"]
    assert ids("val") == ["d"]
    with pytest.raises(DataError, match=r"several splits: my_val.*\n.*data\.train\.split=train"):
        ids(None)
    with pytest.raises(DataError, match=r"no file for the split 'eval'.*test\.jsonl"):
        ids("eval")


SPLIT_NAMES = [
    ("Train", "Test"),
    ("x-train", "x-test"),
    ("geo.train", "geo.test"),
    ("my_TRAIN-00000-of-00001", "my_VAL-00000-of-00001"),
    ("amc-2023", "amc-2023-dev"),
    ("x-train", "x-test.json"),  # not one file in two formats
]


@pytest.mark.parametrize(("train", "held_out"), SPLIT_NAMES)
def test_a_split_is_a_word_of_a_files_name(tmp_path: Path, train: str, held_out: str) -> None:
    suffixes = (".jsonl", "" if held_out.endswith(".json") else ".jsonl")
    for name, suffix, qid in zip((train, held_out), suffixes, "ab", strict=True):
        write_rows([{"question": "?", "answer": "1", "qid": qid}], tmp_path / (name + suffix))
    assert [task.id for task in load(path=str(tmp_path), split="train")] == ["a"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no file for the split 'eval'"):
        load(path=str(tmp_path), split="eval")


@pytest.mark.parametrize("names", [("mytrain", "mytest"), ("train2017", "val2017")])
def test_files_that_may_be_of_another_split_are_refused(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        write_rows([{"question": "?", "answer": "1", "qid": name}], tmp_path / f"{name}.jsonl")
    with pytest.raises(DataError, match=rf"{names[1]}\.jsonl may hold another split") as error:
        load(path=str(tmp_path), split="train")
    assert str(error.value).count("\n") == 1
    assert load(path=str(tmp_path), split=names[0])[0].id == names[0]
    (tmp_path / f"{names[0]}.jsonl").unlink()
    assert len(load(path=str(tmp_path), split="train", limit=5)) == 1  # the only file


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("training testing", "has files of several splits: testing.jsonl, training.jsonl"),
        ("train heldout", "has files of several splits"),
        ("gsm8k_train gsm8k_held_out", "has files of several splits"),
        ("train hold-out", "has files of several splits"),
        ("rows test", "has files of several splits"),  # rows of no split are training rows
        ("mytrain mytest", "mytest.jsonl may hold another split"),
        ("train2017 val2017", "val2017.jsonl may hold another split"),
        ("rows testset", "testset.jsonl may hold another split"),
        ("train training", None),
        ("train more", None),
        ("test test_b", None),
        ("mytest mytest2", None),
        ("retrieval contest", None),
        ("values algebra", None),
    ],
)
def test_all_files_are_taken_if_none_may_be_of_another_split(
    tmp_path: Path, names: str, told: str | None
) -> None:
    for name in names.split():
        write_rows([{"question": "?", "answer": "1", "qid": name}], tmp_path / f"{name}.jsonl")
    if told is None:
        assert len(load(path=str(tmp_path), split=None)) == 2
        return
    with pytest.raises(DataError, match=told) as error:
        load(path=str(tmp_path), split=None)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("other", ["gsm8k_train", "train_aug", "held_out", "testing"])
def test_files_that_a_split_leaves_out_are_named(
    tmp_path: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", other):
        write_rows([{"question": "?", "answer": "1", "qid": name}], tmp_path / f"{name}.jsonl")
    assert [task.id for task in load(path=str(tmp_path), split="train")] == ["train"]  # type: ignore[attr-defined]
    told = [record.getMessage() for record in caplog.records]
    if "train" not in other:
        assert not told
        return
    assert told[0].startswith(
        f"the split 'train' of {tmp_path} is read from train.jsonl, without {other}.jsonl.\n"
    )
    assert len(load(path=str(tmp_path), split=None)) == 2  # as it says


@pytest.mark.parametrize("place", ["", "data"])
@pytest.mark.parametrize(
    "names", [("train", "test"), ("Train", "VAL"), ("training", "held_out"), ("mini1", "mini2")]
)
def test_a_folder_that_is_named_like_the_split_holds_its_rows(
    tmp_path: Path, names: tuple[str, str], place: str
) -> None:
    for name in names:
        for file in ("a", "b"):
            row = {"question": "?", "answer": "1", "qid": f"{name}-{file}"}
            write_rows([row], tmp_path / place / name / f"{file}.jsonl")
    for name in names:
        tasks = load(path=str(tmp_path), split=name.lower())
        assert [task.id for task in tasks] == [f"{name}-a", f"{name}-b"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"no (file for the split 'dev'|rows) in") as error:
        load(path=str(tmp_path), split="dev")
    assert str(error.value).count("\n") == 1
    if names[0] == "mini1":
        told = f"Name the folder that holds the rows as the path, as {tmp_path / place / 'mini1'}."
    else:
        assert f"{names[0]}/b.jsonl" in str(error.value)
        told = "set the split (as data.train.split=train)."
    with pytest.raises(DataError, match=re.escape(told)):
        load(path=str(tmp_path), split=None)


def test_files_come_before_folders_that_are_named_like_the_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("rows", "test/a", "train/a"):
        write_rows([{"question": "?", "answer": "1", "qid": name}], tmp_path / f"{name}.jsonl")
    (tmp_path / "test" / "labels.csv").write_text("file,label\n")
    ids = {s: [t.id for t in load(path=str(tmp_path), split=s)] for s in ("test", "train")}  # type: ignore[attr-defined]
    assert ids == {"test": ["test/a"], "train": ["rows"]}
    (told,) = [record.getMessage() for record in caplog.records]
    assert "is read from rows.jsonl, without train/a.jsonl.\n" in told


def test_files_about_a_data_set_hold_no_rows(tmp_path: Path) -> None:
    for name in ("README", "dataset_info", "dataset_infos", "dataset_dict", "state"):
        (tmp_path / f"{name}.json").write_text('{"builder_name": "parquet", "splits": {}}')
    with pytest.raises(DataError, match="no rows in"):
        load(path=str(tmp_path))
    write_rows([{"question": "?", "answer": "1"}], tmp_path / "rows.json")
    for split in ("train", None):
        assert len(load(path=str(tmp_path), split=split)) == 1


def test_a_held_out_split_is_a_word_in_two(tmp_path: Path) -> None:
    for name in ("gsm8k_training", "gsm8k_held_out"):
        write_rows([{"question": "?", "answer": "1", "qid": name}], tmp_path / f"{name}.jsonl")
    for split, name in (("train", "gsm8k_training"), ("held_out", "gsm8k_held_out")):
        assert [t.id for t in load(path=str(tmp_path), split=split)] == [name]  # type: ignore[attr-defined]


def test_shards_whose_name_has_a_splits_letters_are_training_rows(tmp_path: Path) -> None:
    for part in range(2):
        name = f"retrieval-0000{part}-of-00002.jsonl"
        write_rows([{"question": "?", "answer": "1", "qid": part}], tmp_path / name)
    assert len(load(path=str(tmp_path), split="train")) == 2


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train-00000-of-00002"], r"has 1 of the 2 files of 'train': train-00001-of-00002 is"),
        (["train-00001-of-00002-ab12"], r"has 1 of the 2 files of 'train': train-00000-of-00002"),
        (["train-2-of-3", "train-3-of-3"], r"has 2 of the 3 files of 'train': train-00001-of-"),
        (["train-0-of-1", "train-0-of-2", "train-1-of-2"], r"'train' twice, in 1 and 2 files"),
        (["rows-00000-of-00003"], r"has 1 of the 3 files of 'rows'"),
    ],
)
def test_a_split_that_lacks_files_is_refused(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        write_rows([{"question": "?", "answer": "1", "qid": name}], tmp_path / f"{name}.jsonl")
    with pytest.raises(DataError, match=told) as error:
        load(path=str(tmp_path), split="train")
    assert str(error.value).count("\n") == 1
    assert len(load(path=str(tmp_path / f"{names[0]}.jsonl"), split="train")) == 1


@pytest.mark.parametrize("numbers", [(0, 1, 2), (1, 2, 3)])
def test_numbers_of_files_count_from_0_or_1(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        name = f"train-{number:05d}-of-00003.jsonl"
        write_rows([{"question": "?", "answer": "1", "qid": number}], tmp_path / name)
    (tmp_path / "test-00000-of-00002.jsonl").write_text("")  # of another split
    assert len(load(path=str(tmp_path), split="train")) == 3


def test_all_files_are_not_taken_if_they_are_of_several_splits(tmp_path: Path) -> None:
    write_rows([{"problem": "?", "answer": "1"}], tmp_path / "gsm8k-train.jsonl")
    assert len(load(source="math_jsonl", path=str(tmp_path), split=None)) == 1
    write_rows([{"problem": "??", "answer": "1"}], tmp_path / "gsm8k-test.jsonl")
    with pytest.raises(DataError, match=r"several splits: gsm8k-test\.jsonl, gsm8k-train\.jsonl"):
        load(source="math_jsonl", path=str(tmp_path), limit=9)
    with pytest.raises(DataError, match=r"no file for the split 'dev'.*\nName .* the path\.$"):
        load(source="math_jsonl", path=str(tmp_path), split="dev")


def test_files_without_a_split_in_their_name_hold_training_rows(tmp_path: Path) -> None:
    write_rows([{"question": "?", "answer": "1"}], tmp_path / "rows.json")
    assert len(load(path=str(tmp_path), split="train")) == 1
    assert len(load(path=str(tmp_path), split=None)) == 1
    with pytest.raises(
        DataError, match=r"no file for the split 'eval'.*rows\.json.*\n.*split=null"
    ):
        load(path=str(tmp_path), split="eval")


def test_limit_and_sharing(tmp_path: Path) -> None:
    for part in range(3):
        rows: Rows = [{"question": "?", "answer": "1", "qid": f"{part}{i}"} for i in range(4)]
        write_rows(rows, tmp_path / f"train-{part}.jsonl")
    tasks = load(path=str(tmp_path), split="train", limit=6)
    assert [t.id for t in tasks] == ["00", "01", "02", "03", "10", "11"]  # type: ignore[attr-defined]
    assert load(path=str(tmp_path), limit=6, split="train") is tasks
    assert load(path=str(tmp_path), limit=5, split="train") is not tasks


# What is wrong


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"answer": "1"}, "no column question; found: answer; .* needs: question, answer"),
    ({"question": "  ", "answer": "1"}, "no question"),
    ({"question": "<image> ", "answer": "1"}, "1 picture mark in the text, but 0 pictures in"),
    ({"question": 3, "answer": "1"}, "'question' must be a text, got int"),
    ({"question": "?\ud800", "answer": "1"}, "half a surrogate pair"),
    ({"question": "?"}, "no column answer or label; found: question"),
    ({"question": "?", "answer": {"a": 1}}, "an answer must be a text or a number, got dict"),
    ({"question": "?", "answer": float("nan")}, "no answer"),
    ({"question": "?", "answer": ""}, "no answer"),
    ({"question": "?", "answer": [None, " "]}, "no answer"),
    ({"question": "?", "answer": "1", "image": 5}, "a picture must be a path or bytes"),
    ({"question": "?", "answer": "1", "image": [5]}, "a picture must be a path or bytes"),
    ({"question": "?", "answer": "1", "image": {"bytes": "x"}}, "'x' is neither in"),
    ({"question": "?", "answer": "1", "image": ["gone.png"]}, "download images.zip and videos.zip"),
    ({"question": "?", "answer": "1", "image": [""]}, "no picture"),
    ({"question": "?", "answer": "1", "image": ["images"]}, "neither in"),
    ({"question": "?", "answer": "1", "image": ["../secret.png"]}, "leaves the data folder"),
    ({"question": "?", "answer": "1", "image": ["a/../../secret.png"]}, "leaves the data folder"),
    ({"question": "?", "answer": "1", "image": ["..\\secret.png"]}, "leaves the data folder"),
    ({"question": "?", "answer": "1", "image": ["/etc/hostname"]}, "leaves the data folder"),
    ({"question": "?", "answer": "1", "image": ["link.png"]}, "data folder .* by a link"),
    ({"question": "?", "answer": "1", "image": ["links/secret.png"]}, "by a link"),
    ({"question": "?", "answer": "1", "image": ["top.png"]}, "by a link"),
    ({"question": "?", "answer": "1", "image": ["a" * 5000]}, "cannot be used"),
    ({"question": "?", "answer": "1", "image": ["a\0.png"]}, "cannot be used"),
    ({"question": "?", "answer": "1", "image": ["circle.png"]}, "the picture|the path"),
    ({"question": "?", "answer": "1", "image": ["http://127.0.0.1:9/x.png"]},
     r"at a URL \(http://127.0.0.1:9/x.png\); data.checks.allow_urls=true"),
]  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A data folder beside a secret, with links to it."""
    (tmp_path / "secret.png").write_bytes(png(photo(9)))
    folder = tmp_path / "data"
    store(folder, "extracted")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "links").symlink_to(tmp_path)
    (folder / "images" / "top.png").symlink_to(tmp_path / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    return folder


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_fails_or_is_left_out(
    hostile: Path, row: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows([IMAGE_ROW, row, VIDEO_ROW], hostile / "rows.json")
    with pytest.raises(DataError, match=message) as caught:
        load(path=str(hostile))
    text = str(caught.value)
    assert text.startswith(f"1 of 3 rows of {hostile} cannot be used:\n")
    assert "  1  rows.json, row 1: " in text
    assert text.endswith("Correct them, or leave them out with on_bad_row=skip.")
    with caplog.at_level(logging.WARNING):
        tasks = load(path=str(hostile), on_bad_row="skip")
    assert [tasks[0].id, tasks[1].id, len(tasks)] == ["q-1", "q-2", 2]
    assert f"1 of 3 rows of {hostile} cannot be used" in caplog.text


def test_many_bad_rows_are_counted_and_three_are_shown(tmp_path: Path) -> None:
    write_rows(
        [{"question": "", "answer": "1"}] * 9 + [{"question": "?", "answer": "1"}],
        tmp_path / "rows.jsonl",
    )
    with pytest.raises(DataError) as caught:
        load(path=str(tmp_path))
    assert str(caught.value).startswith("9 of 10 rows")
    assert str(caught.value).count(": no question") == 3
    assert "no question       9  " in str(caught.value)
    assert "and 6 more" in str(caught.value)
    write_rows([{"answer": "1"}], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no usable rows"):
        load(path=str(tmp_path), on_bad_row="skip")


def test_links_inside_the_folder_are_fine(tmp_path: Path) -> None:
    real = tmp_path / "real"
    store(real, "extracted")
    (real / "again.png").symlink_to(real / "images" / "1.png")
    (tmp_path / "alias").symlink_to(real)
    write_rows([{**IMAGE_ROW, "image": ["again.png"]}], real / "rows.json")
    assert same(load(path=str(tmp_path / "alias"))[0].images[0].open(), photo(1))


def test_the_hubs_own_links_are_fine(tmp_path: Path) -> None:
    """huggingface_hub fills a snapshot with links into the folder ``blobs`` beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    (snapshot / "images").mkdir(parents=True)
    (blobs / "cafe").write_bytes(png(photo(1)))
    (tmp_path / "secret.png").write_bytes(png(photo(9)))
    (snapshot / "images" / "1.png").symlink_to("../../../blobs/cafe")
    (snapshot / "images" / "2.png").symlink_to("../../../secret.png")
    write_rows([IMAGE_ROW], snapshot / "train.json")
    write_rows([{**IMAGE_ROW, "image": ["images/2.png"]}], snapshot / "test.json")
    assert same(load(path=str(snapshot), split="train")[0].images[0].open(), photo(1))
    with pytest.raises(DataError, match="by a link"):
        load(path=str(snapshot), split="test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", 'question,answer\n"What, then?",1\nWhy?,2\n'),
        (
            "train.json",
            '{"question": "What, then?", "answer": "1"}\n{"question": "Why?", "answer": 2}',
        ),
        (
            "train.json",
            json.dumps(
                {
                    "dataset_name": "infographicVQA",
                    "data": [
                        {"question": "What, then?", "answer": "1"},
                        {"question": "Why?", "answer": "2"},
                    ],
                },
                indent=1,
            ),
        ),
    ],
)
def test_other_forms_of_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\n", "utf-8")
    if name.endswith(".csv"):
        (tmp_path / "labels.csv").rename(tmp_path / "labels.txt")
    tasks = load(path=str(tmp_path))
    assert [(task.question, task.answers) for task in tasks] == [
        ("What, then?", ("1",)),
        ("Why?", ("2",)),
    ]


def test_repeated_ids_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows([{"question": "?", "answer": "1", "qid": i} for i in "aabccc"], tmp_path / "r.json")
    with caplog.at_level(logging.WARNING):
        assert len(load(path=str(tmp_path))) == 6
    assert "3 repeat an id and are kept" in caplog.text
    assert "duplicate id       3  r.json, row 1: the id 'a' of r.json, row 0" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"{", r"cannot read .*rows\.json"),
        ("rows.json", b'{"question": "?"}', "must hold a list of objects"),
        ("rows.json", b"[1, 2]", "must hold a list of objects"),
        ("rows.json", b"[" * 100_000, r"cannot read .*rows\.json"),
        ("rows.json", b'["\xff\xfe"]', r"cannot read .*rows\.json"),
        ("rows.jsonl", b'{"question": "?", "answer": "1"}\n{\n', r"rows\.jsonl, line 2: "),
        ("rows.jsonl", b"[1]\n", "line 1: expected an object"),
        ("rows.jsonl", b'{"question": "?", "answer": "\xff"}\n', r"rows\.jsonl, line 1: "),
        ("rows.parquet", b"not parquet at all", r"cannot read .*rows\.parquet"),
        ("rows.parquet", b"", r"cannot read .*rows\.parquet"),
        ("rows.arrow", b"ARROW1", r"no rows in .*; there are rows\.arrow\.\n.*save_to_disk"),
        ("rows.jsonl.gz", b"", r"no rows in .*\nUnpack rows\.jsonl\.gz first\."),
        ("rows.txt", b"", r"no rows in .*\nThe path must name the folder that holds \*\.parquet"),
        ("rows.csv", b'question,answer\n"?,1\n', r"cannot read .*rows\.csv at row 0"),
        ("images.zip", b"not a zip", r"images\.zip is not a zip archive"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path=str(tmp_path))


def test_a_cut_parquet_file_is_named(tmp_path: Path) -> None:
    write_rows(
        [{"question": "?" * 50, "answer": str(i)} for i in range(99)], tmp_path / "a.parquet"
    )
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"a\.parquet"):
        load(path=str(tmp_path))
    # the end is whole, a page is not
    (tmp_path / "a.parquet").write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    with pytest.raises(DataError, match=r"a\.parquet"):
        load(path=str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({}, ConfigError, "needs 'source'"),
        ({"source": "pixl_reasoner"}, UnknownNameError, "Did you mean 'pixel_reasoner'"),
        ({"source": "pixel_reasoner"}, ConfigError, "missing.*'path'"),
        ({"source": "demo", "splitt": "train"}, ConfigError, "'splitt'"),
        ({"source": "demo", "split": "test"}, ConfigError, "split must be"),
        ({"source": "pixel_reasoner", "path": "/nowhere/at/all"}, DataError, "at/all does not"),
        ({"source": "verl", "path": "gone.parquet"}, DataError, r"gone\.parquet does not exist"),
        ({"source": "verl", "path": "data/gone.parquet"}, DataError, "does not exist"),
        ({"source": "verl", "path": "./data/gone"}, DataError, "does not exist"),
        ({"source": "verl", "path": "data/gone.csv"}, DataError, "does not exist"),
        ({"source": "verl", "path": "me/gone-v1.5"}, DataError, "could not be downloaded"),
    ],
)  # fmt: skip
def test_specifications_that_cannot_be_used(
    spec: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_tasks(spec)


def test_a_wrong_setting_for_bad_rows(tmp_path: Path) -> None:
    write_rows([{"question": "?", "answer": "1"}], tmp_path / "rows.json")
    with pytest.raises(ConfigError, match="'fail' or 'skip', got 'ignore'"):
        load(path=str(tmp_path), on_bad_row="ignore")
    (tmp_path / "rows.txt").write_text("")
    with pytest.raises(DataError, match=r"rows\.txt is not one of \.parquet, \.jsonl, \.json"):
        load(path=str(tmp_path / "rows.txt"))


# The hub


def test_a_hub_id_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, "zip with top")
    write_rows([IMAGE_ROW], tmp_path / "train.jsonl")
    asked: list[Any] = []

    def snapshot_download(repository: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repository, repo_type, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for _ in range(2):
        tasks = load(path="some-lab/Set-1", split="train", revision="abc")
        assert tasks[0].id == "q-1"
    assert asked == [("some-lab/Set-1", "dataset", "abc")]


def test_without_a_network_the_download_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise ConnectionError("cannot reach the hub\nlong trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(DataError) as caught:
        load(path="some-lab/Set-2", split="train")
    text = str(caught.value)
    assert "hf download some-lab/Set-2 --repo-type dataset --local-dir" in text
    assert "ConnectionError: cannot reach the hub)" in text
    assert "long trace" not in text
    assert "data.train.path=" in text


def test_without_the_hubs_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install -e "\.\[hub\]"'):
        load(path="some-lab/Set-3", split="train")


# verl's rows


def test_verl_round_trip_through_parquet(tmp_path: Path) -> None:
    demo = DemoTasks("eval", 12, seed=5, video_share=0.5)
    rows = []
    for index, task in enumerate(demo):
        paths = [f"pictures/{index}-{n}.png" for n in range(len(task.images))]
        for path, image in zip(paths, task.images, strict=True):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            image.open().save(tmp_path / path)
        rows.append(verl_row(task, index, "test", paths))
    assert {task.is_video for task in demo} == {True, False}
    assert set(rows[0]) == {"data_source", "prompt", "images", "ability", "reward_model",
                            "extra_info"}  # fmt: skip
    write_rows(rows, tmp_path / "test.parquet")
    for path in (tmp_path, tmp_path / "test.parquet"):
        back = load_tasks({"source": "verl", "path": str(path), "split": "test"})
        assert len(back) == 12
        for index, task in enumerate(demo):
            again = back[index]
            assert (again.id, again.question, again.answers, again.is_video) == (
                task.id, task.question, task.answers, task.is_video,
            )  # fmt: skip
            assert len(again.images) == len(task.images)
            for one, other in zip(again.images, task.images, strict=True):
                assert same(one.open(), other.open())


def test_verl_row_says_how_many_pictures_and_which_answers() -> None:
    row = verl_row(Task("t", "Q?", ("a", "b"), is_video=True), 3, "train", ["1.png", "2.png"])
    assert row["prompt"] == [{"role": "user", "content": "<image><image>Q?"}]
    assert row["images"] == [{"image": "1.png"}, {"image": "2.png"}]
    assert row["reward_model"] == {"style": "rule", "ground_truth": ["a", "b"]}
    assert row["extra_info"] == {"split": "train", "index": 3, "qid": "t", "is_video": True,
                                 "images": ["1.png", "2.png"]}  # fmt: skip
    assert verl_row(Task("t", "Q?", ("a",)), 0, "train", [])["reward_model"]["ground_truth"] == "a"


def verl(**more: Any) -> dict[str, Any]:
    shown = more.get("images", [])
    marks = "<image>" * (len(shown) if isinstance(shown, list) else 1)
    return {
        "data_source": "pixel",
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": f"{marks}Q?"}],
        "reward_model": {"style": "rule", "ground_truth": "7"},
        **more,
    }


def test_pictures_of_verl_rows_by_path_and_by_bytes(tmp_path: Path) -> None:
    for seed in range(1, 5):
        photo(seed).save(tmp_path / f"{seed}.png")
    data = png(photo(5))
    rows = [
        verl(images=[{"image": "1.png"}, {"image": str(tmp_path / "2.png")}]),
        verl(images=[{"image": f"file://{tmp_path}/3.png"}], extra_info={"index": 0}),
        verl(images=["4.png"], extra_info={"qid": 0, "index": 9}),
        verl(images="4.png"),
        verl(extra_info={"images": ["1.png"], "is_video": True, "qid": "x"}),
    ]
    write_rows(rows, tmp_path / "rows.json")
    tasks = load_tasks({"source": "verl", "path": str(tmp_path / "rows.json")})
    opened = [[image.open() for image in tasks[i].images] for i in range(5)]
    expected = [[1, 2], [3], [4], [4], [1]]
    for pictures, seeds in zip(opened, expected, strict=True):
        assert len(pictures) == len(seeds)
        assert all(same(p, photo(s)) for p, s in zip(pictures, seeds, strict=True))
    assert [tasks[i].id for i in range(5)] == ["0", "0", "0", "3", "x"]
    assert tasks[4].is_video
    assert tasks[0].metadata == {"data_source": "pixel", "system_message": "S"}
    # bytes, as datasets' Image feature writes them, and bare
    write_rows([verl(images=[{"bytes": data, "path": None}])], tmp_path / "a.parquet")
    write_rows([verl(images=[data])], tmp_path / "b.parquet")
    for name in ("a", "b"):
        task = load_tasks({"source": "verl", "path": str(tmp_path / f"{name}.parquet")})[0]
        assert task.question == "Q?"
        assert same(task.images[0].open(), photo(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "'prompt' must be a list of messages"),
        ({"prompt": "Q?"}, "'prompt' must be a list of messages"),
        ({"prompt": []}, "no user message"),
        ({"prompt": [{"role": "assistant", "content": "A"}]}, "no user message"),
        ({"prompt": ["Q?"]}, "a message must have the role"),
        ({"reward_model": {}}, "no answer"),
        ({"reward_model": "7"}, "'reward_model' must be an object"),
        ({"extra_info": "7"}, "'extra_info' must be an object"),
        ({"images": [{"image": "gone.png"}]}, r"'gone\.png' is neither in"),
        ({"images": [{"image": "../secret.png"}]}, "leaves the data folder"),
        ({"images": [{"image": "/etc/hostname"}]}, "leaves the data folder"),
        ({"images": [{"image": "file:///etc/hostname"}]}, "leaves the data folder"),
        ({"images": [{"image": "link.png"}]}, "by a link"),
        ({"images": [{"path": None}]}, "'images' is a list of nulls"),
        ({"images": [3]}, "a path or bytes, got int"),
        ({"images": 3}, "a picture must be a path or bytes, got int"),
    ],
)
def test_bad_verl_rows(hostile: Path, change: dict[str, Any], message: str) -> None:
    write_rows([verl(), verl(**change)], hostile / "rows.json")
    with pytest.raises(DataError, match=message) as caught:
        load_tasks({"source": "verl", "path": str(hostile)})
    assert "1 of 2 rows" in str(caught.value)
    skipped = load_tasks({"source": "verl", "path": str(hostile), "on_bad_row": "skip"})
    assert len(skipped) == 1


# Pictures


def opened(data: bytes) -> Image.Image:
    image = BytesImage(data).open()
    assert image.mode == "RGB"
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    plain = photo(1, 8, 6)
    turned = {
        1: plain,
        2: plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: plain.transpose(Image.Transpose.ROTATE_180),
        4: plain.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: plain.transpose(Image.Transpose.TRANSPOSE),
        6: plain.transpose(Image.Transpose.ROTATE_270),
        7: plain.transpose(Image.Transpose.TRANSVERSE),
        8: plain.transpose(Image.Transpose.ROTATE_90),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(opened(encoded(plain, "PNG", exif=exif)), turned)


def test_a_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    shown = opened(encoded(image, "PNG", transparency=0))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_half_transparency_mixes_with_white() -> None:
    rgba = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert opened(png(rgba)).getpixel((0, 0)) == (255, 127, 127)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert opened(png(grey)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("most", [65535, 40000, 200])
def test_16_bits_become_8_by_division(most: int) -> None:
    values = np.array([[0, most // 2, most]], dtype=np.uint16)
    shown = np.asarray(opened(encoded(Image.fromarray(values), "PNG")))[0]
    assert (shown == np.round(values[0] / 257)[:, None]).all()


def test_a_float_tiff_from_0_to_1_is_not_black() -> None:
    values = np.array([[0, 0.25, 1]], dtype=np.float32)
    shown = np.asarray(opened(encoded(Image.fromarray(values), "TIFF")))[0]
    assert shown[:, 0].tolist() == [0, 64, 255]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("I", (1, 1), 77), (77, 77, 77)),
        (Image.new("F", (1, 1), 77.0), (77, 77, 77)),
        (Image.new("F", (1, 1), 1.0), (255, 255, 255)),
        (Image.new("F", (1, 1), 0.5), (128, 128, 128)),
        (Image.new("F", (1, 1), 0.0), (0, 0, 0)),
        (Image.new("F", (1, 1), 1.5), (2, 2, 2)),
        (Image.new("F", (1, 1), 1.2), (255, 255, 255)),  # as after a bicubic resize
        (Image.new("F", (1, 1), -0.2), (0, 0, 0)),
        (Image.new("F", (1, 1), 65535.0), (255, 255, 255)),
        (Image.new("I", (1, 1), 1), (1, 1, 1)),
        (Image.new("I", (1, 1), 65535), (255, 255, 255)),
        (Image.new("I", (1, 1), -5), (0, 0, 0)),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
    ],
)
def test_modes_become_rgb(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert to_rgb(image).getpixel((0, 0)) == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_counts(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert same(opened(data), frames[0])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(100_000, 100_000), (15_000, 14_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_pixels(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load_pixels)
    with pytest.raises(DataError, match=r"too large|the limit is"):
        BytesImage(bomb(*size), "bomb.png").open()


def test_our_own_limit_holds_where_pillows_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(
        DataError, match=r"bomb\.png has 15000x14000 pixels; the limit is 200000000"
    ):
        BytesImage(bomb(15_000, 14_000), "bomb.png").open()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_picture_is_a_data_error(tmp_path: Path, kind: str, keep: float) -> None:
    data = encoded(photo(1, 120, 90), kind)
    file = tmp_path / "cut.img"
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"cut\.img is not a readable picture"):
        FileImage(file).open()


FORMATS = {kind: encoded(photo(2, 24, 18), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP",
                                                              "TIFF", "PPM", "ICO")}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_corrupt_picture_is_a_picture_or_a_data_error(
    kind: str, changes: list[tuple[float, int]], where: float, at_start: bool
) -> None:
    data = bytearray(FORMATS[kind])
    reach = 64 if at_start else len(data)
    for place, value in changes:
        data[min(len(data) - 1, int(place * reach))] = value
    if where < 0.2:
        del data[int(where * 5 * len(data)) :]
    try:
        image = BytesImage(bytes(data)).open()
    except DataError:
        return
    assert image.mode == "RGB"


def test_a_missing_picture_names_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        FileImage(tmp_path / "gone.png").open()
    with pytest.raises(DataError, match=r"cannot read 1\.png in .*gone\.zip"):
        ZipImage(tmp_path / "gone.zip", "1.png").open()


def _flip(data: bytearray, start: int) -> None:
    for i in range(start, start + 40):
        data[i] ^= 0xFF


def _encrypted(data: bytearray, start: int) -> None:
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1


def _method(data: bytearray, start: int) -> None:
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(signature) + offset] = 98


@pytest.mark.parametrize("spoil", [_flip, _encrypted, _method])
def test_a_damaged_archive_is_a_data_error(
    tmp_path: Path, spoil: Callable[[bytearray, int], None]
) -> None:
    file = tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", encoded(Image.new("RGB", (90, 90)), "BMP"))
    assert ZipImage(file, "1.png").open().size == (90, 90)
    data = bytearray(file.read_bytes())
    spoil(data, 40)
    file.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"cannot read 1\.png in .*images\.zip"):
        ZipImage(file, "1.png").open()
    with pytest.raises(DataError, match=r"cannot read 2\.png"):
        ZipImage(file, "2.png").open()


def test_a_huge_member_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", b"\0" * 5000)
    monkeypatch.setattr(images_module, "MAX_BYTES", 4999)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(DataError, match="has 5000 bytes; the limit is 4999"):
        ZipImage(file, "1.png").open()


parts = st.sampled_from(["..", ".", "", "a", "images", "link", "links", "x.png", "~", "\\", "C:",
                         "\0", "a" * 300, "漢"])  # fmt: skip


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walls") / "data"
    (root / "images").mkdir(parents=True)
    (root / "links").symlink_to(root.parent)
    (root / "link").symlink_to("/etc")
    return root


@settings(max_examples=1500)
@given(st.lists(parts | st.text(max_size=4), max_size=6), st.sampled_from(["/", "\\", "//"]))
@example(["links", "data", "images"], "/")
def test_no_path_leaves_the_folder(walls: Path, pieces: list[str], separator: str) -> None:
    try:
        path = safe_join(walls, separator.join(pieces))
    except DataError:
        return
    assert Path(os.path.realpath(path)).is_relative_to(walls.resolve())
    assert ".." not in path.parts
