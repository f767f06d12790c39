"""vLLM, and whole runs under verl with its servers, for families that no other test runs so.

A run takes two minutes, so they are not part of ``.ci/run``: ``REOPOLD_EVERY_FAMILY=1 pytest -m
full_env tests/test_families_full_env.py`` in the environment that it builds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SEEING
from families import save_checkpoint as save_seeing
from recorded import policy, trajectory
from running import run_on_ray
from test_text_checkpoints import save_checkpoint, small_tokenizer
from test_vllm_full_env import TOLERANCE, check_text, gap, pair

from reopold_agent.policies.loading import ModelSpec, load_model, load_processing
from reopold_agent.tracking.metrics import read_json_lines

pytestmark = [
    pytest.mark.full_env,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get("REOPOLD_EVERY_FAMILY"),
        reason="takes two minutes for each family; set REOPOLD_EVERY_FAMILY=1",
    ),
]

pytest.importorskip("verl", reason="needs the full environment")
pytest.importorskip("vllm", reason="needs the full environment")

STEPS, PROMPTS, SAMPLES = 2, 4, 2


def save(folder: Path, family: str, seed: int) -> None:
    if family in SEEING:
        tokenizer = load_processing(ModelSpec("demo:student"), "student").tokenizer
        save_seeing(folder, family, tokenizer, seed)
    else:
        sizes = {"hidden_size": 128, "head_dim": 32}  # vLLM's CPU build has no narrower heads
        save_checkpoint(folder, small_tokenizer(family), family, seed, 3, **sizes)


def test_qwen2_vl_in_vllm_agrees_with_transformers(tmp_path: Path) -> None:
    for seed, role in enumerate(("student", "teacher")):
        save(tmp_path / role, "qwen2_vl", seed)
    paths = [f"model.{role}.path={tmp_path / role}" for role in ("student", "teacher")]
    with pair("env=pixel_reasoner", "policy=vllm", *paths) as seeing:
        for role, own in (("teacher", seeing.teacher), ("student", seeing.roles.trainer)):
            played = seeing.play(seeing.vllm(role), 24)
            assert all(t.images for t in played)
            reference = own.score(played)
            assert gap(played, reference) < TOLERANCE
            assert gap(seeing.vllm(role).score(played), reference) < TOLERANCE


def test_qwen3_and_mistral_in_vllm_agree_with_transformers(tmp_path: Path) -> None:
    check_text("qwen3", "mistral", tmp_path)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3", "llama", "mistral"])
def test_a_run_under_verl(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for seed, role in enumerate(("student", "teacher")):
        save(tmp_path / role, family, seed)
    env = "pixel_reasoner" if family in SEEING else "math"
    command = [
        *(sys.executable, "-m", "reopold_agent.train", f"env={env}", "engine=verl"),
        *(f"model.{role}.path={tmp_path / role}" for role in ("student", "teacher")),
        *("engine.device=cpu", "engine.gpus_per_node=2", "engine.teacher_gpus_per_node=1"),
        *("engine.packed=true", "engine.rollout_workers=1", f"steps={STEPS}"),
        *(f"batch.prompts={PROMPTS}", f"batch.samples={SAMPLES}", f"batch.mini_batch={PROMPTS}"),
        *("rollout.max_turn_tokens=24", "rollout.max_response_tokens=64", "optimizer.lr=0.001"),
        *("evaluation.tasks=2", "evaluation.every=0", "logging.trajectories=100"),
        f"hydra.run.dir={folder}",
    ]
    run_on_ray(command, 800)

    rows = [r for r in read_json_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert row["rollout/dropped"] == 0
        assert row["sync/logp_gap_max"] < 1e-3  # the servers have the update's weights
        assert row["grad_norm"] > 0
    records = read_json_lines(folder / "trajectories.jsonl")
    assert len(records) == STEPS * PROMPTS * SAMPLES
    teacher = load_model(ModelSpec(str(tmp_path / "teacher")), "teacher", torch.device("cpu"))
    batch = [trajectory(record, folder, teacher) for record in records]
    for t, score in zip(batch, policy(teacher).score(batch), strict=True):
        np.testing.assert_allclose(t.teacher_logp, score.logp, atol=2e-4)
    trained = load_model(ModelSpec(str(folder)), "student", torch.device("cpu"))  # final/
    begun = load_model(ModelSpec(str(tmp_path / "student")), "student", torch.device("cpu"))
    before = begun.adapter.model.state_dict()
    after = trained.adapter.model.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
