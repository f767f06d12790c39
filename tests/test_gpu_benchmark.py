"""``benchmarks/gpu.py`` without a GPU: its parts on a small model, and parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delenv("REOPOLD_REAL_DATA", raising=False)
    return pytest.importorskip("gpu")


def test_the_parts_run_on_a_small_model(gpu: Any, tmp_path: Path) -> None:
    context = gpu.Context(tmp_path, "cpu", tiny=True, seconds=60)
    with torch.random.fork_rng(devices=[]):
        results = {name: gpu.__dict__[f"part_{name}"](context) for name in ("machine", "parity")}
        results["checkpoint"] = gpu.part_checkpoint(context)
        results["packed"] = gpu.part_packed(context)
        results["compiled"] = gpu.part_compiled(context)
    assert results["parity"]["holds"]
    assert results["parity"]["device_float32"]["logp_max"] == 0
    assert 1e-4 < results["parity"]["device_bfloat16"]["logp_mean"] < 0.1
    packed = results["packed"]
    assert packed["holds"]
    assert packed["padded"]["tokens"] == packed["sdpa"]["tokens"]
    assert 0 < packed["sdpa"]["logp_max_difference"] < 0.05
    assert results["compiled"]["holds"]
    assert 0 < results["compiled"]["compiled"]["logp_max_difference"] < 0.05
    loaded = gpu_model(tmp_path / "real/student")
    rows = gpu.spread_rows(loaded, number=3, mean=4, most=4, picture=16)
    assert [len(row.images) for row in rows] == [1, 0, 0]
    lines = [
        {
            "ids": row.ids.tolist(),
            "loss_mask": [int(x) for x in row.loss_mask],
            "prompt_length": row.prompt_length,
            "images": [{"grid": image.grid} for image in row.images],
        }
        for row in rows
    ]
    file = tmp_path / "real/trajectories.jsonl"
    file.write_text("\n".join(map(json.dumps, [lines[1], lines[0], lines[0]])))
    with torch.random.fork_rng(devices=[]):
        results["bare"] = gpu.part_bare(context)
    assert all(rate > 0 for rate in results["bare"]["tokens_per_second"].values())
    text = "\n".join(gpu.table(results))
    assert "parity device_bfloat16" in text
    assert "packed   sdpa" in text
    assert "FAILED" not in text


def gpu_model(folder: Path) -> Any:
    from reopold_agent.policies.loading import ModelSpec, load_model

    return load_model(ModelSpec(str(folder), dtype="bfloat16"), "student", torch.device("cpu"))


def test_a_part_that_fails_leaves_the_others(gpu: Any, tmp_path: Path) -> None:
    write = "import sys, json; json.dump({}, open(sys.argv[1], 'w'))"
    alive = tmp_path / "alive"
    child = (
        f"import time\nfor i in range(99): open({str(alive)!r}, 'w').write(str(i)); time.sleep(.1)"
    )
    codes = {
        "good": write.replace("{}", "{'x': 1}"),
        "bad": "raise SystemExit('no kernel image is available')",
        "wrong": write.replace("{}", "{'holds': False}"),
        "slow": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        "last": write.replace("{}", "{'x': 2}"),
    }

    def command(name: str, target: Path, seconds: float) -> list[str]:
        return [sys.executable, "-S", "-c", codes[name], str(target)]

    limits = {"good": 60.0, "bad": 60.0, "wrong": 60.0, "slow": 3.0, "last": 60.0}
    out = tmp_path / "results/gpu.json"
    facts = {"device": "cpu", "tiny": True}
    results = gpu.run_parts(limits, command, out, tmp_path, 600.0, facts)
    assert json.loads(out.read_text()) == {**facts, **results}
    problems = {name: found["problem"] for name, found in results.items()}
    assert problems == {
        "good": None,
        "bad": "status 1: no kernel image is available",
        "wrong": "its check does not hold",
        "slow": "took longer than its 3 s",
        "last": None,
    }
    assert results["last"]["x"] == 2
    last = alive.read_text()
    time.sleep(0.4)
    assert alive.read_text() == last  # what the slow part started has ended too
    assert gpu.table(results) == [f"{k} FAILED: {v}" for k, v in problems.items() if v]
    late = gpu.run_parts({"good": 60.0}, command, out, tmp_path, 0.5, facts)
    assert late["good"]["problem"] == "no time was left"


def test_a_trial_does_not_replace_the_results_of_a_gpu(gpu: Any) -> None:
    kept = gpu.default_out("cuda", False)
    assert kept == ROOT / "benchmarks/results/gpu.json"
    for device, tiny in (("cuda", True), ("cpu", True), ("cpu", False)):
        assert gpu.default_out(device, tiny).parent == ROOT / "results"


def test_the_wheels_are_those_of_this_environment_and_limited(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "wheels" / command[-1]).write_bytes(b"x" * 1000)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.collect_wheels(tmp_path / "wheels", "3.12") == 1000 * len(gpu.WHEELS)
    assert f"transformers=={version('transformers')}" in [command[-1] for command in commands]
    assert all("--no-deps" in command for command in commands)
    monkeypatch.setattr(gpu, "WHEEL_BYTES", 5000)
    for path in (tmp_path / "wheels").iterdir():
        path.unlink()
    (tmp_path / "wheels").rmdir()
    with pytest.raises(SystemExit, match="more than 64"):
        gpu.collect_wheels(tmp_path / "wheels", "3.12")
