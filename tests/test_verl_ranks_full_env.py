"""verl's FSDP engine on two ranks of this CPU, without Ray and servers: against the local engine.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``.
"""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_config, tiny_model
from running import environment
from step_rows import rows_of, update_rows
from test_packed import tiny
from verl_ranks import EPS, OBJECTIVE, RATE, SEED, Case, importance_weights

from reopold_agent.config import OptimizerConfig
from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.update import Updater
from reopold_agent.train.verl.checkpoints import ADAPTER
from reopold_agent.types import EncodedImage, Trajectory

pytestmark = [pytest.mark.full_env, pytest.mark.timeout(300)]

pytest.importorskip("verl", reason="needs the full environment")

WORLD = 2
TEXT = ("qwen2", "qwen3", "llama", "mistral")
PLAIN = ("qwen2_5_vl", "qwen3_vl", "qwen2_vl", *TEXT)
ADAPTED = ("qwen2_5_vl, LoRA", "qwen2, LoRA")


@pytest.fixture(scope="module")
def models(
    tokenizer: Any, vision: Any, make_model: Callable[..., Any]
) -> dict[str, torch.nn.Module]:
    """One of each family that verl knows; the text models' embeddings are not tied."""
    seeing = {
        kind: tiny_model(tiny_config(kind, tokenizer, {"patch_size": 14}), 1)
        for kind in ("qwen3_vl", "qwen2_vl")
    }
    text = {kind: tiny(kind, make_model, tokenizer, 3) for kind in TEXT}
    return {"qwen2_5_vl": make_model(seed=1), **seeing, **text}


@pytest.fixture(scope="module")
def cases(
    models: dict[str, Any],
    tokenizer: Any,
    vision: Any,
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., EncodedImage],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Case]:
    """Rows with several pictures, with one and with none; the second rank has none at all."""
    folder = tmp_path_factory.mktemp("models")
    shown = [
        random_trajectory(1, [encode(1), encode(2, 84, 56), encode(3)], turns=3),
        random_trajectory(2),
        random_trajectory(3, [encode(4)]),
    ]
    plain = [random_trajectory(seed, turns=1 + seed % 3, turn_tokens=20) for seed in range(4, 10)]
    rows = {name: [plain[:3], plain[3:]] if name in TEXT else [shown, plain[:3]] for name in models}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if hasattr(model.config, "vision_config"):
            vision.processor.save_pretrained(folder / name)
    lengths = [len(t.ids) for each in rows.values() for part in each for t in part]
    # Several micro-batches on each rank; single rows are longer than what is allowed.
    tokens = max(lengths) - 5
    made = [Case(name, folder / name, each, tokens) for name, each in rows.items()]
    return made + [
        Case(f"{name}, LoRA", folder / name, rows[name], tokens, lora, dtype)
        for name, lora, dtype in (
            # Also in the vision tower's merger, which is outside of all layers.
            ("qwen2_5_vl", {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}, "bfloat16"),
            ("qwen2", {"r": 3, "target_modules": ["q_proj", "down_proj"]}, "float32"),
        )
    ]


@pytest.fixture(scope="module")
def results(
    cases: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[bool, dict[str, Any]]]]:
    """By case, each rank's: log-probs, entropies and gradients, padded and packed."""
    folder = tmp_path_factory.mktemp("ranks")
    job = folder / "job.pickle"
    job.write_bytes(pickle.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("verl_ranks.py")
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    ranks = []
    for rank, log in enumerate(logs):
        words = [sys.executable, str(script), *map(str, (rank, WORLD, port, job, folder))]
        with log.open("wb") as stream:
            process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment())
        ranks.append(process)
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * WORLD, "\n".join(log.read_text()[-3000:] for log in logs)
    return {
        case.name: [
            torch.load(folder / f"{case.name}-{rank}.pt", weights_only=False)
            for rank in range(WORLD)
        ]
        for case in cases
    }


def named(cases: list[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


@pytest.mark.parametrize("name", PLAIN)
def test_the_export_is_a_checkpoint(
    name: str, cases: list[Case], models: dict[str, Any], results: dict[str, Any]
) -> None:
    """Made while the model has an attention that transformers does not know."""
    exported = named(cases, name).saved / "huggingface"
    loaded = type(models[name]).from_pretrained(exported, dtype=torch.float32)
    for key, value in models[name].state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0, msg=key)


def adapted(case: Case, saved: Path | None) -> Any:
    """The local engine's student with an adapter, in float32; a new adapter without ``saved``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        spec = ModelSpec(str(case.model), lora=case.lora, dtype=case.dtype)
        model = load_model(spec, "student", torch.device("cpu"), saved=saved).adapter.model
    return model.float().eval()


@pytest.fixture(params=ADAPTED)
def adapter(request: pytest.FixtureRequest, cases: list[Case]) -> Case:
    return named(cases, request.param)


def test_the_first_update_of_an_adapter_is_the_local_engines(
    adapter: Case, make_policy: Callable[..., TransformersPolicy], results: dict[str, Any]
) -> None:
    """With its random start, which the run's seed decides."""
    model = adapted(adapter, None)
    start = {name: value.clone() for name, value in model.named_parameters()}
    made_update(make_policy(model), adapter, RATE)
    saved = dict(adapted(adapter, adapter.saved / ADAPTER).named_parameters())
    moved = set()
    for name, value in model.named_parameters():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-4, msg=name)
        if not torch.equal(value, start[name]):
            moved.add(name)
    assert moved == {name for name in start if "lora_B" in name}


def test_servers_get_the_merged_weights(
    adapter: Case, make_policy: Callable[..., TransformersPolicy], results: dict[str, Any]
) -> None:
    merged = adapted(adapter, adapter.saved / ADAPTER).merge_and_unload()
    expected = dict(merged.named_parameters())
    for rank, found in enumerate(results[adapter.name]):
        assert found["sent"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found["sent"][name].float(), value, atol=1e-6, rtol=0, msg=name
            )
        merged.load_state_dict(found["sent"], strict=False)
        for t, score, theirs in zip(
            adapter.rows[rank],
            make_policy(merged).score(adapter.rows[rank]),
            found[True]["log_probs"],
            strict=True,
        ):
            np.testing.assert_allclose(np.roll(theirs.numpy(), 1), score.logp, atol=1e-5)
            assert t.loss_mask.any()


def test_a_checkpoint_holds_the_adapter_only_and_brings_it_back(
    adapter: Case, results: dict[str, Any]
) -> None:
    for rank, found in enumerate(results[adapter.name]):
        file = adapter.saved / f"model_world_size_{WORLD}_rank_{rank}.pt"
        kept = torch.load(file, weights_only=False)
        assert kept
        assert all("lora_" in name for name in kept)
        for again, before in zip(found["loaded"], found[True]["log_probs"], strict=True):
            torch.testing.assert_close(again, before, rtol=0, atol=0)
    assert not list((adapter.saved / "huggingface").glob("*.safetensors"))


@pytest.fixture(params=[*PLAIN, *ADAPTED])
def case(request: pytest.FixtureRequest, cases: list[Case]) -> Case:
    return named(cases, request.param)


@pytest.fixture
def policy(
    case: Case,
    models: dict[str, Any],
    results: dict[str, Any],
    make_policy: Callable[..., TransformersPolicy],
) -> TransformersPolicy:
    """The local engine's, of the case's model."""
    own = case.lora is None
    return make_policy(models[case.name] if own else adapted(case, case.saved / ADAPTER))


def made_update(policy: TransformersPolicy, case: Case, lr: float) -> dict[str, torch.Tensor]:
    """Makes one update of the local engine on the rows of all ranks; returns its gradients.

    Without clipping.
    """
    settings = OptimizerConfig(lr=lr, weight_decay=0.0, max_grad_norm=1e9, eps=EPS)
    updater = Updater(policy, OBJECTIVE, settings, max_tokens=4096)
    rows = rows_of([t for part in case.rows for t in part])
    for row in rows:
        row.weight = importance_weights(row.trajectory)
    gradients: dict[str, torch.Tensor] = {}

    def remember(*_: Any) -> None:
        named = policy.adapter.model.named_parameters()
        gradients.update((name, p.grad) for name, p in named if p.grad is not None)

    updater.optimizer.register_step_pre_hook(remember)
    update_rows(updater, [rows], 0)
    return gradients


@pytest.mark.parametrize("packed", [False, True])
def test_scores_are_the_local_engines(
    packed: bool, case: Case, policy: TransformersPolicy, results: dict[str, Any]
) -> None:
    for rank, found in enumerate(results[case.name]):
        own = policy.score(case.rows[rank], with_entropy=True)
        for place, (t, score) in enumerate(zip(case.rows[rank], own, strict=True)):
            # verl's alignment: entry i belongs to token i + 1.
            for name, expected in (("log_probs", score.logp), ("entropy", score.entropy)):
                theirs = np.roll(found[packed][name][place].numpy(), 1)
                np.testing.assert_allclose(theirs, expected, atol=1e-5, err_msg=f"{name} {rank}")
            assert not found[packed]["log_probs"][place][np.roll(~t.loss_mask, -1)].any()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_local_engines(
    packed: bool, case: Case, policy: TransformersPolicy, results: dict[str, Any]
) -> None:
    expected = made_update(policy, case, 1e-30)  # only the gradients matter, not the step
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for found in results[case.name]:
        gradients = found[packed]["gradients"]
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                gradients[name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=name
            )
