"""Mathematics: the embedded arithmetic, its models, the environment, and the field's data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import random_picture
from gymnasium.utils.env_checker import check_env
from PIL import Image
from real_data import real_data
from running import composed, train, train_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.embedded_models.arithmetic.build import (
    PREFIX,
    TINY,
    ArithmeticBuilder,
    build,
    fingerprint,
    make_env,
)
from examples.embedded_models.arithmetic.scripts import Careless, Talkative, expert
from examples.embedded_models.builder import WEIGHTS
from reopold_agent.data import load_tasks
from reopold_agent.data.rows import read_rows
from reopold_agent.demo.arithmetic.tasks import ArithmeticTasks, Operation, Problem
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.judges import grade
from reopold_agent.policies.loading import resolve_path
from reopold_agent.types import Task

NAMES = ("teacher", "student", "far")


@pytest.fixture(scope="module")
def builder() -> ArithmeticBuilder:
    return ArithmeticBuilder(AutoTokenizer.from_pretrained(WEIGHTS / f"{PREFIX}student"))


# Tasks


def test_a_problem_depends_on_seed_split_and_index_only() -> None:
    for index in range(30):
        problem = ArithmeticTasks("eval", 50, 3).problem(index)
        assert problem == ArithmeticTasks("eval", 9999, 3).problem(index)
        assert problem != ArithmeticTasks("eval", 50, 4).problem(index)
    assert len(list(ArithmeticTasks(size=3))) == 3


def test_no_problem_is_in_both_splits() -> None:
    train, held_out = (
        {
            ArithmeticTasks(split, 5000, seed).problem(index)
            for seed in (0, 1)
            for index in range(1500)
        }
        for split in ("train", "eval")
    )
    # A mirrored sum is the same problem.
    assert not train & (held_out | {Problem(p.second, p.operation, p.first) for p in held_out})
    assert {p.operation for p in held_out} == {"+", "-", "x"}


@pytest.mark.parametrize(
    ("problem", "answer", "carry"),
    [
        (Problem(386, "+", 448), 834, True),
        (Problem(123, "+", 456), 579, False),
        (Problem(923, "+", 455), 1378, False),  # only the last column overflows
        (Problem(532, "-", 148), 384, True),
        (Problem(548, "-", 132), 416, False),
        (Problem(47, "x", 6), 282, True),
        (Problem(42, "x", 3), 126, False),
    ],
)
def test_answers_are_exact(problem: Problem, answer: int, carry: bool) -> None:
    assert problem.answer == answer
    assert problem.has_carry is carry
    assert expert(problem, np.random.default_rng(0)).endswith(f"\\boxed{{{answer}}}")


def test_the_expert_writes_the_columns() -> None:
    rng = np.random.default_rng(0)
    assert expert(Problem(386, "+", 448), rng) == (
        "ones:6+8+0=14 write:4 carry:1\ntens:8+4+1=13 write:3 carry:1\n"
        "hundreds:3+4+1=8 write:8\n\\boxed{834}"
    )
    assert expert(Problem(532, "-", 148), rng) == (
        "ones:12-8-0=4 write:4 borrow:1\ntens:13-4-1=8 write:8 borrow:1\n"
        "hundreds:5-1-1=3 write:3\n\\boxed{384}"
    )
    assert expert(Problem(47, "x", 6), rng) == (
        "ones:7x6=42 write:2 carry:4\ntens:4x6=24+4=28\n\\boxed{282}"
    )


def test_scripts_are_right_or_wrong_as_they_say() -> None:
    tasks = ArithmeticTasks("train", 600, 5)
    careless, talkative = Careless(at_once=0.5, no_carries=0.5), Talkative(proper=0.0)
    shares = []
    for index in range(300):
        task, problem = tasks[index], tasks.problem(index)
        rng = np.random.default_rng(index)
        assert problem.has_carry
        assert task.answers == (str(problem.answer),)
        assert grade(expert(problem, rng), task.answers).correct
        assert not grade(careless(problem, rng), task.answers).correct
        assert not grade(talkative(problem, rng), task.answers).correct
        shares.append(Careless()(problem, rng) == expert(problem, rng))
    assert abs(np.mean(shares) - 0.28) < 0.08


@pytest.mark.parametrize(
    "bad", [{"split": "test"}, {"size": 0}, {"seed": -1}, {"operations": ["/"]}, {"operations": []}]
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        load_tasks({"source": "arithmetic", **bad})


# The models that are shipped


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_are_small_and_load(name: str) -> None:
    folder = Path(resolve_path(f"demo:{PREFIX}{name}"))
    assert (folder / "model.safetensors").stat().st_size <= 1_600_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert tokenizer == (WEIGHTS / f"{PREFIX}teacher" / "tokenizer.json").read_bytes()


def test_shipped_models_know_the_present_prompts() -> None:
    note = json.loads((WEIGHTS / "arithmetic.json").read_text())
    assert note["prompts"] == fingerprint(make_env()), (
        "the guideline or the tasks' words have changed since the models were made; run "
        "python -m examples.embedded_models arithmetic"
    )


@pytest.mark.slow
def test_the_gap_between_the_shipped_models(builder: ArithmeticBuilder) -> None:
    results = {}
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(WEIGHTS / f"{PREFIX}{name}").eval()
        results[name] = builder.evaluate(model, 128, temperature=1.0)
    assert results["teacher"]["success"] >= 0.8
    assert 0.08 <= results["student"]["success"] <= 0.32
    assert results["far"]["success"] <= 0.1
    assert results["student"]["tokens"] < results["teacher"]["tokens"] < results["far"]["tokens"]


def test_the_recipe_runs_repeats_itself_and_loads_again(tmp_path: Path) -> None:
    lines: list[str] = []
    assert set(build(tmp_path / "a", TINY, lines.append)) == set(NAMES)
    torch.rand(3)  # the recipe must not lean on the global random state
    build(tmp_path / "b", TINY, lines.append)
    tokenizers = []
    for name in NAMES:
        first, second = (tmp_path / run / f"{PREFIX}{name}" for run in "ab")
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
        tokenizers.append(AutoTokenizer.from_pretrained(first))
    shipped = WEIGHTS / f"{PREFIX}student"
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "a" / f"{PREFIX}student" / file).read_bytes() == (
            shipped / file
        ).read_bytes(), "the shipped weights are not of the present recipe"
    # transformers cuts words its own way for this model type; the recipe must cut likewise.
    builder, tasks = ArithmeticBuilder(tokenizers[0]), ArithmeticTasks("eval")
    words = [expert(tasks.problem(i), np.random.default_rng(0)) for i in range(20)]
    for index, text in enumerate(words):
        trace = builder.trace(tasks, index, lambda problem, rng, text=text: text)
        assert builder.chat.text(trace.ids[trace.loss_mask].tolist()) == text
        assert trace.response_tokens < 60


# The environment


def make(**settings: Any) -> gymnasium.Env[Any, Any]:
    data = {
        split: {"source": "arithmetic", "split": split, "size": 8} for split in ("train", "eval")
    }
    return gymnasium.make("reopold/Math-v0", data=data, **settings)


def test_math_is_a_gymnasium_environment() -> None:
    env = make()
    check_env(env.unwrapped, skip_render_check=True)
    observation, info = env.reset(options={"split": "eval", "index": 3})
    task = ArithmeticTasks("eval", 8)[3]
    assert info == {"task_id": task.id, "system_prompt": ""}
    assert observation["images"] == ()
    assert observation["text"] == (
        task.question
        + "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    _, reward, terminated, truncated, info = env.step(f"so \\boxed{{{task.answers[0]}}}")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    env.close()


def test_a_wrong_answer_ends_the_episode_too() -> None:
    env = make(guideline="", system_message="Be brief.")
    observation, info = env.reset(options={"index": 0})
    assert observation["text"] == ArithmeticTasks("train", 8)[0].question
    assert info["system_prompt"] == "Be brief."
    _, reward, terminated, truncated, _ = env.step("\\boxed{-1}")
    assert (reward, terminated, truncated) == (0.0, True, False)


def answer_is_right(response: str) -> bool:
    task = Task("t", "What is 2 + 2?", ("4",))
    env = SingleTurnEnv(data={"train": [task], "eval": None})
    env.reset(options={"index": 0})
    return bool(env.step(response)[4]["success"])


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>\nIs it \\boxed{5}?\n</think>\n\nIt is \\boxed{4}.", True),
        (
            "Is it \\boxed{4}?\n</think>\n\nIt is \\boxed{5}.",
            False,
        ),  # the prompt opened the thought
        ("It is \\boxed{4}.\n</think>\n\nFour.", False),
        ("It is \\boxed{4}.\n</think>", True),  # nothing follows: what there is counts
        ("<think>\nSo the answer is 4", False),
        ("<think>\nSo \\boxed{4}, but wait", True),  # cut by the budget after a box
        ("<think>\nSo \\boxed{4", False),
    ],
)
def test_what_follows_the_thoughts_is_graded(response: str, right: bool) -> None:
    assert answer_is_right(response) is right
    if "boxed" not in response:
        # The graders of benchmarks, which accept more than boxes, see no answer here either.
        assert not grade(response, ("4",)).correct


def test_env_math_brings_data_and_model() -> None:
    config, _ = composed("env=math")
    assert config.data.train is not None
    assert (config.env.id, config.data.train["source"]) == ("reopold/Math-v0", "arithmetic")
    assert config.model.student.path == "demo:arithmetic_student"
    config, _ = composed(
        "env=math", "data=verl", "data.train.path=a.parquet", "data.eval.path=b.parquet"
    )
    assert config.data.train == {
        "source": "verl",
        "path": "a.parquet",
        "split": None,
        "revision": None,
        "limit": None,
        "on_bad_row": "fail",
        "solution": None,
    }
    assert config.model.student.path == "demo:arithmetic_student"


@pytest.mark.parametrize(
    ("model", "teacher"),
    [
        ("r1_distill_1_5b", "Skywork/Skywork-OR1-Math-7B"),
        ("r1_distill_7b", "Skywork/Skywork-OR1-32B-Preview"),
    ],
)
def test_the_papers_mathematics(model: str, teacher: str) -> None:
    config, _ = composed("env=math", f"model={model}")
    assert config.data.train is not None
    assert config.model.teacher is not None
    assert config.model.teacher.path == teacher
    assert config.data.train["path"] == "Elliott/Openr1-Math-46k-8192"
    assert (config.batch.prompts, config.batch.samples, config.batch.mini_batch) == (128, 8, 32)
    assert (config.steps, config.optimizer.lr) == (300, 1e-6)
    assert config.rollout.max_response_tokens == 8192


def test_a_short_training(tmp_path: Path) -> None:
    summary = train(
        tmp_path,
        "env=math",
        "rollout.max_turn_tokens=60",
        "rollout.max_response_tokens=60",
        "data.train.operations=['+']",
    )
    rows = train_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert all(row["rollout/stop/env_error"] == 0 for row in rows)
    assert summary["teacher"]["n"] == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")


# The field's data


def openr1_row(index: int, answer: str) -> dict[str, Any]:
    """A row as LUFFY's prepare_openr1_data_spec_sys.py writes it."""
    return {
        "data_source": "",
        "prompt": [
            {"role": "system", "content": "Your task is to follow a systematic process."},
            {"role": "user", "content": f"Problem {index}?"},
        ],
        "target": [{"role": "assistant", "content": "<think>\nlong\n</think>\n"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "default", "index": index},
    }


def test_openr1_rows(tmp_path: Path) -> None:
    rows = [openr1_row(0, "3"), openr1_row(1, "\\frac{1}{2}")]
    file = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    tasks = load_tasks({"source": "verl", "path": str(tmp_path), "split": "train"})
    assert [(t.id, t.question, t.answers) for t in (tasks[0], tasks[1])] == [
        ("0", "Problem 0?", ("3",)),
        ("1", "Problem 1?", ("\\frac{1}{2}",)),
    ]
    assert "target" not in next(iter(read_rows(file, without=("target",))))


def test_luffys_valid_parquet() -> None:
    path = real_data("luffy", "valid.parquet")
    tasks = load_tasks({"source": "verl", "path": str(path), "limit": 40})
    assert len(tasks) == 40
    row = next(iter(read_rows(path)))
    assert tasks[0].question == row["prompt"][-1]["content"].strip()
    assert tasks[0].answers == (str(row["reward_model"]["ground_truth"]),)


@pytest.mark.parametrize(
    ("name", "count", "answer"),
    [
        ("aime24", 30, "204"),
        ("amc23", 40, "27"),
        ("math500", 500, None),
        ("gsm8k_test", 1319, "18"),
    ],
)
def test_math_jsonl(name: str, count: int, answer: str | None) -> None:
    [path] = real_data("math").glob(f"{name}*.jsonl") or pytest.skip(f"no {name}")
    tasks = load_tasks({"source": "math_jsonl", "path": str(path)})
    assert len(tasks) == count
    if answer is not None:
        assert tasks[0].answers == (answer,)
    assert grade(f"It is \\boxed{{{tasks[1].answers[0]}}}.", tasks[1].answers).correct


def png(seed: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(random_picture(seed, 30, 40)).save(encoded, "PNG")
    return encoded.getvalue()


def test_geometry3k_with_pictures_in_the_rows(tmp_path: Path) -> None:
    for part in range(2):
        rows = [
            {
                "images": [{"bytes": png(part), "path": None}],
                "problem": f"<image>Find x{part}.",
                "answer": f"{part}\\sqrt{{2}}",
            }
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / f"train-0000{part}-of-00002.parquet"
        )
    tasks = load_tasks({"source": "geometry3k", "path": str(tmp_path), "split": "train"})
    assert [(t.id, t.question, t.answers) for t in (tasks[0], tasks[1])] == [
        ("0", "Find x0.", ("0\\sqrt{2}",)),
        ("1", "Find x1.", ("1\\sqrt{2}",)),  # numbered over both files
    ]
    assert np.array_equal(np.asarray(tasks[1].images[0].open()), random_picture(1, 30, 40))
    with pytest.raises(DataError, match="split 'test'"):
        load_tasks({"source": "geometry3k", "path": str(tmp_path), "split": "test"})


def intergps(folder: Path, name: str, **changes: Any) -> None:
    folder = folder / name
    folder.mkdir(parents=True)
    row = {"problem_text": "Find x.", "choices": ["1", "2", "3", "4"], "answer": "C", **changes}
    (folder / "data.json").write_text(json.dumps(row), "utf-8")
    (folder / "img_diagram.png").write_bytes(png(int(name)))


def test_intergps_folders(tmp_path: Path) -> None:
    for number in (10, 9):
        intergps(tmp_path / "train", str(number))
    intergps(tmp_path / "test", "7", annotat_text="Find $x$.")
    spec = {"source": "geometry3k_intergps", "path": str(tmp_path)}
    tasks = load_tasks({**spec, "split": "train"})
    assert [tasks[i].id for i in range(len(tasks))] == ["9", "10"]
    assert tasks[0].answers == ("3",)  # the option's words, not its letter
    assert np.array_equal(np.asarray(tasks[1].images[0].open()), random_picture(10, 30, 40))
    assert load_tasks({**spec, "split": "test"})[0].question == "Find $x$."
    intergps(tmp_path / "val", "3", answer="E")
    intergps(tmp_path / "val", "4")
    with pytest.raises(DataError, match=r"1 of 2 rows.*\n.*3/data.json.*'E'"):
        load_tasks({**spec, "split": "val"})
    assert len(load_tasks({**spec, "split": "val", "on_bad_row": "skip"})) == 1


def test_intergps_sample() -> None:
    path = real_data("geometry3k")
    tasks = load_tasks({"source": "geometry3k_intergps", "path": str(path)})
    assert len(tasks) == 6
    assert (tasks[0].id, tasks[0].answers) == ("11", ("80",))
    assert tasks[0].images[0].open().size == (250, 251)


@pytest.mark.parametrize(
    ("data", "source"),
    [("math_jsonl", "math_jsonl"), ("geometry3k_intergps", "geometry3k_intergps")],
)
def test_data_that_must_be_given_a_path(data: str, source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.path"):
        composed("env=math", f"data={data}")
    config, _ = composed("env=math", f"data={data}", "data.train.path=a", "data.eval.path=b")
    assert config.data.train is not None
    assert config.data.train["source"] == source


def test_operations_may_be_chosen() -> None:
    tasks = load_tasks({"source": "arithmetic", "operations": ["x"], "size": 20})
    wanted: Operation = "x"
    assert {tasks[i].metadata["category"] for i in range(20)} == {wanted}
