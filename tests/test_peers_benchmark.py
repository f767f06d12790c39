"""``benchmarks/peers.py`` without TRL: what both sides generate, the bare parts, the result."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from reopold_agent.plan import flops
from reopold_agent.policies import generation
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.policies.loading import resolve_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return pytest.importorskip("peers")


def test_turns_end_where_and_as_the_script_says(peers: Any) -> None:
    script = peers.Script([5, 3], [[[7, 8], [7, 9]], [[4], [5]]], special=[1], rows=50, filler=6)
    sampled = [10, 1, 60, 12, 13]  # the second would end the turn, the third has no token

    def turn(number: int, episode: int) -> list[int]:
        given = sampled[: script.lengths[number]]
        return [script.token(number, place, episode, each) for place, each in enumerate(given)]

    assert turn(0, 0) == turn(0, 2) == [10, 6, 6, 7, 8]
    assert turn(0, 1) == [10, 6, 6, 7, 9]
    assert turn(1, 4) == [10, 6, 4]
    assert turn(1, 5) == [10, 6, 5]
    assert script.token(7, 2, 5, 10) == 5  # turns that nobody expects are like the last


@pytest.mark.parametrize("case", ["two_turns_tool", "group"])
def test_our_side_plays_the_script_and_learns(
    peers: Any, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = sys.modules["peers_side"]
    monkeypatch.setattr(peers, "find_data", lambda part: None)
    # What the side puts in the place of these is taken back afterwards.
    for owner, name in (
        (generation, "sample_tokens"),
        (generation.TransformersGenerator, "_sample"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    source = Path(resolve_path("demo:student"))
    answers: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]):
        peers.write_models(tmp_path, peers.TINY, source, source / "chat_template.jinja")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student_vl")
        peers.write_rows(tmp_path / f"rows_{case}", case, peers.TINY, tokenizer)
        script = peers.script_of(case, peers.TINY, tokenizer)
        words = peers.words_of(case, "grpo", tmp_path, script, 1)
        given = side.Side(1, str(tmp_path / "run"), asdict(script), words)
        side.ours(given, iter(["step"]), answers.append)
    (found,) = answers
    turns = [[end - start for start, end in episode] for episode in found["turns"]]
    # Ours ends a call's turn itself, and so has one token less.
    assert turns == [[63, 12] if case == "two_turns_tool" else [12]] * 8
    assert found["tokens"] == sum(map(sum, turns))
    assert len(set(found["prompt_of"])) == {"two_turns_tool": 4, "group": 1}[case]
    assert found["grad_norm"] > 0
    assert found["cpu_seconds"] > 0
    assert 0.1 < found["peak_gib"] < 4


def test_bare_parts_are_what_a_step_has_to_compute(peers: Any) -> None:
    model = find_architecture("Qwen/Qwen2.5-VL-3B-Instruct")
    teacher = find_architecture("Qwen/Qwen2.5-VL-7B-Instruct")
    machine = SimpleNamespace(flops=2.0, bandwidth=8.0)
    played = {
        "prompt_of": [0, 0, 1],
        "prompt_tokens": [100, 100, 90],
        "pictures": [[64, 16], [64, 16], [64]],
        "turns": [[[100, 110], [130, 137]], [[100, 108], [128, 140]], [[90, 103]]],
        "lengths": [137, 140, 103],
    }
    found = peers.bare_parts(model, teacher, played, machine)
    text, tower = model.text, model.vision
    prompts = flops.text_forward(text, 100, 1) + flops.text_forward(text, 90, 1)
    # The last token of a turn is not in the cache yet.
    turns = flops.text_forward(text, 130, 1, 109) + flops.text_forward(text, 128, 1, 107)
    pictures = 2 * flops.vision_forward(tower, [64]) + 2 * flops.vision_forward(tower, [16])
    assert found["prefill"] == pytest.approx((prompts + turns + pictures) / 2)
    assert found["decoding"] == (12 + 11) * text.parameters * 4 / 8
    forward = []
    for each in (model, teacher):
        rows = sum(flops.text_forward(each.text, length, 0) for length in (137, 140, 103))
        seen = sum(flops.vision_forward(each.vision, row) for row in played["pictures"])
        logits = flops.logits_forward(each.text, 10 + 7 + 8 + 12 + 13)
        forward.append(rows + seen + logits)
    assert found["teacher"] == pytest.approx(forward[1] / 2)
    assert found["forward and backward"] == pytest.approx(3 * forward[0] / 2)
    assert peers.bare_parts(model, None, played, machine)["teacher"] == 0


def test_the_result_has_medians(peers: Any) -> None:
    def comparison(scale: float) -> dict[str, Any]:
        ratios = {"seconds": [1, 2, 9], "cpu_seconds": [3, 4, 9], "peak_gib": [0.5, 0.6, 0.9]}
        return {
            "ratios": {key: [scale * each for each in values] for key, values in ratios.items()},
            "floors": [1.0, 1.1, 3.0],
            "cpu_floors": [1.2],
        }

    found = peers.summary({"one_turn_gkd": comparison(1), "group": comparison(0.5)})
    assert found["one_turn_gkd"] == 2
    assert (found["group"], found["floor_group"]) == (1, 1.1)
    assert found["memory"] == 0.6
    assert found["memory_by_case"] == {"one_turn_gkd": 0.6, "group": 0.3}
    assert found["cpu"]["one_turn_gkd"] == 4
    assert found["cpu"]["floor_group"] == 1.2
