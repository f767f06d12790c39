"""``benchmarks/real_size.py`` with a small model: what it writes, measures and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from reopold_agent.plan import flops
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.policies.loading import resolve_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delenv("REOPOLD_REAL_DATA", raising=False)
    return pytest.importorskip("real_size")


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def test_a_step_is_measured(
    benchmark: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    # The same on every machine, also beside real photographs.
    monkeypatch.setattr(benchmark, "find_data", lambda part: None)
    settings = benchmark.Settings(tiny=True, response=6, picture_tokens=64)
    parameters, teacher = benchmark.prepare(tmp_path, settings)
    one, other = all_weights(tmp_path / "student"), all_weights(tmp_path / "teacher")
    assert sum(value.numel() for value in one.values()) == parameters
    assert one.keys() == other.keys()
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert "model.language_model.norm.weight" in differing
    assert {name.split(".")[3] for name in differing if ".layers." in name} == {"2", "3"}
    assert "last 2 layers" in teacher
    result = benchmark.real_size(tmp_path, settings)
    assert {"load", "generate", "teacher", "old_logp", "update", "checkpoint", "final"} <= set(
        result["seconds"]
    )
    assert result["response_tokens"] == [6, 6]
    assert result["grad_norm"] > 0
    assert "GENERATED" in result["pictures"]
    assert 0.1 < result["peak_gib"] < 4
    assert result["peak_gib"] == pytest.approx(max(result["peaks_gib"].values()), abs=0.02)
    assert 0 < result["step_seconds"] <= sum(result["seconds"].values())
    assert not (tmp_path / "run").exists()
    assert min(result["peaks_gib"].values()) > 0.1  # of short phases too
    said = capfd.readouterr().err
    assert "2 rows of" in said
    for folders_that_are_gone in ("Next:", "preflight", "options", "warning"):
        assert folders_that_are_gone not in said


def test_the_shapes_are_those_of_the_published_model(benchmark: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("demo:student"))
    config = benchmark.shapes(tokenizer, tiny=False)
    config.text_config.vocab_size = 151_936
    config.save_pretrained(tmp_path)
    published = find_architecture("Qwen/Qwen2.5-VL-3B-Instruct")
    made = find_architecture(str(tmp_path))
    assert (made.text, made.vision) == (published.text, published.vision)
    assert made.parameters == 3_754_622_976


def test_the_least_seconds_are_those_of_the_flops(benchmark: Any) -> None:
    model = find_architecture("Qwen/Qwen2.5-VL-3B-Instruct")
    episode = {"prompt_length": 100, "response_tokens": 11, "images": [{"tokens": 64}]}
    machine = benchmark.Machine(flops=2.0, bandwidth=4.0)
    found = benchmark.bounds(model, [episode], machine, lora=True, value_bytes=2)
    tower = flops.vision_forward(model.vision, [64])
    decoder = flops.text_forward(model.text, 111, 0)
    logits = flops.logits_forward(model.text, 11)
    assert found["teacher"] == found["old_logp"] == (tower + decoder + logits) / 2
    assert found["update"] == (tower + 3 * decoder + 3 * logits) / 2
    prefill = (tower + flops.text_forward(model.text, 100, 1)) / 2
    assert found["generate"] == prefill + 10 * 2 * model.text.parameters / 4


def test_memory_is_that_of_the_whole_tree(benchmark: Any, tmp_path: Path) -> None:
    hold = (
        "import time; x = bytearray(b'1') * (64 << 20); print('ready', flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert 64 << 20 < benchmark.pss_bytes(process.pid) < 128 << 20
    finally:
        for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            subprocess.run(["kill", line], check=True)
        process.wait(10)
    marks = [("start", 0), ("load", 10), ("between", 20), ("update", 30)]
    rows = [json.dumps({"phase": phase, "at": at, "worked": at / 2}) for phase, at in marks]
    (tmp_path / "marks").write_text("\n".join(rows))
    samples = [(5.0, 2 << 30), (15.0, 3 << 30), (25.0, 1 << 30)]
    assert benchmark.Phases.read(tmp_path / "marks", samples[::2]).peak_gib["other"] == 2
    phases = benchmark.Phases.read(tmp_path / "marks", samples)
    assert phases.seconds == {"load": 10, "other": 10, "update": 10}
    assert phases.worked == {"load": 5, "other": 5, "update": 5}
    assert phases.peak_gib == {"load": 2, "other": 3, "update": 1}
