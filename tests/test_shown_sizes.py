"""Boxes and sizes in pixels of what the model sees, and the pictures that environments hold."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from examples.embedded_models.digits.prompts import make_env as demo_env
from reopold_agent.common.pixels import MAX_ASPECT, PixelLimits, ShownSizes, padded
from reopold_agent.config import PixelsConfig
from reopold_agent.demo.tasks import ArrayImage
from reopold_agent.envs.base import ToolEnv, show_as
from reopold_agent.envs.from_config import make_env, shown_sizes
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.evaluate.benchmarks import LoadedBenchmark, select
from reopold_agent.evaluate.protocol import play_of
from reopold_agent.evaluate.run import load_config, make_benchmark_env
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.rollout.workers import Worker
from reopold_agent.train.settings import compose_run
from reopold_agent.types import Completion, Request, Sampling, StopReason, Task

PROMPT, OBSERVATION = PixelLimits(200704, 1003520), PixelLimits(3136, 784000)
SIZES = ShownSizes(PROMPT, OBSERVATION)
NO_PADDING = {"crop_image": {"padding": 0.0}}
RED = (255, 0, 0)


def picture(width: int, height: int, *patch: int) -> ArrayImage:
    """A grey picture with a red patch (left, top, right, bottom)."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    if patch:
        pixels[patch[1] : patch[3], patch[0] : patch[2]] = RED
    return ArrayImage(pixels)


def made(
    *images: ArrayImage, sizes: ShownSizes = SIZES, metadata: Any = None, **settings: Any
) -> tuple[ToolEnv, dict[str, Any]]:
    """An environment told of the sizes, with one task, and the observation of its reset."""
    video = settings.pop("is_video", False)
    task = Task("t", "Which?", ("7",), images, is_video=video, metadata=metadata or {})
    settings.setdefault("tool_options", NO_PADDING)
    env = PixelReasonerEnv(data={"train": [task], "eval": [task]}, **settings)
    show_as(env, sizes)
    observation, _ = env.reset(options={"split": "train", "index": 0})
    return env, dict(observation)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def crop(env: ToolEnv, box: list[float], number: int = 1) -> tuple[Any, str]:
    """The picture and the text of a crop."""
    observation, *_ = env.step(call("crop_image", bbox_2d=box, target_image=number))
    return (observation["images"] or (None,))[0], observation["text"]


def is_red(pixels: Any, width: int, height: int) -> bool:
    return pixels.shape == (height, width, 3) and bool((pixels == RED).all())


# The arithmetic

sides = st.integers(1, 6000)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from([28, 32]), st.integers(1, 2000), st.integers(0, 6000))
@example(4032, 3024, 28, 200704, 802816)
@example(1, 6000, 28, 4, 0)
def test_sizes_are_those_of_qwens_processor(
    width: int, height: int, factor: int, least: int, more: int
) -> None:
    limits = PixelLimits(least * 784, (least + more) * 784)
    whole = padded((width, height))
    assert max(whole) / min(whole) <= MAX_ASPECT
    expected = smart_resize(whole[1], whole[0], factor, limits.min_pixels, limits.max_pixels)
    assert limits.resized(whole, factor) == expected[::-1]


@pytest.mark.parametrize(
    "size", [(4032, 3024), (100, 80), (28, 28), (40, 30), (3000, 2), (2, 900), (640, 480)]
)
def test_sizes_are_those_of_encoded_pictures(
    vision: VisionProcessor, size: tuple[int, int]
) -> None:
    for prompt, limits in ((True, PROMPT), (False, OBSERVATION)):
        encoded = vision.encode(Image.new("RGB", size), limits)
        shown = ShownSizes(PROMPT, OBSERVATION, vision.factor).of(size, prompt=prompt)
        assert (shown.height, shown.width) == encoded.pixels.shape[:2]


# Boxes in pixels

PATCH = (2016, 1512, 2448, 1836)


def in_shown_pixels(patch: tuple[int, ...], whole: tuple[int, int], seen: tuple[int, int]) -> Any:
    return [side * seen[i % 2] / whole[i % 2] for i, side in enumerate(patch)]


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_box_around_what_the_model_sees_cuts_that_from_the_original(isolation: str) -> None:
    env, _ = made(picture(4032, 3024, *PATCH), tool_isolation=isolation)
    box = in_shown_pixels(PATCH, (4032, 3024), (1148, 840))
    cut, text = crop(env, box)
    assert is_red(cut, 432, 324)
    assert "(Image Size: 420x336)" in text  # as the model sees the crop
    whole_pixels, _ = crop(env, [574, 420, 697, 510])
    assert is_red(whole_pixels, 432, 324)
    by_share, _ = crop(env, [0.5, 0.5, 2448 / 4032, 1836 / 3024])
    assert is_red(by_share, 432, 324)


def test_a_crop_of_a_crop_is_in_pixels_of_the_crop_as_shown() -> None:
    env, _ = made(picture(4032, 3024, *PATCH))
    cut, text = crop(env, [0.25, 0.25, 0.75, 0.75])
    assert cut.shape == (1512, 2016, 3)
    assert "(Image Size: 1008x756)" in text
    inside = tuple(side - (1008, 756)[i % 2] for i, side in enumerate(PATCH))
    cut, text = crop(env, in_shown_pixels(inside, (2016, 1512), (1008, 756)), number=2)
    assert is_red(cut, 432, 324)
    _, text = crop(env, [0, 0, 2000, 700], number=2)  # its right side is clipped
    assert "(Image Size: 1036x728)" in text
    _, text = crop(env, [1008, 0, 1100, 700], number=2)
    assert "outside the image, whose size is 1008x756" in text


def test_frames_are_in_pixels_as_shown_in_the_prompt_and_as_selected() -> None:
    frames = (picture(1920, 1080), picture(1920, 1080, 480, 270, 960, 540))
    env, observation = made(*frames, is_video=True)
    assert observation["text"].endswith("(Image Size: 1316x728)")
    cut, _ = crop(env, in_shown_pixels((480, 270, 960, 540), (1920, 1080), (1316, 728)), number=2)
    assert is_red(cut, 480, 270)
    observation, *_ = env.step(call("select_frames", target_frames=[2]))
    assert "(Frame Size: 1176x644, Numbered 4 to 4)" in observation["text"]
    cut, _ = crop(env, in_shown_pixels((480, 270, 960, 540), (1920, 1080), (1176, 644)), number=4)
    assert is_red(cut, 480, 270)


def test_each_size_of_frames_that_differ_is_stated() -> None:
    env, observation = made(picture(640, 480), picture(480, 640), picture(640, 480), is_video=True)
    assert observation["text"].endswith("(Image Sizes: 644x476, 476x644, 644x476)")
    observation, *_ = env.step(call("select_frames", target_frames=[1, 2]))
    assert "(Frame Sizes: 644x476, 476x644, Numbered 4 to 5)" in observation["text"]


@pytest.mark.parametrize("by_task", [True, False])
def test_overview_max_side_and_the_enlargement_after_it_count(by_task: bool) -> None:
    given = {"metadata": {"overview_max_side": 400}} if by_task else {"overview_max_side": 400}
    env, observation = made(picture(4000, 3000, 1000, 600, 2000, 1200), **given)
    assert observation["images"][0].shape == (300, 400, 3)
    assert observation["text"].endswith("(Image Size: 532x392)")
    cut, _ = crop(env, in_shown_pixels((1000, 600, 2000, 1200), (4000, 3000), (532, 392)))
    assert is_red(cut, 1000, 600)


def test_a_small_picture_is_shown_enlarged() -> None:
    env, observation = made(picture(100, 80, 50, 40, 90, 70))
    assert observation["text"].endswith("(Image Size: 504x420)")
    cut, text = crop(env, in_shown_pixels((50, 40, 90, 70), (100, 80), (504, 420)))
    assert is_red(cut, 40, 30)
    assert "(Image Size: 84x56)" in text


def test_the_largest_side_of_observations_counts_for_every_picture() -> None:
    env, observation = made(picture(4000, 1000, 1000, 0, 3000, 1000), max_side=500)
    shown = env.episode.shown(1) if env.episode else None
    assert str(shown) == "896x224"
    assert observation["images"][0].shape == (125, 500, 3)
    _, text = crop(env, in_shown_pixels((1000, 0, 3000, 1000), (4000, 1000), (896, 224)))
    assert "(Image Size: 504x252)" in text
    assert env.episode is not None
    assert is_red(np.asarray(env.episode.images[1]), 2000, 1000)


def test_the_grey_below_a_thin_picture_is_not_part_of_it() -> None:
    env, _ = made(picture(9500, 40, 4750, 0, 5700, 40))
    shown = env.episode.shown(1) if env.episode else None  # 9500 x 50 with its padding
    assert shown is not None
    assert shown.scale_y == 50 / shown.height
    box = [4750 / shown.scale_x, 0, 5700 / shown.scale_x, 40 / shown.scale_y]
    assert is_red(crop(env, box)[0], 950, 40)
    _, text = crop(env, [0, 0.9 * shown.height, 100, shown.height])
    assert "outside the image" in text


def test_without_a_resize_pixels_are_those_of_the_observation() -> None:
    env, observation = made(
        picture(400, 300, 100, 60, 200, 120), sizes=ShownSizes(), overview_max_side=200
    )
    assert observation["images"][0].shape == (150, 200, 3)
    assert observation["text"].endswith("(Image Size: 200x150)")
    cut, text = crop(env, [50, 30, 100, 60])
    assert is_red(cut, 100, 60)
    assert "(Image Size: 100x60)" in text


def test_original_sizes_are_an_option() -> None:
    options = {
        "crop_image": {"padding": 0.0, "sizes": "original"},
        "select_frames": {"sizes": "original"},
    }
    env, observation = made(picture(1920, 1080, 480, 270, 960, 540), tool_options=options)
    assert observation["text"].endswith("\\boxed{}.")
    cut, text = crop(env, [480, 270, 960, 540])
    assert is_red(cut, 480, 270)
    assert "(Image Size: 480x270)" in text
    env, _ = made(picture(112, 84), picture(56, 56), tool_options=options, is_video=True)
    observation, *_ = env.step(call("select_frames", target_frames=[1]))
    assert "(Frame Size: 112x84, Numbered 3 to 3)" in observation["text"]


def test_verltools_words_state_no_sizes_before_the_first_crop() -> None:
    words = compose_run(["model=qwen2_5_vl_3b"]).data.env_kwargs
    env, observation = made(picture(4032, 3024, *PATCH), tools=words["tools"])
    assert "Image Size" not in observation["text"]
    assert "maximum value is the width/height of the image." in env.system_prompt(
        Task("t", "?", ())
    )
    cut, text = crop(env, [574, 420, 697, 510])
    assert is_red(cut, 432, 324)
    assert "(Image Size: 420x336)" in text


def test_a_picture_that_cannot_be_enlarged_is_said_so() -> None:
    for size in ((300, 28), (20, 20)):
        env, _ = made(picture(*size))
        _, text = crop(env, [0, 0, 1, 1])
        assert text == (
            f"Execution error:\nImage 1 cannot be enlarged: its full size is {size[0]}x{size[1]}, "
            "and each side of a part must be larger than 28 pixels."
        )


# Where environments hear of the sizes


class Scripted:
    """Says the texts, one a turn, to one episode at a time."""

    def __init__(self, chat: ChatRenderer, *texts: str) -> None:
        self.chat, self.texts = chat, list(texts)
        self.flying: list[int] = []

    def generator(self, sampling: Sampling) -> Scripted:
        return self

    @property
    def in_flight(self) -> int:
        return len(self.flying)

    def submit(self, requests: list[Request]) -> None:
        self.flying += [request.key for request in requests]

    def step(self) -> list[Completion]:
        ids = tuple(self.chat.turn_ids(self.texts.pop(0)))
        done = [Completion(key, ids, (0.0,) * len(ids), (0.0,) * len(ids), "stop")
                for key in self.flying]  # fmt: skip
        self.flying.clear()
        return done

    def release(self, key: int) -> None: ...


@pytest.mark.parametrize(
    ("patch", "seen", "cut"), [(14, (1148, 840), (420, 336)), (16, (1152, 864), (416, 320))]
)
def test_a_rollout_tells_its_environments_the_models_own_rule(
    chat: ChatRenderer, patch: int, seen: tuple[int, int], cut: tuple[int, int]
) -> None:
    vision = VisionProcessor(Qwen2VLImageProcessorPil(patch_size=patch))
    env, _ = made(picture(4032, 3024, *PATCH), sizes=ShownSizes())
    runner = RolloutRunner(
        lambda: env,
        chat,
        vision,
        prompt_pixels=PROMPT,
        observation_pixels=OBSERVATION,
        limits=RolloutLimits(),
    )
    box = [int(side + 1e-6) for side in in_shown_pixels(PATCH, (4032, 3024), seen)]
    look = call("crop_image", bbox_2d=box, target_image=1)
    (trajectory,) = runner.run(
        Scripted(chat, look, "\\boxed{7}"),  # type: ignore[arg-type]
        [EpisodeSpec("train", 0)],
        Sampling(1.0, 1.0),
        (0,),
    )
    assert env.sizes == ShownSizes(PROMPT, OBSERVATION, vision.factor)
    assert [image.pixels.shape[1::-1] for image in trajectory.images] == [seen, cut]
    assert trajectory.images[0].grid == (1, seen[1] // patch, seen[0] // patch)
    assert f"(Image Size: {cut[0]}x{cut[1]})" in trajectory.turns[0].observation
    assert bool((trajectory.images[1].pixels == RED).all())


def benchmark_env(name: str, *words: str) -> tuple[Any, PixelsConfig]:
    """The environment in which a benchmark is played, with one task, and its pixel limits."""
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config = load_config(compose("evaluate", list(words)))[0]
    (benchmark,) = select(config.benchmarks, [name], None)
    play = play_of(benchmark, config.protocol, config.agentic, config.pixels)
    task = Task("t", "Which?", ("7",), (picture(4032, 3024),))
    env = make_benchmark_env(
        LoadedBenchmark(benchmark, [task], {}), config.agentic.env, play, config.tools
    )
    return env, play.pixels


def test_runs_and_benchmarks_know_the_sizes() -> None:
    config = compose_run(["data=demo", "pixels.prompt.max_pixels=50176"])
    run: Any = make_env(config).unwrapped
    assert run.sizes == ShownSizes(PixelLimits(12544, 50176), PixelLimits(3136, 3136))
    env, pixels = benchmark_env("vstar")
    assert env.unwrapped.sizes == shown_sizes(pixels)
    env.reset(options={"split": "eval", "index": 0})
    assert str(env.unwrapped.episode.shown(1)) == "2296x1708"


def test_the_embedded_models_read_the_same_words_everywhere() -> None:
    task = Task("t", "Which?", ("7",))
    words = demo_env([task], [task]).unwrapped.system_prompt(task)  # type: ignore[attr-defined]
    assert 'or in pixels of the image."' in words
    run: Any = make_env(compose_run(["data=demo"])).unwrapped
    benchmark: Any = benchmark_env("demo")[0].unwrapped
    alone = PixelReasonerEnv()
    for env in (run, benchmark, alone):
        assert env.system_prompt(task) == words
        for name in ("crop_image", "select_frames"):
            assert env._tool_options[name]["sizes"] == "original"


def test_other_environments_are_left_alone() -> None:
    env: gymnasium.Env[Any, Any] = gymnasium.Env()
    show_as(env, SIZES)
    assert not hasattr(env, "sizes")


# What is held

SIDE = 1000


def held() -> int:
    """Number of decoded copies of the large picture: PIL's, and arrays with memory of their own."""
    gc.collect()
    known = gc.get_objects()
    arrays = {
        id(each): each
        for owner in known
        for each in gc.get_referents(owner)  # the collector does not know arrays themselves
        if issubclass(type(each), np.ndarray)
    }
    pictures = [each for each in known if issubclass(type(each), Image.Image)]
    return sum(each.size == (SIDE, SIDE) for each in pictures) + sum(
        each.nbytes == SIDE * SIDE * 3 and each.base is None for each in arrays.values()
    )


class OnDisk:
    """A picture that is decoded when it is opened."""

    def open(self) -> Image.Image:
        return Image.new("RGB", (SIDE, SIDE))


def begin(env: Any) -> Any:
    return env.reset(options={"split": "train", "index": 0})


def outcome(worker: Worker, function: Callable[[Any], Any]) -> str:
    """The text that an environment on its own thread shows."""
    worker.call(function)
    result = worker.result(60.0)
    assert result.error is None
    return str(result.value[0]["text"])


def let_it_wait() -> None:
    """Gives an environment's thread the moment that it needs to wait for its next call."""
    time.sleep(0.1)


@pytest.mark.parametrize("mode", ["none", "process"])
def test_one_copy_is_held_during_an_episode_and_none_when_idle(mode: str) -> None:
    task = Task("t", "Which?", ("7",), (OnDisk(),), is_video=True)
    worker = Worker(
        lambda: PixelReasonerEnv(data={"train": [task], "eval": [task]}, tool_isolation=mode)
    )
    assert held() == 0
    outcome(worker, begin)
    let_it_wait()
    assert held() == 1
    assert "Frame Size" in outcome(
        worker, lambda env: env.step(call("select_frames", target_frames=[1]))
    )
    let_it_wait()
    assert held() == 1
    outcome(worker, begin)  # abandons the episode before
    let_it_wait()
    assert held() == 1
    outcome(worker, lambda env: env.step("\\boxed{7}"))
    let_it_wait()
    assert held() == 0
    worker.close()


def test_an_episode_that_the_runner_ends_holds_nothing(
    chat: ChatRenderer, vision: VisionProcessor
) -> None:
    task = Task("t", "Which?", ("7",), (OnDisk(),))
    runner = RolloutRunner(
        lambda: PixelReasonerEnv(data={"train": [task], "eval": [task]}),
        chat,
        vision,
        prompt_pixels=PixelLimits(3136, 3136),
        observation_pixels=PixelLimits(3136, 3136),
        limits=RolloutLimits(max_turns=1),
    )
    look = call("crop_image", bbox_2d=[0.1, 0.1, 0.5, 0.5], target_image=1)
    policy: Any = Scripted(chat, look)
    (trajectory,) = runner.run(policy, [EpisodeSpec("train", 0)], Sampling(1.0, 1.0), (0,))
    assert trajectory.stop_reason is StopReason.MAX_TURNS
    let_it_wait()
    assert held() == 0
    runner.close()


def test_render_keeps_the_last_pictures_only_if_it_is_wanted() -> None:
    task = Task("t", "Which?", ("7",), (OnDisk(),))
    env = PixelReasonerEnv(data={"train": [task], "eval": [task]}, render_mode="rgb_array")
    begin(env)
    assert held() == 1
    env.step("\\boxed{7}")
    assert env.render().shape == (SIDE, SIDE, 3)
    assert held() == 1
