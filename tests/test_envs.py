"""Environments: Gymnasium's contract, budgets, and that nothing but messages leaves ``step``."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import reopold_agent.envs  # noqa: F401  # registers
from reopold_agent.demo.tasks import ArrayImage
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.envs.registration import make_found
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.envs.spaces import Pictures, UnicodeText
from reopold_agent.errors import ConfigError, DataError, ToolError, UnknownNameError
from reopold_agent.judges import Judge, Verdict
from reopold_agent.tools import TOOLS, EpisodeState, Tool, ToolResult
from reopold_agent.types import IMAGE_MARK, Task, ToolCall

many = settings(max_examples=1500)


def picture(width: int, height: int, seed: int = 0) -> ArrayImage:
    rng = np.random.default_rng(seed)
    return ArrayImage(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def task(
    *images: ArrayImage,
    question: str = "Which digit?",
    answers: Sequence[str] = ("7",),
    **more: Any,
) -> Task:
    return Task("task-1", question, tuple(answers), images or (picture(200, 100),), **more)


def call(name: str, arguments: Any = None) -> str:
    body = {"name": name, "arguments": {} if arguments is None else arguments}
    return f"<tool_call>\n{json.dumps(body)}\n</tool_call>"


CROP = call("crop_image", {"bbox_2d": [0.25, 0.2, 0.75, 0.8], "target_image": 1})


def say(state: EpisodeState, words: str = "hello") -> ToolResult:
    """Says
    the words.

    More than the model is told.
    """
    return ToolResult(words)


def show(state: EpisodeState, count: Annotated[int, "how many"], side: int = 8) -> ToolResult:
    """Shows pictures."""
    return ToolResult("Look: " + IMAGE_MARK * count, (Image.new("RGB", (side, side)),) * count)


def fail(state: EpisodeState) -> ToolResult:
    raise ToolError("Not like this.")


def crash(state: EpisodeState) -> ToolResult:
    raise ZeroDivisionError


def leave(state: EpisodeState) -> ToolResult:
    sys.exit(3)


def wrong(state: EpisodeState) -> ToolResult:
    return "text"  # type: ignore[return-value]


def nap(state: EpisodeState, seconds: float) -> ToolResult:
    time.sleep(seconds)
    return ToolResult("Slept.")


TOY = [
    Tool(f.__name__, f, "For tests.", timeout_s=5.0)
    for f in (say, show, fail, crash, leave, wrong, nap)
]  # type: ignore[arg-type]


class ToyEnv(ToolEnv):
    """Questions of this file with the tools of this file."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"tools": TOY, **settings})

    def load_tasks(self, split: str, **source: Any) -> list[Task]:
        return [task(question=f"{split} {i}?") for i in range(5 if split == "train" else 2)]


def started(env: ToolEnv, which: Task | None = None) -> ToolEnv:
    env.reset(seed=0, options={"task": which or task()})
    return env


@pytest.fixture
def crops() -> PixelReasonerEnv:
    env = PixelReasonerEnv(tool_options={"crop_image": {"padding": 0.0}})
    env.reset(options={"task": task()})
    return env


# Gymnasium


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_environment_passes_gymnasiums_check(strict: None) -> None:
    env = gymnasium.make("reopold/PixelReasoner-v0", render_mode="rgb_array")
    assert isinstance(env.unwrapped, PixelReasonerEnv)
    check_env(env.unwrapped)


def test_make_without_arguments_gives_the_embedded_task(strict: None) -> None:
    env = gymnasium.make("reopold/PixelReasoner-v0")
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert info["task_id"].startswith("demo-train-")
    assert "crop_image" in info["system_prompt"]
    assert "select_frames" in info["system_prompt"]
    question = (
        f"{IMAGE_MARK * len(observation['images'])}\nWhich digit is written on the white card"
    )
    assert observation["text"].startswith(question)
    assert observation["text"].endswith(
        "\n\nGuidelines: Understand the given visual information and the user query. Determine if "
        "it is beneficial to employ the given visual operations (tools). For a video, we can look "
        "closer by `select_frames`. For an image, we can look closer by `crop_image`. Reason with "
        "the visual information step by step, and put your final answer within \\boxed{}."
    )
    assert env.unwrapped.num_tasks("eval") == 4096  # type: ignore[attr-defined]


def test_an_episode_is_won_by_looking_closer() -> None:
    env = gymnasium.make("reopold/PixelReasoner-v0", disable_env_checker=True)
    index = next(i for i in range(20) if not _demo(i).is_video)
    right, (row, column) = _demo(index).answers[0], _demo(index).metadata["cell"]
    observation, info = env.reset(options={"split": "eval", "index": index})
    assert info["task_id"] == f"demo-eval-0-{index}"
    assert observation["images"][0].shape == (28, 28, 3)
    box = [column / 4, row / 4, (column + 1) / 4, (row + 1) / 4]
    text = "I zoom in. " + call("crop_image", {"bbox_2d": box, "target_image": 1})
    observation, reward, terminated, truncated, info = env.step(text)
    assert observation["text"] == f"Here is the cropped image (Image Size: 56x56):\n{IMAGE_MARK}"
    original = np.asarray(_demo(index).images[0].open())
    cell = original[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
    assert np.array_equal(observation["images"][0], cell)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["tool_call"].ok
    assert info["tool_call"].name == "crop_image"
    assert "success" not in info
    observation, reward, terminated, truncated, info = env.step(f"It is \\boxed{{{right}}}.")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info == {"tool_call": None, "success": True, "answer": f"It is \\boxed{{{right}}}."}
    assert observation == {"text": "", "images": ()}


def _demo(index: int) -> Task:
    from reopold_agent.data import load_tasks

    return load_tasks({"source": "demo", "split": "eval"})[index]


def test_the_seed_picks_the_task_and_the_index_names_it() -> None:
    env = ToyEnv()
    first = [env.reset(seed=s)[0]["text"] for s in range(12)]
    assert first == [env.reset(seed=s)[0]["text"] for s in range(12)]
    assert len(set(first)) > 2
    for index in range(2):
        observation, info = env.reset(options={"split": "eval", "index": index})
        assert observation["text"].startswith(f"{IMAGE_MARK}\neval {index}?\n\n")
        assert info["task_id"] == "task-1"
    assert (env.num_tasks("train"), env.num_tasks("eval")) == (5, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is 'train' or 'eval', got 'test'"),
        ({"index": 5}, "no task 5; the split has 5"),
        ({"index": -1}, "no task -1"),
        ({"task": {"question": "?"}}, "must be a Task, got dict"),
    ],
)
def test_bad_options_of_reset(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ToyEnv().reset(options=options)


def test_step_before_reset_and_after_the_end_is_refused() -> None:
    env = ToyEnv()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("\\boxed{7}")
    started(env).step("\\boxed{7}")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("\\boxed{7}")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"max_response_tokens": 10}, "max_response_tokens needs count_tokens"),
        ({"tool_call_policy": "all"}, "tool_call_policy is 'first' or 'last', got 'all'"),
        ({"render_mode": "human"}, "render_mode is 'rgb_array' or None"),
        ({"tools": ["crop_imag"]}, "Did you mean 'crop_image'"),
        ({"tools": [{"name": "crop_image", "is": "x"}]}, "given as a name, a function, or as"),
        ({"tools": [{"as": "x"}]}, "given as a name, a function, or as"),
        ({"tools": ["crop_image", "zoom_in"]}, "two tools are shown under one name"),
        ({"tools": ["crop_image", {"name": "select_frames", "as": "crop_image"}]}, "two tools"),
        (
            {"max_turn": 1},
            "no setting 'max_turn'\nDid you mean 'max_turns'. Known: count_tokens, data",
        ),
        ({"tool_options": {"crop_imag": {}}}, "Did you mean 'crop_image'"),
        ({"judge": "rule"}, "no judge is called 'rule'.*Did you mean 'rules'"),
        ({"data": {"train": {"source": "demo"}}}, "no data for the split 'eval'"),
        ({"data": {"train": [], "eval": []}}, "the split 'eval' has no tasks"),
    ],
)
def test_bad_settings_are_explained(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, LookupError), match=message):
        PixelReasonerEnv(**settings_).num_tasks("eval")


class Counted(ToolEnv):
    """Has a setting for its tasks, and functions as tools."""

    default_tools = (say, show)

    def load_tasks(self, split: str, *, count: int = 3) -> list[Task]:
        return [task(question=f"{split} {i}?") for i in range(count)]


def test_settings_of_the_tasks_are_parameters_of_load_tasks() -> None:
    assert (Counted().num_tasks("eval"), Counted(count=2).num_tasks("eval")) == (3, 2)
    for wrong in ("conut", "split"):
        with pytest.raises(ConfigError, match=f"Counted has no setting '{wrong}'\n") as caught:
            Counted(**{wrong: 2})
        assert ("Did you mean 'count'?" in str(caught.value)) == (wrong == "conut")
        assert "Known: count, count_tokens, guideline, " in str(caught.value)


def test_functions_are_tools_under_their_names_and_register_nothing() -> None:
    env = started(Counted())
    assert [tool.name for tool in env.tools] == ["say", "show"]
    assert env.tools[0].description == "Says the words."
    assert env.step(call("say", {"words": "hello"}))[0]["text"] == "hello"
    assert not {"say", "show"} & set(TOOLS.names())
    with pytest.raises(ConfigError, match="tool 'fail' needs a description or a docstring"):
        Counted(tools=[fail])


def test_a_bare_tool_env_has_no_tasks() -> None:
    with pytest.raises(ConfigError, match="ToolEnv has no tasks; override load_tasks"):
        ToolEnv().reset()


def test_a_missing_picture_is_a_data_error_of_reset() -> None:
    class Gone:
        def open(self) -> Image.Image:
            raise DataError("the picture gone.png does not exist")

    with pytest.raises(DataError, match=r"gone\.png"):
        ToyEnv().reset(options={"task": Task("t", "q", ("1",), (Gone(),))})


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_the_state_holds_rgb_whatever_a_picture_opens_as(mode: str) -> None:
    class Odd:
        def open(self) -> Image.Image:
            return Image.new(mode, (40, 30))

    env = ToyEnv()
    observation, _ = env.reset(options={"task": Task("t", "q", ("1",), (Odd(),))})
    assert observation["images"][0].shape == (30, 40, 3)
    assert env.episode is not None
    assert env.episode.images[0].mode == "RGB"


@dataclass(frozen=True)
class Made:
    image: Image.Image

    def open(self) -> Image.Image:
        return self.image


def odd_pictures() -> tuple[Image.Image, ...]:
    """Returns pictures of 3x1: transparent to black, 16 bits, and a colour that is transparent."""
    clear = np.zeros((1, 3, 4), np.uint8)
    clear[0, :, 3] = 0, 128, 255
    deep = np.array([[0, 128 * 257, 65535]], np.uint16)
    keyed = Image.new("RGB", (3, 1))
    keyed.putpixel((0, 0), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    return Image.fromarray(clear), Image.fromarray(deep), keyed


def test_transparency_is_white_and_16_bits_are_scaled_whoever_makes_a_picture() -> None:
    def paint(state: EpisodeState) -> ToolResult:
        return ToolResult(IMAGE_MARK * 3, odd_pictures())

    made = Tool("paint", paint, "For tests.")
    env = ToyEnv(tools=[made, replace(made, name="inline", inline=True)])
    question = Task("t", "q", ("1",), tuple(map(Made, odd_pictures())))
    observation, _ = env.reset(options={"task": question})
    for shown in (observation, env.step(call("paint"))[0], env.step(call("inline"))[0]):
        colours = [image[0, :, 0].tolist() for image in shown["images"]]
        assert colours == [[255, 127, 0], [0, 128, 255], [255, 0, 0]]


# Observations


def test_the_prompt_shows_pictures_small_and_tools_use_the_originals() -> None:
    env = PixelReasonerEnv(overview_max_side=50, tool_options={"crop_image": {"padding": 0.0}})
    big = picture(200, 100)
    observation, _ = env.reset(options={"task": task(big, picture(30, 40))})
    assert [image.shape for image in observation["images"]] == [(25, 50, 3), (40, 30, 3)]
    observation = env.step(CROP)[0]
    assert np.array_equal(observation["images"][0], big.pixels[20:80, 50:150])
    # a task's own wish goes first; None shows it whole
    for wish, shape in ((10, (5, 10, 3)), (None, (100, 200, 3))):
        shown = env.reset(options={"task": task(metadata={"overview_max_side": wish})})[0]
        assert shown["images"][0].shape == shape


def test_a_crop_of_a_crop() -> None:
    env = PixelReasonerEnv(tool_options={"crop_image": {"padding": 0.0, "min_side": 1}})
    big = picture(200, 100)
    env.reset(options={"task": task(big)})
    env.step(CROP)
    again = call("crop_image", {"bbox_2d": [10, 10, 40, 30], "target_image": 2})
    observation = env.step(again)[0]
    assert np.array_equal(observation["images"][0], big.pixels[30:50, 60:90])


def test_a_video_question_counts_its_frames_but_no_crops() -> None:
    env = PixelReasonerEnv()
    frames = [picture(64, 64, seed) for seed in range(3)]
    observation, _ = env.reset(options={"task": task(*frames, is_video=True)})
    assert observation["text"].startswith(IMAGE_MARK * 3 + "\n")
    env.step(call("crop_image", {"bbox_2d": [0, 0, 1, 1], "target_image": 2}))
    info = env.step(call("select_frames", {"target_frames": [4]}))[4]
    assert info["tool_call"].error == "There is no frame 4; the frames are numbered 1 to 3."
    observation = env.step(call("select_frames", {"target_frames": [3, 2]}))[0]
    assert "Numbered 5 to 6" in observation["text"]
    assert np.array_equal(observation["images"][0], frames[2].pixels)
    assert np.array_equal(observation["images"][1], frames[1].pixels)


def test_image_marks_of_a_question_do_not_count_as_pictures() -> None:
    env = ToyEnv(guideline=f"Mind {IMAGE_MARK}.")
    observation, _ = env.reset(
        options={"task": task(question=f"What is {IMAGE_MARK}{IMAGE_MARK}?")}
    )
    assert observation["text"] == f"{IMAGE_MARK}\nWhat is   ?\n\nMind  ."
    assert len(observation["images"]) == 1


def test_a_question_without_pictures_and_without_guideline() -> None:
    observation, _ = ToyEnv(guideline="").reset(options={"task": Task("t", "2+2?", ("4",))})
    assert observation == {"text": "2+2?", "images": ()}


def test_long_texts_are_cut_but_keep_their_marks_and_large_pictures_shrink() -> None:
    env = started(ToyEnv(max_text=40, max_side=20, max_pictures=3, render_mode="rgb_array"))
    observation = env.step(call("show", {"count": 3, "side": 30}))[0]
    assert [image.shape for image in observation["images"]] == [(20, 20, 3)] * 3
    env.observation_space.contains(observation)
    long = Tool(
        "long", lambda state: ToolResult("x" * 90 + IMAGE_MARK, (Image.new("L", (4, 4)),)), "?"
    )
    env = started(ToyEnv(max_text=40, tools=[long]))
    observation = env.step(call("long"))[0]
    assert observation["text"] == "x" * 39 + IMAGE_MARK
    assert env.observation_space.contains(observation)
    # its marks spread over the text
    spread = Tool("spread", lambda state: ToolResult(("y" * 30 + IMAGE_MARK) * 3, (Image.new("L", (4, 4)),) * 3), "?")  # fmt: skip # noqa: E501
    observation = started(ToyEnv(max_text=40, tools=[spread])).step(call("spread"))[0]
    assert len(observation["text"]) <= 40
    assert observation["text"].count(IMAGE_MARK) == len(observation["images"]) == 3


def test_more_pictures_than_can_be_shown_are_a_message() -> None:
    env = started(ToyEnv(max_pictures=2))
    observation, _, terminated, truncated, info = env.step(call("show", {"count": 3}))
    assert observation["text"] == "Execution error:\nThe result has 3 images; 2 can be shown."
    assert observation["images"] == ()
    assert not terminated
    assert not truncated
    assert not info["tool_call"].ok
    with pytest.raises(ConfigError, match="3 pictures; max_pictures is 2"):
        env.reset(options={"task": task(*[picture(9, 9)] * 3)})


def test_render_gives_the_picture_shown_last() -> None:
    env = PixelReasonerEnv(render_mode="rgb_array", tool_options={"crop_image": {"padding": 0.0}})
    assert np.array_equal(env.render(), np.full((56, 56, 3), 128))
    tall, wide = picture(10, 30), picture(40, 20)
    env.reset(options={"task": task(tall, wide)})
    shown = env.render()
    assert shown.shape == (30, 50, 3)
    assert shown.dtype == np.uint8
    assert np.array_equal(shown[:, :10], tall.pixels)
    assert np.array_equal(shown[:20, 10:], wide.pixels)
    assert (shown[20:, 10:] == 255).all()
    big = picture(200, 100)
    env.reset(options={"task": task(big)})
    env.step(CROP)
    assert np.array_equal(env.render(), big.pixels[20:80, 50:150])
    env.step(call("crop_image", {}))  # a message without a picture
    assert np.array_equal(env.render(), big.pixels[20:80, 50:150])
    env.reset(options={"task": Task("t", "2+2?", ("4",))})
    assert env.render().shape == (56, 56, 3)
    assert PixelReasonerEnv().render() is None


# Ends of an episode


def test_the_answer_ends_the_episode_right_or_wrong() -> None:
    for text, right in (("\\boxed{7}", True), ("\\boxed{8}", False), ("7", False), ("", False)):
        observation, reward, terminated, truncated, info = started(ToyEnv()).step(text)
        assert (reward, terminated, truncated) == (float(right), True, False)
        assert info == {"tool_call": None, "success": right, "answer": text}
        assert observation == {"text": "", "images": ()}


def test_the_judge_is_a_setting() -> None:
    asked = []

    def kind(response: str, answers: Sequence[str]) -> Verdict:
        asked.append((response, tuple(answers)))
        return Verdict(True, response)

    for judge, reward in ((Judge("kind", kind), 1.0), ("rules", 0.0)):
        _, got, terminated, _, info = started(ToyEnv(judge=judge)).step("nonsense")
        assert (got, terminated, info["success"]) == (reward, True, bool(reward))
    assert asked == [("nonsense", ("7",))]


PLACES = [
    (
        "The last line of your response should be of the form Answer: $Answer (without quotes) "
        "where $Answer is the answer to the problem.\n\nWhat is 17 + 25?",
        "17+25 = 42.\n\nAnswer: 42",
    ),
    (
        'What is 17 + 25? Let\'s think step by step and output the final answer after "####".',
        "17+25 = 42\n#### 42",
    ),
    (
        "What is 17 + 25? Output the final answer in <answer> </answer> tags.",
        "<think>17+25</think><answer>42</answer>",
    ),
]


@pytest.mark.parametrize(("question", "answer"), PLACES)
def test_an_answer_counts_in_the_form_that_the_prompt_asks_for(question: str, answer: str) -> None:
    def reward(guideline: str, turn: str, asked: str = question) -> float:
        env = SingleTurnEnv(data={"train": [Task("1", asked, ("42",))]}, guideline=guideline)
        env.reset()
        return env.step(turn)[1]

    assert reward("", answer) == 1.0
    assert reward("", "\\boxed{42}") == 1.0
    assert reward("", answer.replace("42", "43")) == 0.0
    assert reward("Put your final answer within \\boxed{}.", answer) == 0.0
    assert reward("", answer, "What is the answer: 42 or 43?") == 0.0


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_call_in_the_last_turn_is_run_and_truncates(turns: int) -> None:
    ran = []

    def count(state: EpisodeState) -> ToolResult:
        ran.append(1)
        return ToolResult("ok")

    env = started(ToyEnv(max_turns=turns, tools=[Tool("count", count, "Counts.")]))
    for _ in range(turns - 1):
        assert env.step(call("count"))[2:4] == (False, False)
    observation, reward, terminated, truncated, info = env.step(call("count"))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert (info["success"], info["answer"]) == (False, None)
    assert info["tool_call"].ok
    assert "time_limit" not in info
    assert observation == {"text": "", "images": ()}
    assert len(ran) == turns


@pytest.mark.parametrize("text", ["<tool_call>", "<tool_call>{</tool_call>", call("nothing")])
def test_a_bad_call_in_the_last_turn_truncates_too(text: str) -> None:
    _, reward, terminated, truncated, info = started(ToyEnv(max_turns=1)).step(text)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert not info["tool_call"].ok


def test_an_answer_in_the_last_turn_counts() -> None:
    env = started(ToyEnv(max_turns=2))
    env.step(call("say"))
    assert env.step("\\boxed{7}")[1:4] == (1.0, True, False)


def test_the_token_budget_counts_turns_and_observations() -> None:
    lengths = {"max_response_tokens": 120, "count_tokens": len}
    turn = call("say", {"words": "x" * 10})
    assert len(turn) == 78
    env = started(ToyEnv(**lengths))
    # 78 + 10 of the observation leave 32
    assert env.step(turn)[2:4] == (False, False)
    assert started_after(turn, lengths).step("\\boxed{7}" + "." * 23)[1:4] == (1.0, True, False)
    assert started_after(turn, lengths).step("\\boxed{7}" + "." * 24)[1:4] == (0.0, False, True)
    _, reward, terminated, truncated, info = env.step(turn)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert "time_limit" not in info
    assert info["cut_short"]
    # an observation that does not fit truncates after the tool has run
    _, _, terminated, truncated, info = started(ToyEnv(**lengths)).step(
        call("say", {"words": "y" * 50})
    )
    assert (terminated, truncated) == (False, True)
    assert (info["success"], info["answer"], info["cut_short"]) == (False, None, True)


def started_after(turn: str, lengths: dict[str, Any]) -> ToyEnv:
    env = ToyEnv(**lengths)
    started(env).step(turn)
    return env


def test_budgets_are_reset_for_every_episode() -> None:
    env = ToyEnv(max_turns=2, max_response_tokens=100, count_tokens=len, tool_time_limit_s=0.5)
    for _ in range(3):
        started(env)
        assert env.step(call("nap", {"seconds": 0.2}))[2:4] == (False, False)


def test_the_tools_of_an_episode_have_a_time_limit_together() -> None:
    env = started(ToyEnv(tool_time_limit_s=0.6))
    assert env.step(call("nap", {"seconds": 0.25}))[2:4] == (False, False)
    begun = time.perf_counter()
    _, reward, terminated, truncated, info = env.step(call("nap", {"seconds": 3.0}))
    assert 0.2 < time.perf_counter() - begun < 1.5
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["time_limit"] is True
    assert (info["success"], info["answer"]) == (False, None)
    assert not info["tool_call"].ok


def test_a_tool_over_its_time_limit_is_a_message_and_the_episode_continues() -> None:
    slow = Tool("nap", nap, "Sleeps.", timeout_s=0.1)
    env = started(ToyEnv(tools=[slow]))
    observation, _, terminated, truncated, info = env.step(call("nap", {"seconds": 1.0}))
    expected = "Execution error:\nThe tool did not finish within 0.1 seconds."
    assert observation == {"text": expected, "images": ()}
    assert not terminated
    assert not truncated
    assert info["tool_call"].seconds < 1.0
    assert env.step("\\boxed{7}")[1] == 1.0


# Calls


def test_first_or_last_call_of_a_turn() -> None:
    text = call("say", {"words": "one"}) + call("say", {"words": "two"})
    assert started(ToyEnv()).step(text)[0]["text"] == "one"
    assert started(ToyEnv(tool_call_policy="first")).step(text)[0]["text"] == "one"
    assert started(ToyEnv(tool_call_policy="last")).step(text)[0]["text"] == "two"


def test_a_turn_with_a_call_and_a_box_is_a_call() -> None:
    observation, _, terminated, _, info = started(ToyEnv()).step("\\boxed{7}" + call("say"))
    assert not terminated
    assert observation["text"] == "hello"
    assert info["tool_call"].name == "say"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (call("fail"), "Not like this."),
        (call("crash"), "The tool crash failed: ZeroDivisionError."),
        (call("leave"), "The tool leave failed: SystemExit."),
        (
            call("wrong"),
            "The tool wrong failed: it returned a value of type str, not a ToolResult.",
        ),
        (call("say", {"word": 1}), "Unknown argument 'word'. The arguments are: words."),
        (call("say", [1]), "The arguments must be a JSON object, got [1]."),
        (call("sya"), "There is no tool 'sya'. Tools: say, show, fail, crash, leave, wrong, nap."),
        (call("\ud800"), "There is no tool '?'. Tools: say, show, fail, crash, leave, wrong, nap."),
        (call("crop_image", {}), "There is no tool 'crop_image'."),
        ("<tool_call>{}", "The tool call is not closed; end it with </tool_call>."),
        ("<tool_call>[]</tool_call>", "The tool call must be a JSON object, got []."),
        (
            call("show", {"count": 1, "side": 0}),
            "The tool show failed: it returned a picture of 0x0 pixels.",
        ),
        (call("show", {"count": 10**7}), "The result has"),
    ],
)
def test_any_failure_is_a_message_and_the_episode_continues(text: str, error: str) -> None:
    if "10000000" in text:
        text, error = call("show", {"count": 65}), "The result has 65 images; 64 can be shown."
    env = started(ToyEnv())
    observation, reward, terminated, truncated, info = env.step(text)
    assert observation["text"].startswith(f"Execution error:\n{error}")
    assert observation["images"] == ()
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert isinstance(info["tool_call"], ToolCall)
    assert not info["tool_call"].ok
    assert info["tool_call"].error.startswith(error)
    assert env.observation_space.contains(observation)
    assert env.step(call("say"))[0]["text"] == "hello"
    assert env.step("\\boxed{7}")[1:3] == (1.0, True)


def test_another_name_is_shown_and_all_names_are_understood() -> None:
    env = PixelReasonerEnv(tools=[{"name": "crop_image", "as": "crop_image_normalized"}])
    _, info = env.reset(options={"task": task()})
    assert '"name": "crop_image_normalized"' in info["system_prompt"]
    assert '"name": "crop_image"' not in info["system_prompt"]
    assert "select_frames" not in info["system_prompt"]
    for name in ("crop_image", "crop_image_normalized", "zoom_in"):
        env.reset(options={"task": task()})
        step = env.step(CROP.replace("crop_image", name))
        assert step[4]["tool_call"].ok, name
        assert step[4]["tool_call"].name == "crop_image_normalized"


def test_a_name_that_is_shown_goes_before_another_tools_alias() -> None:
    tools = [{"name": "select_frames", "as": "pick"}, {"name": "crop_image", "as": "select_frames"}]
    env = PixelReasonerEnv(tools=tools)
    env.reset(options={"task": task()})
    step = env.step(CROP.replace("crop_image", "select_frames"))
    assert step[4]["tool_call"].ok
    assert "cropped image" in step[0]["text"]


def test_the_system_message_is_a_setting() -> None:
    _, info = ToyEnv(system_message="Be brief.", tools=[]).reset(seed=0)
    assert info["system_prompt"] == "Be brief."
    _, info = ToyEnv(system_message="Be brief.").reset(seed=0)
    assert info["system_prompt"].startswith("Be brief.\n\n# Tools\n")


def test_the_demo_sets_the_crops_padding_to_0_and_real_data_does_not() -> None:
    arguments = {"bbox_2d": [50, 20, 150, 80], "target_image": 1}
    for settings_, size in (
        ({}, "100x60"),
        ({"tool_options": {"crop_image": {"min_side": 1}}}, "100x60"),
        ({"tool_options": {"crop_image": {"padding": 0.1}}}, "140x80"),
        ({"tool_options": {"zoom_in": {"padding": 0.1}}}, "140x80"),
        ({"data": {"train": [task()], "eval": [task()]}}, "140x80"),
    ):
        env = PixelReasonerEnv(**settings_)
        env.reset(options={"task": task()})
        assert f"Image Size: {size})" in env.step(call("crop_image", arguments))[0]["text"]


@pytest.mark.parametrize("key", ["crop_image", "zoom_in", "crop_image_normalized"])
def test_options_of_a_tool_may_be_given_under_any_of_its_names(key: str) -> None:
    task = Task("t", "?", ("1",), (ArrayImage(np.zeros((100, 200, 3), np.uint8)),))
    shown = {"name": "crop_image", "as": "crop_image_normalized"}
    env = PixelReasonerEnv(tools=[shown], tool_options={key: {"padding": 0.05}})
    env.reset(options={"task": task})
    call = '{"name": "zoom_in", "arguments": {"bbox_2d": [50, 20, 100, 60], "target_image": 1}}'
    observation, *_ = env.step(f"<tool_call>{call}</tool_call>")
    assert observation["images"][0].shape == (50, 70, 3)


def test_options_under_two_names_of_a_tool_are_taken_together() -> None:
    task = Task("t", "?", ("1",), (ArrayImage(np.zeros((100, 200, 3), np.uint8)),))
    both = {"crop_image": {"padding": 0.0}, "zoom_in": {"min_side": 5}}
    env = PixelReasonerEnv(tool_options=both)
    env.reset(options={"task": task})
    call = '{"name": "zoom_in", "arguments": {"bbox_2d": [50, 20, 60, 30], "target_image": 1}}'
    observation, *_ = env.step(f"<tool_call>{call}</tool_call>")
    assert observation["images"][0].shape == (10, 10, 3)


def test_several_pictures_are_no_video() -> None:
    picture = ArrayImage(np.zeros((60, 60, 3), np.uint8))
    env = PixelReasonerEnv()
    env.reset(options={"task": Task("t", "?", ("1",), (picture, picture))})
    call = '{"name": "select_frames", "arguments": {"target_frames": [1]}}'
    observation, *_, info = env.step(f"<tool_call>{call}</tool_call>")
    assert not info["tool_call"].ok
    assert "This question has no video" in observation["text"]


def test_options_of_a_tool_that_does_not_exist_are_refused() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no tool is called 'crop'\. Did you mean 'crop_image'"
    ):
        PixelReasonerEnv(tool_options={"crop": {"padding": 0.0}})


def test_peer_bug_4_nothing_is_written_on_errors(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, crops: PixelReasonerEnv
) -> None:
    monkeypatch.chdir(tmp_path)
    crops.step(call("crop_image", {"bbox_2d": [0, 0, 9, 9], "target_image": 1}))
    crops.step("<tool_call>")
    crops.step(call("select_frames", {"target_frames": [1]}))
    assert list(tmp_path.iterdir()) == []


# Random play


@pytest.fixture(scope="module")
def arena() -> Any:
    return PixelReasonerEnv(max_turns=3, max_text=2000)


coordinate = st.floats(-1, 2) | st.integers(-10, 300) | st.sampled_from([True, None, "1", 1e308])
crop_calls = st.builds(
    lambda name, box, target: call(name, {"bbox_2d": box, "target_image": target}),
    st.sampled_from(["crop_image", "zoom_in", "crop", "\ud800", IMAGE_MARK, "x" * 3000]),
    st.lists(coordinate, min_size=3, max_size=5),
    st.integers(-1, 4) | coordinate,
)
frame_calls = st.builds(
    lambda frames: call("select_frames", {"target_frames": frames}),
    st.lists(st.integers(-1, 7) | coordinate, max_size=9),
)
fragments = st.sampled_from(
    ["<tool_call>", "</tool_call>", "{", "}", "[" * 2000, '"name": "crop_image"', "NaN", IMAGE_MARK,
     "\\boxed{1}", "```", "<|im_end|>", "<|image_pad|>", "\ud800", "\x00", '{"name": "', '"}']
)  # fmt: skip
utterances = (
    crop_calls
    | frame_calls
    | st.lists(fragments | crop_calls | st.text(max_size=3), max_size=6).map("".join)
)


@many
@given(st.integers(0, 11), st.lists(utterances, min_size=1, max_size=3))
@example(0, ['<tool_call>{"name": "a", "arguments": ' + "[" * 900 + "]" * 900 + "}</tool_call>"])
def test_nothing_but_messages_leaves_step(
    arena: PixelReasonerEnv, index: int, said: list[str]
) -> None:
    observation, info = arena.reset(options={"split": "train", "index": index})
    assert arena.observation_space.contains(observation)
    for turn, text in enumerate(said, start=1):
        observation, reward, terminated, truncated, info = arena.step(text)
        assert arena.observation_space.contains(observation)
        assert observation["text"].count(IMAGE_MARK) == len(observation["images"])
        assert len(observation["text"]) < 500
        assert reward in (0.0, 1.0)
        assert terminated == ("<tool_call>" not in text)
        assert truncated == (turn == 3 and not terminated)
        assert (info["tool_call"] is None) == terminated
        if terminated or truncated:
            assert info["success"] == bool(reward)
            break
        assert observation["text"].startswith("Execution error:\n") != info["tool_call"].ok
        assert bool(observation["images"]) == info["tool_call"].ok


def test_observations_of_random_actions_are_in_the_space(strict: None) -> None:
    env = gymnasium.make("reopold/PixelReasoner-v0")
    env.action_space.seed(0)
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        action = env.action_space.sample()
        assert env.action_space.contains(action)
        assert env.observation_space.contains(env.step(action)[0])


def test_a_process_ends_promptly_in_spite_of_a_hung_tool_in_an_episode() -> None:
    program = """
        import time, json
        from reopold_agent.envs.base import ToolEnv
        from reopold_agent.tools import Tool
        from reopold_agent.types import Task

        def hang(state):
            time.sleep(600)

        env = ToolEnv(tools=[Tool("hang", hang, "Hangs.")], tool_time_limit_s=0.3)
        env.reset(options={"task": Task("t", "q", ("1",))})
        _, _, terminated, truncated, info = env.step('<tool_call>{"name": "hang"}</tool_call>')
        print(terminated, truncated, info["time_limit"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False True True\n"), done.stderr


def test_no_tool_thread_is_left_behind() -> None:
    deadline = time.perf_counter() + 5
    while any(t.name == "reopold-bounded" for t in threading.enumerate()):
        assert time.perf_counter() < deadline
        time.sleep(0.05)


# Spaces


def test_text_space() -> None:
    space = UnicodeText(5)
    assert all(space.contains(text) for text in ("", "abcde", "漢字é\n", IMAGE_MARK))
    assert not any(space.contains(x) for x in ("abcdef", "\ud800", b"abc", 3, None, ["a"]))
    space.seed(3)
    first = [space.sample() for _ in range(50)]
    space.seed(3)
    assert first == [space.sample() for _ in range(50)]
    assert all(space.contains(text) for text in first)
    assert len(set(first)) > 10
    assert space == UnicodeText(5) != UnicodeText(6)
    assert hash(space) == hash(UnicodeText(5))
    assert not space.is_np_flattenable
    with pytest.raises(ValueError, match="max_length"):
        UnicodeText(0)
    with pytest.raises(ValueError, match="mask"):
        space.sample(mask="a")  # type: ignore[arg-type]


def test_picture_space() -> None:
    space = Pictures(2, max_side=10)
    good = np.zeros((3, 10, 3), np.uint8)
    assert all(space.contains(x) for x in ((), (good,), (good, good)))
    bad = [
        [good],
        (good,) * 3,
        (good.astype(np.float32),),
        (good[:, :, :1],),
        (good[:, :, 0],),
        (np.zeros((3, 11, 3), np.uint8),),
        (np.zeros((11, 3, 3), np.uint8),),
        (np.zeros((0, 3, 3), np.uint8),),
        (good.tolist(),),
        None,
    ]
    assert not any(space.contains(x) for x in bad)
    space.seed(3)
    samples = [space.sample() for _ in range(40)]
    assert all(space.contains(x) for x in samples)
    assert {len(x) for x in samples} == {0, 1, 2}
    assert space == Pictures(2, 10) != Pictures(2, 11)
    assert not space.is_np_flattenable
    with pytest.raises(ValueError, match="at least one"):
        Pictures(0, 10)


def test_a_tool_in_the_words_of_a_checkpoint() -> None:
    schema = {
        "type": "object",
        "properties": {"bbox_2d": {"type": "array"}, "target_image": {"type": "number"}},
        "required": ["bbox_2d", "target_image"],
    }
    choice = {"name": "crop_image", "as": "look", "description": "Look.", "parameters": schema}
    env = PixelReasonerEnv(tools=[choice])
    (shown,) = env.tools
    assert shown.schema() == {
        "type": "function",
        "function": {"name": "look", "description": "Look.", "parameters": schema},
    }
    _, info = env.reset(seed=0)
    assert '"description": "Look."' in info["system_prompt"]
    call = '{"name": "look", "arguments": {"bbox_2d": [0, 0, 1, 1], "target_image": true}}'
    *_, info = env.step(f"<tool_call>{call}</tool_call>")
    assert not info["tool_call"].ok  # checked against the signature, not the shown schema
    with pytest.raises(ConfigError, match="bbox_2d, target_image"):
        PixelReasonerEnv(tools=[{"name": "crop_image", "parameters": {"properties": {}}}])


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("nonsense", "single.env=nonsense: Environment `nonsense` doesn't exist\n"),
        ("math", "\nDid you mean 'reopold/Math-v0'? Known: reopold/Geometry-v0, "),
        ("reopold/Maths-v0", "\nDid you mean 'reopold/Math-v0'? "),
        ("reopold/Math-v7", "single.env=reopold/Math-v7: "),
        ("no such", "single.env=no such: Malformed environment ID"),
        ("nosuchmodule:X-v0", "single.env=nosuchmodule:X-v0: "),
        ("CartPole-v1", "got an unexpected keyword argument 'data'\nTake an environment"),
    ],
)
def test_an_id_that_cannot_be_is_explained(id: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_found(id, "single.env", data={})
    assert said in str(caught.value)
    assert "\n" in str(caught.value)


def test_an_error_inside_an_environment_is_not_taken_for_one_of_the_setting() -> None:
    def broken(data: object) -> None:
        int(data=1)  # type: ignore[call-overload]

    gymnasium.register(id="tests/Broken-v0", entry_point=broken)
    with pytest.raises(TypeError):
        make_found("tests/Broken-v0", "env.id", data={})
