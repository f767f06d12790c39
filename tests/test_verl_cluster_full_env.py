"""Two Ray nodes (raylets on loopback), a rollout worker that is killed in a step, and SIGTERM.

Mathematics with GRPO: no teacher, so outcomes and groups go through verl as well. Episodes are
generated ahead of the update, on GPUs that only generate. Needs the environment that ``.ci/run``
builds: ``pytest -m full_env``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import policy, trajectory

from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.tracking.metrics import read_json_lines

pytestmark = [pytest.mark.full_env, pytest.mark.timeout(1800)]

pytest.importorskip("verl", reason="needs the full environment")
psutil = pytest.importorskip("psutil", reason="comes with verl")

PROMPTS, SAMPLES = 4, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with two pretended GPUs each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 32, "num_gpus": 2, "object_store_memory": 2**30}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.add_node(**node)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def train_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    rows = read_json_lines(path) if path.is_file() else []
    return [row for row in rows if row["kind"] == "train"]


def rollout_workers() -> list[Any]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith("ray::RolloutWorker")
    ]


def test_a_killed_rollout_worker_loses_nothing_and_sigterm_saves(
    cluster: Any, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "run.log"
    command = [
        *(sys.executable, "-m", "reopold_agent.train", "env=math", "objective=grpo"),
        *("engine=verl", "engine.device=cpu", f"engine.ray_address={cluster.address}"),
        *("engine.nodes=2", "engine.gpus_per_node=2", "engine.rollout_gpus_per_node=1"),
        *("engine.ahead=1", "model.teacher=null", "optimizer.lr=0.001"),
        *("engine.rollout_workers=2", "steps=100", f"batch.prompts={PROMPTS}"),
        *(f"batch.samples={SAMPLES}", f"batch.mini_batch={PROMPTS}", "evaluation.teacher=false"),
        *("evaluation.tasks=4", "evaluation.every=0", "logging.trajectories=100"),
        f"hydra.run.dir={folder}",
    ]
    with log.open("wb") as stream:
        run = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        victim = None
        while run.poll() is None and victim is None:
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            path = folder / "metrics.jsonl"
            rows = read_json_lines(path) if path.is_file() else []
            if sum(row["kind"] == "eval" for row in rows) >= 2:  # the first step has begun
                playing = [p for p in rollout_workers() if "play" in p.info["cmdline"][0]]
                victim = (playing or rollout_workers())[0]
                victim.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        assert victim is not None, log.read_text()[-4000:]
        while run.poll() is None and not train_rows(folder):
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.02)
        run.terminate()  # in the second step
        assert run.wait(timeout=900) == 143, log.read_text()[-4000:]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    rows = train_rows(folder)
    steps = len(rows)  # the signal is seen within a second, and steps are short
    assert [row["step"] for row in rows] == list(range(steps))
    assert 1 <= steps < 20
    saved = folder / "checkpoints" / f"global_step_{steps}"
    words = log.read_text()[-2000:]
    assert f"Stopped after step {steps}; saved {saved}.\nContinue with:\n" in words
    tracker = saved.with_name("latest_checkpointed_iteration.txt")
    assert tracker.read_text() == str(steps)
    for kind in ("model", "optim", "extra_state"):
        assert len(list((saved / "actor").glob(f"{kind}_world_size_2_rank_*.pt"))) == 2
    assert (saved / "actor" / "huggingface" / "model.safetensors").is_file()
    assert not (folder / ".stop").exists()
    assert all(row["rollout/episodes"] == PROMPTS * SAMPLES for row in rows)
    assert all(row["rollout/dropped"] == 0 for row in rows)
    records = read_json_lines(folder / "trajectories.jsonl")
    episodes = [(r["step"], r["index"], r["sample"]) for r in records]
    assert len(set(episodes)) == len(episodes) == steps * PROMPTS * SAMPLES
    # Episodes have the weights of the step before.
    assert [row["rollout/staleness"] for row in rows] == [min(step, 1) for step in range(steps)]
    assert [row["sync/logp_gap_max"] < 1e-3 for row in rows] == [step == 0 for step in range(steps)]
    base = load_model(ModelSpec("demo:arithmetic_student"), "student", torch.device("cpu"))
    early = [r for r in records if r["step"] < 2]  # generated before the first update
    played = [trajectory(record, folder, base) for record in early]
    for t, score in zip(played, policy(base).score(played), strict=True):
        np.testing.assert_allclose(t.logp, score.logp, atol=1e-3)
