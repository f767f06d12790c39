"""Tools: schemas, the parser, arguments, crops, frames, and every misbehaviour of a tool."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, List, Literal  # noqa: UP035

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from reopold_agent.common.bounded import DeadlineError, run_bounded
from reopold_agent.errors import ConfigError, ToolError
from reopold_agent.tools import (
    BASE_PROMPT,
    TOOLS,
    EpisodeState,
    Tool,
    ToolResult,
    crop_image,
    find_tool_call,
    select_frames,
    system_prompt,
    tool,
)
from reopold_agent.tools.base import failure
from reopold_agent.tools.crop import pixel_box
from reopold_agent.tools.parse import MAX_CALL_CHARACTERS, MAX_DEPTH, ParsedCall
from reopold_agent.tools.schema import check_arguments, parameters_schema, shorten
from reopold_agent.types import IMAGE_MARK, Task

many = settings(max_examples=1200)


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red and green say the column and the row, in steps of 1 while they fit."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x % 256, y % 256, (x // 256) * 16 + y // 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def state_of(*images: Image.Image, frames: int = 0, **options: Any) -> EpisodeState:
    task = Task("t", "What is it?", ("1",), is_video=bool(frames))
    return EpisodeState(task, list(images), frames, options)


def make_tool(function: Callable[..., Any], timeout_s: float = 5.0) -> Tool:
    return Tool("probe", function, "For tests.", timeout_s=timeout_s)


def no_threads_left(name: str = "reopold-bounded") -> bool:
    return not any(t.name == name for t in threading.enumerate())


# The system message

GOLDEN = (
    "You are a helpful assistant.\n"
    "\n"
    "# Tools\n"
    "\n"
    "You may call one or more functions to assist with the user query.\n"
    "\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n"
    '{"type": "function", "function": {"name": "crop_image", "description": "Zoom in on the image '
    "based on the bounding box coordinates. It is useful when the object or text in the image is "
    'too small to be seen.", "parameters": {"type": "object", "properties": {"bbox_2d": {"type": '
    '"array", "description": "coordinates for bounding box of the area you want to zoom in: '
    "[x1, y1, x2, y2], normalized to the range 0 to 1, or in pixels of the image at the size "
    'you see it.", "items": '
    '{"type": "number"}}, "target_image": {"type": "integer", "description": "The index of the '
    "image to crop, from 1 to the number of images so far. Choose 1 to operate on the original "
    'image."}}, "required": ["bbox_2d", "target_image"]}}}\n'
    '{"type": "function", "function": {"name": "select_frames", "description": "Select frames '
    'from a video, to look at them closely.", "parameters": {"type": "object", "properties": '
    '{"target_frames": {"type": "array", "description": "List of frame indices to select from the '
    'video, counted from 1 (no more than 8 frames in total).", "items": {"type": "integer"}}}, '
    '"required": ["target_frames"]}}}\n'
    "</tools>\n"
    "\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    "<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)

# The tool branch of a Nous-style chat template as Qwen2.5's text models have it, written anew.
NOUS_TEMPLATE = r"""
{%- if tools -%}
{{- '<|im_start|>system\n' -}}{{- messages[0].content -}}
{{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query." -}}
{{- "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" -}}
{%- for tool in tools -%}{{- "\n" -}}{{- tool | tojson -}}{%- endfor -%}
{{- "\n</tools>\n\nFor each function call, return a json object with function name and" -}}
{{- " arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n" -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}' -}}
{{- "\n</tool_call><|im_end|>\n" -}}
{%- endif -%}
"""


def test_the_system_prompt_is_the_golden_text() -> None:
    assert system_prompt(BASE_PROMPT, [crop_image, select_frames]) == GOLDEN


def test_the_words_for_original_sizes_are_those_that_the_embedded_models_know() -> None:
    options = {"sizes": "original", "padding": 0.0}
    shown = [tool.with_options(options) for tool in (crop_image, select_frames)]
    assert system_prompt(BASE_PROMPT, shown) == GOLDEN.replace(" at the size you see it", "")
    assert not shown[0].needs_sizes
    assert crop_image.with_options({"padding": 0.0}) is crop_image
    for each in (crop_image, select_frames):
        with pytest.raises(ConfigError, match="sizes must be shown or original, got 'both'"):
            each.with_options({"sizes": "both"})
    other = make_tool(lambda state: None)
    assert other.with_options({"sizes": "both"}) is other  # an option of its own


def test_without_tools_the_system_prompt_is_the_base() -> None:
    assert system_prompt("Be brief.", []) == "Be brief."


@pytest.mark.parametrize("odd", ["plain", "é漢 <b> & 'quoted' \"twice\" \\ back\nline"])
def test_a_template_that_takes_tools_renders_the_same(
    tokenizer: PreTrainedTokenizerFast, odd: str
) -> None:
    def look(state: EpisodeState, where: str, often: int = 1) -> ToolResult:
        raise NotImplementedError

    look.__annotations__["where"] = Annotated[str, odd]
    tools = [crop_image.shown_as("crop_image_normalized"), select_frames, Tool("look", look, odd)]
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": BASE_PROMPT}],
        tools=[each.schema() for each in tools],
        chat_template=NOUS_TEMPLATE,
        tokenize=False,
    )
    assert rendered == f"<|im_start|>system\n{system_prompt(BASE_PROMPT, tools)}<|im_end|>\n"


# Names


def test_aliases_of_the_peers_mean_the_one_crop_tool() -> None:
    for name in ("crop_image", "crop_image_normalized", "zoom_in"):
        assert TOOLS.get(name) is crop_image
        assert crop_image.answers_to(name)
    assert not crop_image.answers_to("crop")
    assert TOOLS.get("select_frames") is select_frames


def test_another_name_is_shown_and_the_old_ones_still_work() -> None:
    renamed = crop_image.shown_as("crop_image_normalized")
    assert renamed.schema()["function"]["name"] == "crop_image_normalized"
    assert sorted(renamed.aliases) == ["crop_image", "zoom_in"]
    assert renamed.function is crop_image.function
    assert crop_image.shown_as("crop_image") is crop_image
    assert crop_image.shown_as("look").answers_to("crop_image")


# From annotations to schemas


def test_schema_of_every_supported_annotation() -> None:
    def each(
        state: Any,
        a: int,
        b: Annotated[float, "a number"],
        c: list[list[str]],
        d: Literal["x", "y"] = "x",
        e: Literal[0, 90] = 0,
        f: bool = True,
    ) -> ToolResult:
        raise NotImplementedError

    schema = parameters_schema(each)
    assert schema == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "number", "description": "a number"},
            "c": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
            "d": {"type": "string", "enum": ["x", "y"]},
            "e": {"type": "integer", "enum": [0, 90]},
            "f": {"type": "boolean"},
        },
        "required": ["a", "b", "c"],
    }
    assert list(schema["properties"]["b"]) == ["type", "description"]


def _untyped(state, x): ...  # type: ignore[no-untyped-def]


def _mapping(state: Any, x: dict[str, int]) -> None: ...
def _mixed(state: Any, x: Literal["a", 1]) -> None: ...
def _truth(state: Any, x: Literal[True]) -> None: ...
def _maybe(state: Any, x: int | None) -> None: ...
def _deep(state: Any, x: list[dict[str, int]]) -> None: ...
def _bare(x: List) -> None: ...  # type: ignore[type-arg]  # noqa: UP006
def _federal(state: Annotated[str | None, "of the union"] = None, x: str = "") -> None: ...
def _object(state: dict[str, int], x: str = "") -> None: ...


@pytest.mark.parametrize(
    "function", [_untyped, _mapping, _mixed, _truth, _maybe, _deep, _bare, _federal, _object]
)
def test_an_annotation_that_cannot_be_checked_is_refused_at_registration(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"x|state"):
        tool("never_registered", description="d")(function)
    assert "never_registered" not in TOOLS


def _search(query: str) -> ToolResult:
    """Searches."""
    return ToolResult(f"found {query!r}")


def _weather(state: str, day: int = 1) -> ToolResult:
    """Says the weather of a federal state."""
    return ToolResult(f"found {state!r}")


def _ping() -> ToolResult:
    """Answers."""
    return ToolResult("found 'it'")


def _context(context: EpisodeState, query: str) -> ToolResult:
    """Searches."""
    assert context.task.answers == ("7",)
    return ToolResult(f"found {query!r}")


def _context_later(context: Later | None, query: str) -> ToolResult:  # type: ignore[name-defined]  # noqa: F821
    raise NotImplementedError


class Searcher:
    """Searches in an index."""

    def __call__(self, query: str) -> ToolResult:
        return _search(query)

    def bound(self, query: str) -> ToolResult:
        """Searches."""
        return _search(query)

    def bound_with_state(self, state: Any, *, query: str) -> ToolResult:
        """Searches."""
        return _context(state, query)

    @staticmethod
    def static(query: str) -> ToolResult:
        """Searches."""
        return _search(query)

    @classmethod
    def of_class(cls, query: str) -> ToolResult:
        """Searches."""
        return _search(query)


def _indexed(index: dict[str, str], query: str) -> ToolResult:
    """Searches."""
    return _search(index[query])


@pytest.mark.parametrize(
    ("function", "name", "first"),
    [
        (_search, "_search", "query"),
        (_weather, "_weather", "state"),
        (_ping, "_ping", None),
        (_context, "_context", "query"),
        (Searcher(), "Searcher", "query"),
        (Searcher().bound, "bound", "query"),
        (Searcher().bound_with_state, "bound_with_state", "query"),
        (Searcher.static, "static", "query"),
        (Searcher.of_class, "of_class", "query"),
        (partial(_indexed, {"it": "it"}), "_indexed", "query"),
    ],
)
@pytest.mark.parametrize("inline", [False, True])
def test_a_function_gets_the_state_only_if_it_has_a_parameter_for_it(
    function: Any, name: str, first: str | None, inline: bool
) -> None:
    made = Tool.of(function, inline=inline)
    assert made.name == name
    assert made.description.startswith(("Searches", "Says", "Answers"))
    assert next(iter(made.parameters()["properties"]), None) == first
    state = EpisodeState(Task("t", "What is it?", ("7",)), [])
    record, result = made.call(state, {first: "it"} if first else {})
    assert record.ok
    assert result.text == "found 'it'"
    record, result = made.call(state, {})
    assert record.ok is (first is None)
    assert "7" not in result.text


@pytest.mark.parametrize("wrapped", [False, True])
def test_arguments_without_names_and_types_are_refused(wrapped: bool) -> None:
    def rest(state: EpisodeState, **fields: str) -> ToolResult: ...
    def several(*queries: str) -> ToolResult: ...
    def placed(query: str, /) -> ToolResult: ...
    def later(query: str, state: EpisodeState) -> ToolResult: ...
    def other(context: Any, query: str) -> ToolResult: ...
    def untyped(query): ...  # type: ignore[no-untyped-def]

    for function, message in (
        (rest, r"tool 'rest' has the parameter '\*\*fields: .*\nName each argument"),
        (several, r"tool 'several' has the parameter '\*queries"),
        (placed, r"tool 'placed' has the parameter 'query"),
        (later, r"later\(state\): .*EpisodeState"),
        (other, r"other\(context\): .*Any.* is not supported"),
        (untyped, r"'query' of tool 'untyped' has no annotation.\nAdd its type"),
        (_context_later, r"'_context_later'.*'Later' is not defined"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tool.of(partial(function) if wrapped else function, description="d")


def test_an_annotation_with_an_unknown_name_says_where_to_import_it() -> None:
    def look(state: Any, x: Elsewhere) -> ToolResult:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    with pytest.raises(ConfigError, match=r"'look'.*'Elsewhere' is not defined.*TYPE_CHECKING"):
        tool("never_registered", description="d")(look)


def test_a_tool_needs_words_for_the_model() -> None:
    def silent(state: Any) -> ToolResult:
        raise NotImplementedError

    with pytest.raises(ConfigError, match="description"):
        tool("silent")(silent)


def test_the_docstring_is_the_description() -> None:
    def spoken(state: Any) -> ToolResult:
        """Says one
        thing.

        And this is for developers.
        """
        raise NotImplementedError

    try:
        assert tool("spoken_for_test", timeout_s=3.0)(spoken).description == "Says one thing."
        assert TOOLS.get("spoken_for_test").timeout_s == 3.0
    finally:
        TOOLS._things.pop("spoken_for_test", None)


# From a model's arguments to values


def _all_kinds(
    state: Any,
    number: float = 0.0,
    count: int = 0,
    word: str = "",
    truth: bool = False,
    box: list[float] = [],  # noqa: B006
    angle: Literal[90, 180] = 90,
    side: Literal["left", "right"] = "left",
) -> None: ...


@pytest.mark.parametrize(
    ("name", "given_value", "expected"),
    [
        ("number", 1, 1.0),
        ("number", -2.5, -2.5),
        ("count", 2.0, 2),
        ("count", -3, -3),
        ("word", "", ""),
        ("truth", True, True),
        ("box", [1, 2.5], [1.0, 2.5]),
        ("box", [], []),
        ("angle", 180, 180),
        ("angle", 90.0, 90),
        ("side", "right", "right"),
    ],
)
def test_accepted_values(name: str, given_value: Any, expected: Any) -> None:
    checked = check_arguments(_all_kinds, {name: given_value})
    assert checked == {name: expected}
    assert type(checked[name]) is type(expected)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("number", True, "'number' must be a number, got true."),
        ("number", "1", "'number' must be a number, got \"1\"."),
        ("number", None, "'number' must be a number, got null."),
        ("number", math.nan, "'number' must be a number, got NaN."),
        ("number", math.inf, "'number' must be a number, got Infinity."),
        ("number", 10**400, "'number' must be a number, got 1000000"),
        ("count", True, "'count' must be an integer, got true."),
        ("count", 1.5, "'count' must be an integer, got 1.5."),
        ("count", "1", "'count' must be an integer, got \"1\"."),
        ("count", [1], "'count' must be an integer, got [1]."),
        ("word", 1, "'word' must be a string, got 1."),
        ("truth", 1, "'truth' must be true or false, got 1."),
        ("truth", "true", "'truth' must be true or false, got \"true\"."),
        ("box", "1,2", "'box' must be a list, got \"1,2\"."),
        ("box", {"0": 1}, "'box' must be a list, got {\"0\": 1}."),
        ("box", [1, False], "'box[1]' must be a number, got false."),
        ("box", [1, [2]], "'box[1]' must be a number, got [2]."),
        ("box", [math.nan], "'box[0]' must be a number, got NaN."),
        ("angle", 45, "'angle' must be one of 90, 180, got 45."),
        ("angle", True, "'angle' must be one of 90, 180, got true."),
        ("angle", "90", "'angle' must be one of 90, 180, got \"90\"."),
        ("side", ["left"], '\'side\' must be one of "left", "right", got ["left"].'),
    ],
)
def test_refused_values(name: str, bad: Any, message: str) -> None:
    with pytest.raises(ToolError) as caught:
        check_arguments(_all_kinds, {name: bad})
    assert str(caught.value).startswith(message)


def test_a_literal_one_does_not_accept_true() -> None:
    def once(state: Any, n: Literal[0, 1]) -> None: ...

    assert check_arguments(once, {"n": 1}) == {"n": 1}
    for bad in (True, False):
        with pytest.raises(ToolError, match="one of 0, 1"):
            check_arguments(once, {"n": bad})


def test_missing_and_unknown_arguments_are_named() -> None:
    with pytest.raises(ToolError, match="The argument 'target_image' is missing"):
        check_arguments(crop_image.function, {"bbox_2d": [0, 0, 1, 1]})
    with pytest.raises(ToolError, match=r"^Unknown argument 'x'. .*: bbox_2d, target_image.$"):
        check_arguments(crop_image.function, {"bbox_2d": [0, 0, 1, 1], "target_image": 1, "x": 2})
    for bad in ([1], "text", None, 3):
        with pytest.raises(ToolError, match="must be a JSON object"):
            check_arguments(crop_image.function, bad)
    with pytest.raises(ToolError, match="Unknown argument 'state'"):
        check_arguments(crop_image.function, {"state": 1})


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**320)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\ud800", IMAGE_MARK, "1", "left", "x" * 300, 0, 1, 90, 180.0, True])
)
lists = st.lists(scalars, max_size=5)
json_values = scalars | lists | st.dictionaries(st.text(max_size=4), scalars | lists, max_size=3)


@many
@given(
    st.dictionaries(
        st.sampled_from(["number", "count", "word", "truth", "box", "angle", "side", "other"]),
        json_values,
        max_size=3,
    )
    | json_values
)
def test_arguments_are_checked_or_refused_with_a_short_message(arguments: Any) -> None:
    try:
        checked = check_arguments(_all_kinds, arguments)
    except ToolError as error:
        text = str(error)
        assert len(text) < 250
        text.encode("utf-8")
        return
    types = {"number": float, "count": int, "word": str, "truth": bool, "box": list, "angle": int}
    for name, value in checked.items():
        assert type(value) is types.get(name, str)
        assert value == arguments[name]
    for value in (checked.get("number", 0.0), *checked.get("box", ())):
        assert type(value) is float
        assert math.isfinite(value)
    assert set(checked) == set(arguments)


def test_a_value_in_a_message_is_short_and_can_be_encoded() -> None:
    assert shorten("a" * 80) == "a" * 80
    assert shorten("a" * 81) == "a" * 77 + "..."
    assert shorten("\ud800x") == "?x"
    assert shorten(10**5000) == "a int"
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "a list"
    while nested:
        nested = nested.pop()  # freed level by level


# The parser


def call_text(name: Any = "crop_image", arguments: Any = None, **more: Any) -> str:
    body = {"name": name, "arguments": {} if arguments is None else arguments, **more}
    return f"<tool_call>\n{json.dumps(body)}\n</tool_call>"


def test_a_call_among_words() -> None:
    text = f"I look closer. {call_text(arguments={'bbox_2d': [0, 0.5, 1, 1], 'target_image': 1})}"
    expected = ParsedCall("crop_image", {"bbox_2d": [0, 0.5, 1, 1], "target_image": 1})
    assert find_tool_call(text) == expected
    assert find_tool_call(f"```json\n{text}\n```") == expected
    assert find_tool_call(text + " and so on") == expected


@pytest.mark.parametrize("text", ["", "The answer is \\boxed{7}", "</tool_call>", "<tool_cal>{}"])
def test_words_without_a_call(text: str) -> None:
    assert find_tool_call(text) is None


def test_first_or_last_of_several() -> None:
    text = call_text("a") + " then " + call_text("b") + call_text("c")
    assert find_tool_call(text) == ParsedCall("a", {})
    assert find_tool_call(text, "first") == ParsedCall("a", {})
    assert find_tool_call(text, "last") == ParsedCall("c", {})


def test_a_first_call_that_is_wrong_is_not_passed_over_for_a_good_one() -> None:
    text = "<tool_call>{</tool_call>" + call_text("b")
    with pytest.raises(ToolError, match="not valid JSON"):
        find_tool_call(text)
    assert find_tool_call(text, "last") == ParsedCall("b", {})


def test_an_opened_tag_before_a_complete_call_does_not_spoil_it() -> None:
    assert find_tool_call("<tool_call> I mean " + call_text("a")) == ParsedCall("a", {})
    assert find_tool_call(call_text("a") + "<tool_call>") == ParsedCall("a", {})


def test_arguments_as_a_json_string_and_absent_ones() -> None:
    assert find_tool_call(call_text("a", '{"x": 1}')) == ParsedCall("a", {"x": 1})
    assert find_tool_call('<tool_call>{"name": "a"}</tool_call>') == ParsedCall("a", {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "not valid JSON"),
        ("{'name': 'a'}", "not valid JSON"),
        ('{"name": "a"} {"name": "b"}', "not valid JSON"),
        ('{"name": "a", "arguments": {"n": 1' + "0" * 5000 + "}}", "a number is too long"),
        ("[1, 2]", "must be a JSON object, got"),
        ('"name"', 'must be a JSON object, got "name"'),
        ("null", "must be a JSON object, got null"),
        ("{}", 'has no "name"'),
        ('{"name": 3}', 'has no "name"'),
        ('{"name": ""}', 'has no "name"'),
        ('{"name": ["a"]}', 'has no "name"'),
        ('{"name": "a", "arguments": NaN}', "NaN is not a number"),
        ('{"name": "a", "arguments": {"x": -Infinity}}', "-Infinity is not a number"),
        ('{"name": "a", "arguments": "{"}', "must be a JSON object"),
        ('{"name": "a", "arguments": "{\\"x\\": NaN}"}', "must be a JSON object"),
        ('{"name": "a", "arguments": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
        ('{"name": "a", "arguments": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ("[" * 9000, "nested too deeply"),
        (" " * (MAX_CALL_CHARACTERS + 1), "too long"),
    ],
)
def test_calls_that_cannot_be_read(body: str, message: str) -> None:
    with pytest.raises(ToolError) as caught:
        find_tool_call(f"<tool_call>{body}</tool_call>")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_nesting_is_accepted_up_to_the_limit() -> None:
    def nested(depth: int) -> str:
        inner = "[" * depth + "]" * depth
        return f'<tool_call>{{"name": "a", "arguments": {inner}}}</tool_call>'

    assert find_tool_call(nested(MAX_DEPTH)) is not None
    with pytest.raises(ToolError, match="nested"):
        find_tool_call(nested(MAX_DEPTH + 1))


def test_an_unclosed_call_is_not_taken_for_an_answer() -> None:
    with pytest.raises(ToolError, match="not closed; end it with </tool_call>"):
        find_tool_call('<tool_call>{"name": "a"}')


@many
@given(st.text(min_size=1, max_size=20).filter(lambda s: "tool_call" not in s), json_values)
def test_whatever_is_written_as_a_call_is_read_back(name: str, arguments: Any) -> None:
    try:
        body = json.dumps({"name": name, "arguments": {"x": arguments}}, allow_nan=False)
    except ValueError:
        return
    if "tool_call" in body or len(body) > MAX_CALL_CHARACTERS:
        return
    assert find_tool_call(f"Let me see. <tool_call>\n{body}\n</tool_call>") == ParsedCall(
        name, {"x": arguments}
    )


pieces = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "{", "}", "[", "]", '"', ":", ",", '"name"', "\\u",
     '"arguments"', "null", "NaN", "1e999", "-", "0.5", "9" * 50, '"crop_image"', "\ud800", "\x00",
     IMAGE_MARK, "\\ud800", "\n", '{"name": "crop_image", "arguments": ', "\\boxed{1}"]
)  # fmt: skip
hostile_text = st.lists(pieces | st.text(max_size=3), max_size=25).map("".join)


@many
@given(hostile_text, st.sampled_from(["first", "last"]))
@example("<tool_call>" * 3000, "first")
@example("<tool_call>" + "[" * 19000 + "</tool_call>", "last")
def test_the_parser_gives_a_call_nothing_or_a_message(text: str, policy: Any) -> None:
    try:
        found = find_tool_call(text, policy)
    except ToolError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "<tool_call>" in text
        assert len(message) < 300
    elif found is None:
        assert "<tool_call>" not in text
    else:
        assert isinstance(found.name, str)
        assert found.name


def test_the_parser_is_linear_in_repeated_tags() -> None:
    started = time.perf_counter()
    for text in ("<tool_call>" * 20_000, "<tool_call>x" * 20_000 + "</tool_call>"):
        with pytest.raises(ToolError):
            find_tool_call(text)
    assert time.perf_counter() - started < 2.0


# crop_image


def crop(image: Image.Image, *box: float, number: Any = 1, **options: Any) -> tuple[Any, Any]:
    state = state_of(image, crop_image=options)
    return crop_image.call(state, {"bbox_2d": list(box), "target_image": number})


def test_the_crop_has_the_pixels_of_the_padded_box() -> None:
    picture = coordinates(200, 100)
    record, result = crop(picture, 50, 40, 100, 80)
    # padded by 10 % of the sides: 20 and 10 pixels
    assert record.ok
    assert result.text == f"Here is the cropped image (Image Size: 90x60):\n{IMAGE_MARK}"
    expected = np.asarray(picture)[30:90, 30:120]
    assert np.array_equal(np.asarray(result.images[0]), expected)
    (region,) = record.regions  # for the people who look at the episode later
    assert region.image == 1
    assert region.box == pytest.approx((30 / 200, 30 / 100, 120 / 200, 90 / 100))


def test_normalised_and_pixel_boxes_agree_and_padding_is_an_option() -> None:
    picture = coordinates(640, 480)
    by_share = crop(picture, 0.25, 0.5, 0.5, 0.75, padding=0.0)[1].images[0]
    by_pixel = crop(picture, 160, 240, 320, 360, padding=0.0)[1].images[0]
    assert by_share.size == by_pixel.size == (160, 120)
    assert np.array_equal(np.asarray(by_share), np.asarray(picture)[240:360, 160:320])
    assert np.array_equal(np.asarray(by_share), np.asarray(by_pixel))


def test_the_padding_of_a_large_picture_is_at_most_600_pixels() -> None:
    box = pixel_box([7000, 100, 7100, 200], 10_000, 500, padding=0.1, min_side=28)
    assert box == (6400, 50, 7700, 250)


def test_peer_bug_1_the_whole_picture_in_normalised_coordinates_is_the_whole_picture() -> None:
    assert crop(coordinates(640, 480), 0, 0, 1, 1)[1].images[0].size == (640, 480)
    assert pixel_box([0, 0, 1.0, 0.5], 640, 480, padding=0.0, min_side=28) == (0, 0, 640, 240)
    assert pixel_box([0.5, 0.5, 1, 1], 640, 480, padding=0.1, min_side=28) == (256, 192, 640, 480)


@pytest.mark.parametrize(
    "box", [[0.5, 0.5, 1.02, 1.0], [-0.01, 0, 0.5, 0.5], [0, 0, 2, 2], [0.1, 0.1, 1.5, 0.9]]
)
def test_normalised_coordinates_that_overshoot_are_not_taken_for_pixels(box: list[float]) -> None:
    record, _ = crop(coordinates(640, 480), *box)
    assert not record.ok
    assert record.error is not None
    assert "is neither normalized (all four from 0 to 1) nor in pixels" in record.error
    assert "whose size is 640x480" in record.error


def test_a_thin_or_negative_pixel_box_is_still_a_pixel_box() -> None:
    assert pixel_box([-5, 0, 3, 3], 640, 480, padding=0.1, min_side=28) == (0, 0, 67, 51)
    assert pixel_box([300, 0, 300.5, 480], 640, 480, padding=0.1, min_side=28) == (236, 0, 364, 480)


def test_peer_bug_2_selected_frames_are_whole_after_a_crop() -> None:
    frames = [coordinates(64, 48).rotate(90 * i, expand=True).resize((64, 48)) for i in range(4)]
    state = state_of(*frames, frames=4)
    cropped = crop_image.call(state, {"bbox_2d": [0, 0, 0.5, 0.7], "target_image": 1})[1]
    state.images.extend(cropped.images)
    record, result = select_frames.call(state, {"target_frames": [3, 1]})
    assert record.ok
    assert [image.size for image in result.images] == [(64, 48), (64, 48)]
    for image, frame in zip(result.images, (frames[2], frames[0]), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(frame))
    assert result.text == (
        "Here are the selected frames (Frame Size: 64x48, Numbered 6 to 7):\n" + IMAGE_MARK * 2
    )


def test_peer_bug_3_too_many_frames_are_an_error_and_not_quietly_fewer() -> None:
    state = state_of(*[coordinates(32, 32)] * 16, frames=16)
    arguments = {"target_frames": list(range(1, 10))}
    record, result = select_frames.call(state, arguments)
    assert not record.ok
    assert result == ToolResult("Execution error:\nYou asked for 9 frames; select at most 8.")
    assert record.arguments == {"target_frames": list(range(1, 10))}
    assert select_frames.call(state, {"target_frames": list(range(1, 9))})[0].ok


def test_peer_bug_4_a_crop_has_a_least_size_and_nothing_is_written(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = coordinates(300, 300)
    record, result = crop(picture, 10, 10, 38, 200, padding=0.0)
    assert not record.ok
    assert "would be 28x190; each side must be larger than 28 pixels" in result.text
    assert crop(picture, 10, 10, 39, 39, padding=0.0)[1].images[0].size == (29, 29)
    assert not crop(picture, 10, 10, 39, 38, padding=0.0)[0].ok
    assert crop(picture, 10, 10, 20, 20, padding=0.0, min_side=9)[0].ok
    assert list(tmp_path.iterdir()) == []


BAD_CALLS: list[tuple[Any, str]] = [
    ({"bbox_2d": [50, 0, 50, 90], "target_image": 1}, "is empty"),
    ({"bbox_2d": [60, 0, 50, 90], "target_image": 1}, "is empty"),
    ({"bbox_2d": [0, 90, 50, 40], "target_image": 1}, "is empty"),
    ({"bbox_2d": [0, 0, math.nan, 90], "target_image": 1}, "'bbox_2d[2]' must be a number"),
    ({"bbox_2d": [0, 0, math.inf, 90], "target_image": 1}, "'bbox_2d[2]' must be a number"),
    ({"bbox_2d": ["0", 0, 1, 1], "target_image": 1}, "'bbox_2d[0]' must be a number"),
    ({"bbox_2d": [False, 0, 1, 1], "target_image": 1}, "'bbox_2d[0]' must be a number"),
    ({"bbox_2d": [0, 0, 1], "target_image": 1}, "must have 4 numbers"),
    ({"bbox_2d": [0, 0, 1, 1, 1], "target_image": 1}, "must have 4 numbers"),
    ({"bbox_2d": [], "target_image": 1}, "must have 4 numbers"),
    ({"bbox_2d": [[0, 0, 1, 1]], "target_image": 1}, "'bbox_2d[0]' must be a number"),
    ({"bbox_2d": "0,0,1,1", "target_image": 1}, "'bbox_2d' must be a list"),
    ({"bbox_2d": [200, 0, 300, 90], "target_image": 1}, "outside the image, whose size is 200x100"),
    ({"bbox_2d": [-50, -50, -2, -2], "target_image": 1}, "outside the image"),
    ({"bbox_2d": [0.5, 0.5, 1.02, 1], "target_image": 1}, "is neither normalized"),
    ({"bbox_2d": [-0.1, 0, 0.5, 0.5], "target_image": 1}, "is neither normalized"),
    ({"bbox_2d": [0, 0, 2, 2], "target_image": 1}, "is neither normalized"),
    ({"bbox_2d": [0, 0, 1, 1]}, "'target_image' is missing"),
    ({"target_image": 1}, "'bbox_2d' is missing"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": 0}, "no image 0; the images are numbered 1 to 1"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": 2}, "no image 2; the images are numbered 1 to 1"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": -1}, "no image -1"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": 1e300}, "no image 100000"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": "1"}, "'target_image' must be an integer"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": True}, "'target_image' must be an integer"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": 1.5}, "'target_image' must be an integer"),
    ({"bbox_2d": [0, 0, 1, 1], "target_image": None}, "'target_image' must be an integer"),
    ({"bbox_2d": [0, 0, 1e308, 1e308], "target_image": 1, "x": 1}, "Unknown argument 'x'"),
    (None, "must be a JSON object"),
    ([0, 0, 1, 1], "must be a JSON object"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_peer_bug_5_a_bad_crop_is_a_clear_message(arguments: Any, message: str) -> None:
    record, result = crop_image.call(state_of(coordinates(200, 100)), arguments)
    assert not record.ok
    assert record.error is not None
    assert message in record.error
    assert result == ToolResult(f"Execution error:\n{record.error}")
    assert len(record.error) < 250


def test_a_later_picture_can_be_cropped_too() -> None:
    state = state_of(coordinates(200, 100), coordinates(90, 80))
    result = crop_image.call(state, {"bbox_2d": [0, 0, 1, 1], "target_image": 2})[1]
    assert result.images[0].size == (90, 80)


corner = st.floats(-2, 2) | st.floats(-50, 5000) | st.floats(allow_nan=False, allow_infinity=False)


@many
@given(
    st.lists(corner, min_size=4, max_size=4),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0, 28]),
)
@example([0.0, 0.0, 1e308, 1e308], 640, 480, 0.1, 28)
@example([0.0, 0.0, 5e-324, 1.0], 640, 480, 0.0, 0)
def test_a_box_lies_in_the_picture_and_around_what_was_asked(
    box: list[float], width: int, height: int, padding: float, least: int
) -> None:
    x1, y1, x2, y2 = box
    refused = ""
    try:
        left, top, right, bottom = pixel_box(box, width, height, padding=padding, min_side=least)
    except ToolError as error:
        refused = str(error)
    if refused:
        assert len(refused) < 200
        if x2 > x1 and y2 > y1 and all(0 <= v <= 1 for v in box):
            # refused for its size only
            assert min((x2 - x1) * width, (y2 - y1) * height) <= least + 1
        return
    assert all(type(v) is int for v in (left, top, right, bottom))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left > least
    assert bottom - top > least
    scale = (width, height) if all(0 <= v <= 1 for v in box) else (1, 1)
    pads = (min(padding * width, 600), min(padding * height, 600))
    for low, high, start, end, side, k, pad in (
        (left, right, x1, x2, width, scale[0], pads[0]),
        (top, bottom, y1, y2, height, scale[1], pads[1]),
    ):
        assert abs(low - max(0.0, min(side, start * k - pad))) <= 0.5
        assert abs(high - min(float(side), max(0, end * k + pad))) <= 0.5


# select_frames


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "'target_frames' is empty"),
        ([0], "no frame 0; the frames are numbered 1 to 4"),
        ([5], "no frame 5; the frames are numbered 1 to 4"),
        ([-1], "no frame -1"),
        ([1, 2, 1], "named twice"),
        ([1.5], "'target_frames[0]' must be an integer"),
        ([True], "'target_frames[0]' must be an integer"),
        (["1"], "'target_frames[0]' must be an integer"),
        (1, "'target_frames' must be a list"),
        ([10**4000], "no frame 1000"),
    ],
)
def test_bad_frames_are_a_clear_message(frames: Any, message: str) -> None:
    # A fifth picture, a crop of before, is not a frame.
    state = state_of(*[coordinates(32, 32)] * 5, frames=4)
    record, result = select_frames.call(state, {"target_frames": frames})
    assert not record.ok
    assert message in result.text
    assert len(result.text) < 200


def test_frames_of_a_picture_question_do_not_exist() -> None:
    record, result = select_frames.call(state_of(coordinates(64, 64)), {"target_frames": [1]})
    assert not record.ok
    assert "has no video; use crop_image" in result.text


# What a tool can do wrong


def test_a_good_call_is_recorded() -> None:
    def sum_up(state: EpisodeState, a: int, b: int = 2) -> ToolResult:
        return ToolResult(str(a + b))

    record, result = make_tool(sum_up).call(state_of(), {"a": 1})
    assert (record.name, record.arguments) == ("probe", {"a": 1})
    assert (record.ok, record.error) == (True, None)
    assert result == ToolResult("3")
    assert 0 < record.seconds < 2


def test_a_hung_tool_takes_its_time_limit_only() -> None:
    stop = threading.Event()

    def hang(state: EpisodeState) -> ToolResult:
        stop.wait(30)
        return ToolResult("too late")

    started = time.perf_counter()
    record, result = make_tool(hang, timeout_s=0.2).call(state_of(), {})
    assert 0.2 <= time.perf_counter() - started < 2.0
    assert result == ToolResult("Execution error:\nThe tool did not finish within 0.2 seconds.")
    assert not record.ok
    assert 0.2 <= record.seconds < 2.0
    # a tighter limit of the episode wins, a wider one does not
    assert "within 0.1 seconds" in make_tool(hang, 0.2).call(state_of(), {}, seconds=0.1)[1].text
    assert "within 0.2 seconds" in make_tool(hang, 0.2).call(state_of(), {}, seconds=9)[1].text
    stop.set()


class Odd:
    """Not a picture."""


def _raises(error: BaseException) -> Callable[..., Any]:
    def function(state: EpisodeState) -> ToolResult:
        raise error

    return function


def _returns(value: Any) -> Callable[..., Any]:
    def function(state: EpisodeState) -> Any:
        return value() if callable(value) else value

    return function


def _broken_file() -> ToolResult:
    import io

    buffer = io.BytesIO()
    coordinates(64, 64).save(buffer, "PNG")
    return ToolResult(IMAGE_MARK, (Image.open(io.BytesIO(buffer.getvalue()[:100])),))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_raises(ToolError("Use a larger box.")), "Use a larger box."),
        (_raises(ToolError(f"It is {IMAGE_MARK}!")), "It is  !"),
        (_raises(ValueError("secret path /home")), "The tool probe failed: ValueError."),
        (_raises(ZeroDivisionError()), "The tool probe failed: ZeroDivisionError."),
        (_raises(MemoryError()), "The tool probe failed: MemoryError."),
        (_raises(RecursionError()), "The tool probe failed: RecursionError."),
        (_raises(SystemExit(3)), "The tool probe failed: SystemExit."),
        (_raises(KeyboardInterrupt()), "The tool probe failed: KeyboardInterrupt."),
        (_raises(GeneratorExit()), "The tool probe failed: GeneratorExit."),
        (_returns(None), "The tool probe failed: it returned None, not a ToolResult."),
        (_returns("text"), "failed: it returned a value of type str, not a ToolResult."),
        (_returns(("text", [])), "it returned a value of type tuple, not a ToolResult."),
        (
            _returns(lambda: ToolResult("x" + IMAGE_MARK)),
            "The tool probe failed: 1 image marks in its text, but 0 images.",
        ),
        (
            _returns(lambda: ToolResult("x", (coordinates(8, 8),))),
            "failed: 0 image marks in its text, but 1 images.",
        ),
        (
            _returns(lambda: ToolResult(IMAGE_MARK, (Odd(),))),  # type: ignore[arg-type]
            "failed: it returned a value of type Odd as a picture, not PIL's Image.",
        ),
        (
            _returns(lambda: ToolResult(IMAGE_MARK, (np.zeros((8, 8, 3), np.uint8),))),  # type: ignore[arg-type]
            "it returned a value of type ndarray as a picture, not PIL's Image.",
        ),
        (
            _returns(lambda: ToolResult(IMAGE_MARK, (Image.new("RGB", (0, 5)),))),
            "failed: it returned a picture of 0x5 pixels.",
        ),
        (_returns(lambda: ToolResult(None)), "failed: its text is of type NoneType."),  # type: ignore[arg-type]
        (_returns(_broken_file), "failed: OSError."),
    ],
)
def test_whatever_a_tool_does_is_a_message(function: Callable[..., Any], message: str) -> None:
    record, result = make_tool(function).call(state_of(), {})
    assert not record.ok
    assert result.images == ()
    assert result.text.startswith("Execution error:\n")
    assert result.text.endswith(message)
    assert "secret" not in result.text
    assert IMAGE_MARK not in result.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_pictures_of_a_tool_become_rgb(mode: str) -> None:
    picture = Image.new(mode, (30, 20))
    result = make_tool(_returns(ToolResult(IMAGE_MARK, (picture,)))).call(state_of(), {})[1]
    assert [(i.mode, i.size) for i in result.images] == [("RGB", (30, 20))]


def test_a_failure_never_holds_an_image_mark() -> None:
    assert failure(f"a{IMAGE_MARK}b") == ToolResult("Execution error:\na b")


def test_a_bounded_function_keeps_its_own_errors_and_values() -> None:
    assert run_bounded(lambda: 42, 5.0) == 42
    with pytest.raises(KeyError, match="mine"):
        run_bounded(lambda: {}["mine"], 5.0)
    stop = threading.Event()
    with pytest.raises(DeadlineError):
        run_bounded(lambda: stop.wait(20), 0.05)
    stop.set()


def test_only_inline_tools_hand_over_their_pictures() -> None:
    own = {mode: Image.new(mode, (40, 40), 7) for mode in ("RGB", "L")}

    def draws(state: EpisodeState) -> ToolResult:
        return ToolResult(2 * IMAGE_MARK, (own["RGB"], own["L"]))

    bounded = make_tool(draws)
    for made, is_same in ((bounded, False), (replace(bounded, inline=True), True)):
        rgb, grey = made.call(state_of(), {})[1].images
        assert (rgb is own["RGB"]) == is_same
        assert rgb.tobytes() == own["RGB"].tobytes()
        assert grey.mode == "RGB"


def test_only_inline_tools_run_on_the_callers_thread() -> None:
    def tells(state: EpisodeState) -> ToolResult:
        return ToolResult(threading.current_thread().name)

    bounded = make_tool(tells)
    inline = replace(bounded, inline=True)
    here = threading.current_thread().name
    assert bounded.call(state_of(), {})[1].text != here
    assert inline.call(state_of(), {})[1].text == here
    assert inline.shown_as("other").call(state_of(), {})[1].text == here
    assert crop_image.inline
    assert select_frames.inline


def test_a_process_ends_promptly_in_spite_of_a_hung_tool() -> None:
    program = """
        import time
        from reopold_agent.tools import EpisodeState, Tool
        from reopold_agent.types import Task

        def hang(state):
            time.sleep(600)

        tool = Tool("hang", hang, "Hangs.", timeout_s=0.2)
        started = time.perf_counter()
        print(tool.call(EpisodeState(Task("t", "q", ("1",)), []), {})[1].text)
        print("took", time.perf_counter() - started < 5)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "did not finish within 0.2 seconds" in done.stdout
    assert "took True" in done.stdout


# Random play: nothing but a result leaves a tool


@pytest.fixture(scope="module")
def pictures() -> Iterator[EpisodeState]:
    yield state_of(*[coordinates(120, 90)] * 3, frames=2)
    assert no_threads_left()


@many
@given(
    st.sampled_from([crop_image, select_frames]),
    json_values
    | st.fixed_dictionaries(
        {},
        optional={
            "bbox_2d": json_values | st.lists(corner, min_size=3, max_size=5),
            "target_image": json_values | st.integers(-1, 5),
            "target_frames": json_values | st.lists(st.integers(-1, 4), max_size=10),
        },
    ),
)
def test_nothing_but_a_result_leaves_a_call(
    pictures: EpisodeState, which: Tool, arguments: Any
) -> None:
    record, result = which.call(pictures, arguments)
    assert isinstance(result, ToolResult)
    assert record.ok == (record.error is None) == bool(result.images)
    assert result.text.count(IMAGE_MARK) == len(result.images)
    assert len(result.text) < 300
    result.text.encode("utf-8")
    if not record.ok:
        assert record.error is not None
        assert result.text == "Execution error:\n" + record.error.replace(IMAGE_MARK, " ")
    assert len(pictures.images) == 3


# Tools that bring their schema

SCHEMA = {
    "type": "object",
    "properties": {
        "side": {"enum": ["left", "right"]},
        "at": {"type": "array", "items": {"type": "number", "minimum": 0}, "maxItems": 2},
        "deep": {"$ref": "#/$defs/pair"},
    },
    "required": ["side"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "object", "required": ["x"]}},
}


def take(state: EpisodeState, **arguments: Any) -> ToolResult:
    return ToolResult(json.dumps(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "left", "at": [1, 2.5], "deep": {"x": 1, "y": [2]}}, None),
        ({}, "'side' is a required property"),
        ({"side": "up"}, "'side': 'up' is not one of ['left', 'right']"),
        ({"side": "left", "at": [1, -1]}, "'at[1]': -1 is less than the minimum of 0"),
        ({"side": "left", "at": [1, True]}, "'at[1]': True is not of type 'number'"),
        ({"side": "left", "deep": {}}, "'deep': 'x' is a required property"),
        ({"side": "left", "more": 1}, "Additional properties are not allowed ('more' was"),
        ([1], "The arguments must be a JSON object, got [1]."),
        ({"side": "x" * 9000}, "..."),
    ],
)
def test_calls_are_checked_against_a_schema_that_the_tool_brings(
    arguments: Any, message: str | None
) -> None:
    made = Tool("take", take, "Takes.", input_schema=SCHEMA)
    assert made.schema()["function"]["parameters"] == SCHEMA
    done, result = made.call(state_of(), arguments)
    assert done.ok is (message is None)
    if message is None:
        assert json.loads(result.text) == arguments
    else:
        assert message in str(done.error)
        assert len(str(done.error)) < 600


def test_a_reference_to_another_document_is_not_fetched() -> None:
    made = Tool("take", take, "Takes.", input_schema={"$ref": "http://127.0.0.1:9/schema.json"})
    done, _ = made.call(state_of(), {})
    assert done.error == "The tool take failed: _WrappedReferencingError."
