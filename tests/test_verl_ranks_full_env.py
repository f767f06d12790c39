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
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl_ranks import OBJECTIVE, Case, importance_weights

from reopold_agent.config import OptimizerConfig
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train.update import Updater
from reopold_agent.types import EncodedImage, Trajectory

pytestmark = [pytest.mark.full_env, pytest.mark.timeout(300)]

pytest.importorskip("verl", reason="needs the full environment")

WORLD = 2


@pytest.fixture(scope="module")
def models(
    tokenizer: Any, vision: Any, make_model: Callable[..., Any]
) -> dict[str, torch.nn.Module]:
    """Qwen2.5-VL and Qwen3-VL with tied embeddings, and a text model whose are not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = Qwen2Config(
            vocab_size=len(tokenizer) + 5,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
        text = Qwen2ForCausalLM(config).eval()
    deep = tiny_model(tiny_config("qwen3_vl", tokenizer, {"patch_size": 14}), 1)
    return {"pictures": make_model(seed=1), "deepstack": deep, "text": text}


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
    seeing = [shown, plain[:3]]
    rows = {"pictures": seeing, "deepstack": seeing, "text": [plain[:3], plain[3:]]}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if hasattr(model.config, "vision_config"):
            vision.processor.save_pretrained(folder / name)
    lengths = [len(t.ids) for each in rows.values() for part in each for t in part]
    # Several micro-batches on each rank; single rows are longer than what is allowed.
    tokens = max(lengths) - 5
    return [Case(name, folder / name, each, tokens) for name, each in rows.items()]


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


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_export_is_a_checkpoint(
    index: int, cases: list[Case], models: dict[str, Any], results: dict[str, Any]
) -> None:
    """Made while the model has an attention that transformers does not know."""
    exported = cases[index].model.with_suffix(".saved") / "huggingface"
    kind = type(models[cases[index].name])
    loaded = kind.from_pretrained(exported, dtype=torch.float32)
    for name, value in models[cases[index].name].state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture(params=[0, 1, 2])
def case(request: pytest.FixtureRequest, cases: list[Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def policy(
    case: Case, models: dict[str, Any], make_policy: Callable[..., TransformersPolicy]
) -> TransformersPolicy:
    """The local engine's, of the case's model."""
    return make_policy(models[case.name])


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
    # Only the gradients matter: no clipping, and steps too small to change a weight.
    settings = OptimizerConfig(lr=1e-30, beta1=0.9, beta2=0.95, weight_decay=0.0, max_grad_norm=1e9)
    updater = Updater(policy, OBJECTIVE, settings, max_tokens=4096)
    rows = rows_of([t for part in case.rows for t in part])
    for row in rows:
        row.weight = importance_weights(row.trajectory)
    update_rows(updater, [rows], 0)
    named = policy.adapter.model.named_parameters()
    expected = {name: p.grad for name, p in named if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for found in results[case.name]:
        gradients = found[packed]["gradients"]
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                gradients[name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=name
            )
