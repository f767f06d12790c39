"""Recorded conversations with tool calls, results and weights, as exact ids and loss masks."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_picture
from gymnasium import Env
from PIL import Image
from running import composed, train, train_rows

from examples.embedded_models.digits.scripts import expert_turns, record
from reopold_agent.data.demonstrations import (
    Demonstration,
    RecordedCall,
    load_demonstrations,
)
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.envs.from_config import make_env
from reopold_agent.errors import DataError, ToolError
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.demonstrations import demonstrated
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.tools.parse import find_tool_call, write_tool_call
from reopold_agent.tools.prompt import system_prompt
from reopold_agent.types import IMAGE_MARK, Task, Trajectory

BOX = {"bbox_2d": [0.5, 0, 1, 0.5], "target_image": 1}
CALL = '<tool_call>\n{"name": "crop_image", "arguments": {"bbox_2d": [0.5, 0, 1, 0.5], ' \
    '"target_image": 1}}\n</tool_call>'  # fmt: skip
ASKED = {"role": "user", "content": "<image>Which digit?"}
SHOWN = "Here is the cropped image:\n<image>"
ANSWER = {"role": "assistant", "content": "\\boxed{7}"}
ASK = {"role": "user", "content": "?"}
SAY = {"role": "assistant", "content": "!"}


def openai(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": "call_1", "type": "function", "function": function}


def hugging_face(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def bare(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


FORMS = (openai, hugging_face, bare)


@pytest.fixture(scope="module")
def runner_of() -> Callable[..., RolloutRunner]:
    """``runner_of(stop_at_tool_call=True)``: the embedded default's."""
    processing = load_processing(ModelSpec("demo:student"), "student")
    config, _ = composed("env=pixel_reasoner")

    def make(*, stop_at_tool_call: bool = True) -> RolloutRunner:
        chat = ChatRenderer(processing.tokenizer, stop_at_tool_call=stop_at_tool_call)
        return make_runner(config, chat, processing.vision, max_turns=3)

    return make


@pytest.fixture
def rendered(tmp_path: Path, runner_of: Callable[..., RolloutRunner]) -> Callable[..., Trajectory]:
    """``rendered(messages, **columns)``: the trajectory of a row with two pictures."""
    for name in ("a.png", "b.png"):
        Image.fromarray(random_picture(ord(name[0]), 60, 60)).save(tmp_path / name)

    def render(messages: Sequence[Any], stop_at_tool_call: bool = True, **row: Any) -> Trajectory:
        row = {"images": ["a.png", "b.png"], "messages": messages, **row}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
        (found,) = load_demonstrations({"path": str(tmp_path / "rows.jsonl")})
        return demonstrated(found, 0, runner_of(stop_at_tool_call=stop_at_tool_call))

    return render


def same(one: Trajectory, other: Trajectory) -> bool:
    assert one.ids.tolist() == other.ids.tolist()
    assert one.loss_mask.tolist() == other.loss_mask.tolist()
    assert one.prompt_length == other.prompt_length
    assert [t.text for t in one.turns] == [t.text for t in other.turns]
    pairs = zip(one.images, other.images, strict=True)
    return all(np.array_equal(mine.pixels, its.pixels) for mine, its in pairs)


def trained_text(trajectory: Trajectory, runner: RolloutRunner) -> str:
    return runner.chat.raw(trajectory.ids[trajectory.loss_mask].tolist())


# Calls and results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("words", ["I will zoom in.", None, ""])
def test_a_call_is_written_as_the_student_must_write_it(
    rendered: Callable[..., Trajectory],
    runner_of: Callable[..., RolloutRunner],
    form: Callable[..., dict[str, Any]],
    words: str | None,
) -> None:
    call = {"role": "assistant", "content": words, "tool_calls": [form("crop_image", BOX)]}
    result = {"role": "tool", "tool_call_id": "call_1", "name": "crop_image", "content": SHOWN}
    mine = rendered([ASKED, call, result, ANSWER])
    text = f"{words}\n{CALL}" if words else CALL
    said = {"role": "assistant", "content": text}
    assert same(mine, rendered([ASKED, said, {"role": "user", "content": SHOWN}, ANSWER]))
    assert mine.turns[0].text == text
    assert trained_text(mine, runner_of()) == f"{text}\\boxed{{7}}<|im_end|>"
    parsed = find_tool_call(text)
    assert parsed is not None
    assert (parsed.name, parsed.arguments) == ("crop_image", BOX)


def test_the_experts_episode_is_that_of_a_rollout(
    tmp_path: Path, runner_of: Callable[..., RolloutRunner]
) -> None:
    """The environment's own results under the role tool, with pictures as data: URLs."""
    env: Env[Any, str] = make_env(composed("env=pixel_reasoner")[0], max_turns=3)
    tasks = DemoTasks("train", 64, 0, video_share=0.4, small_share=0.4)
    runner = runner_of()
    assert runner.vision is not None
    for kind in ("image", "video", "small_video"):
        task = next(t for t in (tasks[i] for i in range(64)) if t.metadata["kind"] == kind)
        row = {"id": task.id, "messages": openai_messages(env, task)}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
        (found,) = load_demonstrations({"path": str(tmp_path)})
        wanted = record(env, task, expert_turns(task), runner.chat, runner.vision)
        assert same(demonstrated(found, 0, runner), wanted), kind


def openai_messages(env: Env[Any, str], task: Task) -> list[dict[str, Any]]:
    def parts(observation: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for position, text in enumerate(observation["text"].split(IMAGE_MARK)):
            if position:
                url = data_url(observation["images"][position - 1])
                found.append({"type": "image_url", "image_url": {"url": url, "detail": "high"}})
            found += [{"type": "text", "text": text}] if text else []
        return found

    observation, info = env.reset(options={"task": task})
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": info["system_prompt"]},
        {"role": "user", "content": parts(observation)},
    ]
    for text in expert_turns(task):
        words, _, _ = text.partition("\n<tool_call>")
        parsed = find_tool_call(text)
        calls = [] if parsed is None else [openai(parsed.name, parsed.arguments)]
        messages.append({"role": "assistant", "content": words, "tool_calls": calls})
        observation, _, terminated, _, _ = env.step(text)
        if not terminated:
            messages.append({"role": "tool", "content": parts(observation)})
    return messages


def data_url(pixels: Any) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_several_calls_and_results_are_one_turn_each(rendered: Callable[..., Trajectory]) -> None:
    calls = [openai("crop_image", BOX), openai("crop_image", {**BOX, "target_image": 2})]
    messages = [
        {"role": "user", "content": "Look at both."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "One: <image>"},
        {"role": "tool", "content": [{"type": "text", "text": "Two: "}, {"type": "image"}]},
        ANSWER,
    ]
    second = CALL.replace('"target_image": 1', '"target_image": 2')
    plain = [
        messages[0],
        {"role": "assistant", "content": f"{CALL}\n{second}"},
        {"role": "user", "content": "One: <image>\nTwo: <image>"},
        ANSWER,
    ]
    mine = rendered(messages, stop_at_tool_call=False)
    assert same(mine, rendered(plain, stop_at_tool_call=False))
    # A student that stops at its first call could not write the second.
    with pytest.raises(DataError, match=r"several tool calls .* rollout\.stop_at_tool_call=false"):
        rendered(messages)


@pytest.mark.parametrize("weight", [0, 1])
def test_a_last_call_of_a_given_weight_needs_no_result(tmp_path: Path, weight: int) -> None:
    last = {**calls_of("b"), "weight": weight}
    found = demonstration(tmp_path, messages=[ASK, calls_of("a"), result("1", "a"), last])
    assert [turn.trained for turn in found.turns[1::2]] == [True, weight == 1]


def test_results_may_be_the_users_messages(tmp_path: Path) -> None:
    """As in Pixel-Reasoner's rows, which have no role tool."""
    messages = [ASK, calls_of("a"), ASK, calls_of("b"), ASK, SAY]
    for name in ("messages", "message_list"):
        found = demonstration(tmp_path, **{name: messages})
        assert [turn.role for turn in found.turns] == ["user", "assistant"] * 3


@pytest.mark.parametrize("after", [CALL, "Now I know: \\boxed{7}"])
def test_a_trained_turn_ends_with_its_first_call(
    rendered: Callable[..., Trajectory], runner_of: Callable[..., RolloutRunner], after: str
) -> None:
    said = {"role": "assistant", "content": f"Hm.\n{CALL}\n{after}"}
    with pytest.raises(DataError, match=r"words after one, .* rollout\.stop_at_tool_call=false"):
        rendered([ASKED, said], images=["a.png"])
    with pytest.raises(DataError, match=r"words after one, "):
        rendered([ASKED, said, {"role": "user", "content": SHOWN}, ANSWER])
    free = rendered([ASKED, said], images=["a.png"], stop_at_tool_call=False)
    trained = trained_text(free, runner_of(stop_at_tool_call=False))
    assert trained == f"{said['content']}<|im_end|>"
    turns = [ASKED, {**said, "weight": 0}, {"role": "user", "content": SHOWN}, ANSWER]
    assert trained_text(rendered(turns), runner_of()) == "\\boxed{7}<|im_end|>"


def test_white_space_after_a_call_is_not_taught(
    rendered: Callable[..., Trajectory], runner_of: Callable[..., RolloutRunner]
) -> None:
    def turns(call: str) -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": call}
        return [ASKED, said, {"role": "user", "content": SHOWN}, ANSWER]

    assert same(rendered(turns(f"{CALL} \n\n")), rendered(turns(CALL)))
    free = rendered(turns(f"{CALL}\n"), stop_at_tool_call=False)
    assert free.turns[0].text == f"{CALL}\n"


def test_nulls_that_parquet_adds_are_no_arguments(
    tmp_path: Path, runner_of: Callable[..., RolloutRunner]
) -> None:
    ask = {"role": "user", "content": "?"}
    calls = [
        hugging_face("crop_image", {"bbox_2d": [0, 0, 1, 1], "target_image": 1}),
        hugging_face("select_frames", {"target_frames": [1]}),
    ]
    rows = [
        {"messages": [ask, {"role": "assistant", "tool_calls": [call]}, result("1"), SAY]}
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = load_demonstrations({"path": str(tmp_path)})
    texts = [demonstrated(each, 0, runner_of()).turns[0].text for each in found]
    assert [json.loads(text.split("\n")[1])["arguments"] for text in texts] == [
        {"bbox_2d": [0, 0, 1, 1], "target_image": 1},
        {"target_frames": [1]},
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_an_experts_own_null_is_an_argument(tmp_path: Path, suffix: str) -> None:
    tool = {"name": "f", "parameters": {"enum": [1, None], "default": None}}
    call = {"role": "assistant", "content": None, "tool_calls": [bare("f", {"x": None})]}
    row = {"messages": [ASK, call, result("1"), SAY], "tools": [tool]}
    (tmp_path / f"rows.{suffix}").write_text(json.dumps(row if suffix == "jsonl" else [row]))
    (found,) = load_demonstrations({"path": str(tmp_path)})
    assert found.turns[1].parts == (RecordedCall("f", {"x": None}),)
    assert found.tools == (tool,)


def test_nulls_of_a_json_text_are_kept_in_parquet(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [openai("f", {"x": None})]}
    tool = {"name": "f", "parameters": {"default": None}}
    rows = [
        {"messages": [ASK, call, result("1"), SAY], "tools": json.dumps([tool])},
        {"messages": [ASK, SAY]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = load_demonstrations({"path": str(tmp_path)})
    assert found[0].turns[1].parts == (RecordedCall("f", {"x": None}),)
    assert found[0].tools == (tool,)


def calls_of(*ids: str | None) -> dict[str, Any]:
    calls = [{**bare("f", {"n": n}), "id": each} for n, each in enumerate(ids)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(content: str, answers: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": answers}


@pytest.mark.parametrize(
    ("ids", "answers", "expected"),
    [
        (["a", "b"], ["b", "a"], "2\n1"),
        (["a", "b"], ["a", "b"], "1\n2"),
        (["a", "b"], [None, None], "1\n2"),
        ([None, None], ["b", "a"], "1\n2"),
        ([None], [None, None], "1\n2"),
    ],
)
def test_results_stand_in_the_order_of_their_calls(
    tmp_path: Path, ids: list[str | None], answers: list[str | None], expected: str
) -> None:
    results = [result(str(n), each) for n, each in enumerate(answers, 1)]
    row = {"messages": [ASK, calls_of(*ids), *results, SAY]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (found,) = load_demonstrations({"path": str(tmp_path)})
    assert "".join(map(str, found.turns[2].parts)) == expected


def test_ids_of_calls_that_are_written_in_words_are_not_checked(tmp_path: Path) -> None:
    row = {"messages": [ASK, {**SAY, "content": CALL}, result("1", "a"), SAY], "id": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (found,) = load_demonstrations({"path": str(tmp_path)})
    assert (found.id, found.turns[2].parts) == ("0", ("1",))


def test_a_result_keeps_its_pictures_when_it_moves(rendered: Callable[..., Trajectory]) -> None:
    calls = [{**openai("crop_image", BOX), "id": each} for each in ("one", "two")]
    ask = {"role": "user", "content": "Look at both."}
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    moved = [result("B: <image>", "two"), result("A: <image>", "one")]
    straight = [result("A: <image>", "one"), result("B: <image>", "two")]
    assert same(
        rendered([ask, call, *moved, ANSWER], stop_at_tool_call=False),
        rendered(
            [ask, call, *straight, ANSWER], stop_at_tool_call=False, images=["b.png", "a.png"]
        ),
    )


def test_only_tools_that_are_described_are_called(
    tmp_path: Path, runner_of: Callable[..., RolloutRunner]
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]
    wrong = {"role": "assistant", "content": f"Hm.\n{CALL}"}
    call = {"role": "assistant", "content": None, "tool_calls": [bare("crop_image", {})]}
    words = r"calls 'crop_image', which is not in the row's 'tools' \(f, g\); describe it"

    def load(*messages: dict[str, Any], **row: Any) -> list[Demonstration]:
        row = {"id": "7", "tools": tools, "messages": [ASK, *messages], **row}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        return load_demonstrations({"path": str(tmp_path)})

    with pytest.raises(DataError, match=f"row 0: message 1: it {words}"):
        load(call)
    (in_words,) = load(wrong)  # read with the tokenizer's tags, when it is rendered
    with pytest.raises(DataError, match=f"the conversation 7: it {words}"):
        demonstrated(in_words, 0, runner_of())
    for mistake in (call, wrong):
        (found,) = load({**mistake, "weight": 0}, {"role": "tool", "content": "No tool."}, SAY)
        assert demonstrated(found, 0, runner_of()).turns[-1].text == "!"
    for given in ([], None):
        assert load(call, result("1"), SAY, tools=given)
    with pytest.raises(DataError, match="row 0: a description in 'tools' has no name"):
        load(SAY, tools=[{"type": "function", "function": {"description": "f"}}])


def test_a_call_that_could_not_be_read_back_is_not_written() -> None:
    assert write_tool_call("crop_image", BOX) == CALL
    assert write_tool_call("say", {"words": "é\n\"x\""}).split("\n")[1] == (
        '{"name": "say", "arguments": {"words": "é\\n\\"x\\""}}'
    )  # fmt: skip
    for words in ("</tool_call>", "<tool_call>", "x" * 30_000):
        with pytest.raises(ToolError):
            write_tool_call("say", {"words": words})


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_described_as_the_environment_describes_them(
    rendered: Callable[..., Trajectory], as_text: bool
) -> None:
    env: Any = make_env(composed("env=pixel_reasoner")[0]).unwrapped
    schemas = [tool.schema() for tool in env.tools]
    tools = json.dumps(schemas) if as_text else schemas
    messages = [{"role": "user", "content": "<image><image>Which?"}, ANSWER]
    _, info = env.reset(seed=0)
    plain = [{"role": "system", "content": info["system_prompt"]}, *messages]
    assert same(rendered(messages, tools=tools), rendered(plain))
    own = {"role": "developer", "content": "Be brief."}
    plain[0] = {"role": "system", "content": system_prompt("Be brief.", env.tools)}
    assert same(rendered([own, *messages], tools=tools), rendered(plain))


# Pictures in the row's columns


def test_marks_are_those_of_training_rows(rendered: Callable[..., Trajectory]) -> None:
    plain = {"role": "user", "content": "<image> or <image>?"}
    wanted = rendered([plain, ANSWER])
    for text in (
        "<image1> or <image_2>?",
        "<|image_1|> or <|image_2|>?",
        "<|vision_start|><|image_pad|><|vision_end|> or <Image>?",
    ):
        assert same(rendered([{**plain, "content": text}, ANSWER]), wanted)
    source = {"type": "image", "source": {"type": "url", "url": "a.png"}}
    parts = [source, " or ", {"type": "input_image", "image_url": "b.png"}, {"text": "?"}]
    assert same(rendered([{**plain, "content": parts}, ANSWER], images=None), wanted)
    own = {**plain, "images": ["a.png", "b.png"]}
    assert same(rendered([own, ANSWER], images=None), wanted)
    films = [{"type": "video", "video": [name]} for name in ("a.png", "b.png")]
    parts = [films[0], {"text": " or "}, films[1], {"text": "?"}]
    assert same(rendered([{**plain, "content": parts}, ANSWER], images=None), wanted)


def test_marks_in_words_of_others_are_words(
    rendered: Callable[..., Trajectory], runner_of: Callable[..., RolloutRunner]
) -> None:
    told = {"role": "system", "content": "Pictures are marked <image>."}
    said = {"role": "assistant", "content": "<image> is \\boxed{7}"}
    mine = rendered([told, ASKED, said], images=["a.png"])
    assert len(mine.images) == 1
    assert trained_text(mine, runner_of()) == "<image> is \\boxed{7}<|im_end|>"
    with pytest.raises(DataError, match="1 picture mark in the text, but 2 pictures in the row"):
        rendered([told, ASKED, said])


def test_pictures_in_messages_and_in_columns_must_agree(
    rendered: Callable[..., Trajectory], tmp_path: Path
) -> None:
    def row(*values: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*({"image": v} for v in values), "?"]}, ANSWER]

    url = data_url(np.asarray(Image.open(tmp_path / "a.png")))
    wanted = rendered(row("a.png", "b.png"), images=None)
    for values, columns in (
        (("a.png", "b.png"), ["a.png", "b.png"]),
        (("a.png", "b.png"), ["./b.png"]),
        ((url, "b.png"), ["a.png"]),
        (("a.png", "b.png"), [url]),
        ((url, "b.png"), ["b.png"]),
        ((url, "b.png"), ["elsewhere/name.png"]),  # a name of what the message holds
    ):
        assert same(rendered(row(*values), images=columns), wanted)
    for values, columns in (
        (("a.png",), ["b.png"]),
        (("a.png", "a.png"), ["b.png"]),
        (("a.png", "b.png"), ["b.png", "a.png"]),
        ((url,), ["b.png"]),
        (("b.png",), [url]),
    ):
        with pytest.raises(DataError, match=r"row 0: .* hold different pictures; leave one of"):
            rendered(row(*values), images=columns)
    with pytest.raises(DataError, match="1 pictures in the messages in the text, but 2 pictures"):
        rendered(row("a.png"), images=["b.png", "b.png"])


def test_a_completion_is_no_column_of_pictures(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "It is in a.png"}
    assert demonstration(tmp_path, prompt=[ASK], completion=[said])


def test_pictures_of_other_columns_are_shown(rendered: Callable[..., Trajectory]) -> None:
    asked = {"role": "user", "content": "<image><image>Which?"}
    wanted = rendered([asked, ANSWER])
    film = {"role": "user", "content": "<video>Which?"}
    part = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which?"}]}
    own = [{"image": "a.png"}, {"image": "b.png"}, {"text": "Which?"}]
    for messages, columns in (
        ([asked, ANSWER], {"image": ["a.png", "b.png"]}),
        ([film, ANSWER], {"videos": [["a.png", "b.png"]]}),
        ([part, ANSWER], {"video": ["a.png", "b.png"]}),
        ([film, ANSWER], {"images": ["a.png", "b.png"], "is_video": "True"}),
        ([{"role": "user", "content": own}, ANSWER], {"image": ["a.png"]}),  # said twice
    ):
        assert same(rendered(messages, **{"images": None, **columns}), wanted)
    for messages, wrong, words in (
        ([ASK, ANSWER], {"image": "a.png"}, "1 pictures, but the messages have no marks; write"),
        ([ASKED, ANSWER], {"image": ["a.png", "b.png"]}, "1 picture mark in the text, but 2"),
        ([ASKED, ANSWER], {"image": None}, "1 picture mark in the text, but 0 pictures"),
        ([film, ANSWER], {"image": "a.png"}, "the row's pictures are no video"),
        ([ASK, ANSWER], {"is_video": True}, "'is_video' is true, but the row has no pictures"),
        ([ASK, ANSWER], {"scan": "a.png"}, "'scan' looks like pictures and is not read"),
        ([film, ANSWER], {"videos": ["a.mp4"]}, "is a video file"),
    ):
        with pytest.raises(DataError, match=f"row 0: .*{words}"):
            rendered(messages, **{"images": None, **wrong})


# Columns


def demonstration(tmp_path: Path, **row: Any) -> Demonstration:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (found,) = load_demonstrations({"path": str(tmp_path)})
    return found


def said(found: Demonstration) -> list[tuple[str, str, bool]]:
    return [(turn.role, "".join(map(str, turn.parts)), turn.trained) for turn in found.turns]


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_rows_system_message(tmp_path: Path, name: str) -> None:
    told = ("system", "Be brief.", True)
    own = {"role": "developer", "content": [{"text": "Be brief."}]}
    for messages in ([ASK, SAY], [own, ASK, SAY]):
        found = demonstration(tmp_path, **{name: "Be brief."}, messages=messages)
        assert said(found) == [told, ("user", "?", True), ("assistant", "!", True)]
    for empty in ("", None):
        assert len(demonstration(tmp_path, **{name: empty}, messages=[ASK, SAY]).turns) == 2
    for wrong, words in (
        ("Be long.", f"'{name}' and another system message of the row differ; leave one of them"),
        (["Be"], f"'{name}' must be a text"),
    ):
        with pytest.raises(DataError, match=f"row 0: {words}"):
            demonstration(tmp_path, **{name: wrong}, messages=[own, ASK, SAY])


def test_only_the_completion_is_trained_on(
    rendered: Callable[..., Trajectory], runner_of: Callable[..., RolloutRunner]
) -> None:
    look = {"role": "assistant", "content": None, "tool_calls": [openai("crop_image", BOX)]}
    prompt, completion = [ASKED, look], [{"role": "tool", "content": SHOWN}, ANSWER]
    mine = rendered(None, prompt=prompt, completion=completion)
    weighed = [ASKED, {**look, "weight": 0}, *completion]
    assert same(mine, rendered(weighed))
    assert trained_text(mine, runner_of()) == "\\boxed{7}<|im_end|>"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "?", "completion": "!"}, "'prompt' must be a list of turns"),
        ({"prompt": [ASK], "completion": "!"}, "'completion' must be a list of turns"),
        ({"completion": [ASK, SAY]}, "'prompt' must be a list of turns"),
        ({"prompt": [ASK]}, "'messages' must be a list of turns"),
        ({"prompt": [ASK], "completion": [SAY], "messages": [ASK, SAY]},
         "both 'messages' and 'completion' hold a conversation; leave one out"),
        ({"prompt": [ASK, {**SAY, "weight": 1}], "completion": [ASK, SAY]},
         "prompt message 1: a prompt is not trained on; leave its 'weight' out"),
        ({"prompt": [ASK], "completion": [{**SAY, "audio": {}, "train": 0}]},
         "completion message 0: 'train' cannot be rendered"),
    ],
)  # fmt: skip
def test_prompts_and_completions_that_cannot_be_used(
    tmp_path: Path, columns: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=f"row 0: {words}"):
        demonstration(tmp_path, **columns)


def test_a_prompt_beside_messages_must_repeat_them(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "S"}, ASK, SAY]
    assert len(demonstration(tmp_path, prompt="?", prompt_id="1", messages=messages).turns) == 3
    for prompt in ("Other?", [ASK]):
        with pytest.raises(DataError, match="'prompt' beside 'messages' would be lost"):
            demonstration(tmp_path, prompt=prompt, messages=messages)
    with pytest.raises(DataError, match="'messages' and 'message_list' differ"):
        demonstration(tmp_path, messages=messages, message_list=[ASK, SAY])
    assert demonstration(tmp_path, messages=messages, message_list=messages)


def test_a_rows_weight(tmp_path: Path) -> None:
    rows = [{"id": str(n), "messages": [ASK, SAY], "weight": w} for n, w in enumerate((1, 0, None))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each.id for each in load_demonstrations({"path": str(tmp_path)})] == ["0", "2"]
    assert len(load_demonstrations({"path": str(tmp_path), "limit": 2})) == 2
    with pytest.raises(DataError, match=r"row 0: 'weight' must be 0 or 1, got 0\.5"):
        demonstration(tmp_path, messages=[ASK, SAY], weight=0.5)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("rejected", [SAY]), ("chosen", [SAY]), ("rejected_response", "?"),
        ("history", [["a", "b"]]),
        ("conversations", [{"from": "human", "value": "?"}]), ("audios", ["a.wav"]),
        ("chat_template_kwargs", {"enable_thinking": False}), ("chat_template", "{{ }}"),
        ("loss_mask", [0, 1]), ("train_mask", [0]), ("mask", [[0, 1]]), ("weights", [0]),
        ("labels", [-100, 5]),
        *((name, no) for name in ("label", "kto_tag", "is_correct", "train")
          for no in (False, 0, 0.0, "false", "False", "0")),
        *(("negative", yes) for yes in (True, 1, "true")),
    ],
)  # fmt: skip
def test_columns_that_would_be_lost_are_refused(tmp_path: Path, column: str, value: Any) -> None:
    with pytest.raises(
        DataError, match=f"row 0: '{column}' (cannot be rendered|is (false|true|0|1)|would).*; "
    ):
        demonstration(tmp_path, messages=[ASK, SAY], **{column: value})
    harmless = {"source": "x", "score": 0.3, "label": True, "answer": "7", "split": "train"}
    assert demonstration(tmp_path, messages=[ASK, SAY], **{**harmless, column: None})


@pytest.mark.parametrize("value", [True, 1, "true", 3, -1, 0.5, "cat", "", [0, 1], {"a": 0}])
def test_other_labels_say_nothing(tmp_path: Path, value: Any) -> None:
    columns = dict.fromkeys(("label", "kto_tag", "is_correct", "train"), value)
    assert demonstration(tmp_path, messages=[ASK, SAY], **columns)
    for no in (False, 0, "false", "cat", ["?"]):
        assert demonstration(tmp_path, messages=[ASK, SAY], negative=no)


# Weights


def test_a_turn_of_weight_0_is_read_but_not_trained_on(
    rendered: Callable[..., Trajectory], runner_of: Callable[..., RolloutRunner]
) -> None:
    def messages(first: Any, last: Any) -> list[dict[str, Any]]:
        call = {"role": "assistant", "content": "Hm.", "tool_calls": [openai("crop_image", BOX)]}
        result = {"role": "tool", "content": SHOWN, "weight": 0}
        return [ASKED, {**call, "weight": first}, result, {**ANSWER, "weight": last}]

    whole = rendered(messages(None, 1))
    for weights, text in (
        ((0, 1), "\\boxed{7}<|im_end|>"),
        ((1.0, 0.0), f"Hm.\n{CALL}"),
        ((False, None), "\\boxed{7}<|im_end|>"),
    ):
        mine = rendered(messages(*weights))
        assert mine.ids.tolist() == whole.ids.tolist()
        assert trained_text(mine, runner_of()) == text
        assert [turn.text for turn in mine.turns] == [turn.text for turn in whole.turns]


def test_training_reads_calls_results_and_weights(tmp_path: Path) -> None:
    Image.fromarray(random_picture(1, 60, 60)).save(tmp_path / "a.png")
    call = {"role": "assistant", "content": None, "tool_calls": [openai("crop_image", BOX)]}
    result = {"role": "tool", "content": "The card:\n<image>"}
    rows = [
        {
            "id": str(number),
            "images": ["a.png", "a.png"],
            "messages": [ASKED, {**call, "weight": number % 2}, result, ANSWER],
        }
        for number in range(4)
    ]
    file = tmp_path / "expert.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ("env=pixel_reasoner", "objective=sft", "objective.source=recorded", "steps=3",
             "model.teacher=null", "evaluation.teacher=false", "evaluation.every=0",
             "rollout.max_response_tokens=256", "optimizer.lr=1e-3")  # fmt: skip
    train(tmp_path / "run", *words, f"+data.demonstrations={{path: {file}}}")
    losses = [row["loss"] for row in train_rows(tmp_path / "run")]
    assert losses[-1] < losses[0]
    (tokens,) = {row["rollout/response_tokens"] for row in train_rows(tmp_path / "run")}
    processing = load_processing(ModelSpec("demo:student"), "student")
    chat = ChatRenderer(processing.tokenizer)
    lengths = [len(chat.turn_ids(text)) for text in (CALL, "\\boxed{7}")]
    assert tokens == pytest.approx(lengths[1] + lengths[0] / 2)


# What cannot be rendered


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([ASK, {**SAY, "function_call": {"name": "f", "arguments": "{}"}}],
         "message 1: 'function_call' cannot be rendered"),
        ([ASK, {**SAY, "audio": {"id": "a"}}], "'audio' cannot be rendered"),
        ([ASK, {**SAY, "reasoning_content": "hm"}], "'reasoning_content' cannot be rendered"),
        ([ASK, {**SAY, "refusal": "No."}], "'refusal' cannot be rendered"),
        ([ASK, {**SAY, "train": False}], "'train' cannot be rendered"),
        ([ASK, {"role": "function", "content": "1"}, SAY], "message 1: the role must be one of "),
        ([ASK, {"role": "assistant", "content": None}],
         "message 1: a message of the role assistant has no"),
        ([ASK, {"role": "assistant", "content": ""}], "message 1: it is empty"),
        ([ASK, {"role": "assistant", "content": []}], "message 1: it is empty"),
        ([ASK, {"role": "assistant", "content": [{"type": "text", "text": " \n"}]}, ASK, SAY],
         "message 1: it is empty"),
        ([ASK, calls_of("a", "b"), result("1", "a"), result("2", "c"), SAY],
         "message 3: its 'tool_call_id' 'c' answers no call of message 1 ('a', 'b'); correct it"),
        ([ASK, SAY, result("1", "c"), SAY],
         "message 2: its 'tool_call_id' 'c' answers no call of message 1 (there is none)"),
        ([ASK, {**calls_of("a"), "image": "a.png"}, result("1"), SAY],
         "message 1: only the user's messages may hold pictures"),
        ([ASK, {**SAY, "tool_calls": [{**bare("f", {}), "image": "a.png"}]}],
         "message 1: 'image' cannot be rendered"),
        ([ASK, calls_of("a", "b"), result("1", "a"), result("2"), SAY],
         "message 3: its 'tool_call_id' null answers no call"),
        ([ASK, calls_of("a", "b"), result("1", "b"), SAY],
         "message 1: only 1 of its 2 calls have a result (none: 'a'); add"),
        ([ASK, calls_of(None, None), result("1"), SAY],
         "message 1: only 1 of its 2 calls have a result; add"),
        ([ASK, calls_of("a", "b"), result("1", "a"), result("2", "a"), SAY],
         "message 3: the call 'a' has two results"),
        ([ASK, calls_of("a", "a"), result("1", "a"), SAY], "message 1: two calls have one id"),
        ([ASK, calls_of("a")], "message 1: its calls have no result, and the conversation ends; "),
        ([ASK, calls_of("a"), ASK, SAY, result("1"), SAY],
         "message 1: its calls have no result, but message 2 of the role user follows; add"),
        ([ASK, calls_of("a"), result("1"), calls_of("b"), ASK, SAY],
         "message 3: its calls have no result, but message 4 of the role user follows; add"),
        ([ASK, {"role": "assistant", "tool_calls": []}],
         "message 1: a message of the role assistant has no"),
        ([ASK, {**SAY, "weight": 0.5}], "message 1: 'weight' must be 0 or 1, got 0.5"),
        ([ASK, {**SAY, "weight": "0"}], "'weight' must be 0 or 1, got '0'"),
        ([ASK, {**SAY, "weight": 0}], "no message is trained on"),
        ([{**ASK, "weight": 1}, SAY], "message 0: only an assistant's message"),
        ([{**ASK, "tool_calls": [bare("f", {})]}, SAY], "message 0: only an assistant's message"),
        ([ASK, {**SAY, "tool_calls": "f()"}], "'tool_calls' must be a list"),
        ([ASK, {**SAY, "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}],
         "a tool call of the type 'custom' cannot be rendered"),
        ([ASK, {**SAY, "tool_calls": [{"function": {"arguments": "{}"}}]}], "call has no name"),
        ([ASK, {**SAY, "tool_calls": [{"name": "f", "parameters": {"x": 1}}]}],
         "'parameters' cannot be rendered"),
        ([ASK, {**SAY, "tool_calls": [{"function": {"name": "f", "parameters": {"x": 1}}}]}],
         "'parameters' cannot be rendered"),
        ([ASK, {**SAY, "tool_calls": [bare("f", {"x": float("nan")})]}], "of 'f' are no JSON"),
        ([ASK, {**SAY, "tool_calls": [{"name": "f", "arguments": "{x}"}]}], "of 'f' are no JSON"),
        ([ASK, {**SAY, "tool_calls": [{"name": "f", "arguments": [1]}]}], "must be a JSON object"),
        ([{"role": "tool", "content": "1"}, SAY], "must take turns, got tool, assistant"),
        ([ASK, SAY, {"role": "tool", "content": "1"}, ASK, SAY], "got user, assistant, tool, user"),
        ([ASK, SAY, {"role": "system", "content": "x"}, SAY], "got user, assistant, system"),
        ([{"role": "user", "content": [{"type": "input_audio", "text": "a"}]}, SAY],
         "message 0: a part of a message has the type 'input_audio', which is not read"),
        ([{"role": "user", "content": [{"text": "a", "audio": "a.wav"}]}, SAY],
         "message 0: 'audio' of a part of a message is not read"),
        ([{"role": "user", "content": [{"type": "image", "text": "a"}]}, SAY],
         "message 0: a part of a message has both text and a picture"),
        ([{"role": "user", "content": [{"image_url": {"url": "http://h/a.png"}}]}, SAY],
         "the picture is at a URL"),
        ([ASK, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}],
         "message 1: only the user's messages may hold pictures"),
    ],
)  # fmt: skip
def test_what_cannot_be_rendered_is_refused_by_name(
    tmp_path: Path, messages: list[dict[str, Any]], words: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"messages": [ASK, SAY]}, {"messages": messages}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: .*{re.escape(words)}"):
        load_demonstrations({"path": str(file)})


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"functions": [{"name": "f"}]}, "'functions' cannot be rendered"),
        ({"tools": "crop_image"}, "'tools' are no JSON"),
        ({"tools": {"crop_image": {}}}, "'tools' must be a list of objects"),
        ({"tools": ["crop_image"]}, "'tools' must be a list of objects"),
    ],
)
def test_descriptions_of_tools_that_cannot_be_rendered(
    tmp_path: Path, columns: dict[str, Any], words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [ASK, SAY], **columns}), "utf-8")
    with pytest.raises(DataError, match=rf"row 0: {words}"):
        load_demonstrations({"path": str(tmp_path)})


def test_empty_fields_say_nothing(tmp_path: Path) -> None:
    """As a client of OpenAI's writes its objects out."""
    said: dict[str, Any] = {**SAY, "function_call": None, "audio": None, "refusal": None,
            "annotations": [], "tool_calls": None, "name": "expert", "id": "msg_1"}  # fmt: skip
    row = {"messages": [{**ASK, "tool_calls": None}, said], "tools": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    (found,) = load_demonstrations({"path": str(tmp_path)})
    assert [(t.role, t.parts, t.trained) for t in found.turns] == [
        ("user", ("?",), True),
        ("assistant", ("!",), True),
    ]


def test_a_missing_path_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    for path in (str(tmp_path / "gone"), "data/gone.jsonl", "data/mine/gone"):
        with pytest.raises(DataError, match=r"gone(\.jsonl)? does not exist"):
            load_demonstrations({"path": path})
