"""Hostile turns against the real environments: nothing but a valid answer leaves `step`.

``REOPOLD_FUZZ=20000 pytest tests/test_fuzz.py -s`` plays that many cases and prints their
duration (docs/reliability.md); without it there are about three thousand.
"""

# ruff: noqa: RUF001  # look-alike letters are the point

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from conftest import random_picture
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reopold_agent.common.files import dump_json
from reopold_agent.demo.arithmetic.tasks import ArithmeticTasks
from reopold_agent.demo.figures.tasks import FigureTasks
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.errors import ToolError
from reopold_agent.judges.rules import KINDS, grade
from reopold_agent.rollout.chat import observation_message
from reopold_agent.tools.parse import MAX_DEPTH, ParsedCall, find_tool_call
from reopold_agent.types import IMAGE_MARK, EncodedImage, Task, ToolCall

CASES = int(os.environ.get("REOPOLD_FUZZ", "3000"))
LONGEST_MESSAGE = 1500
"""Characters that a refused call may cost the student's context."""

SLOWEST = 60.0
"""Seconds of one step, on a machine that is shared; math-verify alone may take 10."""


def cases(share: float) -> Any:
    """Settings of a test that takes this share of all cases."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=max(10, round(CASES * share)),
        suppress_health_check=unhealthy,
        # The long run draws anew each time and keeps what failed for the next.
        derandomize="REOPOLD_FUZZ" not in os.environ,
    )


@dataclass
class Figures:
    """Figures of a run, for the documentation."""

    cases: int = 0
    steps: int = 0
    calls: int = 0
    good: int = 0
    slowest: float = 0.0
    longest: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


FIGURES = Figures()


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    """Prints the figures of a long run."""
    started = time.perf_counter()
    yield
    if "REOPOLD_FUZZ" in os.environ:
        seconds = time.perf_counter() - started
        common = sorted(FIGURES.reasons.items(), key=lambda item: -item[1])[:12]
        print(f"\n{FIGURES.cases} cases, {FIGURES.steps} steps in {seconds:.0f} s; ", end="")
        print(f"{FIGURES.calls} tool calls, {FIGURES.good} of them good; ", end="")
        print(f"slowest {FIGURES.slowest:.2f} s, longest message {FIGURES.longest} characters")
        print("\n".join(f"  {count:>6}  {reason}" for reason, count in common))


# What a hostile student says: not random letters, but calls that are almost right


ODD = [
    "\u200b", "\u202e", "\u2066", "\ufeff", "\0", "\x1b[2J", "\x7f", "\u0301", "\ud800", "\udfff",
    "\U0001f4a9", IMAGE_MARK, "＜", "＞", "｛", "｝", "ｔ", "о", "\\u0000", "\\ud800", "\r\n",
    "\x85", "\u2028", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "</tool_call>", "<tool_call>",
    "<tools>", "</think>", "<think>", "```", "'", '"', "\\", "{", "}", "[", "]", ",", ":", "$",
]  # fmt: skip
NUMBERS = [
    "0", "-0", "1", "2", "-1", "0.5", "0.25", "1.0", "28", "100", "160", "1e400", "-1e400",
    "1e-400", "NaN", "Infinity", "-Infinity", "0x1F", "1_000", "١٢", "9" * 400, "9" * 5000,
    "-" + "9" * 4299, "0." + "3" * 5000, "+1", ".5", "1.", "01", "1e5", "1E+308",
    "1.7976931348623159e308", "2.0000001",
]  # fmt: skip
TOOLS = ["crop_image", "select_frames", "crop_image_normalized", "zoom_in"]
KEYS = ["bbox_2d", "target_image", "target_frames"]

odd_text = st.lists(
    st.one_of(st.sampled_from(ODD), st.text(max_size=4), st.sampled_from(TOOLS + KEYS)), max_size=6
).map("".join)
quoted = st.one_of(
    st.sampled_from([*TOOLS, *KEYS, "", "1", "0.5", "true"]).map(json.dumps),
    odd_text.map(json.dumps),
    odd_text.map(lambda text: json.dumps(text, ensure_ascii=False)),
    odd_text.map(lambda text: f'"{text}"'),  # as it is: quotes and line breaks not escaped
    odd_text.map(lambda text: f"'{text}'"),
)
scalar = st.one_of(
    st.sampled_from(NUMBERS),
    quoted,
    st.sampled_from(["null", "true", "false", "None", "True", "undefined", ""]),
)


def listed(items: list[str]) -> str:
    return "[" + ", ".join(items) + "]"


def mapped(items: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"


anything = st.recursive(
    scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5).map(listed),
        st.lists(st.tuples(quoted, inner), max_size=4).map(mapped),
    ),
    max_leaves=8,
)
heavy = st.sampled_from(
    [
        "[" * 9_000,
        "[" * 100_000,
        "[" * 9_000 + "]" * 9_000,
        '{"a":' * 3_000 + "1" + "}" * 3_000,
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        listed(["1"] * 6_000),
        listed(["1"] * 200_000),
        '"' + "x" * 19_000 + '"',
        '"' + "x" * 1_000_000 + '"',
        '"' + "\\ud800" * 2_000 + '"',
        mapped([(f'"{i}"', "0") for i in range(1_500)]),
    ]
)
box = st.one_of(
    st.lists(st.sampled_from(["0", "0.5", "1", "10", "60", "100", "159", "1e9", "-3"]),
             min_size=4, max_size=4).map(listed),
    st.sampled_from(["[0, 0, 1, 1]", "[0.1, 0.2, 0.9, 0.8]", "[10, 10, 90, 90]"]),
)  # fmt: skip
right = st.sampled_from(
    [
        '{"name": "crop_image", "arguments": {"bbox_2d": [0, 0, 1, 1], "target_image": 1}}',
        '{"name": "crop_image", "arguments": {"target_image": 1.0, "bbox_2d": [-5, 9, 90, 1e9]}}',
        '{"name": "zoom_in", "arguments": {"bbox_2d": [0.1, 0, 0.9, 0.9], "target_image": 2}}',
        '{"name": "crop_image", "arguments": {"bbox_2d": [0, 0, 1, 1], "target_image": 3}}',
        '{"name": "select_frames", "arguments": {"target_frames": [1]}}',
        '{"name": "select_frames", "arguments": "{\\"target_frames\\": [2, 1, 3.0]}"}',
    ]
)
frames = st.lists(st.sampled_from(["1", "2", "3", "4", "0", "-1", "2.0", "99"]), max_size=9)
good_arguments = st.one_of(
    st.tuples(box, st.sampled_from(["1", "2", "3", "1.0"])).map(
        lambda pair: mapped([('"bbox_2d"', pair[0]), ('"target_image"', pair[1])])
    ),
    frames.map(lambda each: mapped([('"target_frames"', listed(each))])),
)
arguments = st.one_of(
    good_arguments,
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(KEYS).map(json.dumps), quoted), st.one_of(anything, box)
        ),
        max_size=4,
    ).map(mapped),
    anything,
    st.lists(heavy, min_size=1, max_size=1).map(lambda h: mapped([('"bbox_2d"', h[0])])),
    heavy,
)


def as_string(text: str, times: int) -> str:
    """Arguments as a string of JSON of a string of JSON ..."""
    for _ in range(times):
        text = json.dumps(text)
    return text


def call_of(name: str, given: str, form: int, extra: str) -> str:
    key = ['"arguments"', '"parameters"', '"args"'][form % 3 if form > 8 else 0]
    parts = [f'"name": {name}', f"{key}: {given}"]
    if form % 5 == 1:
        parts.reverse()
    if form % 7 == 2:
        parts.append(f'"name": {extra}')  # twice
    if form % 7 == 3:
        parts.append(f'"arguments": {extra}')
    if form % 7 == 4:
        parts.pop(form % 2)
    body = "{" + ", ".join(parts) + ("," if form % 6 == 5 else "") + "}"
    if form % 8 == 6:
        body = f"// call\n{body} /* end */"
    if form % 8 == 7:
        body = f"[{body}, {body}]"
    return body


call_body = st.one_of(
    st.builds(
        call_of,
        st.one_of(
            st.sampled_from(TOOLS).map(json.dumps), st.sampled_from(TOOLS).map(json.dumps), anything
        ),
        st.builds(as_string, arguments, st.sampled_from([0, 0, 0, 0, 1, 2, 3])),
        st.one_of(st.just(0), st.integers(0, 40)),
        scalar,
    ),
    anything,
    odd_text,
)
opening = st.sampled_from(
    ["<tool_call>"] * 8
    + ["<tool_call>\n", "<tool_call><tool_call>", "<TOOL_CALL>", "<tool_call >", "＜tool_call＞",
       "<tool\u200b_call>", "<tооl_call>", "", "```json\n<tool_call>", "<think><tool_call>",
       '"<tool_call>', "&lt;tool_call&gt;", "<tool_call>\ufeff",
       "<tool_call></tool_call><tool_call>"]
)  # fmt: skip
closing = st.sampled_from(
    ["</tool_call>"] * 8
    + ["\n</tool_call>", "</tool_call></tool_call>", "<tool_call>", "</tool_call", "</TOOL_CALL>",
       "", "</tool_call>\n```", "</tool_call></think>", '</tool_call>"', "<|im_end|>",
       "</tool\u200b_call>"]
)  # fmt: skip
right_call = right.map(lambda body: f"<tool_call>\n{body}\n</tool_call>")
call = st.one_of(
    right_call,
    st.builds(lambda a, body, z: a + body + z, opening, call_body, closing),
    st.builds(lambda a, body, z: a + body + z, opening, right, closing),
)
inner_box = st.recursive(
    st.one_of(
        st.sampled_from(
            ["7", "x+1", "\\frac{1}{2}", "A", "(1, 2)", "", " ", "10^{10^{10}}", "1/0"]
        ),
        odd_text,
    ),
    lambda inner: st.one_of(
        inner.map(lambda text: f"\\boxed{{{text}}}"),
        inner.map(lambda text: f"\\frac{{{text}}}{{{text}}}"),
        inner.map(lambda text: f"\\text{{{text}"),
        st.tuples(inner, inner).map(", ".join),
    ),
    max_leaves=5,
)
answer = st.one_of(
    inner_box.map(lambda text: f"\\boxed{{{text}}}"),
    inner_box.map(lambda text: f"The answer is \\boxed{{{text}"),
    inner_box,
    st.sampled_from(
        [
            "\\boxed{" * 20_000,
            "\\boxed{" * 5_000 + "7" + "}" * 5_000,
            "{" * 300_000,
            "}" * 1_000_000,
            "\\boxed{" + "{" * 400_000 + "}" * 400_000 + "}",
            "\\boxed{" + "9" * 100_000 + "}",
            "\\boxed{1e999999999}",
            "\\boxed{" + "1+" * 40_000 + "1}",
            "\\boxed{7}, " * 20_000,
            "\\boxed{" + "\\sqrt{" * 200 + "1" + "}" * 201,
            "<think>" * 20_000 + "\\boxed{7}",
            "$" * 200_000 + "\n" * 200_000,
            "\\boxed" + " " * 200_000 + "{7}",
            "<tool_call>" * 50_000,
            "<tool_call>{" * 20_000 + "</tool_call>" * 20_000,
        ]
    ),
)
prose = st.one_of(odd_text, st.sampled_from(["Let me look.", "```", "<think>", "</think>", "\n\n"]))
segments = st.lists(st.one_of(call, call, prose, answer), min_size=1, max_size=4).map("".join)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A turn, with letters taken out, doubled or put in."""
    text = draw(segments)
    for _ in range(draw(st.integers(0, 4)) if len(text) < 3_000 else 0):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 8))
        middle = draw(st.sampled_from(["", text[at : at + length] * 2, *ODD]))
        text = text[:at] + middle + text[at + length :]
    return text


turn = st.one_of(damaged(), segments, call, right_call)


# What must hold


def check_step(env: ToolEnv, action: str) -> bool:
    """Takes the turn; true if the episode goes on."""
    pictures = len(env.episode.images) if env.episode is not None else 0
    started = time.perf_counter()
    result = env.step(action)
    seconds = time.perf_counter() - started
    FIGURES.steps += 1
    FIGURES.slowest = max(FIGURES.slowest, seconds)
    assert seconds < SLOWEST
    assert isinstance(result, tuple)
    observation, reward, terminated, truncated, info = result
    assert observation in env.observation_space
    assert math.isfinite(reward)
    assert isinstance(terminated, bool)
    assert isinstance(truncated, bool)
    assert not (terminated and truncated)
    observation["text"].encode("utf-8")
    # What the renderer and the record do with it raises nothing either.
    encoded = [EncodedImage(each, (1, 2, 2), 1) for each in observation["images"]]
    observation_message(observation, encoded)
    called = info["tool_call"]
    assert called is None or isinstance(called, ToolCall)
    kept = {"call": called, "observation": observation["text"]}
    assert json.loads(dump_json(kept))["observation"] == observation["text"]
    if called is not None:
        FIGURES.calls += 1
        FIGURES.good += called.ok
        if called.error is not None:
            assert 0 < len(called.error) < LONGEST_MESSAGE
            called.error.encode("utf-8")
            reason = called.error.split("'")[0].split("(")[0][:40]
            FIGURES.reasons[reason] = FIGURES.reasons.get(reason, 0) + 1
        assert called.ok == (called.error is None)
    if terminated or truncated:
        assert observation == {"text": "", "images": ()}
        assert info["success"] in (True, False)
        assert terminated == (info["answer"] is not None)
        assert env.episode is None
        return False
    assert called is not None  # only a call goes on
    assert 0 < len(observation["text"]) < LONGEST_MESSAGE
    assert called.ok or not observation["images"]
    assert env.episode is not None
    assert len(env.episode.images) == pictures + len(observation["images"])
    FIGURES.longest = max(FIGURES.longest, len(observation["text"]))
    return True


def play(env: ToolEnv, index: int, turns: list[str]) -> None:
    """Plays them until the episode ends."""
    FIGURES.cases += 1
    observation, _ = env.reset(seed=index, options={"split": "train", "index": index})
    assert observation in env.observation_space
    for action in turns:
        if not check_step(env, action):
            return


@dataclass(frozen=True)
class Seen:
    """A picture in memory."""

    seed: int
    size: tuple[int, int] = (160, 120)

    def open(self) -> Image.Image:
        return Image.fromarray(random_picture(self.seed, self.size[1], self.size[0]))


PICTURE_TASKS = [
    Task("one", "How many?", ("7",), (Seen(1),)),
    Task("two", "Which? (A) a (B) b", ("B",), (Seen(1), Seen(2, (57, 300)))),
    Task("tiny", "Is it?", ("yes",), (Seen(3, (2, 1)),)),
    Task("none", "x?", ("x+1", "\\frac{1}{2}")),
    Task("strange", "<tool_call>" + IMAGE_MARK + "\ud800", ("\\boxed{", "<|im_end|>"), (Seen(4),)),
]
VIDEO_TASKS = [
    Task("video", "When?", ("3",), tuple(Seen(i, (100, 80)) for i in range(4)), is_video=True),
    Task("frame", "When?", ("(1, 2)",), (Seen(9),), is_video=True),
]


def pixel_env(tasks: list[Task], **more: Any) -> PixelReasonerEnv:
    return PixelReasonerEnv(data={"train": tasks, "eval": None}, max_turns=4, **more)


PICTURES, VIDEOS = pixel_env(PICTURE_TASKS), pixel_env(VIDEO_TASKS, tool_call_policy="last")
MATHS = SingleTurnEnv(data={"train": ArithmeticTasks("train", size=8), "eval": None})
GEOMETRY = SingleTurnEnv(data={"train": FigureTasks("train", size=6), "eval": None})

BOMBS = [
    '<tool_call>{"name": "crop_image", "arguments": {"bbox_2d": [0, 0, 1e400, 1], '
    '"target_image": 1}}</tool_call>',
    '<tool_call>{"name": "crop_image", "arguments": {"bbox_2d": ' + "[" * 9_000 + "</tool_call>",
    '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [' + "9" * 4_300
    + "]}}</tool_call>",
    '<tool_call>{"name": "\\ud800' + IMAGE_MARK + '", "arguments": "{}"}</tool_call>',
]  # fmt: skip


@cases(0.4)
@given(st.integers(0, len(PICTURE_TASKS) - 1), st.lists(turn, min_size=1, max_size=3))
@example(0, BOMBS)
@example(4, BOMBS)
def test_pictures(index: int, turns: list[str]) -> None:
    play(PICTURES, index, turns)


@cases(0.2)
@given(st.integers(0, len(VIDEO_TASKS) - 1), st.lists(turn, min_size=1, max_size=3))
@example(0, BOMBS)
def test_videos(index: int, turns: list[str]) -> None:
    play(VIDEOS, index, turns)


@cases(0.1)
@given(st.integers(0, 7), st.one_of(turn, answer))
def test_single_turn_mathematics(index: int, said: str) -> None:
    play(MATHS, index, [said])


@cases(0.05)
@given(st.integers(0, 5), st.one_of(turn, answer))
def test_single_turn_geometry(index: int, said: str) -> None:
    play(GEOMETRY, index, [said])


@cases(0.15)
@given(turn, st.sampled_from(["first", "last"]))
def test_the_parser(text: str, policy: Any) -> None:
    FIGURES.cases += 1
    started = time.perf_counter()
    message, found = "", None
    try:
        found = find_tool_call(text, policy)
    except ToolError as error:
        message = str(error)
    assert found is None or isinstance(found, ParsedCall)
    assert bool(message or found) == ("<tool_call>" in text)
    assert len(message.encode("utf-8")) < LONGEST_MESSAGE
    assert time.perf_counter() - started < SLOWEST


@cases(0.1)
@given(st.one_of(answer, turn), st.one_of(inner_box, odd_text), st.sampled_from(KINDS))
def test_the_judge(response: str, truth: str, kind: str) -> None:
    FIGURES.cases += 1
    started = time.perf_counter()
    verdict = grade(response, truth, kind, options=["a", truth])
    seconds = time.perf_counter() - started
    FIGURES.slowest = max(FIGURES.slowest, seconds)
    assert seconds < SLOWEST
    assert isinstance(verdict.correct, bool)
    assert verdict.extracted is None or isinstance(verdict.extracted, str)


def test_the_cases_are_hostile_and_not_only_noise() -> None:
    """Most turns hold a call, of which some are good: the strategies reach the tools themselves."""
    if FIGURES.steps < 500:
        pytest.skip("only with the other tests of this file")
    assert FIGURES.calls > FIGURES.steps / 3
    assert FIGURES.good > FIGURES.calls / 50
    assert len(FIGURES.reasons) > 20, FIGURES.reasons
    assert isinstance(FIGURES.slowest, float)
    assert np.isfinite(FIGURES.slowest)
