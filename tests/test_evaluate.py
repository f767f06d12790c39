"""The evaluation: formats of the benchmarks, playing, judging, scoring, resuming, reporting."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from judge_server import chat_text, serving
from PIL import Image
from real_data import real_data
from safetensors.torch import load_file, save_file

from reopold_agent.compare.__main__ import main
from reopold_agent.compare.tables import asked_questions, comparison_table, paired_lines
from reopold_agent.data.row_formats import FORMATS
from reopold_agent.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from reopold_agent.evaluate.benchmarks import Benchmark, LoadedBenchmark, load_benchmark, select
from reopold_agent.evaluate.judging import judge_rows
from reopold_agent.evaluate.paper import PAPER_TABLES
from reopold_agent.evaluate.plots import make_plots
from reopold_agent.evaluate.report import blind_lines, failure_lines, markdown, write_page
from reopold_agent.evaluate.results import benchmark_results
from reopold_agent.evaluate.run import Evaluation, load_config
from reopold_agent.evaluate.words import prepared_words
from reopold_agent.judges import grade
from reopold_agent.judges.llm import How, JudgeReply
from reopold_agent.policies.loading import model_path, resolve_path
from reopold_agent.tracking.metrics import read_json_lines

REPOSITORY = Path(__file__).parents[1]


def entry(name: str, **changes: Any) -> Benchmark:
    values: dict[str, Any] = {"suite": "s", "format": "math_jsonl", "play": "single"}
    return Benchmark(name=name, **{**values, **changes})


def row(index: int, sample: int = 0, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "benchmark": "b",
        "index": index,
        "sample": sample,
        "id": f"q{index}",
        "question": "How many?",
        "answers": ["7"],
        "kind": "number",
        "options": [],
        "category": "even" if index % 2 == 0 else "odd",
        "group": {},
        "response": "Perhaps seven, I think.",
        "extracted": None,
        "correct": False,
        "how": "undecided",
        "undecided": True,
        "stop": "answer",
        "error": None,
        "turns": [{"text": "Perhaps seven, I think.", "observation": "", "tool": None}],
        "pictures": [],
        "tokens": 10,
        "seconds": 2.0,
    }
    return {**values, **changes}


def right(index: int, sample: int = 0, **changes: Any) -> dict[str, Any]:
    found = {"extracted": "7", "correct": True, "how": "boxed:number", "undecided": False}
    return row(index, sample, **{**found, **changes})


def wrong(index: int, sample: int = 0, said: str = "8", **changes: Any) -> dict[str, Any]:
    found = {"extracted": said, "how": "boxed:number", "undecided": False}
    return row(index, sample, **{**found, **changes})


# Formats


def test_real_rows_of_the_math_files() -> None:
    expected = {"aime24.jsonl": 30, "amc23.jsonl": 40, "math500.jsonl": 500}
    for name, count in expected.items():
        loaded = load_benchmark(entry("m", path=str(real_data("math", name))))
        assert len(loaded.tasks) == count
        assert all(loaded.tasks[i].answers[0] for i in range(count))
        assert len(next(iter(loaded.files.values()))) == 64
    minerva = load_benchmark(entry("m", path=str(real_data("math", "minerva_math.sample.jsonl"))))
    assert all("boxed" not in task.answers[0] for task in map(minerva.tasks.__getitem__, range(5)))
    gsm = load_benchmark(entry("m", path=str(real_data("math", "gsm8k_test.jsonl"))))
    assert gsm.tasks[0].answers == ("18",)


def test_real_rows_of_the_pictured_benchmarks() -> None:
    vision = load_benchmark(
        entry("v", format="mathvision", path=str(real_data("mathvision")), split=None)
    )
    assert len(vision.tasks) == 32
    letters = [t for t in map(vision.tasks.__getitem__, range(32)) if t.metadata["options"]]
    assert letters
    assert all(t.metadata["answer_kind"] == "option" for t in letters)
    assert vision.tasks[0].images[0].open().mode == "RGB"
    assert "<image1>" not in vision.tasks[0].question
    hallusion = load_benchmark(
        entry("h", format="hallusionbench", path=str(real_data("hallusionbench")))
    )
    assert [hallusion.tasks[i].answers[0] for i in range(2)] == ["no", "yes"]
    figures = {hallusion.tasks[i].metadata["figure"] for i in range(2)}
    assert len(figures) == 1
    geometry = load_benchmark(
        entry("g", format="geometry3k_intergps", path=str(real_data("geometry3k")))
    )
    source = [
        json.loads(line)
        for line in real_data("geometry3k", "sample.jsonl").read_text().splitlines()
        if line
    ]
    for number, raw in enumerate(source):
        assert geometry.tasks[number].answers == (raw["choices"]["ABCD".index(raw["answer"])],)


def test_luffy_rows() -> None:
    loaded = load_benchmark(
        entry("l", format="verl", path=str(real_data("luffy", "valid.parquet")))
    )
    assert len(loaded.tasks) == 2019
    assert loaded.tasks[0].metadata["category"]


@pytest.mark.parametrize(
    ("format", "values", "answer", "kind"),
    [
        ("math_jsonl", {"question": "q", "answer": 27.0}, "27", "math"),
        ("math_jsonl", {"question": "q", "answer": "so #### 1,234"}, "1,234", "math"),
        ("math_jsonl", {"problem": "q", "final_answer": ["1", "2"]}, "1, 2", "math"),
        ("math_jsonl", {"problem": "q", "solution": r"a \boxed{\frac12}"}, r"\frac12", "math"),
        ("mathvista", {"query": "q", "answer": "red", "choices": ["blue", "red"],
                       "question_type": "multi_choice", "image": "p.png"}, "B", "option"),
        ("mathvista", {"query": "q", "answer": "3", "question_type": "free_form",
                       "image": "p.png"}, "3", "auto"),
        ("mathverse", {"query_cot": "q", "answer": "C", "question_type": "multi-choice",
                       "image": "p.png"}, "C", "option"),
        ("wemath", {"question": "q", "answer": "A", "option": "A. 1; B. 2", "ID": "3",
                    "key": "2steps_1", "image_path": "p.png"}, "A", "option"),
        ("parquet_pictures", {"problem": "<image>q", "answer": "5", "images": ["p.png"]},
         "5", "math"),
    ],
)  # fmt: skip
def test_formats(
    tmp_path: Path, format: str, values: Mapping[str, Any], answer: str, kind: str
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "p.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(values) + "\n")
    loaded = load_benchmark(entry("x", format=format, path=str(tmp_path)))
    task = loaded.tasks[0]
    assert task.answers == (answer,)
    assert task.metadata["answer_kind"] == kind
    assert "<image>" not in task.question
    if task.images:
        assert task.images[0].open().size == (40, 30)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_no_format_raises_anything_but_data_errors(tmp_path: Path, format: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": 5, "answer": null}\n')
    with pytest.raises(DataError, match="1 of 1 rows"):
        load_benchmark(entry("x", format=format, path=str(tmp_path)))


def test_benchmarks_that_share_a_data_set(tmp_path: Path) -> None:
    for folder, name, text in (
        ("wemath", "testmini.json", '[{"question": "q", "answer": "B", "option": "A. 1; B. 2", '
         '"ID": "3", "key": "2steps_1", "image_path": "p.png"}]'),
        ("mathvision", "MathVision.tsv",
         "index\tquestion\tanswer\tcategory\n7\tHow?\t5\talgebra\n"),
    ):  # fmt: skip
        (tmp_path / folder / "images").mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / folder / "images" / "p.png")
        Image.new("RGB", (30, 30)).save(tmp_path / folder / "images" / "7.jpg")
        (tmp_path / folder / name).write_text(text)
    wemath = entry("w", format="wemath", path=str(tmp_path), folder="wemath", split="testmini")
    assert load_benchmark(wemath).tasks[0].answers == ("B",)
    vision = load_benchmark(
        entry("v", format="mathvision", path=str(tmp_path), folder="mathvision")
    ).tasks[0]
    assert (vision.id, vision.answers, vision.metadata["category"]) == ("7", ("5",), "algebra")
    assert vision.images[0].open().size == (30, 30)


# Choosing


def test_names_suites_and_what_is_missing(tmp_path: Path) -> None:
    entries: dict[str, Any] = {
        "one": {"suite": "a", "format": "math_jsonl", "play": "single", "path": "x.jsonl"},
        "two": {"suite": "a", "format": "math_jsonl", "play": "single"},
        "three": {"suite": "b", "format": "demo", "play": "agentic", "limit": 3},
    }
    assert [b.name for b in select(entries, ["two", "one"], None)] == ["two", "one"]
    assert [b.name for b in select(entries, [], "a")] == ["one", "two"]
    assert [b.name for b in select(entries, ["three", "two"], "a")] == ["one", "two", "three"]
    with pytest.raises(UnknownNameError, match="Did you mean 'three'"):
        select(entries, ["tree"], None)
    with pytest.raises(UnknownNameError, match="suite"):
        select(entries, [], "c")
    with pytest.raises(DataError, match=r"(?s)x\.jsonl does not exist.*benchmarks\.one\.path"):
        load_benchmark(select(entries, ["one"], None)[0])
    with pytest.raises(ConfigError, match=r"benchmarks\.two\.path"):
        load_benchmark(select(entries, ["two"], None)[0])
    assert len(load_benchmark(select(entries, ["three"], None)[0]).tasks) == 3


def test_a_benchmark_of_ones_own_needs_a_path_and_a_format(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    entries: dict[str, Any] = {"mine": {"path": str(rows), "format": "math_jsonl"}}
    (mine,) = select(entries, ["mine"], None)
    found = (mine.suite, mine.play, mine.kind, mine.metric, mine.samples, mine.limit)
    assert found == ("own", "single", "auto", "accuracy", 1, None)
    assert load_benchmark(mine).tasks[0].answers == ("2",)
    assert select(entries, [], "own") == select(entries, [], None) == [mine]
    tools: dict[str, Any] = {"mine": {"path": "DIR", "format": "pixel_reasoner"}}
    assert select(tools, ["mine"], None)[0].play == "agentic"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "x"}, r"'mine' has no format\.\n.*path: DIR, format: FORMAT.*math_jsonl"),
        (None, "'mine' has no format"),
        ({"format": "math_json"}, "Did you mean 'math_jsonl'"),
        ({"format": "math_jsonl", "metrics": "anls"}, r"Did you mean 'benchmarks\.mine\.metric'"),
        ({"format": "math_jsonl", "metric": "accurracy"}, "Did you mean 'accuracy'"),
        ({"format": "math_jsonl", "kind": "nubmer"}, "Did you mean 'number'"),
        ({"format": "math_jsonl", "play": "multi"}, "'agentic' or 'single'"),
    ],
)
def test_a_wrong_setting_of_a_benchmark_suggests_the_right_one(settings: Any, message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        select({"mine": settings}, ["mine"], None)


def test_a_new_benchmark_is_added_with_a_plus() -> None:
    with pytest.raises(ConfigError, match=r"\+benchmarks\.mine=\{path: DIR, format: FORMAT\}"):
        prepared_words(["benchmarks.mine.path=x"])
    with pytest.raises(ConfigError, match=r"Did you mean 'benchmarks\.vstar'"):
        prepared_words(["benchmarks.vstr.path=x"])
    added = ["+benchmarks.mine={path: x}", "benchmarks.mine.limit=2", "benchmarks.vstar.path=y"]
    assert prepared_words([*added, "model=m"]) == [*added, "checkpoint=m"]
    lacking = ["benchmark=vstar", "benchmarks.vstar.pixels.prompt.max_pixels=9"]
    assert prepared_words(lacking) == [lacking[0], f"++{lacking[1]}"]
    with pytest.raises(ConfigError, match=r"\nAdd benchmark=\[vstar\]"):
        prepared_words(["benchmarks.vstar.path=x"])


def test_a_run_folder_means_its_student(tmp_path: Path) -> None:
    assert model_path("org/name") == "org/name"
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="neither"):
        model_path(str(tmp_path))
    for step in (2, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}" / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert model_path(str(tmp_path)).endswith("step-000010/model")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").touch()
    assert model_path(str(tmp_path)) == str(tmp_path / "final")
    (tmp_path / "config.yaml").touch()
    assert model_path(str(tmp_path)).endswith("step-000010/model")  # it goes on for more steps
    (tmp_path / "summary.json").touch()
    assert model_path(str(tmp_path)) == str(tmp_path / "final")


# Scoring


def test_results_by_hand() -> None:
    rows = [
        right(0), right(0, 1), wrong(0, 2), wrong(0, 3),
        wrong(1), wrong(1, 1, said="9"), right(1, 2), row(1, 3),
    ]  # fmt: skip
    found = benchmark_results(rows, entry("b", samples=4), ks=[1, 2, 4, 8], seed=0)
    assert (found["questions"], found["samples"], found["answers"]) == (2, 4, 8)
    assert found["accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    # 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2
    assert found["pass_at_k"] == pytest.approx({"1": 0.375, "2": (5 / 6 + 0.5) / 2, "4": 1.0})
    # Question 0: two sevens against two eights, the sevens were first. Question 1: 8, 9, 7 once
    # each, the wrong 8 was first.
    assert found["maj_at_k"] == {"1": 0.5, "2": 0.5, "4": 0.5}
    assert found["undecided"] == 1
    assert found["how"] == {"boxed:number": 7, "undecided": 1}
    assert found["categories"]["odd"] == {"answers": 4, "accuracy": 0.25}
    assert found["low"] <= found["accuracy"] <= found["high"]


def test_the_order_of_rows_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = [right(i, s) if rng.random() < 0.4 else wrong(i, s) for i in range(20) for s in range(3)]
    benchmark = entry("b", samples=3)
    first = benchmark_results(rows, benchmark, ks=[1, 2], seed=0)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows))
        shuffled = [rows[i] for i in order]
        assert benchmark_results(shuffled, benchmark, ks=[1, 2], seed=0) == first


@pytest.mark.parametrize(
    ("metric", "rows", "expected"),
    [
        ("anls", [wrong(0, said="sevan", answers=["seven"]), row(1)], {"ANLS": 0.4}),
        ("rmse", [wrong(0, said="9"), right(1)], {"RMSE": 2**0.5}),
    ],
)
def test_other_metrics(metric: str, rows: list[Any], expected: dict[str, float]) -> None:
    found = benchmark_results(rows, entry("b", metric=metric), ks=[1], seed=0)
    assert found["extra"] == pytest.approx(expected)


def test_answers_to_other_questions_are_not_continued(tmp_path: Path) -> None:
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    words = [f"+benchmarks.mine={{path: {rows}, format: math_jsonl}}", "benchmark=[mine]",
             "checkpoint=demo:arithmetic_student", "single.max_response_tokens=4",
             "engine.device=cpu"]  # fmt: skip

    def evaluated(*questions: str) -> dict[str, Any]:
        rows.write_text(
            "".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in questions)
        )
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            config, raw = load_config(compose("evaluate", words))
        return Evaluation(config, raw, run).run()["benchmarks"]["mine"]

    assert evaluated("1 + 1?", "3 - 1?")["questions"] == 2
    with pytest.raises(CheckpointError, match=r"number 0 was '1 \+ 1\?', now it is '9 - 7\?'"):
        evaluated("9 - 7?", "3 - 1?")
    assert evaluated("1 + 1?")["questions"] == 1  # the second question is gone


def test_prompts_beyond_the_context_are_not_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's context is 1,024 tokens, and a word of these has at least one."""
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    asked = ["1 + 1?", "cat " * 6000]
    rows.write_text("".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in asked))
    words = [f"+benchmarks.mine={{path: {rows}, format: math_jsonl}}", "benchmark=[mine]",
             "checkpoint=demo:arithmetic_student", "single.max_response_tokens=4",
             "engine.device=cpu"]  # fmt: skip
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, raw = load_config(compose("evaluate", words))
    results = Evaluation(config, raw, run).run()
    found = results["benchmarks"]["mine"]
    assert (found["questions"], found["errors"], found["prompts_too_long"]) == (2, 1, 1)
    first, second = read_json_lines(run / "responses.jsonl")
    first, second = sorted((first, second), key=lambda row: row["index"])
    assert first["error"] is None
    assert first["tokens"] > 0
    assert second["error"].startswith("prompt too long: ")
    assert second["tokens"] == 0
    assert not second["correct"]
    told = "1 of 2 episodes failed and count as wrong, 1 of them with a prompt too long"
    assert told in (run / "results.md").read_text("utf-8")

    # One that leaves room for a single token is played; what follows is past the context.
    monkeypatch.setattr("reopold_agent.evaluate.run.context_length", lambda _: 2)
    Evaluation(config, raw, tmp_path / "two").run()
    (first, _) = sorted(
        read_json_lines(tmp_path / "two/responses.jsonl"), key=lambda row: row["index"]
    )
    prompt = int(re.findall(r"\d+", first["error"])[0])
    monkeypatch.setattr("reopold_agent.evaluate.run.context_length", lambda _: prompt + 1)
    results = Evaluation(config, raw, tmp_path / "three").run()
    found = results["benchmarks"]["mine"]
    assert (found["errors"], found["past_context"]) == (1, 1)
    assert "mine: 1 of 2 answers ran past the model's context" in "".join(failure_lines(results))


def test_lost_pictures_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A null where others have a picture; an empty list says that there is none."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    pictures = [["red.png"], None, [], None, ["red.png"]]
    benchmark = Benchmark(name="mine", format="parquet_pictures", path=str(tmp_path))

    def loaded(*given: Any, column: str = "images") -> LoadedBenchmark:
        caplog.clear()
        rows = [{"problem": f"Which {i}?", "answer": "5", column: p} for i, p in enumerate(given)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_benchmark(benchmark)

    found = loaded(*pictures)
    assert (found.blind, len(found.tasks)) == (2, 5)
    assert "2 of 5 rows" in caplog.text
    assert "have no picture in 'images', where others have one" in caplog.text
    told = blind_lines({"benchmarks": {"mine": {"without_picture": 2, "questions": 5}}})
    assert told == ["mine: 2 of 5 questions were asked without a picture, where others have one."]
    for given in ([None, None], [[], ["red.png"]], [["red.png"]]):
        assert loaded(*given).blind == 0
        assert "no picture" not in caplog.text
    assert loaded("red.png", None, column="image").blind == 1


def test_a_benchmarks_own_samples_come_first(tmp_path: Path) -> None:
    """Also those that equal the usual number, of a shipped benchmark and of one's own."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    process = evaluate(
        tmp_path / "run",
        f"+benchmarks.mine={{path: {rows}, format: math_jsonl, samples: 1}}",
        "+benchmarks.other={path: " + str(rows) + ", format: math_jsonl}",
        "benchmark=[arithmetic,mine,other,figures]",
        "benchmarks.arithmetic.samples=1",
        "benchmarks.arithmetic.limit=1",
        "benchmarks.figures.limit=1",
        "samples=2",
        "model=demo:figures_student",
        "single.max_response_tokens=4",
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = json.loads((tmp_path / "run/results.json").read_text("utf-8"))["benchmarks"]
    samples = {name: figures["samples"] for name, figures in found.items()}
    assert samples == {"arithmetic": 1, "mine": 1, "other": 2, "figures": 2}


def test_votes_are_compared_as_the_grader_compares_them() -> None:
    """With the question's options, the reference's kind and the benchmark's precision."""

    def majority(answers: list[str], said: list[str], **settings: Any) -> float:
        rows = []
        for sample, response in enumerate(said):
            verdict = grade(response, answers, settings.get("kind", "auto"),
                            options=settings.get("options"),
                            precision=settings.get("precision"))  # fmt: skip
            rows.append(row(0, sample, answers=answers, extracted=verdict.extracted,
                            correct=verdict.correct, undecided=verdict.undecided,
                            **{"kind": "auto", **settings}))  # fmt: skip
        found = benchmark_results(rows, entry("b"), ks=[5], seed=0)
        return float(found["maj_at_k"]["5"])

    votes = ["\\boxed{A}", "\\boxed{A}", "\\boxed{B}", "\\boxed{dog}", "The answer is dog."]
    options = ["cat", "dog", "cow"]
    assert majority(["B"], votes, options=options) == 1
    assert majority(["B"], votes, options=options, kind="option") == 1
    rounded = ["\\boxed{1.3}", "\\boxed{1.3}", "\\boxed{1.21}", "\\boxed{1.19}", "\\boxed{1.2}"]
    assert majority(["1.2"], rounded, precision=1, kind="number") == 1
    assert majority(["1.2"], rounded, kind="number") == 0
    yes = ["\\boxed{no}", "\\boxed{no}", "\\boxed{yes}", "\\boxed{true}", "\\boxed{correct}"]
    assert majority(["yes"], yes) == 1


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(samples: int) -> None:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        composed = compose("evaluate", [f"samples={samples}"])
        with pytest.raises(ConfigError, match=f"samples must be at least 1, got {samples}"):
            load_config(composed)


def test_answers_about_other_pictures_are_not_continued(tmp_path: Path) -> None:
    """Whether another file is named or the same one has other bytes; a zip archive is no change."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()

    def evaluated(picture: str = "red.png") -> int:
        row = {"problem": "<image>Which colour?", "answer": "5", "images": [picture]}
        (data / "rows.jsonl").write_text(json.dumps(row) + "\n")
        words = [f"+benchmarks.mine={{path: {data}, format: parquet_pictures}}",
                 "benchmark=[mine]", "checkpoint=demo:figures_student", "engine.device=cpu",
                 "single.max_response_tokens=4"]  # fmt: skip
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            config, raw = load_config(compose("evaluate", words))
        return int(Evaluation(config, raw, run).run()["benchmarks"]["mine"]["questions"])

    for colour in ("red", "green"):
        Image.new("RGB", (56, 56), colour).save(data / f"{colour}.png")
    assert evaluated() == 1
    told = r"\(number 0 'Which colour\?', has other words, .*or pictures now\)\.\nGive the"
    with pytest.raises(CheckpointError, match=told):
        evaluated("green.png")
    red = (data / "red.png").read_bytes()
    (data / "red.png").write_bytes((data / "green.png").read_bytes())
    with pytest.raises(CheckpointError, match=told):
        evaluated()
    (data / "red.png").unlink()
    for archived in (b"", red):
        with zipfile.ZipFile(data / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("red.png", archived or (data / "green.png").read_bytes())
        if archived:
            assert evaluated() == 1
        else:
            with pytest.raises(CheckpointError, match=told):
                evaluated()
    # An earlier version did not record the pictures.
    rows = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    assert all(row.pop("task_sha256") for row in rows)
    (run / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated("green.png") == 1


def test_hallusionbench_also_over_the_rows_that_the_paper_scores() -> None:
    groups: list[Any] = [{"figure": "f1", "question": "q0"}, {"figure": None, "question": "q1"}]
    rows = [right(0, group=groups[0]), wrong(1, group=groups[1])]
    found = benchmark_results(rows, entry("b", metric="hallusionbench"), ks=[1], seed=0)
    assert found["accuracy"] == found["extra"]["aAcc"] == 0.5
    assert (found["extra"]["aAcc_pictured"], found["extra"]["pictured"]) == (1, 1)
    result = {"benchmarks": {"hallusionbench": found}, "model": {"path": "m"}}
    header, cells = comparison_table(["run"], [result], "visual")
    assert cells[0][header.index("hallusionbench")] == "100.0 of 1 pictured"


# Judging


class ScriptedJudge:
    """Returns scripted replies and records its prompts."""

    name = "scripted:1"

    def describe(self) -> dict[str, Any]:
        return {"name": "scripted", "model": "1"}

    def __init__(self, replies: Mapping[str, JudgeReply]) -> None:
        self.replies, self.asked = replies, list[Any]()

    def run(self, requests: Any, *, ordered: bool = False) -> Iterator[JudgeReply]:
        for request in requests:
            self.asked.append(request)
            reply = self.replies[request.id]
            yield JudgeReply(**{**vars(reply), "id": request.id})


def test_the_judge_extracts_and_the_rules_decide(tmp_path: Path) -> None:
    rows = [right(0), row(1), row(2), row(3), row(4)]
    judge = ScriptedJudge(
        {
            "b/1/0": JudgeReply("7.0", How.JUDGE, said="7.0"),
            "b/2/0": JudgeReply("8", How.JUDGE),
            "b/3/0": JudgeReply(None, How.NO_ANSWER),
            "b/4/0": JudgeReply(None, How.UNAVAILABLE, error="503"),
        }
    )
    judged = judge_rows(rows, judge, tmp_path / "judged.jsonl")  # type: ignore[arg-type]
    assert [r["correct"] for r in judged] == [True, True, False, False, False]
    assert [r["undecided"] for r in judged] == [False, False, False, False, True]
    assert judged[1]["extracted"] == "7.0"
    assert judged[1]["how"].startswith("judge+")
    # It never sees the ground truth, in any field.
    assert all("answer" not in vars(request) for request in judge.asked)
    assert not any("7" in str(value) for r in judge.asked for value in vars(r).values())
    # What was decided is not asked again; what failed is.
    again = ScriptedJudge({"b/4/0": JudgeReply("7", How.JUDGE)})
    judged = judge_rows(rows, again, tmp_path / "judged.jsonl")  # type: ignore[arg-type]
    assert [request.id for request in again.asked] == ["b/4/0"]
    assert [r["correct"] for r in judged] == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("said", "right"), [("None", False), ("no answer", False), ("0", True), ("zero", True)]
)
def test_a_judge_that_says_none_has_found_no_count(said: str, right: bool, tmp_path: Path) -> None:
    judge = ScriptedJudge({"b/1/0": JudgeReply(said, How.JUDGE)})
    counted = {**row(1), "kind": "count", "answers": ["0"]}
    judged = judge_rows([counted], judge, tmp_path / "judged.jsonl")  # type: ignore[arg-type]
    assert (judged[0]["correct"], judged[0]["undecided"]) == (right, False)
    assert (judged[0]["how"] == How.NO_ANSWER) is not right


JUDGED = ("benchmarks.arithmetic.limit=3", "benchmark=[arithmetic]", "engine.device=cpu",
          "checkpoint=demo:arithmetic_student", "single.max_response_tokens=2")  # fmt: skip


def judged(folder: Path, *words: str) -> dict[str, Any]:
    """Evaluates answers that are cut off, so that the rules find nothing in them."""
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, raw = load_config(compose("evaluate", [*JUDGED, *words]))
    return Evaluation(config, raw, folder).run()


def test_another_judge_is_asked_again_about_the_same_answers(tmp_path: Path) -> None:
    """Verdicts stand under the name of the judge that gave them, whichever file is read."""
    with serving(lambda *_: chat_text('{"answer": "7"}')) as server:

        def with_judge(model: str, *words: str) -> tuple[dict[str, Any], int]:
            asked = len(server.seen)
            judge = (
                "judge=openai_compatible",
                f"judge.base_url={server.url}/v1",
                "judge.cache=null",
            )
            found = judged(tmp_path, *judge, f"judge.model={model}", *words)
            figures = found["benchmarks"]["arithmetic"]
            assert found["judge"]["model"] == model
            assert figures["judge"] == f"openai_compatible:{model}"
            assert {each["judge"] for each in entries()} == {figures["judge"]}
            assert (figures["undecided"], len(entries())) == (0, 3)
            return found, len(server.seen) - asked

        def entries(name: str = "judged.jsonl") -> list[dict[str, Any]]:
            return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

        _, asked = with_judge("weak")
        assert asked == 3
        answers = (tmp_path / "responses.jsonl").read_bytes()
        # Keys, rates and time limits decide nothing; a setting of the reply does.
        found, asked = with_judge(
            "weak", "judge.timeout=7", "judge.key_env=NONE", "judge.attempts=1"
        )
        assert asked == 0
        assert "Judge openai_compatible:weak: 3 answers asked about by earlier" in markdown(found)
        assert with_judge("weak", "judge.max_output_tokens=99")[1] == 3
        assert with_judge("strong")[1] == 3
        none = judged(tmp_path, "judge=none")["benchmarks"]["arithmetic"]
        assert (none["judge"], none["undecided"], none["accuracy"]) == ("none", 3, 0.0)
        assert entries() == []
        # Nothing is lost: each judge's replies come back with it.
        assert with_judge("weak")[1] == with_judge("strong")[1] == 0
        # An earlier version did not record the settings: then the name decides.
        old = [{k: v for k, v in each.items() if k != "settings"} for each in entries()]
        (tmp_path / "judged.jsonl").write_text("".join(json.dumps(each) + "\n" for each in old))
        (tmp_path / "judged_before.jsonl").unlink()
        assert with_judge("strong")[1] == 0
        assert with_judge("weak")[1] == 3
        assert (tmp_path / "responses.jsonl").read_bytes() == answers


def test_a_judge_whose_key_is_missing_is_not_another_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    words = ("judge=gemini", "judge.model=m")
    assert judged(tmp_path, *words)["benchmarks"]["arithmetic"]["judge"] == "none"
    reply = {"extracted": "7", "how": "judge", "said": "7", "error": None, "judge": "gemini:m",
             "settings": "x", "asked": True, "correct": True, "rule": "r"}  # fmt: skip
    lines = [json.dumps({**reply, "key": f"arithmetic/{i}/0"}) + "\n" for i in range(3)]
    (tmp_path / "judged.jsonl").write_text("".join(lines))
    found = judged(tmp_path, *words)["benchmarks"]["arithmetic"]
    assert (found["judge"], found["accuracy"]) == ("gemini:m", 1.0)
    found = judged(tmp_path, words[0], "judge.model=n")["benchmarks"]["arithmetic"]
    assert (found["judge"], found["accuracy"]) == ("none", 0.0)


# The command


def evaluate(folder: Path, *overrides: str, **popen: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "reopold_agent.evaluate", f"hydra.run.dir={folder}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    process = evaluate(folder, "benchmarks.demo.limit=24", "samples=2", "latency.ks=[1,2]",
                       "latency.questions=2")  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("arithmetic", 0.8), ("figures", 0.8)])
def test_embedded_tasks_of_one_turn_are_benchmarks_too(
    name: str, least: float, tmp_path: Path
) -> None:
    words = (f"benchmark={name}", f"model=demo:{name}_teacher", f"benchmarks.{name}.limit=48")
    process = evaluate(tmp_path / "out", *words)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmarks"][name]["questions"] == 48
    assert results["benchmarks"][name]["accuracy"] >= least
    rows = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert len({json.loads(row)["category"] for row in rows}) == 3


@pytest.mark.slow
def test_an_evaluation_writes_the_documented_files(finished: tuple[Path, str]) -> None:
    folder, out = finished
    results = json.loads((folder / "results.json").read_text())
    figures = results["benchmarks"]["demo"]
    assert (figures["questions"], figures["samples"], figures["answers"]) == (24, 2, 48)
    assert set(figures["pass_at_k"]) == {"1", "2"}
    assert figures["pixels"]["prompt"]["max_pixels"] == 12544
    assert "crop_image" in figures["prompt"]["system"]
    assert figures["prompt"]["first_question"].startswith("<image>")
    assert figures["sampling"] == {"temperature": 1.0, "top_p": 1.0}
    assert [p["k"] for p in figures["latency"]] == [1, 2]
    assert results["judge"]["counters"]
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len({(r["index"], r["sample"]) for r in rows}) == 48
    assert all((folder / picture).is_file() for r in rows for picture in r["pictures"])
    assert (folder / "plots" / "scaling-demo.png").stat().st_size > 10_000
    assert "demo" in (folder / "results.md").read_text()
    assert "0." in out
    assert "\x1b" not in out


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_evaluation(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = ("benchmarks.demo.limit=24", "samples=2", "engine.concurrency=4")
    process = evaluate(folder, *settings)
    responses = folder / "responses.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if responses.is_file() and len(responses.read_bytes().splitlines()) >= 9:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = responses.read_bytes().splitlines()
    assert 9 <= len(before) < 48
    process = evaluate(folder, *settings)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    after = responses.read_bytes().splitlines()
    whole = before if before[-1].endswith(b"}") else before[:-1]
    assert after[: len(whole)] == whole  # nothing is asked twice
    assert len(after) == 48  # and nothing is lost
    first = {r["id"] + str(r["sample"]): r["response"] for r in map(json.loads, after)}
    other = (finished[0] / "responses.jsonl").read_text().splitlines()
    assert first == {r["id"] + str(r["sample"]): r["response"] for r in map(json.loads, other)}


@pytest.mark.slow
def test_other_settings_on_the_same_folder_are_refused(finished: tuple[Path, str]) -> None:
    process = evaluate(finished[0], "benchmarks.demo.limit=24", "samples=2", "seed=5",
                       "latency.ks=[1,2]", "latency.questions=2")  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "seed: 0 -> 5" in err


@pytest.mark.slow
def test_a_model_that_computes_no_numbers_is_not_scored(tmp_path: Path) -> None:
    shutil.copytree(resolve_path("demo:arithmetic_student"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    words = [
        f"model={tmp_path / 'model'}",
        "evaluation.tasks=4",
        "rollout.max_response_tokens=4096",
    ]
    run = evaluate(tmp_path / "run", "env=math", *words)
    said, told = run.communicate(timeout=300)
    assert "math: an answer may have 4,096 tokens, and the model's context is 1,024, the " in said
    assert run.returncode == 2, said + told
    assert "'math' are not numbers: its weights are broken, or overflow.\n  Take another" in told
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_missing_files_are_reported_before_a_model_is_loaded(tmp_path: Path) -> None:
    process = evaluate(tmp_path / "a", "benchmark=[demo,aime24]", "model=/does/not/exist")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "aime24" in err
    assert "sources.luffy=FILE" in err
    process = evaluate(tmp_path / "b", "benchmark=dem")
    _, err = process.communicate(timeout=120)
    assert "Did you mean 'demo'" in err


# Reports


def small_results(rows: list[Any]) -> dict[str, Any]:
    figures = benchmark_results(rows, entry("b", samples=2), ks=[1, 2], seed=0)
    return {
        "model": {"path": "<b>model</b>", "dtype": "float32"},
        "seed": 0,
        "benchmarks": {"b": {**figures, "latency": []}},
        "judge": {"counters": {"would_ask": 3}},
    }


def test_hostile_words_are_text_on_the_page(tmp_path: Path) -> None:
    hostile = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    rows = [right(0, response=hostile, turns=[{"text": hostile, "observation": "", "tool": None}]),
            wrong(0, 1)]  # fmt: skip
    write_page(small_results(rows), rows, tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 2  # the data and the program, nothing of the model's
    assert "<img src=x" not in page
    assert "http://" not in page.replace("http-equiv", "")
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["rows"][1]["response"] == hostile


def test_a_missing_or_damaged_picture_does_not_break_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    rows = [right(0, pictures=["good.png", "gone.png", "damaged.png"])]
    write_page(small_results(rows), rows, tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    pictures = json.loads(page.split('id="data">')[1].split("</script>")[0])["pictures"]
    assert pictures["good.png"].startswith("data:image/jpeg;base64,")
    assert pictures["gone.png"] is pictures["damaged.png"] is None
    assert "gone.png" in caplog.text


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    hostile = "</script><script>document.title='owned'</script>"
    rows = [right(0, response=hostile, turns=[{"text": hostile, "observation": "", "tool": None}]),
            wrong(0, 1)]  # fmt: skip
    write_page(small_results(rows), rows, tmp_path, tmp_path / "report.html")
    dumped = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         f"file://{tmp_path / 'report.html'}"],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert "<title>Evaluation</title>" in dumped
    assert dumped.count("<article") == 2
    assert '<article class="wrong">' in dumped
    assert "&lt;/script&gt;" in dumped.split("<main")[1]


def test_markdown_and_plots(tmp_path: Path) -> None:
    results = small_results([right(0), wrong(0, 1), right(1), right(1, 1)])
    text = markdown(results)
    assert "| b | 2 x 2 | 0.750 [" in text
    assert "asked about 3 answers" in text
    assert "failed" not in text
    broken = small_results([right(0), wrong(0, 1, error="ValueError: no picture")])
    assert "b: 1 of 2 episodes failed and count as wrong; responses.jsonl" in markdown(broken)
    (made,) = make_plots(results, tmp_path)
    assert Image.open(made).size[0] > 400


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, rows in (
        ("one", [right(i) if i < 3 else wrong(i) for i in range(8)]),
        ("two", [right(i) if i < 7 else wrong(i) for i in range(8)]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "results.json").write_text(json.dumps(small_results(rows)))
        runs.append(folder)
    (line,) = paired_lines(runs[0], runs[1], ["b"])
    # Four questions differ, all the same way: 2 * 0.5**4.
    assert "+0.500" in line
    assert "p = 0.125" in line
    assert main([str(run) for run in runs]) == 0
    assert "37.5 [" in capsys.readouterr().out
    # A judge's finding counts.
    finding = {"key": "b/7/0", "correct": True}
    (runs[1] / "judged.jsonl").write_text(json.dumps(finding) + "\n")
    assert asked_questions(runs[1])["b"]["7:q7"].mean == 1.0
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("key", "lacks"),
    [("question", ()), ("task_sha256", ()), ("question", (0,)), ("question", (1,))],
    ids=["words", "pictures", "the first is older", "the second is older"],
)
def test_different_questions_of_one_id_are_not_paired(
    key: str, lacks: tuple[int, ...], tmp_path: Path
) -> None:
    def line(different: int) -> str:
        for run in range(2):
            rows = [right(i, id=str(i)) if run else wrong(i, id=str(i)) for i in range(8)]
            for each in rows:
                if key == "task_sha256" or (lacks and run not in lacks):
                    each["task_sha256"] = "0"
                if run and each["index"] < different:
                    each[key] = "another"
            (tmp_path / str(run)).mkdir(exist_ok=True)
            text = "".join(json.dumps(each) + "\n" for each in rows)
            (tmp_path / str(run) / "responses.jsonl").write_text(text)
        return paired_lines(tmp_path / "0", tmp_path / "1", ["b"])[0]

    assert "over 8 questions; McNemar p = 0.00781)" in line(0)
    told = "over 6 questions; McNemar p = 0.0312; 2 of the same id left out, whose tasks differ)"
    assert line(2).endswith(told)
    none = "b: no shared questions; 8 of the same id left out, whose tasks differ"
    assert line(8) == none


def test_compare_says_what_to_use_for_training_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three, four = (tmp_path / name for name in ("one", "two", "three", "four"))
    for folder, name in ((one, "metrics"), (two, "metrics"), (three, "responses"), (four, "x")):
        folder.mkdir()
        (folder / f"{name}.jsonl").touch()
    (four / "results.json").write_text(json.dumps(small_results([right(0), right(0, 1)])))

    def told(*runs: Path) -> list[str]:
        with pytest.raises(SystemExit, match="2"):
            main([str(run) for run in runs])
        return capsys.readouterr().err.splitlines()

    what, advice = told(one, two)
    assert what == f"error: {one}, {two} are training runs; `compare` takes evaluations."
    assert f"`reopold view {one} {two}`" in advice
    assert f"`reopold evaluate env=NAME model={one}" in advice
    what, advice = told(four, two)
    assert f"{two} is a training run" in what
    assert "view" not in advice
    assert f"hydra.run.dir={three}" in told(four, three)[1]
    assert "Give folders of `reopold evaluate`" in told(four, tmp_path)[1]


def test_the_papers_figures_are_marked() -> None:
    header, rows = comparison_table([], [], "agentic")
    assert header == ["", "pixel", "vstar", "infovqa", "tallyqa"]
    assert rows[-1] == ["Reopold (paper's)", "57.00", "77.43", "63.12", "65.43"]
    assert all(len(values) == len(columns) for columns, table in PAPER_TABLES.values()
               for values in table.values())  # fmt: skip
