"""``policy=vllm`` without vLLM: requests to the engine, checks of its answers, and
its failures. The engine is `vllm_fake.FakeEngine`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from vllm_fake import FakeEngine, fake_vllm

from reopold_agent.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    ModelServerError,
    NonFiniteError,
    ServerStalledError,
)
from reopold_agent.policies.lora import merged_weights
from reopold_agent.policies.vllm.engine import VllmEngine, make_engine
from reopold_agent.policies.vllm.policy import VllmPolicy
from reopold_agent.policies.vllm.requests import prompt_of
from reopold_agent.policies.vllm.settings import VllmSettings, engine_arguments, start_environment
from reopold_agent.policies.vllm.sync import written_weights
from reopold_agent.policies.vllm.worker import WorkerExtension
from reopold_agent.types import Completion, Request, Sampling

STOP = 2


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_vllm().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def start(chat: Any) -> Iterator[Callable[..., tuple[VllmPolicy, FakeEngine]]]:
    """``start(fault=..., **settings)``: a policy over a fake engine."""
    engines: list[tuple[VllmPolicy, FakeEngine]] = []

    def make(
        fault: Callable[[int, Mapping[str, Any]], str | None] = lambda number, prompt: None,
        **settings: Any,
    ) -> tuple[VllmPolicy, FakeEngine]:
        chosen = VllmSettings(**{"seconds": 5.0, **settings})
        fake = FakeEngine(chat.image_id, STOP, fault)
        engine = VllmEngine("student", {}, chosen, make=lambda arguments: fake)
        policy = VllmPolicy(
            engine,
            chosen,
            allowed_ids=len(chat.tokenizer),
            forbidden_ids=chat.forbidden_ids,
            stop_ids=[STOP],
            image_token_id=chat.image_id,
        )
        engines.append((policy, fake))
        return policy, fake

    yield make
    for policy, fake in engines:
        fake.released.set()
        policy.close()
        assert fake.calls[-1][0] == "shutdown"


def request(key: int, seed: int = 0, length: int = 5, most: int = 6) -> Request:
    return Request(key, [30 + key] * length, [], most, (seed, key))


def drain(generator: Any, limit: float = 10.0) -> list[Completion]:
    deadline = time.monotonic() + limit
    completions = []
    while generator.in_flight:
        assert time.monotonic() < deadline, "the generator hangs"
        completions += generator.step()
    return completions


# Prompts


def test_one_placeholder_per_picture_is_sent(
    encode: Any, random_trajectory: Any, chat: Any
) -> None:
    images = [encode(0), encode(1, 84, 28), encode(2, 28, 28)]
    trajectory = random_trajectory(3, images)
    prompt = prompt_of(trajectory.ids, images, chat.image_id)
    assert prompt["prompt_token_ids"].count(chat.image_id) == 3
    for picture, image in zip(prompt["multi_modal_data"]["image"], images, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), image.pixels)
    assert FakeEngine(chat.image_id)._expanded(prompt) == trajectory.ids.tolist()


def test_pictures_and_placeholders_must_match(
    encode: Any, random_trajectory: Any, chat: Any
) -> None:
    image = encode(0)
    ids = random_trajectory(3, [image]).ids.tolist()
    place = ids.index(chat.image_id)
    for wrong, images in (
        (ids[:place] + ids[place + 1 :], [image]),
        ([*ids, chat.image_id], [image]),
        (ids, [image, image]),
        (ids, []),
    ):
        with pytest.raises(ModelError, match="placeholder"):
            prompt_of(wrong, images, chat.image_id)
    with pytest.raises(ModelError, match="takes no pictures"):
        prompt_of(ids, [image], None)


# Generation


def test_turns_come_back_under_their_keys_and_depend_on_their_own_seed(start: Any) -> None:
    policy, _ = start()

    def play(seed: int, keys: range) -> dict[int, Completion]:
        generator = policy.generator(Sampling())
        generator.submit([request(key, seed) for key in keys])
        assert generator.in_flight == len(keys)
        return {completion.key: completion for completion in drain(generator)}

    first, again, other = play(0, range(6)), play(0, range(3)), play(1, range(6))
    assert sorted(first) == list(range(6))
    for key, completion in again.items():
        assert completion == first[key]
    assert any(other[key].ids != first[key].ids for key in first)
    for completion in first.values():
        assert len(completion.ids) == len(completion.logp) == len(completion.entropy)
        stopped = completion.ids[-1] == STOP
        assert completion.finish == ("stop" if stopped else "length")
    assert {c.finish for c in first.values()} == {"stop", "length"}


def test_a_key_has_one_turn_in_flight(start: Any) -> None:
    policy, _ = start(lambda number, prompt: "slow")
    generator = policy.generator(Sampling())
    generator.submit([request(0)])
    with pytest.raises(ValueError, match="in flight"):
        generator.submit([request(0)])


def test_a_released_turn_is_taken_back(start: Any) -> None:
    policy, fake = start(lambda number, prompt: "slow")
    generator = policy.generator(Sampling())
    generator.submit([request(0)])
    generator.release(0)
    assert generator.in_flight == 0
    policy.rpc("anything", what="waiting for the engine")
    assert len(fake.aborted) == 1


@pytest.mark.parametrize("fault", ["abort", "refuse"])
def test_a_failed_turn_is_tried_again(start: Any, fault: str) -> None:
    policy, _ = start(lambda number, prompt: fault if number == 1 else None)
    generator = policy.generator(Sampling())
    generator.submit([request(key) for key in range(3)])
    completions = {completion.key: completion for completion in drain(generator)}
    assert all(completions[key].error is None for key in range(3))
    sound = start()[0].generator(Sampling())
    sound.submit([request(1)])
    assert drain(sound) == [completions[1]], "the second attempt samples what the first would have"


@pytest.mark.parametrize("fault", ["abort", "refuse"])
def test_a_turn_that_keeps_failing_is_given_up_alone(start: Any, fault: str) -> None:
    policy, _ = start(
        lambda number, prompt: fault if prompt["prompt_token_ids"][0] == 31 else None,
        retries=2,
    )
    generator = policy.generator(Sampling())
    generator.submit([request(key) for key in range(3)])
    completions = {completion.key: completion for completion in drain(generator)}
    assert [completions[key].error is None for key in range(3)] == [True, False, True]
    assert completions[1].ids == ()
    expected = {"abort": "abort", "refuse": "too long"}
    assert expected[fault] in str(completions[1].error)


def test_an_engine_that_works_may_take_any_time(start: Any, random_trajectory: Any) -> None:
    policy, fake = start(lambda number, prompt: "slow", seconds=0.1)
    generator = policy.generator(Sampling())
    generator.submit([request(0)])
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        assert generator.step() == []
    assert not fake.aborted


def test_an_engine_that_stops_ends_the_run(start: Any, random_trajectory: Any) -> None:
    """Leaving out its turns would leave out the longest."""
    policy, _ = start(
        lambda number, prompt: "hang" if prompt["prompt_token_ids"][0] == 31 else None, seconds=0.2
    )
    generator = policy.generator(Sampling())
    generator.submit([request(key) for key in range(3)])
    with pytest.raises(ServerStalledError, match=r"no token for 0\.2 s\.\n.*policy\.\w+\.seconds"):
        drain(generator)
    with pytest.raises(ServerStalledError, match=r"no token for 0\.2 s"):
        policy.score([random_trajectory(0)])


@pytest.mark.parametrize("fault", ["ids", "short"])
def test_an_answer_about_other_ids_stops_the_run(start: Any, fault: str) -> None:
    policy, _ = start(lambda number, prompt: fault)
    generator = policy.generator(Sampling())
    generator.submit([request(0)])
    with pytest.raises(ModelError, match="instead of"):
        drain(generator)


def test_an_engine_that_dies_is_reported_and_not_retried(
    start: Any, random_trajectory: Any
) -> None:
    policy, _ = start(lambda number, prompt: "die")
    generator = policy.generator(Sampling())
    generator.submit([request(0)])
    with pytest.raises(ModelServerError, match=r"EngineDeadError.*last checkpoint"):
        drain(generator)
    with pytest.raises(ModelServerError, match="EngineDeadError"):
        policy.score([random_trajectory(0)])
    with pytest.raises(ModelServerError, match="EngineDeadError"):
        policy.rpc("load_file", "x", what="loading weights")


def test_an_engine_that_does_not_start_is_reported() -> None:
    def broken(arguments: Mapping[str, Any]) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(ModelError, match=r"teacher's vLLM engine did not start.*out of memory"):
        VllmEngine("teacher", {}, VllmSettings(), make=broken)
    fake = FakeEngine()

    def slow(arguments: Mapping[str, Any]) -> FakeEngine:
        time.sleep(0.5)
        return fake

    with pytest.raises(ModelError, match=r"within 0\.1 s"):
        VllmEngine("teacher", {}, VllmSettings(start_seconds=0.1), make=slow)
    deadline = time.monotonic() + 5
    while not fake.calls:
        assert time.monotonic() < deadline, "an engine that started too late runs on"
        time.sleep(0.01)
    assert fake.calls == [("shutdown", ())]


def test_vllm_is_named_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e \"\.\[vllm\]\""):
        make_engine({})


# Scoring


def test_scores_are_aligned_with_the_ids(start: Any, encode: Any, random_trajectory: Any) -> None:
    policy, _ = start()
    trajectories = [random_trajectory(seed, [encode(seed), encode(7)]) for seed in range(5)]
    for trajectory, score in zip(trajectories, policy.score(trajectories), strict=True):
        place = np.arange(len(trajectory.ids))
        # The fake engine gives token i the log-prob -(i + 1).
        expected = np.where(trajectory.loss_mask, -(place + 1.0), 0.0)
        np.testing.assert_array_equal(score.logp, expected.astype(np.float32))
        assert not score.entropy.any()
    with pytest.raises(ValueError, match="no entropies"):
        policy.score(trajectories, with_entropy=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ids", "instead of"),
        ("short", "instead of"),
        ("infinite", "not finite"),
    ],
)
def test_scores_of_other_ids_are_refused(
    start: Any, random_trajectory: Any, fault: str, message: str
) -> None:
    policy, _ = start(lambda number, prompt: fault)
    kind = NonFiniteError if fault == "infinite" else ModelError
    with pytest.raises(kind, match=message):
        policy.score([random_trajectory(0)])


@pytest.mark.parametrize("fault", ["abort", "refuse"])
def test_scoring_is_tried_again_and_then_fails(
    start: Any, random_trajectory: Any, fault: str
) -> None:
    policy, _ = start(lambda number, prompt: fault if number == 0 else None)
    sound, _ = start()
    trajectory = random_trajectory(0)
    np.testing.assert_array_equal(
        policy.score([trajectory])[0].logp, sound.score([trajectory])[0].logp
    )
    policy, _ = start(lambda number, prompt: fault)
    with pytest.raises(ModelServerError, match="failed 2 times"):
        policy.score([trajectory])


# Weights and ids in the worker


def test_sync_sends_all_weights_and_forgets_the_old_ones(start: Any, model: Any) -> None:
    policy, fake = start(bucket_mib=1)
    sent: dict[str, torch.Tensor] = {}
    answer = fake.collective_rpc

    def receive(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "load_file":
            with safe_open(args[0], framework="pt") as tensors:
                sent.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
        return answer(method, args)

    fake.collective_rpc = receive
    policy.sync(model)
    parameters = dict(model.named_parameters())
    assert sent.keys() == parameters.keys()
    assert all(torch.equal(sent[name], value) for name, value in parameters.items())
    methods = [method for method, _ in fake.calls]
    last = len(methods) - 1 - methods[::-1].index("load_file")
    assert methods[last + 1 :] == ["reset_prefix_cache", "reset_encoder_cache"]
    assert not os.path.exists(fake.calls[last][1][0]), "the file is removed"


def test_buckets_are_bounded(model: Any) -> None:
    whole = sum(value.nbytes for value in model.parameters())
    largest = max(value.nbytes for value in model.parameters())
    sizes = [os.path.getsize(path) for path in written_weights(model, torch.float32, whole // 5)]
    assert len(sizes) >= 4
    assert max(sizes) <= max(largest, whole // 5) + 20_000  # and the file's header
    halved = [os.path.getsize(p) for p in written_weights(model, torch.bfloat16, whole)]
    assert sum(halved) < 0.6 * sum(sizes)


def test_lora_is_merged_as_peft_does_and_the_trainer_is_left_alone(make_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    wrapped: Any = get_peft_model(make_model(seed=3), settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: value.clone() for name, value in wrapped.named_parameters()}
    merged = {name: value.detach().clone() for name, value in merged_weights(wrapped)}
    after = dict(wrapped.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    expected = dict(wrapped.merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value.detach())
    plain = dict(make_model(seed=3).named_parameters())
    moved = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert moved
    assert all("q_proj" in name or "down_proj" in name for name in moved)


def test_the_worker_masks_ids_and_loads_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    class LogitsProcessor(nn.Module):
        def forward(self, head: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits_processor = LogitsProcessor()
            self.loaded: dict[str, torch.Tensor] = {}

        def load_weights(self, weights: Any) -> None:
            self.loaded.update(weights)

    operations = SimpleNamespace(_supports_onednn=True)
    for name, module in {
        "vllm": SimpleNamespace(_custom_ops=operations),
        "vllm._custom_ops": operations,
        "vllm.model_executor.layers.logits_processor": SimpleNamespace(
            LogitsProcessor=LogitsProcessor
        ),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    worker = WorkerExtension()
    assert operations._supports_onednn is False
    model = Model()
    worker.model_runner = SimpleNamespace(model=model)
    assert worker.mask_ids(6, [1, 3]) == 1
    logits = model.logits_processor(None, torch.zeros(2, 8))
    assert torch.isinf(logits).tolist() == [[i in (1, 3, 6, 7) for i in range(8)]] * 2
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert worker.load_file(str(tmp_path / "w.safetensors")) == 2
    assert torch.equal(model.loaded["a"], torch.ones(2))


def test_a_model_whose_logits_cannot_be_masked_is_refused(chat: Any) -> None:
    fake = FakeEngine()
    fake.collective_rpc = lambda method, args=(): [0]  # type: ignore[method-assign]
    engine = VllmEngine("student", {}, VllmSettings(), make=lambda arguments: fake)
    with pytest.raises(ModelError, match="masked"):
        VllmPolicy(
            engine,
            VllmSettings(),
            allowed_ids=9,
            forbidden_ids=(),
            stop_ids=[2],
            image_token_id=None,
        )
    engine.close()


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel_size": 0},
        {"score_chunk": 0},
        {"retries": -1},
        {"seconds": 0.0},
        {"dtype": "int8"},
        {"gpu_memory_utilization": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        VllmSettings(**wrong)


def test_engine_arguments() -> None:
    settings = VllmSettings(score_chunk=300, engine={"block_size": 16})
    facts: dict[str, Any] = {"path": "here", "revision": None, "dtype": "float32", "longest": 4096}
    arguments = engine_arguments(settings, **facts, has_vision=True, max_pixels=784_000, seed=3)
    assert arguments["model"] == "here"
    assert arguments["block_size"] == 16
    # Pictures have their final size, and the engine is no larger than these need.
    assert arguments["mm_processor_kwargs"] == {"do_resize": False, "max_pixels": 784_000}
    assert arguments["limit_mm_per_prompt"] == {"image": 16, "video": 0}
    assert arguments["seed"] == 3
    assert arguments["generation_config"] == "vllm"
    # On a CPU a seeded prompt cannot be read in parts.
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"] == 4096
    settings = VllmSettings(seed=5)
    text = engine_arguments(settings, **facts, has_vision=False, max_pixels=None, seed=3)
    assert "limit_mm_per_prompt" not in text
    assert text["seed"] == 5
    served = engine_arguments(settings, **facts, has_vision=True, max_pixels=None, seed=3)
    assert served["mm_processor_kwargs"] == {"do_resize": False}


def test_requests_have_seeds_on_a_cpu_only_unless_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for there, given, seeded in (
        (False, None, True),
        (True, None, False),
        (True, True, True),
        (False, False, False),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert VllmSettings(seeded_requests=given).seeds is seeded


@pytest.mark.parametrize("seeded", [True, False])
def test_all_requests_of_an_engine_have_seeds_or_none_has(
    start: Any, random_trajectory: Any, seeded: bool
) -> None:
    policy, fake = start(seeded_requests=seeded)
    seeds = []
    add = fake.add_request

    def noted(name: str, prompt: Any, parameters: Any) -> str:
        seeds.append(parameters.seed)
        return str(add(name, prompt, parameters))

    fake.add_request = noted
    generator = policy.generator(Sampling())
    generator.submit([request(0), request(1)])
    drain(generator)
    policy.score([random_trajectory(1, [])])
    assert [seed is not None for seed in seeds] == [seeded] * 3


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with start_environment(VllmSettings(gpus="1")):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        assert os.environ["OMP_NUM_THREADS"] == "7", "what the user set stays"
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert dict(os.environ) == before
