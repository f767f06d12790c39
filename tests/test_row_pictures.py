"""Where rows have their pictures, and where the pictures stand in the text."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.data import load_tasks
from reopold_agent.data.export import write_verl
from reopold_agent.errors import DataError
from reopold_agent.types import IMAGE_MARK, Task

M = IMAGE_MARK


def png(red: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (30, 30), (red, 0, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for red in (1, 2, 3):
        (tmp_path / "images" / f"{red}.png").write_bytes(png(red))
    return tmp_path


def load(folder: Path, source: str, row: dict[str, Any], **settings: Any) -> Task:
    name = f"rows{len(list(folder.glob('rows*')))}"
    try:
        file = folder / f"{name}.json"
        file.write_text(json.dumps([row]))
    except TypeError:  # bytes
        file = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), file)
    task: Task = load_tasks({"source": source, "path": str(file), **settings})[0]
    return task


def reds(task: Task) -> list[int]:
    """Returns which pictures the task has."""
    return [int(np.asarray(image.open())[0, 0, 0]) for image in task.images]


def question(source: str, text: str = "Which?") -> dict[str, Any]:
    if source == "verl":
        return {"prompt": [{"role": "user", "content": text}],
                "reward_model": {"ground_truth": "7"}}  # fmt: skip
    return {"question": text, "problem": text, "answer": "7"}


SOURCES = ("pixel_reasoner", "verl", "math_jsonl", "geometry3k")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("column", ["image", "images", "img", "image_path", "picture", "pictures"])
@pytest.mark.parametrize(
    "shape",
    [
        "path",
        "list",
        "object",
        "url object",
        "bytes",
        "bytes object",
        "base64",
        "data",
        "text",
    ],
)
def test_pictures_are_read_under_every_usual_name_and_in_every_usual_form(
    folder: Path, source: str, column: str, shape: str
) -> None:
    packed = base64.b64encode(png(2)).decode()
    value: Any = {
        "path": "images/2.png",
        "list": ["2.png"],
        "object": [{"image": "2.png"}],
        "url object": [{"path": f"file://{folder}/images/2.png"}],
        "bytes": png(2),
        "bytes object": [{"bytes": png(2), "path": None}],
        "base64": packed,
        "data": [f"data:image/png;base64,{packed}"],
        "text": "['2.png']",
    }[shape]
    task = load(folder, source, {**question(source), column: value})
    assert reds(task) == [2]
    assert task.question == "Which?"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("text", "pictures", "message"),
    [
        ("<image>Which?", 0, "1 picture mark in the text, but 0 pictures in the row"),
        ("<image>Which?", 2, "1 picture mark in the text, but 2 pictures in the row"),
        ("<image> or <image>?", 1, "2 picture marks in the text, but 1 picture in the row"),
        ("<video>Which?", 0, "1 picture mark in the text, but 0 pictures in the row"),
        ("<image1> or <image1>?", 2, "the marks <image1>, <image1> in the text, but 2 pictures"),
        ("Is <image 2> before <image 1>?", 2, "the marks <image2>, <image1> in the text"),
        ("<image2>?", 1, "the marks <image2> in the text, but 1 picture in the row"),
    ],
)
def test_marks_and_pictures_must_agree(
    folder: Path, source: str, text: str, pictures: int, message: str
) -> None:
    shown = [f"{number}.png" for number in range(1, pictures + 1)]
    row = {**question(source, text), **({"images": shown} if shown else {})}
    with pytest.raises(DataError, match=message):
        load(folder, source, row)


@pytest.mark.parametrize(
    ("text", "pictures", "expected", "order"),
    [
        ("Which?", 2, "Which?", [1, 2]),
        ("<image>\n<image>\nWhich?", 2, "Which?", [1, 2]),
        ("Is <image> before <image>?", 2, f"Is {M} before {M}?", [1, 2]),
        ("<image>Which one follows? <image>", 2, f"{M}Which one follows? {M}", [1, 2]),
        ("Is <image 1> before <image_2>?", 2, f"Is {M} before {M}?", [1, 2]),
        ("Is <|image_1|> red?", 1, f"Is {M} red?", [1]),
        ("Here:<|vision_start|><|image_pad|><|vision_end|>?", 1, f"Here:{M}?", [1]),
        (f"Is {M} a mark? <image>", 1, f"Is   a mark? {M}", [1]),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_pictures_stand_where_their_marks_are(
    folder: Path, source: str, text: str, pictures: int, expected: str, order: list[int]
) -> None:
    shown = [f"{number}.png" for number in range(1, pictures + 1)]
    task = load(folder, source, {**question(source, text), "images": shown})
    assert task.question == expected
    assert reds(task) == order


def test_content_as_parts_with_and_without_the_pictures(folder: Path) -> None:
    def row(*parts: Any, **more: Any) -> dict[str, Any]:
        prompt = [{"role": "user", "content": list(parts)}]
        return {"prompt": prompt, "reward_model": {"ground_truth": "7"}, **more}

    say = {"type": "text", "text": "Is"}
    for first, second in (
        ({"type": "image", "image": "2.png"}, {"type": "image", "image": "1.png"}),
        ({"type": "image_url", "image_url": {"url": "2.png"}}, {"image": {"path": "1.png"}}),
    ):
        task = load(folder, "verl", row(say, first, {"type": "text", "text": "or"}, second, "?"))
        assert (task.question, reds(task)) == (f"Is{M}or{M}?", [2, 1])
    mark = {"type": "image"}
    task = load(folder, "verl", row(mark, say, images=["3.png"]))
    assert (task.question, reds(task)) == ("Is", [3])
    own = {"type": "image", "image": "2.png"}
    task = load(folder, "verl", row(say, own, images=["2.png"]))  # the column repeats it
    assert reds(task) == [2]
    with pytest.raises(DataError, match="1 pictures in the messages"):
        load(folder, "verl", row(say, own, images=["1.png", "2.png"]))
    with pytest.raises(DataError, match="neither text nor picture: audio"):
        load(folder, "verl", row({"type": "audio", "audio": "a.wav"}))


def test_parts_as_parquet_stores_them(folder: Path) -> None:
    nothing: dict[str, Any] = {"image": {"bytes": None, "path": None}, "image_url": {"url": None},
                               "video": []}  # fmt: skip

    def load_parts(*parts: Any, **more: Any) -> Task:
        prompt = [{"role": "user", "content": list(parts)}]
        return load(
            folder, "verl", {"prompt": prompt, "reward_model": {"ground_truth": "7"}, **more}
        )

    words = {**nothing, "type": "text", "text": "Only if red: stop?"}
    task = load_parts(words, images=["1.png"])
    assert (task.question, reds(task)) == ("Only if red: stop?", [1])
    assert load_parts(words, images=[None]).images == ()
    assert reds(load_parts(words, {"type": "image", "path": "2.png"})) == [2]
    task = load_parts({"type": "video", "video": ["1.png", "2.png"]}, words)
    assert (task.is_video, reds(task)) == (True, [1, 2])
    with pytest.raises(DataError, match="both text and a picture"):
        load_parts({"text": "Look", "image": "1.png"})


def test_videos_are_frames(folder: Path) -> None:
    frames = ["1.png", "2.png", "3.png"]
    for text in ("Which?", "<video>Which?", "<image><image><image>Which?"):
        for given in ({"videos": [frames]}, {"videos": [{"video": frames}]}, {"frames": frames},
                      {"image": frames, "is_video": True}):  # fmt: skip
            task = load(folder, "pixel_reasoner", {**question("pixel_reasoner", text), **given})
            assert (task.question, task.is_video, reds(task)) == ("Which?", True, [1, 2, 3])
    interleaved = question("pixel_reasoner", "After <video> comes?")
    task = load(folder, "pixel_reasoner", {**interleaved, "videos": [frames]})
    assert task.question == f"After {M * 3} comes?"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"videos": ["clip.mp4"]}, "'clip.mp4' is a video file; give its frames"),
        ({"videos": [["1.png"], ["2.png"]]}, "2 videos in one row"),
        ({"videos": [["1.png"]], "images": ["2.png"]}, "both pictures and a video"),
        ({"image": ["1.png"], "is_video": "maybe"}, "'is_video' must be true or false"),
    ],
)
def test_videos_that_cannot_be_used(folder: Path, given: dict[str, Any], message: str) -> None:
    for source in ("pixel_reasoner", "verl"):
        with pytest.raises(DataError, match=message):
            load(folder, source, {**question(source), **given})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("False", False), ("true", True), ("0", False), (1, True), (1.0, True), ("", False),
     (None, False), (float("nan"), False), ("no", False), (True, True)],
)  # fmt: skip
def test_a_flag_that_is_written_as_text(folder: Path, value: Any, expected: bool) -> None:
    row = {**question("pixel_reasoner"), "image": ["1.png"], "is_video": value}
    assert load(folder, "pixel_reasoner", row).is_video is expected


def test_a_column_that_looks_like_pictures_is_reported_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "Which?", "answer": "7", "qid": str(i), "screenshot": f"{i}.png"}
            for i in range(3)]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        tasks: Any = load_tasks({"source": "pixel_reasoner", "path": str(folder / "rows.json")})
    assert "3 of 3 rows" in caplog.text
    assert caplog.text.count("'screenshot' that looks like pictures and is not read") == 1
    assert tasks.report.record()["unread_columns"] == {"screenshot": 3}


# Earlier turns and system messages


CONVERSATION = [
    {"role": "system", "content": "Pictures are marked <image>."},
    {"role": "user", "content": "Look: <image>"},
    {"role": "assistant", "content": "I see it."},
    {"role": "user", "content": "And <image> now?"},
]


def conversation(*messages: Any) -> dict[str, Any]:
    return {"prompt": list(messages), "images": ["2.png", "1.png"],
            "reward_model": {"ground_truth": "7"}}  # fmt: skip


def test_earlier_turns_and_the_system_message_are_kept(folder: Path) -> None:
    task = load(folder, "verl", conversation(*CONVERSATION))
    assert task.history == (("user", f"Look: {M}"), ("assistant", "I see it."))
    assert task.question == f"And {M} now?"
    assert task.metadata["system_message"] == "Pictures are marked <image>."
    write_verl([task], folder / "out" / "rows.parquet", split="train")
    again = load_tasks({"source": "verl", "path": str(folder / "out" / "rows.parquet")})[0]
    assert (again.history, again.question) == (task.history, task.question)
    assert again.metadata["system_message"] == task.metadata["system_message"]
    assert reds(again) == reds(task) == [2, 1]


@pytest.mark.parametrize(
    "roles",
    [("user", "assistant"), ("user", "user"), ("assistant", "user"), ("user", "system", "user"),
     ("user", "tool", "user")],
)  # fmt: skip
def test_turns_in_another_order_are_refused(folder: Path, roles: tuple[str, ...]) -> None:
    row = conversation(*({"role": role, "content": "Hm?"} for role in roles))
    with pytest.raises(DataError, match=r"user and assistant in turn|must have the role"):
        load(folder, "verl", row)


def test_an_environment_shows_earlier_turns(folder: Path) -> None:
    task = load(folder, "verl", conversation(*CONVERSATION))
    env = gymnasium.make("reopold/SingleTurn-v0", data={"eval": [task]}, guideline="")
    observation, info = env.reset(options={"split": "eval", "index": 0})
    env.close()
    (first, looked), (second, said) = info["history"]
    assert (first, looked["text"], second, said["text"]) == (
        "user", f"Look: {M}", "assistant", "I see it."
    )  # fmt: skip
    assert observation["text"] == f"And {M} now?"
    assert [looked["images"][0][0, 0, 0], observation["images"][0][0, 0, 0]] == [2, 1]


def test_pictures_without_marks_stand_before_the_question(folder: Path) -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Which?"}]  # fmt: skip
    task = load(folder, "verl", conversation(*messages))
    env = gymnasium.make("reopold/SingleTurn-v0", data={"eval": [task]}, guideline="")
    observation, info = env.reset(options={"split": "eval", "index": 0})
    env.close()
    assert observation["text"] == f"{M}{M}\nWhich?"
    assert not info["history"][0][1]["images"]
