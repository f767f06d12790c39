"""The embedded default: its tasks, its two models and the recipe that makes them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from examples.embedded_models.__main__ import main as recipes_command
from examples.embedded_models.builder import WEIGHTS
from examples.embedded_models.digits.build import LIMITS, TINY, DigitsBuilder, build
from examples.embedded_models.digits.prompts import make_env, prompt_texts
from examples.embedded_models.digits.scripts import (
    OBSERVATION_LIMITS,
    PROMPT_LIMITS,
    Careless,
    expert,
    record,
)
from examples.embedded_models.hints.build import RULE, HintsBuilder
from examples.embedded_models.hints.build import TINY as HINTS_TINY
from examples.embedded_models.hints.build import build as build_hints
from examples.embedded_models.tokenizer import CONTROL_TOKENS, TOOL_TOKENS
from reopold_agent.config import ViewConfig
from reopold_agent.demo import tasks as demo_tasks
from reopold_agent.demo.tasks import CARD, CELL, SIDE, TRAIN_COLUMNS, DemoTasks, card, digit_indices
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.types import Sampling, Task

MEGABYTE = 1_000_000


def pixels(task: Task) -> list[np.ndarray]:
    return [np.asarray(image.open()) for image in task.images]


@functools.cache  # not a fixture: hypothesis calls it for every example
def shipped_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(WEIGHTS / "student")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return shipped_tokenizer()


@pytest.fixture(scope="module")
def builder(tokenizer: PreTrainedTokenizerFast) -> DigitsBuilder:
    return DigitsBuilder(tokenizer)


# Tasks


def test_a_task_depends_on_seed_split_and_index_only() -> None:
    kinds = set()
    for index in range(20):
        first, again = DemoTasks("eval", 50, seed=3)[index], DemoTasks("eval", 99, seed=3)[index]
        assert first.answers == again.answers
        assert first.metadata == again.metadata
        assert all(map(np.array_equal, pixels(first), pixels(again)))
        others = (DemoTasks("eval", seed=4)[index], DemoTasks("train", seed=3)[index])
        for other in others:
            assert not np.array_equal(pixels(first)[0], pixels(other)[0])
        kinds.add(first.metadata["kind"])
    assert len({DemoTasks("eval")[index].id for index in range(50)}) == 50
    assert "image" in kinds
    assert len(kinds) > 1


def test_an_index_outside_the_set_ends_iteration() -> None:
    tasks = DemoTasks("train", size=3)
    assert len(list(tasks)) == 3
    with pytest.raises(IndexError):
        tasks[-1]


@pytest.mark.parametrize(
    "bad", [{"split": "test"}, {"size": 0}, {"seed": -1}, {"video_share": 1.5}, {"small_share": -1}]
)
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DemoTasks(**bad)  # type: ignore[arg-type]


def test_splits_share_no_digit() -> None:
    train, held_out = set(digit_indices("train")), set(digit_indices("eval"))
    assert not train & held_out
    assert (len(train), len(held_out)) == (1400, 397)
    for split, allowed in (("train", train), ("eval", held_out)):
        used = {DemoTasks(split)[index].metadata["digit_index"] for index in range(100)}
        assert used <= allowed


def test_splits_share_no_column_of_a_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = np.zeros((427, 640, 3), dtype=np.uint8)
    marked[:, TRAIN_COLUMNS:] = 200  # what only held-out tasks may show
    monkeypatch.setattr(demo_tasks, "_photographs", lambda: (marked,))
    rng = np.random.default_rng(0)
    assert max(demo_tasks.backdrop(rng, "train").max() for _ in range(300)) == 0
    assert min(demo_tasks.backdrop(rng, "eval").min() for _ in range(300)) > 0


def test_the_digit_is_in_the_annotated_cell() -> None:
    seen = set()
    for index in range(60):
        task = DemoTasks("train", video_share=0.6, small_share=0.5)[index]
        places = task.metadata
        face = card(places["digit_index"])
        assert task.answers == (demo_tasks.digit(places["digit_index"]),)
        frames = pixels(task)
        if places["kind"] == "image":
            shown = [(frames[0], places["cell"])]
            assert frames[0].shape == (SIDE, SIDE, 3)
            left, top, right, bottom = places["card"]
            assert np.array_equal(frames[0][top:bottom, left:right], face)
        else:
            assert task.is_video
            assert len(frames) in demo_tasks.FRAMES
            shown = [
                (frames[number - 1], cell)
                for number, cell in zip(places["legible"], places["cells"], strict=True)
            ]
            hidden = [f for i, f in enumerate(frames) if i + 1 not in places["legible"]]
            assert not any(contains(frame, face) for frame in hidden)
        for frame, (row, column) in shown:
            cell = frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            assert contains(cell, face)
        seen.add(places["kind"])
    assert seen == {"image", "video", "small_video"}


def contains(picture: np.ndarray, face: np.ndarray) -> bool:
    height, width = picture.shape[:2]
    return any(
        np.array_equal(picture[y : y + CARD, x : x + CARD], face)
        for y in range(height - CARD + 1)
        for x in range(width - CARD + 1)
        if picture[y, x, 0] == face[0, 0, 0]
    )


# Tokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_control_tokens_are_qwens(tokenizer: PreTrainedTokenizerFast) -> None:
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert added == {**dict.fromkeys(CONTROL_TOKENS, True), **dict.fromkeys(TOOL_TOKENS, False)}
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in tokenizer.get_vocab():
        assert sum(letter.isdigit() for letter in token) <= (1 if len(token) == 1 else 0)


def test_chat_template_is_qwens(tokenizer: PreTrainedTokenizerFast) -> None:
    qwen = AutoTokenizer.from_pretrained(real_data("qwen_tokenizer"))
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " hi\n"}]}
    rest = [
        question,
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "video"}]},
    ]
    for messages in (rest, [{"role": "system", "content": "Be brief.\n"}, *rest], rest[:1]):
        for prompt in (True, False):
            ours, theirs = (
                t.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                for t in (tokenizer, qwen)
            )
            assert ours == theirs


# What is shipped


@pytest.mark.parametrize("name", ["student", "teacher", "teacher_vocab2"])
def test_shipped_models_are_small_and_load(name: str) -> None:
    folder = WEIGHTS / name
    assert (folder / "model.safetensors").stat().st_size <= 2 * MEGABYTE
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (folder / file).is_file()
    assert (folder / "chat_template.jinja").is_file()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_student_and_teacher_share_one_tokenizer() -> None:
    student, teacher = (
        (WEIGHTS / n / "tokenizer.json").read_bytes() for n in ("student", "teacher")
    )
    assert student == teacher


@pytest.mark.parametrize("report", ["recipe.json", "teacher_vocab2.json"])
def test_shipped_models_know_the_present_prompts(report: str) -> None:
    note = json.loads((WEIGHTS / report).read_text())
    assert note["prompts"] == prompt_texts().fingerprint(), (
        "the system message, tools or guidelines have changed since the demo's models were made; "
        "run python -m examples.embedded_models digits"
    )


def test_the_gap_between_the_shipped_models(builder: DigitsBuilder) -> None:
    results = {}
    for name in ("student", "teacher"):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS / name)
        results[name] = builder.evaluate(model, 128, temperature=1.0)
    assert results["student"]["success"] <= 0.30
    assert results["teacher"]["success"] >= 0.75
    assert results["teacher"]["tool_rate"] > results["student"]["tool_rate"]


def test_the_expert_solves_every_kind_of_task(builder: DigitsBuilder) -> None:
    for split in ("train", "eval"):
        tasks = DemoTasks(split, video_share=0.6, small_share=0.5)
        traces = builder.traces(tasks, range(30), expert, 0)
        assert {len(trace.tool_calls) for trace in traces} == {1, 2}
        for trace in traces:
            assert trace.success
            assert trace.reward == 1.0
            assert all(call.ok for call in trace.tool_calls)
            assert 15 <= trace.response_tokens <= 80
            assert len(trace.ids) - trace.prompt_length <= 256


def test_the_system_message_costs_tens_of_tokens(
    tokenizer: PreTrainedTokenizerFast, builder: DigitsBuilder
) -> None:
    [trace] = builder.traces(DemoTasks("eval", video_share=0.0), [0], expert, 0)
    picture_tokens = trace.images[0].tokens
    assert picture_tokens == 16
    assert trace.prompt_length - picture_tokens < 120


def test_careless_habits_have_the_stated_shares(builder: DigitsBuilder) -> None:
    tasks = DemoTasks("train", video_share=0.0)
    script, count, at_once, right = Careless(), 400, 0, 0
    for index in range(count):
        task = tasks[index]
        turns = script(task, np.random.default_rng(index))
        at_once += len(turns) == 1
        right += turns == expert(task, np.random.default_rng(0))
    assert abs(at_once / count - script.at_once) < 0.08
    assert abs(right / count - (1 - script.at_once - script.astray)) < 0.08
    builder.traces(tasks, range(20), script, 0)  # and the environment accepts every one


def test_a_recorded_trace_is_what_a_rollout_records(builder: DigitsBuilder) -> None:
    tasks = DemoTasks("eval")
    runner = RolloutRunner(
        lambda: make_env(DemoTasks("train"), tasks),
        builder.chat,
        builder.vision,
        prompt_pixels=PROMPT_LIMITS,
        observation_pixels=OBSERVATION_LIMITS,
        limits=LIMITS,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS / "teacher")
    specs = [EpisodeSpec("eval", index) for index in range(12)]
    episodes = runner.run(builder.policy(model), specs, Sampling(temperature=0), (0,))
    runner.close()
    for episode in episodes:
        turns = [turn.text for turn in episode.turns]
        trace = record(builder.env, tasks[episode.index], turns, builder.chat, builder.vision)
        assert trace.ids.tolist() == episode.ids.tolist()
        assert trace.loss_mask.tolist() == episode.loss_mask.tolist()
        assert (trace.success, trace.reward) == (episode.success, episode.reward)
        assert [i.grid for i in trace.images] == [i.grid for i in episode.images]
        for ours, theirs in zip(trace.images, episode.images, strict=True):
            assert np.array_equal(ours.pixels, theirs.pixels)


# The recipe


def test_the_recipe_runs_repeats_itself_and_loads_again(tmp_path: Path) -> None:
    lines: list[str] = []
    figures = build(tmp_path / "a", TINY, lines.append)
    assert set(figures) == {"student", "teacher"}
    assert lines
    torch.rand(3)  # the recipe must not lean on the global random state
    build(tmp_path / "b", TINY, lines.append)
    for name in ("student", "teacher"):
        first, second = tmp_path / "a" / name, tmp_path / "b" / name
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(first)
        loaded = AutoTokenizer.from_pretrained(first)
        assert len(loaded) == model.get_input_embeddings().num_embeddings
    shipped = json.loads((WEIGHTS / "student" / "config.json").read_text())
    fresh = json.loads((tmp_path / "a" / "student" / "config.json").read_text())
    assert fresh == shipped, "the shipped weights are not of the present recipe"


def test_the_student_that_understands_hints(tmp_path: Path) -> None:
    assert set(build_hints(tmp_path, HINTS_TINY, lambda line: None)) == {"self_student"}
    note = json.loads((WEIGHTS / "hints.json").read_text())
    assert note["prompts"] == prompt_texts().fingerprint(), (
        "run python -m examples.embedded_models hints"
    )
    shipped = WEIGHTS / "self_student"
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "self_student" / file).read_bytes() == (shipped / file).read_bytes()
    builder = HintsBuilder(PreTrainedTokenizerFast.from_pretrained(shipped))
    policy = builder.policy(Qwen2_5_VLForConditionalGeneration.from_pretrained(shipped))
    tasks = DemoTasks("eval")
    right = {}
    for name, view in (("usual", ViewConfig()), ("rule", ViewConfig(system=RULE))):
        traces = builder.read(tasks, range(16), expert, view)
        right[name] = float(np.mean([score.logp.sum() for score in policy.score(traces)]))
    # Under the rule it finds an expert's episodes much likelier.
    assert right["rule"] > right["usual"] + 1.0


def embedded_models(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.embedded_models", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_recipes_command_lists_what_it_makes_and_refuses_other_names() -> None:
    listed = embedded_models("--help")
    assert listed.returncode == 0
    assert "{digits,digits_vocab2,arithmetic,branches,figures,hints,generalist}" in listed.stdout
    unknown = embedded_models("letters")
    assert unknown.returncode == 2
    assert "invalid choice: 'letters'" in unknown.stderr


@pytest.mark.parametrize(
    "name",
    ["digits", "digits_vocab2", "arithmetic", "branches", "figures", "hints", "generalist"],
)
def test_the_recipes_command_has_an_option_for_every_number(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["embedded_models", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        recipes_command()
    shown = capsys.readouterr().out
    recipe = importlib.import_module(f"examples.embedded_models.{name}.build").Recipe
    options = [f.name.replace("_", "-") for f in dataclasses.fields(recipe)]
    assert all(f"--{option}" in shown for option in ["out", *options])
