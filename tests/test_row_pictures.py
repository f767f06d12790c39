"""Where rows have their pictures, and where the pictures stand in the text."""

from __future__ import annotations

import base64
import io
import json
import logging
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageSequence

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.data import load_tasks
from reopold_agent.data.demonstrations import load_demonstrations
from reopold_agent.data.export import write_verl
from reopold_agent.data.formats import pixel_reasoner_task, verl_task
from reopold_agent.data.pictures import PictureFolder, given_pictures, unread_columns
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
    Image.new("RGB", (30, 30)).save(tmp_path / "black.bmp")
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
SAID = {"role": "user", "content": "Which?"}
DATA = f"data:image/png;base64,{base64.b64encode(png(2)).decode()}"


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
    with pytest.raises(DataError, match="the type 'audio', which is not read"):
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
    assert load_parts(words, images=[]).images == ()
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


def film(kind: str, frames: int = 3) -> bytes:
    """A file with several frames; of an MPO they are views of one moment."""
    data = io.BytesIO()
    first, *others = (Image.new("RGB", (30, 30), (60 * n, 0, 0)) for n in range(1, frames + 1))
    first.save(data, kind, save_all=True, append_images=others)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_no_video_of_one_frame(folder: Path, kind: str) -> None:
    data = film(kind)
    (folder / "clip.bin").write_bytes(data)
    with zipfile.ZipFile(folder / "films.zip", "w") as archive:
        archive.writestr("packed.bin", data)
    told = "the video is an animation in one file; give its frames"
    named = {"image": ["clip.bin"], "is_video": True}
    for given in ({"videos": ["clip.bin"]}, {"video": "packed.bin"}, {"video": data},
                  {"frames": [["clip.bin"]]}, named):  # fmt: skip
        for source in ("pixel_reasoner", "verl"):
            with pytest.raises(DataError, match=told):
                load(folder, source, {**question(source), **given})
    part = {"type": "video", "video": "clip.bin"}
    with pytest.raises(DataError, match=told):
        load(folder, "verl", asked([part, {"type": "text", "text": "Which?"}]))
    answer = {"role": "assistant", "content": "It is 7."}
    shown = {"role": "user", "content": "<video>Which?"}
    (folder / "d").mkdir()
    (folder / "d" / "clip.bin").write_bytes(data)
    (folder / "d" / "rows.jsonl").write_text(
        json.dumps({"messages": [shown, answer], "videos": ["clip.bin"]})
    )
    with pytest.raises(DataError, match=f"row 0: .*{told}"):
        load_demonstrations({"path": str(folder / "d")})
    # As a picture it is its first frame, as before.
    task = load(folder, "pixel_reasoner", {**question("pixel_reasoner"), "image": ["clip.bin"]})
    assert (task.is_video, len(task.images)) == (False, 1)
    frames = list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))  # as the message says
    for n, frame in enumerate(frames):
        frame.convert("RGB").save(folder / f"f{n}.png")
    given = {"videos": [[f"f{n}.png" for n in range(len(frames))]]}
    task = load(folder, "pixel_reasoner", {**question("pixel_reasoner"), **given})
    assert (task.is_video, len(task.images)) == (True, 3)


def test_videos_of_one_frame_stay(folder: Path) -> None:
    (folder / "one.gif").write_bytes(film("GIF", 1))
    (folder / "two.jpg").write_bytes(film("MPO", 2))
    for name in ("one.gif", "two.jpg", "1.png"):
        row = {**question("pixel_reasoner"), "videos": [name]}
        task = load(folder, "pixel_reasoner", row)
        assert (task.is_video, len(task.images)) == (True, 1)


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


# Rows whose pictures would not be seen


SHOWN = [{"role": "user", "content": [{"type": "image", "image": "2.png"}, "Which?"]}]


@pytest.mark.parametrize("column", ["messages", "prompt", "message_list", "completion"])
@pytest.mark.parametrize(
    "messages",
    [
        SHOWN,
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
        [{"role": "user", "content": "<image>Which?", "images": ["2.png"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA}}]}],
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_pictures_in_messages_that_are_not_read_are_refused(
    folder: Path, source: str, messages: list[Any], column: str
) -> None:
    row = question(source)
    if column not in row:
        message = f"'{column}' holds pictures and is not read, and the row has none elsewhere"
        with pytest.raises(DataError, match=message):
            load(folder, source, {**row, column: messages})
        assert reds(load(folder, source, {**row, column: messages, "image": "2.png"})) == [2]
    with pytest.raises(DataError, match=rf"'extra_info.{column}' holds pictures and is not read"):
        load(folder, source, {**row, "extra_info": {column: messages}})


def test_messages_without_pictures_are_no_matter(folder: Path) -> None:
    words = [{"role": "user", "content": "Save it as a.png", "images": None, "id": "a.png"[:1]},
             {"role": "assistant", "content": [{"type": "text", "text": "a.png", "image": None}]},
             "plot.png"]  # fmt: skip
    for source in SOURCES:
        for given in (words, "Which?", None, 7):
            assert load(folder, source, {**question(source), "messages": given}).images == ()
    row = {"prompt": SHOWN, "reward_model": {"ground_truth": "7"}, "messages": SHOWN}
    assert reds(load(folder, "verl", row)) == [2]


@pytest.mark.parametrize(
    "text",
    ["![](2.png) Which?", "Look: ![a digit](img/2.JPG 'x')", '<img src="2.png"> Which?',
     "<img width=9 src=2.webp/>Which?", "![](https://host/2.jpg?width=9)", f"![]({DATA})",
     "![](<2.png>)", "![](2(1).png)"],
)  # fmt: skip
@pytest.mark.parametrize("source", SOURCES)
def test_a_picture_that_only_the_text_names_is_refused(
    folder: Path, source: str, text: str
) -> None:
    with pytest.raises(DataError, match=r"the text shows the picture '.*, but 0 pictures in"):
        load(folder, source, question(source, text))
    for shown in ("[image] Which?", "![](x) Which?", '<img src="a"> Which?', "Is a.png red?"):
        assert load(folder, source, question(source, shown)).question == shown
    marked = {**question(source, f"<image>{text} Hm?"), "images": ["2.png"]}
    assert reds(load(folder, source, marked)) == [2]


def test_only_the_users_words_show_pictures(folder: Path) -> None:
    said = [{"role": "system", "content": "Draw ![](a.png)"}, SAID,
            {"role": "assistant", "content": "![](a.png)"}, SAID]  # fmt: skip
    assert load(folder, "verl", {**question("verl"), "prompt": said}).images == ()
    said[1] = {"role": "user", "content": "![](a.png)"}
    with pytest.raises(DataError, match=r"the text shows the picture 'a\.png'"):
        load(folder, "verl", {**question("verl"), "prompt": said})


def test_a_demonstration_whose_text_names_a_picture_is_refused(folder: Path) -> None:
    file = folder / "rows.json"
    row = {"messages": [{"role": "user", "content": "![](2.png) Which?"},
                        {"role": "assistant", "content": "7"}]}  # fmt: skip
    file.write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"row 0: the text shows the picture '2\.png'"):
        load_demonstrations({"path": str(file)})


@pytest.mark.parametrize(
    "nothing",
    [[None], [None, None], [{"bytes": None, "path": None}], [{"url": ""}], [float("nan")]],
)
@pytest.mark.parametrize("source", SOURCES)
def test_a_list_of_nulls_is_a_missing_picture(
    folder: Path, source: str, nothing: list[Any]
) -> None:
    for given in ({"images": nothing}, {"extra_info": {"img_paths": nothing}}, {"videos": nothing}):
        with pytest.raises(DataError, match="is a list of nulls; give the pictures"):
            load(folder, source, {**question(source), **given})
    for none in (None, [], {"bytes": None, "path": None}, ""):
        assert load(folder, source, {**question(source), "images": none}).images == ()
    both = {**question(source), "images": ["2.png"], "extra_info": {"images": nothing}}
    assert reds(load(folder, source, both)) == [2]


def test_lists_of_nulls_in_parquet(folder: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{**question("math_jsonl"), "id": str(i)} for i in range(3)]

    def tasks(kind: pa.DataType, *values: Any) -> Any:
        table = pa.Table.from_pylist(rows).append_column("images", pa.array(values, kind))
        pq.write_table(table, folder / f"{len(list(folder.glob('*.parquet')))}.parquet")
        newest = folder / f"{len(list(folder.glob('*.parquet'))) - 1}.parquet"
        return load_tasks({"source": "math_jsonl", "path": str(newest)})

    empty = {"bytes": None, "path": None}
    found = tasks(kind, {"bytes": png(2), "path": "2.png"}, None, empty)
    assert [len(task.images) for task in found] == [1, 0, 0]
    found = tasks(pa.list_(kind), [{"bytes": png(2), "path": "2.png"}], None, [])
    assert [len(task.images) for task in found] == [1, 0, 0]
    with pytest.raises(DataError, match="'images' is a list of nulls"):
        tasks(pa.list_(kind), [{"bytes": png(2), "path": "2.png"}], None, [empty])


@pytest.mark.parametrize(
    "column", ["image_id", "imageId", "image_name", "photo_url", "imageUrl", "photo", "img_names"]
)
def test_a_column_that_names_a_picture_is_reported_where_there_is_none(
    folder: Path, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "Which?", "answer": "7", "qid": str(i), column: f"a{i}"} for i in range(3)]
    rows += [{**rows[0], "qid": "p", "image": "2.png"}, {**rows[0], "qid": "n", column: None}]
    (folder / "rows.json").write_text(json.dumps(rows))
    tasks: Any = load_tasks({"source": "pixel_reasoner", "path": str(folder / "rows.json")})
    assert len(tasks) == 5
    assert tasks.report.record()["unread_columns"] == {column: 3}
    assert caplog.text.count(f"'{column}' that looks like pictures and is not read") == 1
    for other in ("image_size", "image_width", "has_image", "question_id", "image_caption"):
        assert unread_columns({other: "x"}, by_name=True) == []


def test_an_object_with_two_names_is_refused(folder: Path) -> None:
    row = question("pixel_reasoner")
    for two in ({"path": "1.png", "image": "2.png"}, {"image": "2.png", "url": "11.png"}):
        for value in (two, [two], [{"image": two}]):
            with pytest.raises(DataError, match="hold different pictures"):
                load(folder, "pixel_reasoner", {**row, "image": value})
    for same in (
        {"path": "2.png", "image": "images/2.png"},
        {"path": "2.png", "source": "coco", "url": "https://host/9.png"},
        {"bytes": png(2), "path": "a.png", "image": "b.png"},
    ):
        assert reds(load(folder, "pixel_reasoner", {**row, "image": [same]})) == [2]


def test_the_mark_of_a_geometry_problem_is_stripped(folder: Path) -> None:
    row = {"annotat_text": "<image>Find x.", "choices": ["3", "7"], "answer": "B", "id": 1,
           "image": "2.png"}  # fmt: skip
    task = load(folder, "geometry3k_intergps", row)
    assert (task.question, task.answers, reds(task)) == ("Find x.", ("7",), [2])
    with pytest.raises(DataError, match="the question has no words beside its picture"):
        load(folder, "geometry3k_intergps", {**row, "annotat_text": "<image>"})


# Wherever a row has its pictures, none is lost


def asked(content: Any, **keys: Any) -> dict[str, Any]:
    """Returns a row of verl with one question."""
    message = {"role": "user", "content": content, **keys}
    return {"prompt": [message], "reward_model": {"ground_truth": "7"}}


@pytest.mark.parametrize(
    "place",
    [
        {"extra_info": {"image": "2.png"}},
        {"extra_info": {"img_paths": ["2.png"]}},
        {"extra_info": {"multi_modal_data": {"image": [{"image": "2.png"}]}}},
        {"multi_modal_data": {"image": ["2.png"]}},
        {"multi_modal_data": {"images": [{"path": "2.png"}], "video": None}},
        {"Image": "2.png"},
        {"image_file": "2.png"},
        {"image_bytes": png(2)},
        {"decoded_image": {"bytes": png(2), "path": "x.png"}, "image": "images/x.png"},
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_no_usual_place_of_pictures_is_overlooked(
    folder: Path, source: str, place: dict[str, Any]
) -> None:
    task = load(folder, source, {**question(source, "Is <image> red?"), **place})
    assert (task.question, reds(task)) == (f"Is {M} red?", [2])


def test_frames_in_multi_modal_data_are_a_video(folder: Path) -> None:
    row = {**asked("Which?"), "multi_modal_data": {"image": [], "video": [["1.png", "3.png"]]}}
    task = load(folder, "verl", row)
    assert (task.is_video, reds(task)) == (True, [1, 3])


@pytest.mark.parametrize(
    ("columns", "order"),
    [
        ({"image": "3.png", "image2": "1.png"}, [3, 1]),
        ({"image_10": "1.png", "image_2": "2.png", "image_1": "3.png", "image_3": None}, [3, 2, 1]),
        ({"image": "3.png", "image_1": "3.png", "image_2": "1.png"}, [3, 1]),
        ({"images": ["3.png"], "images_2": ["1.png", "2.png"]}, [3, 1, 2]),
        ({"images": ["3.png", "1.png"], "image_1": "images/3.png", "image_2": "./1.png"}, [3, 1]),
        ({"image": DATA, "picture": png(2)}, [2]),
        ({"image_url": "https://host/photos/2.png?width=9", "image": "2.png"}, [2]),
        ({"image": "2.png", "picture": png(2)}, [2]),
        ({"image": "2.png", "video": False, "extra_info": {"images": None}}, [2]),
        ({"image_path": "black.bmp", "image": base64.b64encode(png(0)).decode()}, [0]),
        ({"images": ["2.png"], "extra_info": {"images": [{"image": "2.png"}]}}, [2]),
        ({"images": [{"bytes": png(2), "path": None}], "extra_info": {"image": "raw/9.png"}}, [2]),
    ],
)
def test_columns_that_repeat_or_continue_another_one(
    folder: Path, columns: dict[str, Any], order: list[int]
) -> None:
    for source in SOURCES:
        assert reds(load(folder, source, {**question(source), **columns})) == order


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"images": ["1.png"], "extra_info": {"image": "2.png"}},
         "'images' and 'extra_info.image' hold different pictures; put all of them into one"),
        ({"image": "1.png", "image_1": "2.png"}, "'image' and 'image_1' hold different pictures"),
        ({"image": "1.png", "images": ["1.png", "2.png"]}, "hold different pictures"),
        ({"image": png(1), "picture": png(2)}, "hold different pictures"),
        ({"image": "1.png", "picture": DATA}, "'picture' and 'image' hold different pictures"),
        ({"image": "1.png", "picture": "11.png"}, "hold different pictures"),
        ({"frames": ["1.png"], "videos": [["2.png"]]}, "hold different pictures"),
        ({"video_1": ["1.png"], "video_2": ["2.png"]}, "2 videos in one row"),
        ({"images": ["1.png"], "extra_info": {"video": ["2.png"]}},
         "both pictures and a video, in 'images' and 'extra_info.video'"),
        ({"images": ["clip.mp4"]}, "'clip.mp4' is a video file"),
        ({"videos": [{"video": {"path": "clip.MP4"}}]}, "'clip.MP4' is a video file"),
        ({"video_path": "clip.mp4"}, "'clip.mp4' is a video file"),
        ({"audios": ["a.wav"]}, "'audios' would be lost"),
        ({"images": [[[[[[[[[["1.png"]]]]]]]]]]}, "a picture must be a path or bytes, got list"),
        ({"images": ["nan"]}, "no picture"),
        ({"image": {"name": "1.png"}}, "a picture's object has name; it must have 'bytes'"),
        ({"is_video": True}, "'is_video' is true, but the row has no pictures"),
        ({"extra_info": {"is_video": "true"}}, "'is_video' is true, but the row has no pictures"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", SOURCES)
def test_pictures_that_would_be_lost_are_refused(
    folder: Path, source: str, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(folder, source, {**question(source), **columns})


def test_the_file_of_a_video_whose_frames_are_given_is_no_second_one(folder: Path) -> None:
    row = {**asked("Which?"), "images": ["1.png", "2.png"],
           "extra_info": {"is_video": True, "video_path": "clip.mp4"}}  # fmt: skip
    assert reds(load(folder, "verl", row)) == [1, 2]
    row["extra_info"]["is_video"] = False
    with pytest.raises(DataError, match="both pictures and a video"):
        load(folder, "verl", row)


def test_a_message_with_pictures_of_its_own(folder: Path) -> None:
    task = load(folder, "verl", asked("Which?", images=["2.png"]))
    assert (task.question, reds(task)) == ("Which?", [2])
    row = asked("After <image> comes <image>?", images=["2.png", "1.png"])
    row["prompt"][:0] = [{"role": "user", "content": "Look.", "image": {"path": "3.png"}},
                         {"role": "assistant", "content": "Yes."}]  # fmt: skip
    task = load(folder, "verl", {**row, "images": ["3.png", "2.png", "1.png"]})  # they repeat
    assert task.history[0] == ("user", f"{M}Look.")
    assert (task.question, reds(task)) == (f"After {M} comes {M}?", [3, 2, 1])
    task = load(folder, "verl", asked("<video>Which?", videos=[["1.png", "2.png"]]))
    assert (task.is_video, task.question, reds(task)) == (True, "Which?", [1, 2])
    for content, keys, message in (
        ("<image>Which?", {"images": ["1.png", "2.png"]}, "1 picture mark in the text, but 2"),
        ([{"type": "image", "image": "1.png"}, "?"], {"images": ["2.png"]}, "different pictures"),
        ("Which?", {"screenshot": "1.png"}, "'screenshot' of a message is not read"),
        ("Which?", {"audio": "a.wav"}, "'audio' of a message is not read"),
    ):
        with pytest.raises(DataError, match=message):
            load(folder, "verl", asked(content, **keys))
    row = asked("Which?")
    row["prompt"][:0] = [{"role": "system", "content": "Look.", "images": ["1.png"]}]
    with pytest.raises(DataError, match="only the user's messages may hold pictures"):
        load(folder, "verl", row)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": DATA.partition(",")[2]}},
        {"type": "image", "source": {"type": "url", "url": "2.png"}},
        {"type": "input_image", "image_url": DATA, "detail": "high"},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}},
        {"type": "image", "image": "2.png", "min_pixels": 3136, "text": None},
        {"type": "image", "images": ["2.png"]},
    ],
)  # fmt: skip
def test_parts_as_other_programs_write_them(folder: Path, part: dict[str, Any]) -> None:
    say = {"type": "input_text", "text": "Is"}
    task = load(folder, "verl", asked([say, part, {"type": "text", "text": "red?"}]))
    assert (task.question, reds(task)) == (f"Is{M}red?", [2])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "input_audio", "text": "Hear", "input_audio": {"data": "x"}},
         "the type 'input_audio', which is not read; text, image and video are"),
        ({"type": "file", "text": "Read"}, "the type 'file', which is not read"),
        ({"type": "tool_result", "content": "8"}, "the type 'tool_result', which is not read"),
        ({"type": "text", "text": "Read", "file": {"file_id": "f"}}, "'file' of a part"),
        ({"type": "text", "text": "Look", "source": {"url": "1.png"}}, "'text' has 'source'"),
        ({"type": "text", "text": "", "image": "1.png"}, "both text and a picture"),
        ({"type": "image", "text": "Look"}, "both text and a picture"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "object has type, file_id"),
        ({"type": "image", "video": ["1.png"]}, "the type 'image' has a video"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "'a.mp4' is a video file"),
        ({"type": "video", "path": "a.mp4"}, "'a.mp4' is a video file"),
    ],
)  # fmt: skip
def test_parts_that_would_be_lost_are_refused(
    folder: Path, part: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(folder, "verl", asked([{"type": "text", "text": "Which?"}, part]))


def test_pictures_in_parts_and_in_columns_must_be_the_same(folder: Path) -> None:
    def row(*values: Any, **more: Any) -> dict[str, Any]:
        return {**asked([*({"type": "image", "image": value} for value in values), "?"]), **more}

    task = load(folder, "verl", {**row("2.png", DATA), "images": ["images/2.png", DATA]})
    assert reds(task) == [2, 2]
    for given in (["3.png", "1.png"], ["2.png", "1.png"], [DATA, "2.png"]):
        with pytest.raises(DataError, match="the row's columns hold different pictures; leave"):
            load(folder, "verl", row("1.png", "2.png", images=given))
    with pytest.raises(DataError, match="some parts of the messages hold pictures and others mark"):
        load(folder, "verl", row("1.png", None, images=["2.png"]))
    films = [{"type": "video", "video": [name]} for name in ("1.png", "2.png")]
    with pytest.raises(DataError, match="2 videos in the messages"):
        load(folder, "verl", asked([*films, "Which?"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is <Image> red?", f"Is {M} red?"),
        ("Is <IMAGE_1> red?", f"Is {M} red?"),
        ("Is <|image_pad|> red?", f"Is {M} red?"),
        ("Is <|vision_start|><|image_pad|><|image_pad|><|vision_end|> red?", f"Is {M} red?"),
        ("<image>What does <img> do in [image1]?", "What does <img> do in [image1]?"),
        (r"Find $\text{image}(f)$, [1] and <b>.", r"Find $\text{image}(f)$, [1] and <b>."),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_marks_in_the_forms_of_other_programs(
    folder: Path, source: str, text: str, expected: str
) -> None:
    task = load(folder, source, {**question(source, text), "images": ["2.png"]})
    assert (task.question, reds(task)) == (expected, [2])


@pytest.mark.parametrize("mark", ["<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>"])
def test_marks_of_videos_in_the_forms_of_other_programs(folder: Path, mark: str) -> None:
    row = {**question("pixel_reasoner", f"After {mark} comes?"), "videos": [["1.png", "2.png"]]}
    assert load(folder, "pixel_reasoner", row).question == f"After {M * 2} comes?"


@pytest.mark.parametrize(
    "mark",
    ["<img>", '<img src="a">', "[image1]", "[Image]", "{image}", "<image_placeholder>",
     "<ImageHere>", "<|image|>", "<|vision_start|>", "<picture 1>", "![](1)"],
)  # fmt: skip
@pytest.mark.parametrize("source", SOURCES)
def test_what_looks_like_a_mark_is_refused_where_pictures_have_none(
    folder: Path, source: str, mark: str
) -> None:
    row = question(source, f"Is {mark} red?")
    with pytest.raises(DataError, match="in the text is no mark that is read; write <image>"):
        load(folder, source, {**row, "images": ["2.png"]})
    assert load(folder, source, row).question == f"Is {mark} red?"  # words, without pictures
    if source == "verl":
        with pytest.raises(DataError, match="in the text is no mark that is read; write <image>"):
            load(folder, source, asked(f"Is {mark} red?", images=["2.png"]))


@pytest.mark.parametrize("text", ["<video>Which?", "What does <video> do?", "<|video_pad|>?"])
def test_the_mark_of_a_video_takes_no_picture(folder: Path, text: str) -> None:
    for source in SOURCES:
        row = {**question(source, text), "images": ["1.png"]}
        with pytest.raises(DataError, match="the row's pictures are no video; say so with 'is_vi"):
            load(folder, source, row)


def test_rows_as_pandas_reads_them(folder: Path) -> None:
    pictures = PictureFolder(folder)
    row = {
        "prompt": np.array(
            [{"role": "user", "content": np.array(["Is ", "<image> red?"], object)}]
        ),
        "images": np.array([{"image": "2.png"}], object),
        "extra_info": {"images": np.array(["2.png"], object)},
        "reward_model": {"ground_truth": np.array(["7", "seven"], object)},
    }
    task = verl_task(row, 0, pictures)
    assert (task.question, reds(task), task.answers) == (f"Is {M} red?", [2], ("7", "seven"))
    film = {"question": "Which?", "answer": "7", "is_video": np.bool_(True),
            "image": np.array(["1.png", "2.png"], object)}  # fmt: skip
    task = pixel_reasoner_task(film, 0, pictures)
    assert (task.is_video, reds(task)) == (True, [1, 2])
    task = verl_task(
        {**row, "images": [], "extra_info": float("nan"), "prompt": [SAID]}, 5, pictures
    )
    assert (task.id, task.images) == ("5", ())
    assert given_pictures({"images": np.array([], object)}).values == ()
    empty = {"image": PurePosixPath("2.png"), "question": "Which?", "answer": "7"}
    assert reds(pixel_reasoner_task(empty, 0, pictures)) == [2]


@pytest.mark.parametrize(
    "value",
    [
        *(f"a.{ending}" for ending in ("jfif", "heic", "avif", "svg", "JPEG", "mp4")),
        "https://host/a.png?width=9#x", PurePosixPath("a.png"), np.array(["a.png"], object),
        [None, "a.png"], {"name": "a.png"}, b"\0\0\0 ftypavif", png(1), DATA,
        base64.b64encode(png(1)).decode(),
    ],
)  # fmt: skip
def test_what_looks_like_a_picture(value: Any) -> None:
    assert unread_columns({"screenshot": value}) == ["screenshot"]
    assert unread_columns({"extra_info": {"screenshot": value}}) == ["extra_info.screenshot"]
    assert unread_columns({"image_2": value, "extra_info": {"img_path": value}}) == []
    assert unread_columns({"prompt": [{"role": "user", "content": [{"image": "a.png"}]}]}) == []
    deep = json.loads("[" * 900 + "]" * 900)
    assert unread_columns({"other": [deep], "deep": {"x": deep}}) == []
    assert unread_columns({"other": ["a", 1, None], "page": "https://host/a?x=b.png"}) == []


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


def test_what_earlier_turns_would_lose_is_refused(folder: Path) -> None:
    call = {"type": "function", "function": {"name": "crop_image", "arguments": "{}"}}
    for keys, message in (
        ({"tool_calls": [call]}, "'tool_calls' of an earlier turn would be lost; write them"),
        ({"tool_calls": [], "reasoning_content": "Hm."}, "'reasoning_content' of a message"),
        ({"content": "\ud800"}, "half a surrogate pair"),
        ({"content": None}, "a message of the role assistant has no 'content'"),
    ):
        said = {"role": "assistant", "content": "I look.", **keys}
        with pytest.raises(DataError, match=message):
            load(folder, "verl", conversation(*CONVERSATION[:2], said, CONVERSATION[3]))
    said = {"role": "assistant", "content": "I look.", "tool_calls": None, "name": "x"}
    task = load(folder, "verl", conversation(*CONVERSATION[:2], said, CONVERSATION[3]))
    assert task.history[1] == ("assistant", "I look.")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_message_in_a_column(folder: Path, name: str) -> None:
    def system(*messages: Any, **columns: Any) -> Any:
        task = load(folder, "verl", {**conversation(*messages), **columns})
        assert task.question == f"And {M} now?"
        return task.metadata.get("system_message")

    assert system(*CONVERSATION[1:], **{name: "Look twice."}) == "Look twice."
    assert system(*CONVERSATION[1:], **{name: ""}) is None
    said = CONVERSATION[0]["content"]
    assert system(*CONVERSATION, **{name: said}) == said
    for other in ({name: "Look twice."}, {name: 7}):
        with pytest.raises(DataError, match="system message"):
            system(*CONVERSATION, **other)
    with pytest.raises(DataError, match="half a surrogate pair"):
        system(*CONVERSATION[1:], **{name: "\ud800"})


@pytest.mark.parametrize("content", [7, True, {"text": "Look."}])
@pytest.mark.parametrize("role", ["system", "user"])
def test_the_content_of_a_message_is_a_text_or_parts(folder: Path, role: str, content: Any) -> None:
    row = conversation({"role": role, "content": content}, *CONVERSATION[1:])
    with pytest.raises(DataError, match="must be a text or a list of parts"):
        load(folder, "verl", row)
