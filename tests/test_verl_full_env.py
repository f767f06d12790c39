"""The distributed engine with verl, Ray, FSDP and vLLM servers on this CPU.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``. A run takes minutes, most of
them for starting some fifteen processes, so one run with two ranks serves several tests. Its
student and teacher are random Qwen3-VL models; those of `test_verl_tools_full_env` are Qwen2.5-VL.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_checkpoint
from omegaconf import OmegaConf
from recorded import policy, trajectory
from running import last_of_each, stop_ray, write_plugin
from step_rows import update_rows

from reopold_agent.config import OptimizerConfig
from reopold_agent.objectives import Needs, Reopold
from reopold_agent.objectives.pieces import importance_weight
from reopold_agent.policies.loading import ModelSpec, load_model, load_processing
from reopold_agent.tracking.metrics import read_json_lines
from reopold_agent.train.rows import Row
from reopold_agent.train.update import Updater

pytestmark = [pytest.mark.full_env, pytest.mark.timeout(1800)]

pytest.importorskip("verl", reason="needs the full environment")
pytest.importorskip("vllm", reason="needs the full environment")
psutil = pytest.importorskip("psutil", reason="comes with verl")

STEPS, PROMPTS, SAMPLES = 3, 4, 2
ROLES = ("student", "teacher")
COMMAND = (sys.executable, "-m", "reopold_agent.train")
WORDS = [
    *("env=reflex", "model=demo", "engine=verl", "engine.device=cpu"),
    *("engine.gpus_per_node=3", "engine.teacher_gpus_per_node=1"),
    *("engine.packed=true", "engine.rollout_workers=1", f"steps={STEPS}"),
    f"batch.prompts={PROMPTS}",
    *(f"batch.samples={SAMPLES}", f"batch.mini_batch={PROMPTS}", "objective.switch_step=1"),
    *("checkpoint.every=1", "checkpoint.keep=10", "logging.trajectories=100"),
    *("evaluation.tasks=4", "evaluation.every=0", "evaluation.teacher=true"),
    "rollout.max_turn_tokens=24",  # random models write to the limit
]
MOVED = {
    "engine.gpus_per_node": 2,
    "engine.teacher_gpus_per_node": 0,
    "engine.student_server.tensor_parallel": 2,
    "engine.teacher_server.tensor_parallel": 2,
}
"""The teacher on the student's two GPUs, and one server of each role on both."""

# Random models write no calls: two turns of three stand for one, with another box each.
PLUGIN = """
    from reopold_agent.envs import register_env
    from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
    from reopold_agent.tools.parse import write_tool_call

    class ReflexEnv(PixelReasonerEnv):
        def step(self, action):
            if len(action) % 3:
                x, y = (len(action) % sides / 2 / sides for sides in (5, 7))
                box = {"bbox_2d": [x, y, x + 0.5, y + 0.5], "target_image": 1}
                action = write_tool_call("crop_image", box)
            return super().step(action)

    register_env(
        "reflex", id="reflex/Reflex-v0", entry_point="reflex_plugin:ReflexEnv",
        config={"takes_data": True},
    )
"""


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    models = [f"model.{role}.path={folder.parent / role}" for role in ROLES]
    path = [str(folder.parent / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, *last_of_each(*WORDS, *models, *more), f"hydra.run.dir={folder}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
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


def start_moved(folder: Path) -> subprocess.Popen[bytes]:
    """Continues from step 1 as if the run had been begun on the GPUs of `MOVED`."""
    (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text("1")
    config = OmegaConf.load(folder / "config.yaml")
    for key, value in MOVED.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    return start(folder, *(f"{key}={value}" for key, value in MOVED.items()))


@dataclass
class Run:
    """A run that is killed with kill -9 after its second step and continued on other GPUs.

    Attributes:
        folder: the run's.
        rows, episodes: what was recorded before the kill.
        servers: names of the continued run's vLLM processes.
    """

    folder: Path
    rows: list[dict[str, Any]]
    episodes: list[dict[str, Any]]
    servers: set[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("verl") / "run"
    points = "[reopold_agent.envs]\nreflex = reflex_plugin\n"
    write_plugin(folder.parent / "site", "reflex", points, reflex_plugin=PLUGIN)
    tokenizer = load_processing(ModelSpec("demo:student"), "student").tokenizer
    for seed, role in enumerate(ROLES):
        save_checkpoint(folder.parent / role, "qwen3_vl", tokenizer, seed)
    first = start(folder)
    servers = set()
    try:
        wait(
            first,
            folder,
            lambda: (
                (folder / "checkpoints/latest_checkpointed_iteration.txt").is_file()
                and len(rows_of(folder, "train")) >= 2
            ),
        )
        rows, episodes = rows_of(folder, "train"), read_json_lines(folder / "trajectories.jsonl")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        stop_ray()
        second = start_moved(folder)
        deadline = time.monotonic() + 900
        while second.poll() is None:
            assert time.monotonic() < deadline, said(folder)[-4000:]
            names = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
            servers |= {name for name in names if name.startswith("VLLM::")}
            time.sleep(1)
        assert second.returncode == 0, said(folder)[-4000:]
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
        stop_ray()
    return Run(folder, rows, episodes, servers)


def test_resumes_after_kill_and_uses_every_draw_once(run: Run) -> None:
    after = rows_of(run.folder, "train")
    assert [row["step"] for row in after] == list(range(STEPS))
    assert after[0] == run.rows[0]  # steps before the checkpoint were not done again
    seen = [
        (r["step"], r["index"], r["sample"])
        for r in read_json_lines(run.folder / "trajectories.jsonl")
    ]
    assert len(set(seen)) == len(seen) == STEPS * PROMPTS * SAMPLES
    assert "continuing" in said(run.folder)


def test_servers_on_other_gpus_give_the_same_episodes_and_scores(run: Run) -> None:
    """Step 1 was made twice: by servers with a GPU each, and by servers that share the same two."""
    assert any("TP1" in name for name in run.servers), run.servers
    recorded = run.episodes, read_json_lines(run.folder / "trajectories.jsonl")
    apart, shared = (
        {(r["index"], r["sample"]): r for r in records if r["step"] == 1} for records in recorded
    )
    assert len(apart) == PROMPTS * SAMPLES
    assert apart.keys() == shared.keys()
    for key, row in apart.items():
        assert shared[key]["ids"] == row["ids"]
        for name in ("teacher_logp", "logp"):
            np.testing.assert_allclose(shared[key][name], row[name], atol=1e-4, err_msg=name)


def test_rows_files_and_phases_are_those_of_the_local_engine(run: Run) -> None:
    folder = run.folder
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
    # Teachers on the student's GPUs sleep until all episodes have been played.
    assert [row["time/teacher"] > 0 for row in rows] == [False, True, True]
    assert rows[0]["mask/kept_share"] == pytest.approx(rows[0]["mask/exploration_share"])
    assert rows[1]["mask/kept_share"] == pytest.approx(rows[1]["mask/refinement_share"])
    summary = json.loads((folder / "summary.json").read_text())
    assert {summary[who]["n"] for who in ("before", "teacher", "after")} == {4}
    assert (folder / "plots").is_dir()
    load_model(ModelSpec(str(folder)), "student", torch.device("cpu"))  # final/, weights and all


@pytest.mark.parametrize("step", [0, 1])
def test_an_update_is_the_local_engines(run: Run, step: int) -> None:
    """Rewards, masks, loss, gradient norm and the weights afterwards, on two ranks and on one."""
    folder = run.folder
    row = rows_of(folder, "train")[step]
    cpu = torch.device("cpu")
    earlier = folder / f"checkpoints/global_step_{step}/actor/huggingface"
    begun = earlier if step else folder.parent / "student"
    student = load_model(ModelSpec(str(begun)), "student", cpu)
    teacher = load_model(ModelSpec(str(folder.parent / "teacher")), "teacher", cpu)
    records = [r for r in read_json_lines(folder / "trajectories.jsonl") if r["step"] == step]
    batch = [trajectory(record, folder, student) for record in records]
    assert len(batch) == PROMPTS * SAMPLES
    assert any(len(t.images) > 1 for t in batch), "tools gave pictures"

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
