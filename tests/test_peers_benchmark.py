"""``benchmarks/peers.py`` without TRL and verl: what all sides do, the bare parts, the result."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import composed
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


def test_bare_memory_is_what_a_step_has_to_hold(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = importlib.import_module("peers_bare")

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.down(self.up(inputs_embeds).sigmoid())
            return hidden

    # What the products multiply: 4 numbers a token, and 6 that are also the sigmoid's.
    assert bare.activations(Decoder(), 4, [10, 7]) == 17 * (4 + 6) * 4
    rows: list[list[int]] = []

    def run(words: Sequence[str], **_: Any) -> SimpleNamespace:
        rows.append(json.loads(words[-1]))
        return SimpleNamespace(stdout='words\n{"packages": 1.0, "activations": 0.5}')

    monkeypatch.setattr(peers.subprocess, "run", run)
    model = find_architecture("Qwen/Qwen2.5-VL-3B-Instruct")
    played = {"prompt_of": [0, 0, 1], "prompt_tokens": [100, 100, 90], "lengths": [137, 140, 103]}
    found = peers.bare_memory(Path("x"), model, model, played)
    assert rows == [[137, 40, 103]]  # the second row's prompt is that of the first
    weights = model.parameters * 4 / 2**30
    assert found["student"] == found["teacher"] == pytest.approx(weights)
    assert found["gradients and moments"] == pytest.approx(3 * weights)
    assert sum(found.values()) == pytest.approx(1.5 + 5 * weights)
    assert peers.bare_memory(Path("x"), model, None, played)["teacher"] == 0


def test_the_result_has_medians(peers: Any) -> None:
    def comparison(scale: float) -> dict[str, Any]:
        ratios = {"seconds": [1, 2, 9], "cpu_seconds": [3, 4, 9], "peak_gib": [0.5, 0.6, 0.9]}
        return {
            "ratios": {key: [scale * each for each in values] for key, values in ratios.items()},
            "floors": [1.0, 1.1, 3.0],
            "cpu_floors": [1.2],
            "memory_floors": [scale, 2 * scale, 5 * scale],
        }

    found = peers.summary({"one_turn_gkd": comparison(1), "group": comparison(0.5)})
    assert found["one_turn_gkd"] == 2
    assert (found["group"], found["floor_group"]) == (1, 1.1)
    assert found["memory"] == 0.6
    assert found["memory_by_case"] == {"one_turn_gkd": 0.6, "group": 0.3}
    assert found["memory_floors"] == {"one_turn_gkd": 2, "group": 1}
    assert found["cpu"]["one_turn_gkd"] == 4
    assert found["cpu"]["floor_group"] == 1.2


@pytest.mark.parametrize("engine", ["local", "verl"])
def test_our_side_of_verls_case_has_verls_settings(peers: Any, engine: str, tmp_path: Path) -> None:
    words = peers.our_words(tmp_path, peers.TINY, engine, 3)
    assert len({word.partition("=")[0] for word in words}) == len(words)
    config, _ = composed(*("env=math" if word == "env=digits" else word for word in words))
    assert (config.engine.name, config.engine.threads, config.steps) == (engine, 1, 3)
    theirs = dict(
        word.lstrip("+").split("=", 1) for word in peers.verl_words(tmp_path, 200, peers.TINY, 3)
    )
    rollout, data = "actor_rollout_ref.rollout", config.batch
    assert str(data.prompts) == theirs["data.train_batch_size"]
    assert str(data.samples) == theirs[f"{rollout}.n"]
    assert str(data.mini_batch) == theirs["actor_rollout_ref.actor.ppo_mini_batch_size"]
    assert str(config.rollout.max_response_tokens) == theirs["data.max_response_length"]
    assert str(config.optimizer.lr) == theirs["actor_rollout_ref.actor.optim.lr"]
    assert f"{config.model.student.path}" == theirs["actor_rollout_ref.model.path"]


def test_steps_of_verls_case_are_those_after_the_first_without_checkpoints(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        if "verl.trainer.main_ppo" in command:
            rows: list[dict[str, Any]] = [
                {"data": {"timing_s/step": s, "response_length/mean": 2, "actor/grad_norm": 1}}
                for s in (40, 4, 5)
            ]
            path = Path(environment["VERL_FILE_LOGGER_PATH"])
        else:
            rows = [{"kind": "evaluation"}]
            rows += [
                {"kind": "train", "rollout/response_tokens": 2, "grad_norm": 1, **times}
                for times in (
                    {"time/step": 30},
                    {"time/step": 2, "time/update": 1},
                    {"time/step": 9, "time/checkpoint": 8},
                )
            ]
            path = log.with_suffix("") / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(peers, "_run", run)
    runs = {
        "local": peers.run_ours(tmp_path, peers.TINY, "local", 3),
        "verl": peers.run_ours(tmp_path, peers.TINY, "verl", 3),
        peers.VERL_SIDE: peers.run_verl(tmp_path, []),
    }
    assert {name: [step["seconds"] for step in steps] for name, steps in runs.items()} == {
        "local": [2, 1],
        "verl": [2, 1],
        peers.VERL_SIDE: [4, 5],
    }
    assert {step["tokens"] for steps in runs.values() for step in steps} == {16}
    assert peers.figures_of_verl(runs) == {"verl_engine": 0.35, "verl_local": 0.35}


def test_verl_gets_the_prompts_of_our_run(peers: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("demo:student"))
    texts = ["<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", "Two, and longer?"] * 2
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        rows.append({"ids": [*ids, 5, 6, 7], "prompt_length": len(ids)})
    (tmp_path / "verl-local").mkdir()
    written = "\n".join(map(json.dumps, rows))
    (tmp_path / "verl-local" / "trajectories.jsonl").write_text(written)
    longest = peers.write_prompts(tmp_path, tokenizer)
    given = [json.loads(line) for line in (tmp_path / "verl.jsonl").read_text().splitlines()]
    template = "{{messages[0].content}}"  # `verl_words`
    found = [
        tokenizer.apply_chat_template(row["prompt"], chat_template=template, return_dict=False)
        for row in given
    ]
    assert found == [row["ids"][: row["prompt_length"]] for row in rows[:2]]
    assert longest == max(map(len, found))


def test_both_sides_of_verls_case_have_one_reward(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reopold_agent.envs.register_env", lambda *_, **__: None)
    monkeypatch.delitem(sys.modules, "peers_reward", raising=False)
    reward = importlib.import_module("peers_reward")
    monkeypatch.delitem(sys.modules, "peers_reward")
    env = object.__new__(reward.DigitsEnv)
    for text, expected in (("", 0.0), ("abc", 0.03), ("a" * 164, 0.64)):
        assert reward.compute_score(solution_str=text, data_source="peers") == expected
        assert reward.DigitsEnv.reward(env, None, text) == (expected, expected > 0.5)


def test_without_verl_its_case_is_left_out(
    peers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--cases", "verl"])
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.main()
    assert capsys.readouterr().out == "verl is left out: it needs verl, vLLM and Ray\n"
