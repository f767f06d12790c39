"""Geometry: the embedded figures, their models and recipe, and the environment that poses them."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import running
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image
from real_data import real_data
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from examples.embedded_models.builder import WEIGHTS
from examples.embedded_models.figures.build import (
    LIMITS,
    PIXELS,
    PREFIX,
    TINY,
    FiguresBuilder,
    build,
    fingerprint,
    make_env,
)
from examples.embedded_models.figures.scripts import (
    _WRONG_RULES,
    Careless,
    equations,
    exercise_picture,
    expert,
    worked,
)
from reopold_agent import configs
from reopold_agent.demo.figures.drawing import SIDE, Point
from reopold_agent.demo.figures.shapes import UNKNOWN, Measure
from reopold_agent.demo.figures.tasks import KINDS, FigureTasks, Problem, draw, problems
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.errors import ConfigError
from reopold_agent.policies.loading import resolve_path
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.types import IMAGE_MARK, Sampling, Task

MODELS = ("student", "teacher")
MEGABYTE = 1_000_000


def pixels(task: Task) -> np.ndarray:
    return np.asarray(task.images[0].open())


def problem(task: Task) -> Problem:
    kind, given = task.metadata["kind"], task.metadata["given"]
    return Problem(kind, given, KINDS[kind].solve(given))


def all_problems() -> list[Problem]:
    return [p for kind in KINDS for p in problems(kind)]


# Tasks


def test_a_task_depends_on_seed_split_and_index_only() -> None:
    for index in range(20):
        first, again = FigureTasks("eval", 50, seed=3)[index], FigureTasks("eval", 99, 3)[index]
        assert (first.answers, first.metadata) == (again.answers, again.metadata)
        assert np.array_equal(pixels(first), pixels(again))
        for other in (FigureTasks("eval", seed=4)[index], FigureTasks("train", seed=3)[index]):
            assert not np.array_equal(pixels(first), pixels(other))
    assert len({FigureTasks("eval")[index].id for index in range(50)}) == 50
    seen = {FigureTasks("train")[index].metadata["kind"] for index in range(150)}
    assert seen == set(KINDS)


def test_an_index_outside_the_set_ends_iteration() -> None:
    tasks = FigureTasks("train", size=3)
    assert len(list(tasks)) == 3
    with pytest.raises(IndexError):
        tasks[-1]


@pytest.mark.parametrize("bad", [{"split": "test"}, {"size": 0}, {"seed": -1}, {"kind": "cube"}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FigureTasks(**bad)
    with pytest.raises(ConfigError, match="figures"):
        SingleTurnEnv(data={"train": {"source": "figures", **bad}}).reset()


def test_splits_share_no_figure_and_pose_every_problem() -> None:
    figures = {
        (split, seed): {pixels(FigureTasks(split, seed=seed)[i]).tobytes() for i in range(100)}
        for split in ("train", "eval")
        for seed in (0, 5)
    }
    assert len(set().union(*figures.values())) == 4 * 100
    for kind, rule in KINDS.items():
        assert [p.given for p in problems(kind)] == list(rule.givens)
        for split in ("train", "eval"):
            tasks = FigureTasks(split, kind=kind)
            posed = {problem(tasks[i]) for i in range(30)}
            assert len(posed) > 5
            assert posed <= set(problems(kind))


# Figures: everything is measured again in what was drawn.


def measured(measure: Measure) -> float:
    """Degrees or pixels, from the drawn points alone."""
    if measure.what == "length":
        return math.dist(*measure.points)
    one, vertex, other = (complex(*point) for point in measure.points)
    turn = (one - vertex) / (other - vertex)
    return abs(math.degrees(math.atan2(turn.imag, turn.real)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_drawn_figure_has_the_labelled_sizes_and_the_answer(kind: str) -> None:
    rng = np.random.default_rng(1)
    every = problems(kind)
    for posed in [*every, *every]:
        _, drawn = draw(posed, rng)
        sizes = {measure.label: measured(measure) for measure in drawn["measures"]}
        assert sorted(sizes) == sorted([*map(str, posed.given), UNKNOWN])
        [(one, size)] = list(sizes.items())[:1]
        # Angles are drawn as they are, lengths to scale.
        angles = all(measure.what == "angle" for measure in drawn["measures"])
        number = posed.answer if one == UNKNOWN else int(one)
        scale = 1.0 if angles else size / number
        assert math.isclose(sizes.pop(UNKNOWN), scale * posed.answer, rel_tol=1e-9)
        for label, size in sizes.items():
            assert math.isclose(size, scale * int(label), rel_tol=1e-9)


def test_the_drawn_lines_are_what_the_question_says() -> None:
    rng = np.random.default_rng(2)
    for kind in ("isosceles_base", "isosceles_top"):
        _, drawn = draw(problems(kind)[0], rng)
        by_label = {m.label: m for m in drawn["measures"]}
        top = (
            by_label[UNKNOWN]
            if kind == "isosceles_top"
            else next(m for m in drawn["measures"] if m.label != UNKNOWN)
        )
        one, vertex, other = top.points
        assert math.isclose(math.dist(vertex, one), math.dist(vertex, other))
    for kind in ("central_angle", "inscribed_angle"):
        _, drawn = draw(problems(kind)[0], rng)
        central, inscribed = drawn["measures"]
        a, centre, b = central.points
        assert inscribed.points[::2] == (a, b)
        radii = [math.dist(centre, point) for point in (a, b, inscribed.points[1])]
        assert all(math.isclose(radius, radii[0]) for radius in radii)
    for kind in ("corresponding", "cointerior"):
        for posed in problems(kind):
            _, drawn = draw(posed, rng)
            first, second = (direction(m.points[1], m.points[0]) for m in drawn["measures"])
            assert math.isclose(abs(first * second.conjugate()), 1.0)
            assert abs((first * second.conjugate()).imag) < 1e-9, "the two lines are parallel"
    for kind in ("radius", "diameter"):
        _, drawn = draw(problems(kind)[0], rng)
        radius, diameter = drawn["measures"]
        middle = sum(complex(*point) for point in diameter.points) / 2
        assert abs(middle - complex(*radius.points[0])) < 1e-9


def direction(start: Point, end: Point) -> complex:
    step = complex(*end) - complex(*start)
    return step / abs(step)


def test_figures_and_labels_lie_in_the_picture_and_labels_apart() -> None:
    close = 0
    for index in range(300):
        task = FigureTasks("train")[index]
        picture = pixels(task)
        assert picture.shape == (SIDE, SIDE, 3)
        assert picture.dtype == np.uint8
        for measure in task.metadata["measures"]:
            assert all(0 <= value <= SIDE for point in measure.points for value in point)
        boxes = task.metadata["boxes"]
        texts = sorted(text for text, _ in boxes)
        assert texts == sorted([*map(str, task.metadata["given"]), UNKNOWN])
        for text, (left, top, right, bottom) in boxes:
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            inside = picture[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert inside.min() < 60, f"no ink where {text} is"
            assert bottom - top >= 0.05 * SIDE
        close += any(overlap(a, b) for (_, a), (_, b) in combinations(boxes, 2))
    assert close == 0


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    return not apart


# Texts


def test_the_expert_answers_and_its_equations_hold() -> None:
    rng = np.random.default_rng(0)
    env = make_env()
    for posed in all_problems():
        text = expert(posed, rng)
        assert text.endswith(f"So x is \\boxed{{{posed.answer}}}.")
        assert all(str(number) in text for number in posed.given)
        check_equations(text)
    for kind in KINDS:
        task = FigureTasks("eval", kind=kind)[0]
        env.reset(options={"task": task})
        _, reward, terminated, truncated, info = env.step(expert(problem(task), rng))
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def check_equations(text: str) -> None:
    for sentence in text.split(". "):
        left, equals, right = sentence.rstrip(".").partition("=")
        if equals:
            assert eval(left) == int(right)  # digits and + - * / only


def test_wrong_rules_are_wrong_but_their_sums_are_right() -> None:
    for posed in all_problems():
        text = worked(posed.given, _WRONG_RULES[posed.kind](posed.given))
        check_equations(text)
        last = text.rpartition("{")[2].rstrip("}.")
        # Some problems forgive: of two right angles that add up to 180 either rule gives one.
        assert int(last) != posed.answer or 90 in (*posed.given, posed.answer)
    assert any("x is" in sentence for sentence in [worked((3,), [])])


def test_careless_habits_have_the_stated_shares() -> None:
    script, count = Careless(), 1000
    posed = problems("third_angle")
    texts = [
        (script(posed[i % len(posed)], np.random.default_rng(i)), posed[i % len(posed)])
        for i in range(count)
    ]
    at_once = sum(text.startswith("So x") for text, _ in texts) / count
    right = sum(text == expert(p, np.random.default_rng(0)) for text, p in texts) / count
    assert abs(at_once - script.at_once) < 0.05
    assert abs(right - (1 - script.at_once - script.wrong_rule)) < 0.05


def test_exercises_are_right() -> None:
    for index in range(50):
        rng = np.random.default_rng(index)
        picture, numbers = exercise_picture(rng)
        assert picture.ndim == 3
        assert 1 <= len(numbers) <= 2
        assert list(numbers) == sorted(numbers)
        check_equations(". ".join(equations(rng)) + ".")


# The environment


def test_the_environment_is_registered_and_passes_gymnasiums_check() -> None:
    data = {"train": FigureTasks("train"), "eval": FigureTasks("eval")}
    env = gymnasium.make("reopold/Geometry-v0", data=data)
    assert isinstance(env.unwrapped, SingleTurnEnv)
    check_env(env.unwrapped, skip_render_check=True)
    observation, info = env.reset(seed=0, options={"split": "eval", "index": 4})
    assert info["task_id"] == "figure-eval-0-4"
    assert info["system_prompt"] == ""
    assert observation["text"].count(IMAGE_MARK) == len(observation["images"]) == 1
    assert FigureTasks("eval")[4].question in observation["text"]
    env.close()


def test_render_shows_the_figure() -> None:
    env = gymnasium.make(
        "reopold/Geometry-v0", data={"train": FigureTasks()}, render_mode="rgb_array"
    )
    env.reset(options={"index": 0})
    assert np.array_equal(env.render(), pixels(FigureTasks()[0]))
    env.close()


@pytest.mark.parametrize(
    ("words", "source", "student"),
    [
        (["env=geometry"], "figures", "demo:figures_student"),
        (["env=geometry", "data=demo"], "demo", "demo:figures_student"),
        (["env=geometry", "model=demo", "data=figures"], "figures", "demo:student"),
    ],
)
def test_the_command_composes_and_its_words_win(
    words: list[str], source: str, student: str
) -> None:
    config, raw = running.composed(*words)
    assert raw["env"]["name"] == "geometry"
    assert raw["data"]["train"]["source"] == source
    assert raw["model"]["student"]["path"] == student
    assert config.env.id == "reopold/Geometry-v0"


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_papers_setting_composes(size: str) -> None:
    if not (Path(configs.__path__[0]) / "data" / "geometry3k.yaml").is_file():
        pytest.skip("needs configs/data/geometry3k.yaml")
    _, raw = running.composed("env=geometry", f"model=qwen2_5_vl_{size}_geometry")
    assert raw["model"]["student"]["path"] == f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    assert raw["model"]["teacher"]["path"].startswith("xyliu6/NoisyRollout-Geo3")
    assert (raw["batch"]["prompts"], raw["batch"]["mini_batch"]) == (128, 64)
    assert raw["rollout"]["max_response_tokens"] == 2048
    assert raw["data"]["env_kwargs"]["system_message"].endswith("\\boxed{}.")


def test_real_problems_with_their_pictures_are_playable() -> None:
    folder = real_data("geometry3k")
    for row in map(json.loads, (folder / "sample.jsonl").read_text().splitlines()):
        answer = row["precise_value"]["ABCD".index(row["answer"])]
        file = folder / row["image"]
        task = Task(str(row["id"]), row["compact_text"], (f"{answer:g}",), (FileImage(file),))
        env = gymnasium.make("reopold/Geometry-v0", data={"train": [task]})
        observation, _ = env.reset(options={"index": 0})
        with Image.open(file) as picture:
            assert np.array_equal(observation["images"][0], np.asarray(picture.convert("RGB")))
        assert row["compact_text"] in observation["text"]
        _, reward, terminated, _, info = env.step(f"So it is \\boxed{{{answer:g}}}.")
        assert (reward, terminated, info["success"]) == (1.0, True, True)
        env.reset(options={"index": 0})
        assert env.step("So it is \\boxed{-12345}.")[1] == 0.0
        env.close()


class FileImage:
    def __init__(self, file: Path) -> None:
        self.file = file

    def open(self) -> Image.Image:
        with Image.open(self.file) as picture:
            return picture.convert("RGB")


# What is shipped


@pytest.fixture(scope="module")
def builder() -> FiguresBuilder:
    return FiguresBuilder(AutoTokenizer.from_pretrained(WEIGHTS / f"{PREFIX}student"))


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_small_and_load(name: str) -> None:
    folder = Path(resolve_path(f"demo:{PREFIX}{name}"))
    assert folder == WEIGHTS / f"{PREFIX}{name}"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2.5 * MEGABYTE
    for file in ("config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (folder / file).is_file()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_student_and_teacher_share_one_tokenizer() -> None:
    student, teacher = (
        (WEIGHTS / f"{PREFIX}{name}" / "tokenizer.json").read_bytes() for name in MODELS
    )
    assert student == teacher


def test_shipped_models_know_the_present_prompts() -> None:
    note = json.loads((WEIGHTS / "figures.json").read_text())
    assert note["prompts"] == fingerprint(make_env()), (
        "the questions or the guideline have changed since the figures' models were made; "
        "run python -m examples.embedded_models figures"
    )


def test_the_gap_between_the_shipped_models(builder: FiguresBuilder) -> None:
    results = {}
    for name in MODELS:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS / f"{PREFIX}{name}")
        results[name] = builder.evaluate(model, 128, temperature=1.0)
    assert results["student"]["success"] <= 0.35
    assert results["teacher"]["success"] >= 0.75


def test_a_recorded_trace_is_what_a_rollout_records(builder: FiguresBuilder) -> None:
    tasks = FigureTasks("eval")
    runner = RolloutRunner(
        make_env,
        builder.chat,
        builder.vision,
        prompt_pixels=PIXELS,
        observation_pixels=PIXELS,
        limits=LIMITS,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS / f"{PREFIX}teacher")
    specs = [EpisodeSpec("eval", index) for index in range(8)]
    episodes = runner.run(builder.policy(model), specs, Sampling(temperature=0), (0,))
    runner.close()
    for episode in episodes:
        said = episode.turns[0].text
        trace = builder.trace(tasks, episode.index, lambda problem, rng, said=said: said)
        assert trace.ids.tolist() == episode.ids.tolist()
        assert trace.loss_mask.tolist() == episode.loss_mask.tolist()
        assert np.array_equal(trace.images[0].pixels, episode.images[0].pixels)


def test_the_picture_is_read_not_guessed(builder: FiguresBuilder) -> None:
    """With another figure's picture the teacher gives the other figure's numbers."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS / f"{PREFIX}teacher")
    tasks = FigureTasks("eval", kind="third_angle")
    policy = builder.policy(model)
    own = [builder.trace(tasks, index, expert) for index in range(12)]
    swapped = [builder.trace(tasks, index, expert) for index in range(12)]
    for trace, other in zip(swapped, [*own[1:], own[0]], strict=True):
        trace.images = list(other.images)
    right, wrong = (
        np.mean([float(score.logp.sum()) for score in policy.score(traces)])
        for traces in (own, swapped)
    )
    assert right > wrong + 3


# Training


def test_a_short_training_run(tmp_path: Path) -> None:
    summary = running.train(tmp_path, "env=geometry", "rollout.max_turns=1", "steps=2")
    assert summary
    rows = running.train_rows(tmp_path)
    assert len(rows) == 2
    for row in running.lines(tmp_path / "trajectories.jsonl"):
        assert "<tool_call>" not in json.dumps(row)


def test_the_recipe_runs_repeats_itself_and_loads_again(tmp_path: Path) -> None:
    said: list[str] = []
    figures = build(tmp_path / "a", TINY, said.append)
    assert set(figures) == set(MODELS)
    assert said
    torch.rand(3)  # the recipe must not lean on the global random state
    build(tmp_path / "b", TINY, said.append)
    for name in MODELS:
        first, second = (tmp_path / run / f"{PREFIX}{name}" for run in ("a", "b"))
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
