"""The layouts in which data sets lie on the hub, made small: which files and rows are read."""
# ruff: noqa: RUF001  # options are written with full-width punctuation too

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from real_data import real_data

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.data import load_tasks
from reopold_agent.data.archives import unzipped
from reopold_agent.data.checks import BadRowsError
from reopold_agent.data.hold_out import PARTS, position, share_between
from reopold_agent.data.pictures import PictureFolder
from reopold_agent.data.row_formats import FORMATS, options_in
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.evaluate.benchmarks import Benchmark, LoadedBenchmark, load_benchmark, select
from reopold_agent.evaluate.words import shipped_benchmarks
from reopold_agent.judges import grade
from reopold_agent.types import Task, TaskSource


def listed(tasks: TaskSource) -> list[Task]:
    return [tasks[index] for index in range(len(tasks))]


def png(size: int = 30) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(data, "PNG")
    return data.getvalue()


def released_rows(count: int, pictures: int) -> list[dict[str, Any]]:
    return [
        {
            "qid": f"q{i}",
            "question": f"Which one, {i}?",
            "answer": ["A"],
            "image": [f"images/{i % pictures}.png"],
            "is_video": False,
        }
        for i in range(count)
    ]


def write_release(folder: Path, rows: list[dict[str, Any]], pictures: int) -> None:
    """TIGER-Lab/PixelReasoner-RL-Data: release.parquet and pictures; there is no test file."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "release.parquet")
    (folder / "images").mkdir()
    for number in range(pictures):
        (folder / "images" / f"{number}.png").write_bytes(png())


def pixel(folder: Path, **changes: Any) -> LoadedBenchmark:
    shipped = select(shipped_benchmarks(), ["pixel"], None)[0]
    return load_benchmark(Benchmark(**{**vars(shipped), "path": str(folder), **changes}))


def training(folder: Path, **changes: Any) -> list[str]:
    tasks = load_tasks(
        {"source": "pixel_reasoner", "path": str(folder), "split": "train", "part": "train"}
        | changes
    )
    return [task.id for task in listed(tasks)]


def test_pixel_asks_only_rows_that_training_leaves_out(tmp_path: Path) -> None:
    rows = released_rows(1200, pictures=400)
    write_release(tmp_path, rows, pictures=400)
    held_out = {task.id for task in listed(pixel(tmp_path).tasks)}
    trained_on = set(training(tmp_path))
    assert held_out
    assert not held_out & trained_on
    assert held_out | trained_on == {row["qid"] for row in rows}
    assert 0.005 < len(held_out) / len(rows) < 0.05
    shown = {row["qid"]: row["image"][0] for row in rows}
    assert not {shown[each] for each in held_out} & {shown[each] for each in trained_on}


def test_the_hold_out_depends_on_a_row_alone(tmp_path: Path) -> None:
    rows = released_rows(1200, pictures=400)
    write_release(tmp_path, rows[::-1][:900], pictures=400)
    kept = {row["qid"] for row in rows[300:]}
    other = tmp_path / "other"
    other.mkdir()
    write_release(other, rows, pictures=400)
    assert set(training(tmp_path)) == set(training(other)) & kept


IN_PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Why?"}]


@pytest.mark.parametrize(
    ("row", "place"),
    [
        *(
            (row, 0.596854)
            for row in (
                {"image": "a.png"},
                {"image": ["./a.png", "b.png"]},
                {"images": [{"path": "a.png", "bytes": None}]},
                {"image": None, "images": [{"image": "a.png"}]},
                {"image": "a.png", "decoded_image": b"abc"},
                {"image_path": "a.png"},
                {"img": "a.png"},
                {"Image": {"url": "a.png"}},
                {"image_file": "['a.png']"},
                {"pictures": ["a.png"]},
                {"image_2": "b.png", "image_1": "a.png"},
                {"frames": ["a.png", "b.png"]},
                {"multi_modal_data": {"image": ["a.png"]}},
                {"extra_info": {"images": ["a.png"]}},
                {"prompt": [{"role": "user", "content": IN_PARTS}]},
                {"prompt": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]},
                {"prompt": [{"role": "user", "content": "<image>", "images": ["a.png"]}]},
            )
        ),
        *(
            (row, 0.55753)
            for row in (
                {"image": b"abc"},
                {"images": [{"bytes": b"abc"}]},
                {"images": [{"bytes": b"abc", "path": "image.png"}]},
                {"image_path": {"bytes": b"abc", "path": "image.png"}},
                {"decoded_image": b"abc", "image_path": "a.png"},
            )
        ),
        *((row, 0.961032) for row in ({}, {"image": ""}, {"images": [{"path": None}]})),
    ],
)
def test_the_hold_out_goes_by_the_picture_whatever_its_columns_name(
    row: dict[str, Any], place: float
) -> None:
    assert position({"question": "Why?", **row}) == pytest.approx(place, abs=1e-6)


def test_a_part_without_rows_says_what_to_do_about_it(tmp_path: Path) -> None:
    rows = [{"qid": f"{n}", "question": f"{n}?", "answer": "1", "image": "1.png"} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "1.png").write_bytes(png())
    with pytest.raises(BadRowsError, match="they all have the same first picture") as told:
        training(tmp_path, part="held_out")
    assert str(told.value).endswith("\nGive data.eval a file of its own, with part=null.")
    # Pictures whose bytes are in the rows often have one name.
    for row in rows:
        row["image"] = {"bytes": png(int(row["qid"]) + 30), "path": "image.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for part, share in (("held_out", 1e-9), ("train", 1 - 1e-9)):
        with pytest.raises(BadRowsError, match="9 rows falls into part=") as told:
            training(tmp_path, part=part, held_out_share=share)
        (used,) = set(re.findall(r"\+\+data\.\w+\.held_out_share=([\d.]+)", str(told.value)))
        sides = [training(tmp_path, part=p, held_out_share=float(used)) for p in PARTS]
        assert all(sides)
        assert sum(map(len, sides)) == 9


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, unique=True))
def test_a_share_that_is_proposed_leaves_rows_on_both_sides(places: list[float]) -> None:
    share = share_between(places)
    assert share is not None
    assert min(places) < share <= max(places)


def test_the_share_of_the_hold_out_can_be_set_on_both_sides(tmp_path: Path) -> None:
    write_release(tmp_path, released_rows(400, pictures=400), pictures=400)
    asked = len(pixel(tmp_path, held_out_share=0.5).tasks)
    assert 150 < asked < 250
    assert len(training(tmp_path, held_out_share=0.5)) == 400 - asked
    with pytest.raises(ConfigError, match="held_out_share must be between 0 and 1"):
        training(tmp_path, held_out_share=1.5)
    with pytest.raises(ConfigError, match="part must be 'train', 'held_out' or null"):
        training(tmp_path, part="test")


def test_a_split_that_is_not_there_is_an_error_and_not_every_row(tmp_path: Path) -> None:
    write_release(tmp_path, released_rows(10, pictures=2), pictures=2)
    with pytest.raises(DataError, match=r"no file for the split 'test'.*release\.parquet"):
        pixel(tmp_path, split="test", part=None)


MATHVISTA = {
    "pid": "7",
    "question": "How tall?",
    "query": "Hint: Answer with a number.\nQuestion: How tall?",
    "question_type": "free_form",
    "answer": "1.5",
    "answer_type": "float",
    "precision": 1.0,
    "choices": None,
    "image": "images/7.jpg",
}


def mathvista(folder: Path) -> LoadedBenchmark:
    shipped = select(shipped_benchmarks(), ["mathvista"], None)[0]
    return load_benchmark(Benchmark(**{**vars(shipped), "path": str(folder)}))


def test_mathvista_takes_its_parquet_and_each_row_once(tmp_path: Path) -> None:
    (tmp_path / "annot_testmini.json").write_text(json.dumps({"7": MATHVISTA, "8": MATHVISTA}))
    (tmp_path / "data").mkdir()
    row = {**MATHVISTA, "decoded_image": {"bytes": png(), "path": None}}
    pq.write_table(
        pa.Table.from_pylist([row]), tmp_path / "data" / "testmini-00000-of-00001-725687bf.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist([row, row]), tmp_path / "data" / "test-00000-of-00002.parquet"
    )
    loaded = mathvista(tmp_path)
    assert [Path(file).suffix for file in loaded.files] == [".parquet"]
    (task,) = listed(loaded.tasks)
    assert task.id == "7"
    assert task.metadata["precision"] == 1
    assert task.images[0].open().size == (30, 30)


def test_annotations_by_id_are_rows_too(tmp_path: Path) -> None:
    (tmp_path / "annot_testmini.json").write_text(json.dumps({"7": MATHVISTA}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.jpg").write_bytes(png())
    assert [task.id for task in listed(mathvista(tmp_path).tasks)] == ["7"]


def test_mathverse_is_not_read_twice_and_without_its_text_only_rows(tmp_path: Path) -> None:
    row = {
        "sample_index": "1",
        "question_type": "free-form",
        "question": "Find x.",
        "query_cot": "Find x.",
        "answer": "4",
        "problem_version": "Text Lite",
    }
    stored = [{**row, "image": {"bytes": png(), "path": "1.png"}}]
    for name in ("testmini", "testmini_text_only"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**row, "image": "1.png"}]))
        pq.write_table(pa.Table.from_pylist(stored), tmp_path / f"{name}.parquet")
    shipped = select(shipped_benchmarks(), ["mathverse"], None)[0]
    loaded = load_benchmark(Benchmark(**{**vars(shipped), "path": str(tmp_path), "folder": None}))
    assert [Path(file).name for file in loaded.files] == ["testmini.parquet"]
    assert len(loaded.tasks) == 1


def mathvision_folder(folder: Path, questions: list[str]) -> Benchmark:
    (folder / "images").mkdir()
    for number in range(len(questions)):
        (folder / "images" / f"{number}.jpg").write_bytes(png())
    rows = [
        {"id": str(i), "question": text, "options": [], "answer": "4", "image": f"images/{i}.jpg"}
        for i, text in enumerate(questions)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Benchmark("v", "mathvision", path=str(folder), split="test")


def test_a_row_without_a_question_is_counted_and_named(tmp_path: Path) -> None:
    loaded = load_benchmark(mathvision_folder(tmp_path, ["Find x. <image1>"] * 99 + ["<image1>"]))
    assert len(loaded.tasks) == 99
    assert len(loaded.left_out) == 1
    assert "test.jsonl, row 99" in loaded.left_out[0]
    assert "picture" in loaded.left_out[0]


def test_many_rows_without_a_question_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match="3 of 10 rows"):
        load_benchmark(mathvision_folder(tmp_path, ["Find x. <image1>"] * 7 + ["<image1>"] * 3))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. 3000, 4000; B. 3; C. 4000, 3000; D. No correct answer",
         ["3000, 4000", "3", "4000, 3000", "No correct answer"]),
        ("\nA:3\nB:4\n", ["3", "4"]),
        ("A、三角形；B、圆", ["三角形", "圆"]),
        ("(A) 12 (B) 13 (C) 14", ["12", "13", "14"]),
        ("A. 5 B. 6", ["5", "6"]),
        ("A. point B; B. point A", ["point B", "point A"]),
        ("A. 5; C. 6", []),
        ("B. 5; A. 6", []),
        ("A. ; B. 6", []),
        ("no options here", []),
        ("", []),
    ],
)  # fmt: skip
def test_options_in_a_text(text: str, options: list[str]) -> None:
    assert options_in(text) == options


def wemath(folder: Path) -> LoadedBenchmark:
    (folder / "images").mkdir()
    (folder / "images" / "1.png").write_bytes(png())
    row = {
        "ID": "1",
        "key": "2steps_1",
        "question": "Which pair?",
        "option": "A. 1; B. 2; C. 3000, 4000",
        "answer": "C",
        "image_path": "images/1.png",
    }
    (folder / "testmini.json").write_text(json.dumps([row]))
    return load_benchmark(Benchmark("w", "wemath", path=str(folder), split="testmini"))


def test_the_value_of_an_option_in_the_text_is_its_letter(tmp_path: Path) -> None:
    task = wemath(tmp_path).tasks[0]
    options = task.metadata["options"]
    for response, right in (("3000, 4000", True), ("C", True), ("2", False), ("B", False)):
        verdict = grade(f"\\boxed{{{response}}}", task.answers, "option", options=options)
        assert verdict.correct == right


def shipped(name: str, **changes: Any) -> LoadedBenchmark:
    """Loads a benchmark as it is shipped, with another path."""
    (found,) = select(shipped_benchmarks(), [name], None)
    return load_benchmark(replace(found, **changes))


# NoisyRollout's evaluation data: one archive on the hub, to be unzipped


MATHVERSE = {
    "sample_index": "1",
    "problem_version": "Text Dominant",
    "question_type": "multi-choice",
    "image": "images_version_1-4/image_1.png",
    "query_cot": "Find x.\nChoices:\nA:3000\nB:4",
    "question_for_eval": "Find x.",
    "answer": "A",
}
WEMATH = {
    "ID": "7",
    "key": "2steps_1",
    "image_path": "1.png",
    "question": "Which?",
    "option": "A. 1; B. 2",
    "answer": "B",
}
HALLUSION = {
    "category": "VD",
    "subcategory": "chart",
    "set_id": "0",
    "figure_id": "1",
    "question_id": "0",
    "question": "Is it larger?",
    "gt_answer": "1",
    "filename": "./VD/chart/0_1.png",
}
TSV = {
    "index": "3",
    "question": "How many?",
    "answer": "5",
    "category": "counting",
    "choices": "[]",
}


def noisyrollout_data(folder: Path) -> None:
    """Writes what eval/utils/data_loaders.py of NoisyRollout reads."""
    for name, rows in (
        ("mathverse/testmini.json", [MATHVERSE]),
        ("wemath/testmini.json", [WEMATH]),
        ("hallubench/HallusionBench.json", [HALLUSION, {**HALLUSION, "filename": None}]),
        ("geometry3k/test/2/data.json", INTERGPS),
        ("geometry3k/test/10/data.json", {**INTERGPS, "answer": "D"}),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows))
    for name in (
        "mathverse/images/images_version_1-4/image_1.png",
        "wemath/images/1.png",
        "hallubench/images/VD/chart/0_1.png",
        "mathvision/images/3.jpg",
        "geometry3k/test/2/img_diagram.png",
        "geometry3k/test/10/img_diagram.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    write_tsv(folder / "mathvision" / "MathVision.tsv", [TSV])


INTERGPS = {
    "annotat_text": "Find x.",
    "problem_text": "Find $x$.",
    "choices": ["1", "2", "3", "4"],
    "answer": "C",
    "problem_type_goal": ["Length"],
}


def write_tsv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def zipped(folder: Path, archive: Path, top: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            opened.write(file, top + str(file.relative_to(folder)))
    return archive


@pytest.mark.parametrize("kind", ["hub", "hub, top folder", "archive", "unzipped", "unzipped here"])
def test_noisyrollouts_data_is_found_and_unzipped_by_itself(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, hub = tmp_path / "data", tmp_path / "hub"
    hub.mkdir()
    noisyrollout_data(data if kind != "unzipped here" else hub / "eval_data")
    if kind.startswith("unzipped"):
        path = data if kind == "unzipped" else hub
    else:
        archive = zipped(data, hub / "eval_data.zip", "eval_data/" if "top" in kind else "")
        path = archive if kind == "archive" else hub
    found = {
        name: listed(shipped(name, path=str(path)).tasks)
        for name in ("mathverse", "wemath", "hallusionbench", "mathvision")
    }
    (verse,), (math_we,), (seen, unseen), (vision,) = found.values()
    assert (verse.answers, verse.metadata["options"]) == (("A",), ["3000", "4"])
    assert (math_we.id, math_we.metadata["options"]) == ("7@2steps_1", ["1", "2"])
    assert (seen.answers, len(unseen.images)) == (("yes",), 0)
    assert "\\boxed{yes} or \\boxed{no}" in seen.question
    assert (vision.id, vision.question, vision.metadata["answer_kind"]) == (
        "3",
        "How many?",
        "math",
    )
    assert all(task.images[0].open().size == (30, 30) for task in (verse, math_we, seen, vision))
    unzipped_once = list((tmp_path / "cache").rglob("testmini.json"))
    assert len(unzipped_once) == (0 if kind.startswith("unzipped") else 2)


def test_geometry_with_a_folder_per_problem_is_a_benchmark_too(tmp_path: Path) -> None:
    noisyrollout_data(tmp_path)
    for path in (tmp_path / "geometry3k", tmp_path / "geometry3k" / "test"):
        loaded = shipped("geometry3k", path=str(path))
        found = {task.id: task.answers for task in listed(loaded.tasks)}
        assert found == {"2": ("3",), "10": ("4",)}
        assert list(found) == ["2", "10"]
        assert loaded.tasks[0].images[0].open().size == (30, 30)
        assert len(loaded.files) == 1


def test_an_archive_without_the_benchmark_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text("[]")
    archive = zipped(tmp_path / "data", tmp_path / "eval_data.zip")
    with pytest.raises(DataError, match=r"no folder 'wemath'.\n.*wemath\.folder .*\(none\)"):
        shipped("wemath", path=str(archive))


# Archives


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reopold-agent" / "unzipped"


def test_an_archive_is_unzipped_once_and_again_when_it_changed(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one")
    archive = zipped(tmp_path / "data", tmp_path / "a.zip")
    first = unzipped(archive)
    (first / "mark").touch()
    assert unzipped(archive) == first
    assert (first / "mark").exists()
    (tmp_path / "data" / "a.txt").write_text("two, longer")
    second = unzipped(zipped(tmp_path / "data", archive))
    assert second != first
    assert (second / "a.txt").read_text() == "two, longer"


def test_a_damaged_or_hostile_archive_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one" * 1000)
    archive = zipped(tmp_path / "data", tmp_path / "cut.zip")
    data = bytearray(archive.read_bytes())
    data[60] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot unzip .*cut\.zip"):
        unzipped(archive)
    for name in ("../out.txt", "/etc/out.txt", "a/../../out.txt"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as opened:
            opened.writestr("good.txt", "1")
            opened.writestr(name, "x")
        with pytest.raises(DataError, match="leaves the data folder"):
            unzipped(tmp_path / "bad.zip")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert not (tmp_path / "out.txt").exists()


def test_an_archive_larger_than_the_disk_is_refused_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one" * 1000)
    archive = zipped(tmp_path / "data", tmp_path / "a.zip")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2999))
    with pytest.raises(DataError, match=r"needs 0\.0 GB unzipped.*\n.*XDG_CACHE_HOME"):
        unzipped(archive)


# VLMEvalKit's tsv files: pictures in base64, each once


def base64_png(size: int) -> str:
    return base64.b64encode(png(size)).decode()


def tsv(folder: Path, name: str, benchmark: str, rows: list[dict[str, Any]]) -> list[Task]:
    """Loads the file by its own path, and the same from its folder."""
    write_tsv(folder / f"{name}.tsv", rows)
    loaded = [
        listed(shipped(benchmark, path=str(path)).tasks)
        for path in (folder / f"{name}.tsv", folder)
    ]
    assert [task.id for task in loaded[0]] == [task.id for task in loaded[1]]
    return loaded[0]


def test_vlmevalkits_mathvision(tmp_path: Path) -> None:
    first = {**TSV, "question": "Which? <image1>", "image": base64_png(20), "answer": "B"}
    rows = [
        {**first, "choices": "['3', 'a, \"b\"']"},
        {**first, "index": "4", "image": "3", "answer": "7", "choices": "[]"},
        {**first, "index": "5", "question": "Which?\n(A) 1\n(B) 2", "choices": "['1', '2']"},
    ]
    one, two, three = tsv(tmp_path, "MathVision", "mathvision", rows)
    assert one.question == 'Which?\nOptions:\n(A) 3\n(B) a, "b"'
    assert one.metadata["answer_kind"] == "option"
    assert two.metadata["answer_kind"] == "math"
    assert [task.images[0].open().size for task in (one, two)] == [(20, 20), (20, 20)]
    assert three.question == "Which?\n(A) 1\n(B) 2"  # the options are there already


def test_vlmevalkits_mathvista(tmp_path: Path) -> None:
    row = {
        "index": "1",
        "question": "Hint: 请回答。\nQuestion: 哪一个?",
        "image": base64_png(20),
        "question_type": "multi_choice",
        "answer_type": "text",
        "answer": "圆",
        "answer_option": "B",
        "choices": "['三角形', '圆']",
        "task": "geometry problem solving",
        "precision": "",
    }
    free = {**row, "index": "2", "question_type": "free_form", "answer_type": "float",
            "answer": "1.5", "choices": "", "precision": "1.0"}  # fmt: skip
    choice, number = tsv(tmp_path, "MathVista_MINI", "mathvista", [row, free])
    assert choice.answers == ("B",)
    assert choice.metadata["category"] == "geometry problem solving"
    for response, right in (("圆", True), ("答案是B", True), ("\\boxed{三角形}", False)):
        options = choice.metadata["options"]
        assert grade(response, choice.answers, "option", options=options).correct == right
    assert (number.answers, number.metadata["precision"]) == (("1.5",), 1)
    count = {**free, "answer_type": "integer", "answer": "14"}
    (whole,) = tsv(tmp_path, "MathVista_MINI", "mathvista", [count])
    assert whole.metadata["precision"] == "whole"


def test_vlmevalkits_mathverse_wemath_and_hallusionbench(tmp_path: Path) -> None:
    for name in ("v", "w", "h"):
        (tmp_path / name).mkdir()
    picture = base64_png(20)
    row = {**MATHVERSE, "index": "1", "question": "Find x.", "image": picture}
    (verse,) = tsv(tmp_path / "v", "MathVerse_MINI", "mathverse", [row])
    assert verse.metadata["options"] == ["3000", "4"]
    row = {"index": "0", "ID": "7", "key": "3steps_multi", "question": "Which?", "answer": "C",
           "A": "1", "B": "2", "C": "3000, 4000", "D": "", "image": picture}  # fmt: skip
    (wemath,) = tsv(tmp_path / "w", "WeMath", "wemath", [row])
    assert wemath.metadata["options"] == ["1", "2", "3000, 4000"]
    assert (wemath.metadata["problem"], wemath.metadata["key"]) == ("7", "3steps_multi")
    assert "(C) 3000, 4000" in wemath.question
    rows = [
        {"index": f"hb_VD_figure_0_{figure}_{question}", "category": "VD", "l2-category": "figure",
         "question": "Is it?", "answer": answer, "image": picture}
        for figure, question, answer in ((0, 0, "Yes"), (1, 0, "No"), (0, 1, "No"))
    ]  # fmt: skip
    first, second, third = tsv(tmp_path / "h", "HallusionBench", "hallusionbench", rows)
    assert [task.answers for task in (first, second, third)] == [("yes",), ("no",), ("no",)]
    assert first.metadata["question"] == second.metadata["question"]
    assert first.metadata["figure"] == third.metadata["figure"] != second.metadata["figure"]


def test_empty_names_of_groups_are_not_the_word_none() -> None:
    row = {"category": "VD", "subcategory": None, "set_id": 0, "figure_id": None,
           "question_id": 2, "question": "Is it?", "answer": "Yes"}  # fmt: skip
    pictures = PictureFolder(Path())
    assert FORMATS["hallusionbench"](row, 5, Path(), pictures).id == "VD_0__2"
    empty = {**row, "set_id": None, "question_id": None, "index": None}
    assert FORMATS["hallusionbench"](empty, 5, Path(), pictures).id == "VD_5"


def test_any_file_of_vlmevalkit_is_a_benchmark_of_ones_own(tmp_path: Path) -> None:
    picture = base64_png(20)
    rows = [
        {"index": 1, "image": picture, "question": "Which?", "hint": "Look.", "A": "cat",
         "B": "dog", "answer": "B", "category": "animals"},
        {"index": 2, "image": f"['{picture}', '{picture}']", "question": "How many?", "hint": "",
         "A": "", "B": "", "answer": "['3', 'three']", "category": "counts"},
        {"index": 3, "image": "1", "question": "Where?", "hint": "", "A": "", "B": "",
         "answer": "[0, 1)", "category": "math"},
    ]  # fmt: skip
    write_tsv(tmp_path / "Mine.tsv", rows)
    mine = Benchmark("mine", "vlmevalkit", path=str(tmp_path / "Mine.tsv"))
    choice, count, interval = listed(load_benchmark(mine).tasks)
    assert choice.question == "Hint: Look.\nWhich?\nOptions:\n(A) cat\n(B) dog"
    assert (choice.answers, choice.metadata["answer_kind"]) == (("B",), "option")
    assert (count.answers, len(count.images)) == (("3", "three"), 2)
    assert (interval.answers, len(interval.images)) == (("[0, 1)",), 1)


def test_a_folder_of_all_vlmevalkit_files_is_read_for_one_benchmark(tmp_path: Path) -> None:
    row = {**MATHVERSE, "index": "1", "question": "Find x.", "image": base64_png(20)}
    for name in ("MathVerse_MINI", "MathVerse_MINI_Vision_Only", "MathVision_MINI",
                 "MathVista_MINI", "._MathVerse_MINI"):  # fmt: skip
        write_tsv(tmp_path / f"{name}.tsv", [row])
    loaded = shipped("mathverse", path=str(tmp_path))
    assert [Path(file).name for file in loaded.files] == ["MathVerse_MINI.tsv"]
    for name in ("aime25", "hallusionbench", "vstar"):
        with pytest.raises(DataError, match=r"MathVerse_MINI\.tsv, .*\n.*Name the file itself|set"):
            shipped(name, path=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"A": "1", "B": "2", "C": "", "D": "4"}, "option C of 4 is empty"),
        (dict.fromkeys("ABCDEFGHIJKL", "1"), "12 options; 10 are possible"),
        ({"choices": str(list(range(12)))}, "12 options; 10 are possible"),
        ({"choices": "['1', "}, "'choices' is no list"),
    ],
)
def test_options_that_cannot_be_lettered(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    write_tsv(tmp_path / "Mine.tsv", [{"index": 1, "question": "Which?", "answer": "B", **options}])
    with pytest.raises(BadRowsError, match=message):
        load_benchmark(Benchmark("mine", "vlmevalkit", path=str(tmp_path / "Mine.tsv")))


def test_a_quotation_mark_that_does_not_end_is_an_error(tmp_path: Path) -> None:
    lines = ["index\tquestion\tanswer", '1\t"How many?\t2', "2\tWhich?\tB", "3\tWhat?\tC"]
    (tmp_path / "Mine.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"cannot read .*Mine\.tsv"):
        load_benchmark(Benchmark("mine", "vlmevalkit", path=str(tmp_path / "Mine.tsv")))


def test_pictures_by_an_index_that_pandas_wrote(tmp_path: Path) -> None:
    row = {"question": "Which?", "answer": "B"}
    write_tsv(tmp_path / "Mine.tsv", [{**row, "index": "0.0", "image": base64_png(20)},
                                      {**row, "index": "1.0", "image": "0"}])  # fmt: skip
    tasks = load_benchmark(Benchmark("mine", "vlmevalkit", path=str(tmp_path / "Mine.tsv"))).tasks
    assert tasks[1].images[0].open().size == (20, 20)


def test_a_damaged_base64_picture_is_named(tmp_path: Path) -> None:
    write_tsv(tmp_path / "Mine.tsv", [{"index": 1, "image": base64_png(20)[:-3] + "!!!",
                                       "question": "Which?", "answer": "B"}])  # fmt: skip
    with pytest.raises(BadRowsError, match=r"Mine\.tsv, row 0: a picture in base64 is damaged"):
        load_benchmark(Benchmark("mine", "vlmevalkit", path=str(tmp_path / "Mine.tsv")))


# Hub trees


def test_mathvisions_hub_tree_has_two_splits(tmp_path: Path) -> None:
    row = {"id": "1", "question": "Find x. <image1>", "options": ["2", "3"], "answer": "A",
           "image": "images/1.jpg", "decoded_image": {"bytes": png(), "path": None},
           "level": 1, "subject": "algebra"}  # fmt: skip
    (tmp_path / "data").mkdir()
    for split in ("test", "testmini"):
        name = f"data/{split}-00000-of-00001-3532b8d3f1b4047a.parquet"
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / name)
    loaded = shipped("mathvision", path=str(tmp_path))
    (task,) = listed(loaded.tasks)
    assert task.images[0].open().size == (30, 30)
    assert task.metadata["options"] == ["2", "3"]
    assert [Path(file).name.startswith("test-") for file in loaded.files] == [True]


def test_tallyqa_takes_the_file_that_verltool_names(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    row = {"qid": "1", "question": "How many?", "answer": ["3"], "image": ["1.png"]}
    for name in ("tallyqa_mini3200", "tallyqa_full", "tallyqa_simple"):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    loaded = shipped("tallyqa", path=str(tmp_path))
    assert [Path(file).stem for file in loaded.files] == ["tallyqa_mini3200"]
    (tmp_path / "tallyqa_mini3200.parquet").unlink()
    with pytest.raises(DataError, match=r"split 'mini3200 or test'.*tallyqa_full\.parquet"):
        shipped("tallyqa", path=str(tmp_path))
    (tmp_path / "tallyqa_full.parquet").unlink()
    assert len(shipped("tallyqa", path=str(tmp_path)).tasks) == 1  # the only file


def test_a_missing_picture_among_many_is_left_out_and_named(tmp_path: Path) -> None:
    benchmark = mathvision_folder(tmp_path, ["Find x."] * 100)
    (tmp_path / "images" / "7.jpg").unlink()
    loaded = load_benchmark(benchmark)
    assert len(loaded.tasks) == 99
    assert "test.jsonl, row 7: the picture 'images/7.jpg' is neither" in loaded.left_out[0]
    for number in range(10, 15):
        (tmp_path / "images" / f"{number}.jpg").unlink()
    with pytest.raises(BadRowsError, match="6 of 100 rows"):
        load_benchmark(benchmark)


# LUFFY's file of repeated questions


def luffy_rows() -> list[dict[str, Any]]:
    return [
        {
            "data_source": source,
            "prompt": [
                {"role": "system", "content": "Think first."},
                {"role": "user", "content": f"{source} question {number}"},
            ],
            "reward_model": {"ground_truth": str(number), "style": "rule"},
            "extra_info": {"index": number, "split": "default"},
        }
        for source, count, repeats in (("aime", 3, 8), ("amc", 5, 4), ("math", 2, 1))
        for _ in range(repeats)
        for number in range(count)
    ]


def test_repeated_rows_are_one_question(tmp_path: Path) -> None:
    file = tmp_path / "valid.parquet"
    pq.write_table(pa.Table.from_pylist(luffy_rows()), file)
    counts = {"aime24": (3, 21), "amc23": (5, 15), "math500": (2, 0), "luffy": (10, 36)}
    for name, (questions, repeats) in counts.items():
        loaded = shipped(name, path=str(file))
        assert (len(loaded.tasks), loaded.repeats) == (questions, repeats)
    amc = listed(shipped("amc23", path=str(file)).tasks)
    assert {task.metadata["data_source"] for task in amc} == {"amc"}
    assert amc[0].metadata["answer_kind"] == "math"
    assert len({task.id for task in amc}) == 5
    limited = shipped("amc23", path=str(file), limit=2)
    assert [task.question for task in listed(limited.tasks)] == ["amc question 0", "amc question 1"]


def test_the_papers_file_has_30_and_83_questions() -> None:
    file = str(real_data("luffy", "valid.parquet"))
    counts = {"aime24": 30, "amc23": 83, "math500": 500, "minerva": 272, "olympiadbench": 675}
    for name, count in counts.items():
        loaded = shipped(name, path=file)
        assert len(loaded.tasks) == loaded.benchmark.questions == count
        assert loaded.tasks[0].metadata["system_message"].startswith("Your task is to follow")
    assert len(shipped("luffy", path=file).tasks) == sum(counts.values())


def test_a_column_that_no_row_has_selects_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(luffy_rows()), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"no rows with \{'data_src': 'aime'\}"):
        shipped("aime24", path=str(tmp_path / "rows.parquet"), where={"data_src": "aime"})


def test_the_same_benchmarks_read_qwens_files(tmp_path: Path) -> None:
    (tmp_path / "amc.jsonl").write_text('{"problem": "1 + 1?", "answer": 2.0}\n')
    (task,) = listed(shipped("amc23", path=str(tmp_path / "amc.jsonl")).tasks)
    assert (task.question, task.answers) == ("1 + 1?", ("2",))
    pq.write_table(pa.Table.from_pylist(luffy_rows()), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"no rows with \{'data_source': \['minerva'"):
        shipped("minerva", path=str(tmp_path / "rows.parquet"))


def test_a_rows_own_system_message_is_asked_unless_the_settings_have_one(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(luffy_rows()), tmp_path / "valid.parquet")
    tasks = shipped("amc23", path=str(tmp_path / "valid.parquet")).tasks
    first = {"split": "eval", "index": 0}

    def asked(name: str = "SingleTurn", task: Task | None = None, **settings: Any) -> list[str]:
        env = gymnasium.make(f"reopold/{name}-v0", data={"eval": tasks}, **settings)
        observation, info = env.reset(options=first if task is None else {"task": task})
        env.close()
        return [info["system_prompt"], observation["text"]]

    assert asked() == ["Think first.", "amc question 0"]
    assert asked(guideline="Go.") == ["Think first.", "amc question 0\n\nGo."]
    message, question = asked(system_message="")
    assert message == ""
    assert question.startswith("amc question 0\n\nPlease reason step by step")
    assert asked(system_message="Be brief.")[0] == "Be brief."
    message, question = asked("PixelReasoner")
    assert message.startswith("Think first.\n\n# Tools")
    assert "crop_image" in message
    tools = {"system_message": "Help.\n<tools>\n{}\n</tools>"}
    message = asked("PixelReasoner", replace(tasks[0], metadata=tools))[0]
    assert message.startswith("You are a helpful assistant.\n\n# Tools")
    assert asked(task=Task("t", "1 + 1?", ("2",)))[0] == ""
