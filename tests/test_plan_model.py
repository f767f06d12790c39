"""The cost model's arithmetic: against transformers, PyTorch's counter of FLOPs, and by hand."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SEEING, tiny_config, tiny_model
from running import composed, load_script
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from reopold_agent.errors import ConfigError
from reopold_agent.plan import flops
from reopold_agent.plan.hardware import GIB, Rate, Rates
from reopold_agent.plan.memory import cache_sequences, server_cache
from reopold_agent.plan.timing import (
    Server,
    StepSeconds,
    Training,
    decode_seconds,
    spread,
    step_flops,
)
from reopold_agent.plan.workload import PictureLoad, Workload, assumed_workload
from reopold_agent.policies import architecture
from reopold_agent.policies.architecture import (
    PUBLISHED,
    Architecture,
    TextShape,
    find_architecture,
    from_config,
)

WEIGHTS = Path(architecture.__file__).parents[1] / "demo" / "weights"


# Shapes


build = load_script(Path(__file__).parents[1] / "benchmarks" / "plan_memory.py").build


@pytest.mark.parametrize(
    ("path", "billions"),
    [  # of the model cards
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3.75),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29),
        ("Qwen/Qwen2.5-VL-32B-Instruct", 33.5),
        ("Qwen/Qwen3-VL-2B-Thinking", 2.127_532_032),
        ("Qwen/Qwen3-VL-4B-Instruct", 4.437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8.767_123_696),
        ("Qwen/Qwen3-VL-32B-Instruct", 33.4),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.62),
        ("Skywork/Skywork-OR1-32B-Preview", 32.8),
    ],
)
def test_parameters_of_the_published_sizes(
    path: str, billions: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape = find_architecture(path)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.004)
    with torch.device("meta"):
        model = build(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["student", "teacher", "arithmetic_student"])
def test_shapes_of_a_config_json(name: str) -> None:
    shape = find_architecture(f"demo:{name}")
    config = json.loads((WEIGHTS / name / "config.json").read_text("utf-8"))
    assert shape.source.endswith("config.json")
    kind: Any = Qwen2ForCausalLM if shape.vision is None else Qwen2_5_VLForConditionalGeneration
    model = kind.from_pretrained(WEIGHTS / name)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.image_token == config.get("image_token_id")
    assert find_architecture(str(WEIGHTS / name)).text == shape.text


def test_the_hubs_cache_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--thing" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((WEIGHTS / "student" / "config.json").read_text("utf-8"))
    assert find_architecture("someone/thing").text == find_architecture("demo:student").text
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        find_architecture("someone/thing")


def test_unknown_shapes_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"'no/such'.*config.json"):
        find_architecture("no/such")
    with pytest.raises(ConfigError, match="'hidden_size'"):
        from_config("x", {"num_attention_heads": 2}, "x/config.json")


def test_models_of_other_families_are_counted_or_refused() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"intermediate_size": 128, "vocab_size": 100, "num_key_value_heads": 2}
    llama = from_config("x", {**config, "model_type": "llama"}, "x/config.json")
    unknown = from_config("x", {**config, "model_type": "with_code_of_its_own"}, "x/config.json")
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    assert llama.parameters == 2 * 100 * 64 + 2 * layer + 64
    assert unknown.parameters == llama.parameters + 2 * (64 + 32 + 32)  # counted as Qwen2: biases
    with pytest.raises(ConfigError, match=r"'x' is a mixtral model.*\nTake one of"):
        from_config("x", {**config, "model_type": "mixtral"}, "x/config.json")
    with pytest.raises(ConfigError, match=r"cannot build the model of x/config\.json"):
        from_config("x", {**config, "model_type": "llama", "hidden_act": "none"}, "x/config.json")


@pytest.mark.parametrize(
    ("model", "parts", "what"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 3, "4 key-value heads"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8, "28 attention heads"),
        # vLLM repeats the two key-value heads.
        ("Qwen/Qwen2.5-VL-3B-Instruct", 8, "3420 units of the vision tower's feed-forward layer"),
        ("demo:student", 4, "2 attention heads"),
        ("demo:arithmetic_student", 3, "256 units of the feed-forward layer"),
    ],
)
def test_what_the_gpus_of_a_server_cannot_share(
    model: str, parts: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape = find_architecture(model)
    assert shape.undivided(parts) == what
    assert shape.undivided(1) is None
    assert (shape.undivided(2) is None) == (shape.text.heads % 2 == 0)


@pytest.mark.parametrize(("rows", "what"), [(531, None), (580, "640 rows of the embedding")])
def test_a_servers_embedding_is_filled_up_to_blocks(rows: int, what: str | None) -> None:
    """Of 64 rows: 531 become 576, which nine GPUs can share."""
    text = replace(TEXT, heads=9, kv_heads=9, mlp=9, vocab=rows)
    assert Architecture("x", text, None, "test").undivided(9) == what


def test_the_table_covers_the_recipes() -> None:
    for recipe in ("agentic", "math_1_5b", "math_7b", "geometry_3b", "geometry_7b"):
        config, _ = composed(f"recipe=paper_{recipe}")
        assert config.model.teacher is not None
        assert {config.model.student.path, config.model.teacher.path} <= PUBLISHED.keys()


# FLOPs

TEXT = TextShape(48, 3, 4, 2, 12, 80, 160, False, parameters=70_000)


def tiny_text() -> Any:
    # With eager attention, matrix products that the counter sees as they are.
    return build(Architecture("tiny", TEXT, None, "test"), "eager")


def test_forward_flops_equal_the_counters() -> None:
    length, model = 24, tiny_text()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, length, dtype=torch.long))
    # Without a causal kernel every query meets every key. The counter sees the rotary angles too.
    angles = 2 * (12 // 2) * length
    expected = (
        flops.layers_forward(TEXT, length)
        + flops.attention_forward(TEXT, length * length)
        + flops.logits_forward(TEXT, length)
    )
    assert counter.get_total_flops() == expected + angles


def test_a_backward_pass_costs_two_forwards() -> None:
    length, model = 24, tiny_text()
    ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids)
    with FlopCounterMode(display=False) as both:
        model(ids).logits.sum().backward()
    assert both.get_total_flops() == pytest.approx(3 * forward.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("kind", SEEING)
def test_vision_flops_and_parameters_equal_the_counters(kind: str, tokenizer: Any) -> None:
    more = {"fullatt_block_indexes": [1], "depth": 3} if kind == "qwen2_5_vl" else {"depth": 3}
    config = tiny_config(kind, tokenizer, vision={**more, "num_heads": 4})
    shape = from_config("tiny", config.to_dict(), "test")
    assert shape.vision is not None
    blocks = (3, 1) if kind == "qwen2_5_vl" else (3, 3)
    assert (shape.vision.depth, shape.vision.full_blocks) == blocks
    assert shape.vision.mergers == (3 if kind == "qwen3_vl" else 1)
    model = tiny_model(config, attention="eager")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    rows, columns = 16, 24  # patches: two by three whole windows of 8 x 8
    pixels = torch.zeros(rows * columns, shape.vision.patch_values)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.visual(pixels, grid_thw=torch.tensor([[1, rows, columns]]))
    expected = flops.vision_forward(shape.vision, [rows * columns / 4])
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)  # rotary angles


def test_causal_pairs_by_hand() -> None:
    assert flops.causal_pairs(4) == 1 + 2 + 3 + 4
    assert flops.causal_pairs(4, 2) == 3 + 4


def work(**changes: Any) -> Workload:
    plain = Workload(2, 3, 10, PictureLoad(), 4, 4, 0, PictureLoad(), {})
    return replace(plain, **changes)


def test_flops_of_a_step_by_hand() -> None:
    """2 prompts x 3 episodes of 10 + 4 tokens (all as long as the budget)."""
    model = Architecture("tiny", TEXT, None, "test")
    weights = 3 * (48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 80)  # q, k and v, o, MLP
    head, per_pair = 48 * 160, 4 * 3 * 4 * 12
    whole = 2 * weights * 14 + per_pair * (14 * 15 / 2)
    how = Training(checkpointing=True, lora=False, recompute_old=True)
    counted = step_flops(model, model, work(), how)
    assert counted.prompt == 2 * (2 * weights * 10 + per_pair * 55 + 2 * head)
    assert counted.decode == 6 * ((2 * weights + 2 * head) * 4 + per_pair * (11 + 12 + 13 + 14))
    assert counted.teacher == 6 * (whole + 2 * head * 14)  # a server: all tokens
    assert counted.old_logp == 6 * (whole + 2 * head * 4)  # the student's tokens only
    assert counted.update == 6 * (4 * whole + 4 * 2 * head * 4)
    assert counted.vision == 0
    padded = step_flops(model, None, work(), replace(how, padding=0.5, old_padding=0.2))
    assert padded.update == 6 * (2 * 4 * whole + 4 * 2 * head * 4)
    assert padded.old_logp == pytest.approx(6 * (whole / 0.8 + 2 * head * 4))
    own = step_flops(model, None, work(), Training(False, False, False))
    assert own.update == 6 * (3 * whole + 4 * 2 * head * 4)
    assert own.teacher == own.old_logp == 0


def test_pictures_and_observations_are_counted_where_they_are_seen() -> None:
    model = find_architecture("Qwen/Qwen2.5-VL-3B-Instruct")
    assert model.vision is not None
    how = Training(checkpointing=False, lora=False, recompute_old=True)
    blind = step_flops(model, model, work(prompt_text=100), how)
    seeing = step_flops(model, model, work(prompt_text=36, prompt_pictures=PictureLoad(1, 64)), how)
    look = flops.vision_forward(model.vision, [64])
    assert seeing.prompt - blind.prompt == pytest.approx(2 * look)  # once per group
    assert seeing.teacher - blind.teacher == pytest.approx(6 * look)
    assert seeing.update - blind.update == pytest.approx(3 * 6 * look)
    assert seeing.vision == pytest.approx((2 + 6 + 6 + 18) * look / seeing.total)
    told = step_flops(model, None, work(observation_text=5), how)
    assert told.prompt > step_flops(model, None, work(), how).prompt


# Seconds


def rates(compute: float = 1e30, bandwidth: float = 1e30, iteration: float = 0.0) -> Rates:
    made = [Rate(value, "test") for value in (compute, compute, bandwidth, iteration)]
    return Rates(*made)


def test_iterations_by_hand() -> None:
    model = Architecture("tiny", TEXT, None, "test")
    fixed = rates(iteration=1.0)
    assert decode_seconds(model, [2, 4], 7, Server(1, 2), fixed) == 4  # side by side
    assert decode_seconds(model, [2, 4], 7, Server(1, 1), fixed) == 6  # one after the other
    assert (
        decode_seconds(model, [2, 4, 3], 7, Server(1, 2), fixed) == 5
    )  # the third after the first


def test_memory_traffic_by_hand() -> None:
    """Two sequences of 2 and 4 tokens after 10: cached tokens at mid-step 22, and 13 at the end."""
    model = Architecture("tiny", TEXT, None, "test")
    per_token = 2 * 3 * 2 * 12 * 2  # key and value, layers, heads, width, bytes
    assert TEXT.kv_bytes() == per_token
    read = 4 * 2 * TEXT.parameters + per_token * (2 * 22 + 2 * 13)
    seconds = decode_seconds(model, [2, 4], 10, Server(1, 2), rates(bandwidth=1.0))
    assert seconds == pytest.approx(read)
    halved = decode_seconds(model, [2, 4], 10, Server(2, 2), rates(bandwidth=1.0))
    assert halved == pytest.approx(read / 2)


def test_many_sequences_are_bound_by_compute() -> None:
    model = Architecture("tiny", TEXT, None, "test")
    one = flops.layers_forward(TEXT, 1) + flops.logits_forward(TEXT, 1)
    expected = 50 * (one + flops.attention_forward(TEXT, 1.0)) * 2  # contexts 0 to 2, in the middle
    assert decode_seconds(model, [2] * 50, 0, Server(1, 50), rates(1.0)) == pytest.approx(expected)


def test_key_value_cache_of_a_published_size() -> None:
    shape = find_architecture("Qwen/Qwen2.5-VL-3B-Instruct")
    assert shape.text.kv_bytes() == 36 * 2 * 2 * 128 * 2 == 36864
    cache = server_cache(shape, 40 * GIB, 1)
    assert cache == 40 * GIB - 2 * shape.parameters - 2 * GIB
    assert cache_sequences(shape, cache, 1000, 1) == int(cache // 36_864_000)
    assert cache_sequences(shape, cache, 1000, 8) == int(cache // 18_432_000)  # two heads only


def test_a_separate_teacher_overlaps_with_the_rollout() -> None:
    assert StepSeconds(10, 4, 1, 2, 0.5, overlap=True).total == 13.5
    assert StepSeconds(4, 10, 1, 2, 0.5, overlap=True).total == 13.5
    both = StepSeconds(10, 4, 1, 2, 0.5, overlap=False)
    assert both.total == 17.5
    assert both.share("teacher") == 4 / 17.5


# Lengths


@pytest.mark.parametrize("mean", [1, 50, 300, 680, 999, 1000])
def test_responses_have_the_mean_and_the_budget(mean: float) -> None:
    lengths = work(response=mean, response_max=1000).responses(256)
    assert statistics.fmean(lengths) == pytest.approx(mean, rel=0.01)
    assert max(lengths) <= 1000
    assert lengths == sorted(lengths)


def test_how_many_are_cut_off() -> None:
    """An exponential of scale s is cut with probability exp(-1000 / s); s = 1249 has mean 688."""
    lengths = work(response=688.2, response_max=1000).responses(1000)
    cut = sum(length > 999 for length in lengths) / 1000
    assert cut == pytest.approx(0.449, abs=0.01)


def test_spread_keeps_every_response() -> None:
    for count in (1, 2, 7, 128, 250):
        assert sorted(spread(list(range(count)))) == list(range(count))
    mixed = spread([float(i) for i in range(128)])
    halves = statistics.fmean(mixed[:64]), statistics.fmean(mixed[64:])
    assert abs(halves[0] - halves[1]) < 8


def test_assumptions_scale_with_the_task() -> None:
    config, _ = composed("recipe=paper_math_1_5b")
    made = assumed_workload(config, None, given={})
    assert (made.response, made.prompt_pictures.total, made.observation) == (5500, 0, 0)
    config, _ = composed("recipe=paper_agentic")
    made = assumed_workload(config, 784, given={})
    assert made.prompt_pictures == PictureLoad(1, 1250)
    assert made.observation > 0
    assert assumed_workload(config, 1024, {}).prompt_pictures.tokens == 1250 * 784 / 1024
    config, _ = composed()  # the embedded task: pictures of 16 tokens
    made = assumed_workload(config, 784, given={"response": 20, "prompt": 50})
    assert made.prompt_pictures == PictureLoad(1, 16)
    assert (made.response, made.prompt_text) == (20, 50)
    assert made.sources["response"] == "given"
    with pytest.raises(ConfigError, match=r"\(0, 256\].*got 300"):
        assumed_workload(config, 784, given={"response": 300})
