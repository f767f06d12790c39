"""How benchmarks are played: the paper's protocol, what beats it, and what is said to differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from reopold_agent.errors import ConfigError
from reopold_agent.evaluate.benchmarks import Benchmark, LoadedBenchmark, select
from reopold_agent.evaluate.protocol import Play, differences, play_of
from reopold_agent.evaluate.run import EvaluateConfig, Evaluation, load_config
from reopold_agent.evaluate.words import shipped_benchmarks
from reopold_agent.types import Task


def settings(*words: str) -> EvaluateConfig:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return load_config(compose("evaluate", list(words)))[0]


def played(name: str, *words: str) -> Play:
    config = settings(*words)
    (benchmark,) = select(config.benchmarks, [name], None)
    given = config.agentic if benchmark.play == "agentic" else config.single
    return play_of(benchmark, config.protocol, given, config.pixels)


def test_the_papers_values() -> None:
    agentic = played("vstar")
    assert (agentic.temperature, agentic.top_p, agentic.max_turns) == (1, 1, 5)
    assert (agentic.max_response_tokens, agentic.max_turn_tokens) == (8192, 4096)
    assert (agentic.pixels.prompt.min_pixels, agentic.pixels.prompt.max_pixels) == (200704, 4014080)
    visual = played("mathvista")
    assert (visual.temperature, visual.top_p, visual.max_response_tokens) == (0.6, 0.95, 8192)
    assert (visual.pixels.prompt.min_pixels, visual.pixels.prompt.max_pixels) == (262144, 1000000)
    assert visual.env_kwargs["system_message"].startswith("You FIRST think about the reasoning")
    math = played("aime24")
    assert (math.temperature, math.top_p, math.max_response_tokens) == (0.6, 0.95, 32768)
    assert math.max_turn_tokens == 32768
    samples = {b.name: b.samples for b in select(settings().benchmarks, [], "math")}
    assert samples["aime24"] == samples["amc23"] == samples["aime25"] == 32
    assert samples["math500"] == samples["minerva"] == samples["olympiadbench"] == 1


def test_greedy_is_an_option_of_its_own() -> None:
    assert played("mathvista", "protocol=paper_greedy").temperature == 0
    assert settings("protocol=paper_greedy").protocol["samples"] == 1
    assert played("mathvista", "protocol=paper_greedy").pixels == played("mathvista").pixels
    assert played("aime24", "protocol=paper_greedy").max_response_tokens == 32768


@pytest.mark.parametrize(
    ("name", "word", "field", "value"),
    [
        ("mathvista", "single.temperature=1", "temperature", 1),
        ("mathvista", "single.max_response_tokens=99", "max_response_tokens", 99),
        ("vstar", "agentic.max_turns=2", "max_turns", 2),
        ("mathvista", "+single.env_kwargs.guideline=Go.", "env_kwargs.guideline", "Go."),
        ("mathvista", "pixels.prompt.max_pixels=784000", "pixels.prompt.max_pixels", 784000),
        ("demo", "pixels.prompt.max_pixels=784000", "pixels.prompt.max_pixels", 784000),
        ("demo", "agentic.temperature=0", "temperature", 0),
    ],
)
def test_what_the_user_sets_counts_and_nothing_else_changes(
    name: str, word: str, field: str, value: Any
) -> None:
    before, after = played(name), played(name, word)
    key, *rest = field.split(".")
    changed = getattr(after, key)
    for part in rest:
        changed = changed[part] if isinstance(changed, dict) else getattr(changed, part)
    assert changed == value
    assert replace(before, **{key: getattr(after, key)}) == after


def test_the_users_value_counts_also_where_it_is_the_usual_one() -> None:
    # The demo's own pixels differ from the protocol's, which are set here.
    words = ["pixels.prompt.min_pixels=200704", "pixels.prompt.max_pixels=4014080"]
    assert played("demo").pixels.prompt.max_pixels == 12544
    assert played("demo", *words).pixels.prompt == played("vstar").pixels.prompt
    assert played("aime24", "single.max_response_tokens=8192").max_response_tokens == 8192


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("aime24", "single.temperature=-1", "temperature"),
        ("aime24", "single.max_turn_tokens=0", "max_turn_tokens must be at least 1"),
        ("vstar", "pixels.prompt.max_pixels=many", "pixels.prompt.max_pixels"),
        ("aime24", "+protocol.single.tempreture=1", "Did you mean 'single.temperature'"),
        ("vstar", "~protocol.agentic.top_p", "top_p"),
    ],
)
def test_wrong_settings_are_named(name: str, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        played(name, word)


def loaded(benchmark: Benchmark, count: int, left_out: int = 0, blind: int = 0) -> LoadedBenchmark:
    tasks = [Task(str(i), "q", ("1",)) for i in range(count)]
    return LoadedBenchmark(benchmark, tasks, {}, ["row"] * left_out, blind=blind)


def told(name: str, count: int, *words: str, judge: str = "none", left_out: int = 0) -> list[str]:
    config = settings(*words)
    (benchmark,) = select(config.benchmarks, [name], None)
    if config.samples is not None:
        benchmark = replace(benchmark, samples=config.samples)
    found = loaded(benchmark, count, left_out)
    return differences(found, played(name, *words), judge)


JUDGE = "judge gemini instead of gemini-2.0-flash-001, which is no longer served"


def test_what_differs_from_the_paper() -> None:
    assert told("aime24", 30) == []
    assert told("vstar", 191, judge="gemini") == [JUDGE]
    assert told("mathvision", 3039, judge="gemini", left_out=1) == [JUDGE]
    assert told("mathvista", 10, "single.temperature=0", "benchmarks.mathvista.limit=10") == [
        "temperature 0 instead of 0.6",
        "limit 10 instead of none",
        "questions 10 instead of 1000",
        JUDGE.replace("gemini", "none", 1),
    ]
    assert told("aime24", 30, "samples=4", "pixels.prompt.max_pixels=1") == [
        "pixels.prompt.max_pixels 1 instead of 4014080",
        "samples 4 instead of 32",
    ]
    (vstar,) = select(settings().benchmarks, ["vstar"], None)
    lost = differences(loaded(vstar, 191, blind=2), played("vstar"), "gemini")
    assert lost == ["2 questions without their picture", JUDGE]
    assert "hold-out" in told("pixel", 100)[0]
    assert "aAcc_pictured" in told("hallusionbench", 1129)[0]
    assert told("demo", 3, "agentic.temperature=0") == []


@pytest.mark.parametrize(
    ("name", "word", "line"),
    [
        ("mathvista", "protocol=paper_greedy", "temperature 0 instead of 0.6"),
        ("mathvista", "protocol.single.temperature=0.2", "temperature 0.2 instead of 0.6"),
        ("mathvista", "+single.env_kwargs.guideline=Go.", "env_kwargs.guideline Go. instead of "),
        ("mathvista", "+single.env_kwargs.system_message=null", "env_kwargs.system_message none"),
        ("math500", "+single.env_kwargs.guideline=Go.", "env_kwargs.guideline Go. instead of none"),
        ("mathvista", "++benchmarks.mathvista.pixels={prompt: {max_pixels: 50000, min_pixels: 1}}",
         "pixels.prompt.max_pixels 50000 instead of 1000000"),
        ("vstar", "++agentic.env_kwargs.tools=[crop_image]", "env_kwargs.tools ['crop_image']"),
        ("vstar", "++benchmarks.vstar.env_kwargs={overview_max_side: 9}", "overview_max_side 9"),
        ("aime24", "benchmarks.aime24.samples=3", "samples 3 instead of 32"),
        ("wemath", "benchmarks.wemath.metric=accuracy", "metric accuracy instead of wemath"),
    ],
)  # fmt: skip
def test_every_kind_of_setting_is_told(name: str, word: str, line: str) -> None:
    assert any(each.startswith(line) or line in each for each in told(name, 1, word))


def test_the_more_specific_setting_counts() -> None:
    pixels = "++benchmarks.demo.pixels.prompt.max_pixels=50000"
    assert played("demo", "pixels.prompt.max_pixels=9", pixels).pixels.prompt.max_pixels == 50000
    tools = played("demo", "++agentic.env_kwargs.tools=[crop_image]").env_kwargs["tools"]
    assert tools == ["crop_image"]
    assert played("demo").env_kwargs["tools"] == ["crop_image", "select_frames"]


def test_another_play_has_its_own_protocol() -> None:
    agentic = played("mathvista", "benchmarks.mathvista.play=agentic")
    assert agentic.max_turns == 5
    assert "system_message" not in agentic.env_kwargs
    assert agentic.pixels == played("vstar").pixels
    single = played("vstar", "benchmarks.vstar.play=single")
    assert (single.max_turns, single.temperature) == (1, 0.6)


def test_it_is_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "aime.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    words = [
        "benchmark=aime24",
        f"benchmarks.aime24.path={tmp_path / 'aime.jsonl'}",
        "checkpoint=demo:arithmetic_student",
        "samples=2",
        "single.max_response_tokens=8",
        "single.max_turn_tokens=8",
        "engine.device=cpu",
    ]
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, raw = load_config(compose("evaluate", words))
    results = Evaluation(config, raw, tmp_path / "run").run()
    figures = results["benchmarks"]["aime24"]
    assert figures["protocol"] == "paper"
    assert figures["differences"] == [
        "max_response_tokens 8 instead of 32768",
        "max_turn_tokens 8 instead of 32768",
        "samples 2 instead of 32",
        "questions 1 instead of 30",
    ]
    line = "aime24 differs from the paper: max_response_tokens 8 instead of 32768; max_turn_tokens"
    assert line in (tmp_path / "run" / "results.md").read_text()
    assert line in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["benchmarks"]["aime24"]["differences"] == figures["differences"]


def test_every_shipped_benchmark_has_a_protocol() -> None:
    for name in shipped_benchmarks():
        assert played(name).max_turns == (
            5 if shipped_benchmarks()[name]["play"] == "agentic" else 1
        )
