"""The distributed engine with verl, Ray, FSDP and vLLM servers on this CPU.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``. A run takes minutes, most of
them for starting some fifteen processes, so one run with two ranks serves several tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import policy, trajectory
from step_rows import update_rows

from reopold_agent.config import OptimizerConfig
from reopold_agent.objectives import Needs, Reopold
from reopold_agent.objectives.pieces import importance_weight
from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.tracking.metrics import read_json_lines
from reopold_agent.train.rows import Row
from reopold_agent.train.update import Updater

pytestmark = [pytest.mark.full_env, pytest.mark.timeout(1800)]

pytest.importorskip("verl", reason="needs the full environment")
pytest.importorskip("vllm", reason="needs the full environment")

STEPS, PROMPTS, SAMPLES = 3, 4, 2
COMMAND = [
    *(sys.executable, "-m", "reopold_agent.train", "env=pixel_reasoner", "engine=verl"),
    *("engine.device=cpu", "engine.gpus_per_node=3", "engine.teacher_gpus_per_node=1"),
    *("engine.packed=true", "engine.rollout_workers=1", f"steps={STEPS}"),
    f"batch.prompts={PROMPTS}",
    *(f"batch.samples={SAMPLES}", f"batch.mini_batch={PROMPTS}", "objective.switch_step=1"),
    *("checkpoint.every=1", "checkpoint.keep=10", "logging.trajectories=100"),
    *("evaluation.tasks=4", "evaluation.every=0", "evaluation.teacher=true"),
]


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, *more, f"hydra.run.dir={folder}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def rows_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [r for r in read_json_lines(path) if r["kind"] == kind] if path.is_file() else []


def said(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text()


def wait(process: subprocess.Popen[bytes], folder: Path, until: Any, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert process.poll() is None, said(folder)[-4000:]
        assert time.monotonic() < deadline, said(folder)[-4000:]
        time.sleep(0.5)


def stop_ray() -> None:
    """Nothing of a killed run may stay: its processes live in sessions of their own."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"]
    subprocess.run(command, check=False, capture_output=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that is killed with kill -9 after its second step and started again."""
    folder = tmp_path_factory.mktemp("verl") / "run"
    first = start(folder)
    try:
        wait(
            first,
            folder,
            lambda: (
                (folder / "checkpoints/latest_checkpointed_iteration.txt").is_file()
                and len(rows_of(folder, "train")) >= 2
            ),
        )
        before = rows_of(folder, "train")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        stop_ray()
        second = start(folder)
        assert second.wait(timeout=900) == 0, said(folder)[-4000:]
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
        stop_ray()
    return folder, before


def test_resumes_after_kill_and_uses_every_draw_once(run: Any) -> None:
    folder, before = run
    after = rows_of(folder, "train")
    assert [row["step"] for row in after] == list(range(STEPS))
    assert after[0] == before[0]  # steps before the checkpoint were not done again
    seen = [
        (r["step"], r["index"], r["sample"]) for r in read_json_lines(folder / "trajectories.jsonl")
    ]
    assert len(set(seen)) == len(seen) == STEPS * PROMPTS * SAMPLES
    assert "continuing" in said(folder)


def test_rows_files_and_phases_are_those_of_the_local_engine(run: Any) -> None:
    folder, _ = run
    rows = rows_of(folder, "train")
    assert [row["phase"] for row in rows] == ["exploration", "refinement", "refinement"]
    for row in rows:
        assert row["rollout/dropped"] == 0
        assert row["rollout/tool_rate"] > 0, "the student's tools ran"
        assert np.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        # Server and trainer agree on the samples, after every synchronisation of the weights.
        assert row["sync/logp_gap_max"] < 1e-3
        assert row["importance/mean"] == pytest.approx(1, abs=1e-4)
        assert row["importance/capped_share"] == 0
        assert row["perf/padding_share"] == 0, "rows are packed"
    assert rows[0]["mask/kept_share"] == pytest.approx(rows[0]["mask/exploration_share"])
    assert rows[1]["mask/kept_share"] == pytest.approx(rows[1]["mask/refinement_share"])
    summary = json.loads((folder / "summary.json").read_text())
    assert {summary[who]["n"] for who in ("before", "teacher", "after")} == {4}
    assert (folder / "plots").is_dir()
    load_model(ModelSpec(str(folder)), "student", torch.device("cpu"))  # final/, weights and all


@pytest.mark.parametrize("step", [0, 1])
def test_an_update_is_the_local_engines(run: Any, step: int) -> None:
    """Rewards, masks, loss, gradient norm and the weights afterwards, on two ranks and on one."""
    folder, _ = run
    row = rows_of(folder, "train")[step]
    cpu = torch.device("cpu")
    earlier = folder / f"checkpoints/global_step_{step}/actor/huggingface"
    student = load_model(ModelSpec("demo:student" if step == 0 else str(earlier)), "student", cpu)
    teacher = load_model(ModelSpec("demo:teacher"), "teacher", cpu)
    records = [r for r in read_json_lines(folder / "trajectories.jsonl") if r["step"] == step]
    batch = [trajectory(record, folder, student) for record in records]
    assert len(batch) == PROMPTS * SAMPLES

    for t, score in zip(batch, policy(teacher).score(batch), strict=True):
        np.testing.assert_allclose(t.teacher_logp, score.logp, atol=2e-4)
    own = policy(student).score(batch, with_entropy=True)
    for t, score in zip(batch, own, strict=True):
        np.testing.assert_allclose(t.logp, score.logp, atol=1e-3)
        np.testing.assert_allclose(t.entropy, score.entropy, atol=1e-5)

    objective = Reopold(switch_step=1)
    assert objective.needs is Needs.TEACHER
    settings = OptimizerConfig(lr=3e-4, beta1=0.9, beta2=0.95, weight_decay=0.0)
    updater = Updater(policy(student), objective, settings, max_tokens=8192)
    rows = [Row(t, old_logp=s.logp, entropy=s.entropy) for t, s in zip(batch, own, strict=True)]
    for each, score in zip(rows, own, strict=True):
        logps = torch.from_numpy(score.logp), torch.from_numpy(each.trajectory.logp)
        each.weight = importance_weight(*logps, cap=2.0).numpy()
    stats = update_rows(updater, [rows], step)
    assert stats.kept_share == pytest.approx(row["mask/kept_share"])
    assert stats.loss == pytest.approx(row["loss"], rel=1e-4)
    assert stats.grad_norm == pytest.approx(row["grad_norm"], rel=1e-4)
    if stats.threshold is not None:
        assert stats.threshold == pytest.approx(row["entropy/threshold"], abs=1e-5)
    if step == 0:  # the optimizer starts from nothing, as here
        exported = folder / "checkpoints/global_step_1/actor/huggingface"
        theirs = load_model(ModelSpec(str(exported)), "student", cpu).adapter.model.state_dict()
        for name, value in student.adapter.model.state_dict().items():
            torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-4, msg=name)
