"""The doctor: every problem is simulated, and no secret is printed."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from running import composed, environment

from reopold_agent.common import memory
from reopold_agent.common.secrets import HIDDEN, Redactor
from reopold_agent.config import TrainConfig
from reopold_agent.doctor import base, gpu, hub, judges, machine, packages, run
from reopold_agent.doctor.__main__ import main
from reopold_agent.doctor.base import Check, Finding, run_checks
from reopold_agent.doctor.examine import checks_for, parse
from reopold_agent.doctor.report import as_json, cleaned, show
from reopold_agent.envs import ENVS
from reopold_agent.errors import ConfigError, DataError
from reopold_agent.plan.hardware import GIB
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.policies.loading import resolve_path

Usage = namedtuple("Usage", "total used free")


def config(*words: str) -> TrainConfig:
    return composed(*(words or ("env=pixel_reasoner",)))[0]


def told(findings: Any, status: str, *words: str) -> Finding:
    """Returns the only finding of that status that contains all the words."""
    found = list(findings)
    hits = [f for f in found if f.status == status and all(w in f.text + f.advice for w in words)]
    assert len(hits) == 1, "\n".join(map(str, found))
    return hits[0]


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clears cached answers of earlier tests and hides this machine's keys."""
    for name in (*judges.KEY_VARIABLES, "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asks = gpu.ask_torch, gpu.ask_driver  # as they are; tests put others in their place
    for ask in asks:
        ask.cache_clear()
    yield
    for ask in asks:
        ask.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes first on the import path, here and in other processes."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def package(site: Path, name: str, version: str, *lines: str, code: str | None = None) -> None:
    """Installs a package that has metadata, and perhaps a module."""
    module = name.replace("-", "_")
    about = site / f"{module}-{version}.dist-info"
    about.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (about / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
    if code is not None:
        (site / module).mkdir()
        (site / module / "__init__.py").write_text(code)


# How checks are run


def test_a_check_that_fails_or_hangs_does_not_end_the_others() -> None:
    released = threading.Event()

    def hangs() -> list[Finding]:
        released.wait(60)
        return []

    def raises(error: BaseException) -> Any:
        raise error

    def exits() -> Any:
        sys.exit(3)

    checks = [
        Check("a", lambda: [Finding("a", "ok", "fine")]),
        Check("b", hangs, 0.2),
        Check("c", lambda: raises(KeyError("gone"))),
        Check("d", lambda: raises(DataError("no rows\nMend them"))),
        Check("e", exits),
        Check("f", lambda: [Finding("f", "ok", "fine too")]),
    ]
    started = time.monotonic()
    found = {f.area: f for f in run_checks(checks, 60)}
    assert time.monotonic() - started < 30
    released.set()
    assert (found["a"].status, found["f"].status) == ("ok", "ok")
    assert (found["b"].status, found["b"].text) == ("problem", "no result after 0 seconds")
    assert found["c"].status == "warning"
    assert "KeyError: 'gone'" in found["c"].text
    assert (found["d"].text, found["d"].advice) == ("no rows", "Mend them")
    assert "SystemExit: 3" in found["e"].text


def test_all_checks_together_have_a_limit() -> None:
    late: list[str] = []
    slow = Check("slow", lambda: time.sleep(0.3) or [])
    found = run_checks([slow, Check("late", lambda: late.append("ran") or [])], 0.1)
    assert [f.area for f in found] == ["slow", "late"]
    assert "no result" in found[0].text
    assert "not checked" in found[1].text
    assert not late


# Python and packages


def test_this_environment_is_sound() -> None:
    told(packages.python(), "ok", "Python 3.")
    told(packages.core(), "ok", "have the required versions")
    told(packages.conflicts(), "ok")


def test_a_python_that_is_too_old_is_reported(site: Path) -> None:
    package(site, "reopold-agent", "9", "Requires-Python: >=3.99")
    told(packages.python(), "problem", "required is >=3.99", "uv venv")


def test_missing_and_incompatible_packages_are_reported_with_the_command(site: Path) -> None:
    package(site, "reopold-agent", "9", "Requires-Dist: numpy<2,>=1.2", "Requires-Dist: no-such>=3",
            'Requires-Dist: neither; python_version < "3"', "Requires-Dist: pillow",
            'Requires-Dist: nor; extra == "x"')  # fmt: skip
    found = list(packages.core())
    assert told(found, "problem", "numpy", "does not fit").advice == 'pip install "numpy<2,>=1.2"'
    assert told(found, "problem", "is not installed").advice == 'pip install "no-such>=3"'
    assert len(found) == 2


def test_every_extra_has_its_purpose() -> None:
    extras = metadata("reopold-agent").get_all("Provides-Extra")
    assert packages.PURPOSES.keys() == set(extras or ())


def test_extras_are_whole_partly_there_or_absent(site: Path) -> None:
    lines = [
        f"Provides-Extra: {x}" for x in ("lora", "verl", "video", "track", "hub", "dev", "mcp")
    ]
    lines += [
        'Requires-Dist: reopold-agent[lora]; extra == "dev"',
        'Requires-Dist: pillow; extra == "lora"',
        'Requires-Dist: no-mcp; extra == "mcp"',
        'Requires-Dist: no-verl; extra == "verl"',
        'Requires-Dist: no-vllm; extra == "verl"',
        'Requires-Dist: numpy<1; extra == "video"',
        'Requires-Dist: no-av; extra == "video"',
        'Requires-Dist: wandb; extra == "track"',
        'Requires-Dist: tensorboard-no; extra == "track"',
        'Requires-Dist: gone; (python_version < "3") and extra == "hub"',
    ]
    package(site, "reopold-agent", "9", *lines)
    package(site, "wandb", "1")
    found = list(packages.extras(None))
    told(found, "ok", "lora: installed (model.student.lora)")
    told(found, "ok", "dev: installed")
    absent = told(found, "info", "verl: not installed (engine=verl: many GPUs)")
    assert absent.advice == 'pip install -e ".[verl]"'
    told(found, "warning", "video: partly", "numpy", "does not fit <1; lacks no-av")
    told(found, "info", "track: partly", "lacks tensorboard-no")
    told(found, "info", "hub: not available for this Python and platform")
    needed = list(packages.extras(config("engine=verl", "tracking=tensorboard")))
    told(needed, "problem", "verl: not installed", "engine=verl needs it")
    told(needed, "problem", "track: partly", "tracking=tensorboard needs it")
    told(packages.extras(config("tracking=wandb")), "info", "track: partly")
    served = config("+env.kwargs.tools=[crop_image,'mcp:python server.py']")
    told(packages.extras(served), "problem", "mcp: not installed", "tools=[mcp:...] needs it")
    told(packages.extras(config()), "info", "mcp: not installed")


def test_conflicting_packages_are_reported(site: Path) -> None:
    package(site, "verl", "0.9.1", "Requires-Dist: transformers<5.1,!=5.0",
            "Requires-Dist: no-such", "Requires-Dist: rich<1")  # fmt: skip
    package(site, "trl", "1.2.0")
    found = list(packages.conflicts())
    verl = told(found, "problem", "verl 0.9.1 requires transformers!=5.0,<5.1")
    assert verl.advice == 'pip install "verl" "transformers!=5.0,<5.1"'
    assert told(found, "problem", "trl 1.2.0 with verl").advice == "pip uninstall trl"
    assert len(found) == 2
    shutil.rmtree(site / "trl-1.2.0.dist-info")
    package(site, "trl", "0.24.0")
    assert len(list(packages.conflicts())) == 1


def test_flash_attention_is_looked_for_where_it_is_asked_for(site: Path) -> None:
    assert list(packages.flash_attention(config(), False)) == []
    asked = config("engine=verl", "engine.attention=flash_attention_2")
    told(packages.flash_attention(asked, True), "problem", "pip install flash-attn --no-build-iso")
    package(site, "flash-attn", "2", code="raise ImportError('undefined symbol: _ZN3c10')")
    told(packages.flash_attention(asked, True), "problem", "undefined symbol")
    told(packages.flash_attention(config(), False), "warning", "undefined symbol")


def test_without_flash_attention_a_gpu_takes_another_path(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, path in (("2.11.0+cu130", "varlen"), ("2.9.1", "scaled_dot_product_attention")):
        package(site, "torch", version)
        found = told(packages.flash_attention(config(), True), "warning", "not installed", path)
        assert found.advice == "pip install flash-attn --no-build-isolation"
        shutil.rmtree(site / f"torch-{version}.dist-info")
    for words in ("engine.packed=false", "engine.attention=sdpa"):
        assert list(packages.flash_attention(config(words), True)) == []
    seen = gpu.Torch(version="2.13.0", cuda="13.0", available=True)
    monkeypatch.setattr(gpu, "ask_torch", lambda: seen)
    assert gpu.is_used(config())
    assert not gpu.is_used(config("engine.device=cpu"))


# PyTorch and GPUs


@pytest.mark.parametrize("build", ["+cpu", ""])
def test_a_torchvision_for_another_torch_is_reported(build: str, site: Path) -> None:
    package(site, "torch", f"2.13.0{build}")
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    package(site, "torchvision", "0.20.1", "Requires-Dist: torch (==2.5.1)", code=code)
    found = list(gpu.torchvision(config()))
    finding = told(found, "warning", "0.20.1 (built for torch==2.5.1) with torch 2.")
    assert "operator torchvision::nms does not exist" in finding.text
    assert "pip install --force-reinstall torch torchvision" in finding.advice
    assert ("whl/cpu" in finding.advice) == bool(build)  # both from one index
    told(gpu.torchvision(config("policy=vllm")), "problem", "does not exist")
    told(packages.conflicts(), "problem", "torchvision 0.20.1 requires torch==2.5.1")


def test_a_torchvision_that_crashes_or_hangs_is_reported(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "torchvision", "1", code="import os; os.kill(os.getpid(), 11)")
    told(gpu.torchvision(config()), "warning", "ended by signal 11")
    monkeypatch.setattr(gpu, "TORCH_SECONDS", 1.0)
    (site / "torchvision" / "__init__.py").write_text("import time; time.sleep(100)")
    told(gpu.torchvision(config()), "warning", "no answer within 1 seconds")


def test_a_torch_that_does_not_load_is_reported(site: Path) -> None:
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    told(gpu.torch_and_gpus(None), "problem", "PyTorch does not load", "libcudart.so.13")


def fake_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_gpu_that_a_cpu_build_cannot_use_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ask_torch", lambda: gpu.Torch(version="2.13.0+cpu"))
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA L4, 23034 MiB, 8.9, 550.54'")
    found = told(gpu.torch_and_gpus(config()), "problem", "CPU only", "NVIDIA L4", "cannot use")
    assert found.advice.startswith("pip install --force-reinstall torch")
    assert gpu.ask_driver().version == "550.54"


def test_a_driver_whose_tools_fail_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ask_torch", lambda: gpu.Torch(version="2.13.0", cuda="13.0"))
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'Driver/library version mismatch' >&2; exit 18")
    told(
        gpu.torch_and_gpus(config()), "warning", "nvidia-smi fails: Driver/library version mismatch"
    )
    kernel = tmp_path / "version"
    kernel.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun 6\n")
    monkeypatch.setattr(gpu, "_DRIVER", kernel)
    gpu.ask_driver.cache_clear()
    old = told(gpu.torch_and_gpus(config()), "problem", "cannot use the GPU", "driver 535.54.03")
    assert "Update NVIDIA's driver for CUDA 13.0" in old.advice


def card(**changes: Any) -> dict[str, Any]:
    new = {"name": "NVIDIA X", "memory": 80 * GIB, "free": 79 * GIB, "capability": "9.0"}
    return {**new, "bfloat16": True, **changes}


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (card(), card(free=8 * GIB), card(name="Tesla V100", capability="7.0", bfloat16=False))
    seen = gpu.Torch(version="2.13.0", cuda="13.0", available=True, gpus=cards)
    monkeypatch.setattr(gpu, "ask_torch", lambda: seen)
    monkeypatch.setattr(gpu, "ask_driver", lambda: gpu.Driver(True, "580.1"))
    found = list(gpu.torch_and_gpus(config()))
    told(found, "ok", "torch 2.13.0 (CUDA 13.0), driver 580.1")
    told(found, "ok", "GPU 0: NVIDIA X, 80 GiB, 79 free, compute capability 9.0")
    told(found, "warning", "GPU 1", "others use it")
    told(
        found,
        "warning",
        "GPU 2: Tesla V100",
        "does not support bfloat16",
        "engine.precision=float32",
    )
    single = config("engine.precision=float32")
    assert not [f for f in gpu.torch_and_gpus(single) if "bfloat16" in f.text]


def test_a_requested_gpu_that_is_absent_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ask_driver", lambda: gpu.Driver(False))
    monkeypatch.setattr(gpu, "ask_torch", lambda: gpu.Torch(version="2.13.0", cuda="13.0"))
    told(gpu.torch_and_gpus(config("engine.device=cuda")), "problem", "there is no GPU")
    told(gpu.torch_and_gpus(config()), "info", "several GB smaller", "whl/cpu")


# The machine


def test_limits_that_are_too_low_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524288))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * 2**20, 0, 64 * 2**20))
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_affinity", lambda: range(16))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    free = "engine.threads=null"
    found = list(machine.limits(config(free)))
    told(found, "warning", "at most 1024", "ulimit -n 65536")
    told(found, "info", "/dev/shm has 64 MiB")
    told(found, "warning", "2.5 of 64 usable", "would start 16 threads", "engine.threads=2")
    told(machine.limits(config("policy=vllm")), "problem", "docker run --shm-size=16g")
    told(machine.limits(config("engine.threads=2")), "ok", "PyTorch starts 2 threads")
    monkeypatch.setenv("OMP_NUM_THREADS", "32,2")
    told(machine.limits(config(free)), "warning", "would start 32 threads")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cpus() == 16


def test_memory_is_what_the_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = machine.usable_memory()
    assert whole is not None
    assert whole > 0
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.usable_memory() == 2_000_000


def test_a_clock_in_the_past_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told(machine.clock(), "ok")
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    told(machine.clock(), "problem", "1970-01-02", "set-ntp")


def test_a_ray_cluster_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(machine.ray_cluster(config())) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verl = config("engine=verl", f"engine.ray_address=127.0.0.1:{port}")
        told(machine.ray_cluster(verl), "ok", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
    told(machine.ray_cluster(config("engine=verl")), "problem", "no cluster at", "ray start --head")


def test_disks_are_compared_with_what_the_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = config("model=qwen2_5_vl_3b", "checkpoint.keep=2")
    student = find_architecture(real.model.student.path)
    # Weights and two moments in float32, three times, and the final weights.
    assert machine.checkpoint_bytes(real, student) == student.parameters * 4 * (3 * 3 + 1)
    one = replace(real, checkpoint=replace(real.checkpoint, keep=1))
    assert machine.checkpoint_bytes(one, student) == student.parameters * 4 * (3 * 2 + 1)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for free, status in ((100, "problem"), (150, "warning"), (400, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: Usage(1, 0, f * GIB))
        found = list(machine.disks(real, tmp_path / "runs" / "new", [("org/name", 120.0 * GIB)]))
        disk = told([f for f in found if f.area == "disk"], status, f"{free}.0 GiB free")
        assert "checkpoints take about 139.9 GiB (3 at once" in disk.text
        assert ("checkpoint.keep=1" in disk.advice) == (status != "ok")
    told([f for f in found if f.area == "cache"], "ok", "about 120.0 GiB to download (org/name)")


def test_a_folder_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    assert machine.cannot_write(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refuse)
    found = machine.disks(config(), tmp_path / "a" / "b", [])
    told(found, "problem", f"{tmp_path} cannot be written: Permission denied", "hydra.run.dir=DIR")


def seen(*cards: dict[str, Any]) -> Any:
    torch = gpu.Torch(version="2", cuda="13.0", available=bool(cards), gpus=cards)
    return lambda: torch


def test_memory_is_planned_for_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=qwen2_5_vl_3b"]
    monkeypatch.setattr(machine, "ask_torch", seen(card(memory=24 * GIB)))
    small = list(machine.memory(words, config(*words)))
    told([f for f in small if "update" in f.text], "problem", "does not fit", "of 24.0")
    monkeypatch.setattr(machine, "ask_torch", seen(card(memory=140 * GIB)))
    told(machine.memory(words, config(*words)), "ok", "of 140.0 GiB (this machine's GPU)")


def test_memory_on_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ask_torch", seen())
    monkeypatch.setattr(machine, "usable_memory", lambda: 8.0 * GIB)
    words = ["model=qwen2_5_vl_3b"]
    found = list(machine.memory(words, config(*words)))
    assert any(f.status == "problem" and "does not fit" in f.text for f in found)
    told(machine.memory(["env=math"], config("env=math")), "ok", "(this machine's memory)")


def test_nothing_is_planned_where_pytorch_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imports_torch(*_: Any) -> Any:
        pytest.fail("the plan imports PyTorch to count parameters")

    monkeypatch.setattr(machine, "ask_torch", lambda: gpu.Torch(error="ended by signal 11"))
    monkeypatch.setattr(machine, "plan_run", imports_torch)
    monkeypatch.setattr(machine, "find_architecture", imports_torch)
    told(machine.memory([], config()), "info", "not planned: PyTorch does not load")
    told(machine.disks(config(), tmp_path, []), "info", "the model's size is unknown")


def test_too_few_gpus_for_the_recipe_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["recipe=paper_agentic"]
    monkeypatch.setattr(machine, "ask_torch", seen(card(), card()))
    found = list(machine.memory(words, config(*words)))
    told(found, "problem", "needs 8 GPUs on each of 1 machines; this one has 2")
    told(found, "ok", "student, rollout", "teacher, score")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # the GPUs are elsewhere
    assert not [f for f in machine.memory(words, config(*words)) if "here are" in f.text]


# Models, data, plugins


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_path("demo:student"), tmp_path / "student"))


def with_models(student: Path, **teacher: Any) -> TrainConfig:
    made = config()
    path = {"path": str(student)}
    return replace(
        made,
        model=replace(
            made.model,
            student=replace(made.model.student, **path),
            teacher=None if made.model.teacher is None else replace(made.model.teacher, **teacher),
        ),
    )


def test_whole_models_that_agree_are_ok(student: Path) -> None:
    found = list(run.models(with_models(student)))
    told(found, "ok", f"student {student}: complete")
    told(found, "ok", "teacher demo:teacher: complete")
    told(found, "ok", "map the same ids to the same tokens")


def test_missing_files_of_a_model_are_reported(student: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    index = {"weight_map": {"a": "model.safetensors", "b": shard}}
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    found = list(run.models(with_models(student)))
    told(
        found, "problem", "the student's folder", f"the first is {shard}", "download is incomplete"
    )
    told(found, "ok", "teacher demo:teacher: complete")  # the one does not hide the other
    (student / "model.safetensors.index.json").unlink()
    (student / "preprocessor_config.json").unlink()
    told(run.models(with_models(student)), "problem", "lacks a picture processor")
    (student / "tokenizer.json").unlink()
    told(run.models(with_models(student)), "problem", "lacks a tokenizer")


def test_tokenizers_that_disagree_are_reported(student: Path) -> None:
    file = student / "tokenizer.json"
    text = file.read_text("utf-8")
    values = json.loads(text)
    first, second = list(values["model"]["vocab"])[:2]
    values["model"]["vocab"][first], values["model"]["vocab"][second] = 1, 0
    file.write_text(json.dumps(values))
    asked = Check("models", lambda: run.models(with_models(student)), 60)
    told(run_checks([asked], 60), "problem", "disagree on 2 token ids", "student's tokenizer")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, by the requested name."""

    def do_HEAD(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        names = {"moved": 307, "gated": 401, "gone": 404, "broken": 500}
        status = next((code for name, code in names.items() if name in self.path), 200)
        if "slow" in self.path:
            time.sleep(2)
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        key = self.headers.get("x-goog-api-key") or self.headers.get("Authorization") or ""
        self.server.asked.append((self.path, key))  # type: ignore[attr-defined]
        body = b'{"models": []}'
        self.send_response(400 if "good" not in key else 404 if "gone" in self.path else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("org/there", "ok", ["not here yet; the hub has it"]),
        ("org/moved", "ok", ["the hub has it"]),
        ("org/gated", "problem", ["the token may not read it", "hf auth login"]),
        ("org/gone", "problem", ["does not have it", "Check the name"]),
        ("org/broken", "problem", ["HTTP 500", "hf download org/broken --local-dir models/broken"]),
        ("org/slow", "problem", ["does not answer: timed out", "model.teacher.path=models/slow"]),
    ],
)
def test_models_of_the_hub_are_asked_for(
    web: Any, monkeypatch: pytest.MonkeyPatch, name: str, status: str, words: Sequence[str]
) -> None:
    monkeypatch.setattr(hub.request, "__defaults__", (0.5, "HEAD"))
    made = with_models(Path(resolve_path("demo:student")), path=name)
    told([f for f in run.models(made) if name in f.text], status, *words)
    assert web.asked == [(f"/{name}/resolve/main/config.json", "Bearer hf_planted_token")]


def test_a_missing_network_is_reported_with_a_remedy(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_models(Path(resolve_path("demo:student")), path="org/name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    told(run.models(made), "problem", "the hub does not answer: [Errno 111] Connection refused")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told(run.models(made), "problem", "HF_HUB_OFFLINE forbids", "hf download org/name")
    assert web.asked == []


def test_models_in_the_cache_must_be_whole(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "hf" / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    shutil.copytree(student, folder / "snapshots" / "abc")
    made = with_models(student, path="org/name")
    told(run.models(made), "ok", "teacher org/name: complete", "the cache")
    assert run.downloads(made) == []
    (folder / "snapshots" / "abc" / "model.safetensors").unlink()
    broken = told(run.models(made), "problem", "the teacher's folder", "lacks weights")
    assert "hf download org/name" in broken.advice


def test_a_remote_teacher_needs_no_weights_but_its_server(student: Path) -> None:
    teacher = student.parent / "teacher"
    shutil.copytree(resolve_path("demo:teacher"), teacher)
    (teacher / "model.safetensors").unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        urls = f"policy.teacher.urls=[http://127.0.0.1:{port},http://127.0.0.1:1]"
        made = config("env=pixel_reasoner", "policy=server", urls)
        remote = replace(with_models(student, path=str(teacher)), policy=made.policy)
        told(run.models(remote), "ok", f"teacher {teacher}: complete")
        found = list(run.servers(remote))
    told(found, "ok", f"http://127.0.0.1:{port} answers")
    told(found, "problem", "http://127.0.0.1:1 does not answer", "reopold_agent.serve")
    assert any(f.status == "problem" for f in run.models(with_models(student, path=str(teacher))))


def test_data_of_the_hub_is_asked_for_and_never_fetched(web: Any) -> None:
    asked = config("data=verl", "data.train.path=org/there", "data.eval.path=org/gone")
    found = list(run.data(asked))
    told(found, "ok", "train org/there", "the hub has it")
    told(found, "problem", "eval org/gone", "does not have it")
    assert [path for path, _ in web.asked] == [
        "/datasets/org/there/resolve/main/README.md",
        "/datasets/org/gone/resolve/main/README.md",
    ]
    told(run.environment(asked), "info", "not checked: org/there is not cached")
    assert len(web.asked) == 2


def rows(folder: Path, picture: bytes | None) -> None:
    folder.mkdir()
    row = {"question": "which?", "answer": "3", "image": ["a.png"], "qid": "q", "is_video": False}
    (folder / "train.json").write_text(json.dumps([row]))
    if picture is not None:
        (folder / "a.png").write_bytes(picture)


def test_an_environment_that_cannot_start_is_reported(tmp_path: Path) -> None:
    rows(tmp_path / "d", b"no picture")
    words = (f"data.train.path={tmp_path / 'd'}", f"data.eval.path={tmp_path / 'absent'}")
    broken = config("env=pixel_reasoner", "data=pixel_reasoner_rl", *words)
    (finding,) = run_checks([Check("environment", lambda: run.environment(broken), 60)], 60)
    assert finding.status == "problem"
    assert str(tmp_path / "d") in finding.text
    found = list(run.environment(config()))
    told(found, "ok", "pixel_reasoner, train: 4096 tasks", "(demo-train-0-0) has pictures 28x28")
    told(run.environment(config("env=math")), "ok", "train", "no picture")


def test_plugins_are_loaded_and_named_by_their_makers(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "good-maker", "1", code="x = 1")
    (site / "good_maker-1.dist-info" / "entry_points.txt").write_text(
        "[reopold_agent.envs]\nmine = good_maker\n[reopold_agent.env]\nlost = good_maker\n"
    )
    package(site, "bad-maker", "1", code="import nothing_like_it")
    (site / "bad_maker-1.dist-info" / "entry_points.txt").write_text(
        "[reopold_agent.tools]\nbroken = bad_maker\nabsent = bad_maker_2:x\n"
    )
    package(site, "worse-maker", "1", code="import sys; sys.exit(1)")
    (site / "worse_maker-1.dist-info" / "entry_points.txt").write_text(
        "[reopold_agent.judges]\nquits = worse_maker\n"
    )
    found = list(run.plugins())
    told(found, "ok", "mine (reopold_agent.envs) of good-maker loads")
    told(found, "warning", "there is no such group; did it mean reopold_agent.envs?")
    bad = told(found, "problem", "broken (reopold_agent.tools) of bad-maker", "nothing_like_it")
    assert bad.advice == "pip install --upgrade bad-maker, or: pip uninstall bad-maker"
    told(found, "problem", "absent (reopold_agent.tools)", "bad_maker_2")
    told(found, "problem", "quits (reopold_agent.judges) of worse-maker", "SystemExit")
    monkeypatch.setitem(ENVS.failures, "mine", "TypeError: it points to a dict")
    told(run.plugins(), "problem", "mine (reopold_agent.envs)", "is not used: TypeError")


# Keys


def test_keys_are_set_or_not(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gemini = {"name": "gemini", "endpoint": web.address}
    told(run.keys({"name": "none"}, config(), False), "info", "GEMINI_API_KEY and GOOGLE_API_KEY")
    told(run.keys(gemini, config(), True), "problem", "would not ask Gemini", "aistudio.google.com")
    assert web.asked == []
    monkeypatch.setenv("GOOGLE_API_KEY", "good-planted-key")
    found = list(run.keys(gemini, config(), False))
    told(found, "ok", "GOOGLE_API_KEY is set")
    told(found, "info", "Gemini was not asked whether it serves 'gemini-flash-latest'")
    assert web.asked == []
    found = list(run.keys(gemini, config(), True))
    told(found, "ok", "Gemini accepts the key and serves 'gemini-flash-latest'")
    told(found, "info", "Hugging Face token: set")
    monkeypatch.setenv("GEMINI_API_KEY", "other")
    told(
        run.keys(gemini, config(), True), "problem", "HTTP 400", "Check the value of GEMINI_API_KEY"
    )
    gone = {**gemini, "model": "gemini-gone"}
    monkeypatch.setenv("GEMINI_API_KEY", "good")
    bad = told(run.keys(gone, config(), True), "problem", "does not serve the model 'gemini-gone'")
    assert "judge.model=gemini-flash-latest" in bad.advice
    assert [key for _, key in web.asked] == ["good-planted-key", "other", "good"]


def test_other_judges_and_trackers(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = {"name": "openai_compatible", "base_url": f"{web.address}/v1", "key_env": "MY_KEY"}
    told(run.keys(chat, config(), False), "info", "MY_KEY is not set")
    monkeypatch.setenv("MY_KEY", "good")
    told(run.keys(chat, config(), True), "ok", "answers and accepts the key")
    assert web.asked == [("/v1/models", "Bearer good")]
    down = {**chat, "base_url": "http://127.0.0.1:1/v1"}
    told(run.keys(down, config(), True), "problem", "does not answer", "refused")
    monkeypatch.setenv("HOME", "/nonexistent")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb = config("tracking=wandb")
    told(run.keys(chat, wandb, False), "problem", "wandb login")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    told(run.keys(chat, wandb, False), "ok", "Weights & Biases")


SECRETS = {
    "GEMINI_API_KEY": "AIza-planted-gemini",
    "HF_TOKEN": "hf_plantedplanted",
    "WANDB_API_KEY": "planted wandb/key",
    "AWS_SECRET_ACCESS_KEY": "planted+aws==",
    "DB_PASSWORD": "planted-db",
    "HTTPS_PROXY": "http://me:planted-proxy@127.0.0.1:1",
    "https_proxy": "http://me:planted-proxy@127.0.0.1:1",
    "HF_ENDPOINT": "http://me:planted-hub@127.0.0.1:1",
    "RAY_ADDRESS": "ray://me:planted-ray@127.0.0.1:1",
}


def test_secrets_are_hidden_wherever_they_stand() -> None:
    redact = Redactor(SECRETS)
    text = " ".join(f"{name}={value}" for name, value in SECRETS.items())
    text += " planted-proxy planted%20wandb%2Fkey http://u:short@h/x?key=abc&y=1&access_token=zz"
    text += " https://bucket/x.png?X-Amz-Credential=cc/2026&X-Amz-Date=1&X-Amz-Signature=ff"
    hidden = redact(text)
    for secret in ("planted", "short", "abc", "zz", "me:", "cc/2026", "ff"):
        assert secret not in hidden
    assert f"http://{HIDDEN}@h/x?key={HIDDEN}&y=1" in hidden
    assert "127.0.0.1:1" in hidden
    assert "X-Amz-Date=1" in hidden
    plain = "numpy 2.1 does not fit <2; see https://a.b/c?page=1, true"
    assert Redactor({"KEY": "true", "TOKENIZERS_PARALLELISM": "false"})(plain) == plain


@pytest.mark.slow
def test_nothing_that_is_printed_holds_a_secret(tmp_path: Path) -> None:
    words = ["engine=verl", "model=qwen2_5_vl_3b", "data=pixel_reasoner_rl", "judge=gemini",
             "online=true", "judge.endpoint=http://me:planted-judge@127.0.0.1:1",
             f"hydra.run.dir={tmp_path}"]  # fmt: skip
    variables = {**environment(), **SECRETS, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    for option in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "reopold_agent.doctor", *words, *option],
            env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "planted" not in done.stdout + done.stderr
        assert "GEMINI_API_KEY is set" in done.stdout
        assert "127.0.0.1" in done.stdout


# The command


def test_the_default_run_is_sound_and_takes_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([f"hydra.run.dir={tmp_path}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["problem"] == 0
    areas = {finding["area"] for finding in said["findings"]}
    assert areas >= {"python", "packages", "extras", "torch", "disk", "memory", "models", "keys"}
    assert all(f["status"] in said["counts"] for f in said["findings"])


def test_problems_are_the_exit_status(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model.student.path=./absent"]) == 1
    out = capsys.readouterr().out
    assert "problem models        the student's folder 'absent' does not exist" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=pixel_resoner"], "Did you mean 'pixel_reasoner'"),
        (["judge=gemni"], "gemini"),
        (["judge.nothing=1"], "nothing"),
        (["online=perhaps"], "online must be true or false"),
        (["seconds=x"], "seconds must be a number"),
        (["--jsn"], "unknown option --jsn"),
        (["steps=-1"], "steps must not be negative"),
    ],
)
def test_wrong_words_end_before_any_check(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_of_the_doctor_are_separated_from_the_runs() -> None:
    words = ["env=math", "judge=gemini", "judge.timeout=3", "online=true", "seconds=9",
             "hydra.run.dir=/x"]  # fmt: skip
    asked = parse(words)
    assert asked.words == ("env=math",)
    assert (asked.judge["name"], asked.judge["timeout"]) == ("gemini", 3)
    assert (asked.online, asked.seconds, asked.folder) == (True, 9.0, Path("/x"))
    areas = [check.area for check in checks_for(asked)]
    assert len(areas) == len(set(areas))
    with pytest.raises(ConfigError):
        parse(["online=1"])


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_on_terminals_and_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    raw = [
        Finding("disk", "problem", "full \x1b[2J of\nit", "rm [bold] things"),
        Finding("cpu", "ok", "two"),
    ]
    found = cleaned(raw, Redactor({}))
    terminal = Tty()
    show(found, Console(file=terminal, width=60, force_terminal=True))
    drawn = terminal.getvalue()
    assert "\x1b[" in drawn
    assert "\x1b[2J" not in drawn
    assert "rm [bold] things" in drawn  # no markup
    pipe = io.StringIO()
    show(found, Console(file=pipe, width=60))
    assert pipe.getvalue() == (
        "problem disk          full [2J of it\n"
        "                      -> rm [bold] things\n"
        "ok      cpu           two\n"
        "1 problems, 0 warnings, 2 findings\n"
    )
    assert json.loads(as_json(found, "1"))["status"] == "problem"


def test_the_time_limit_of_a_check_is_the_tools() -> None:
    """The doctor bounds what it calls as tools are bounded; this holds the two together."""
    assert base.run_bounded(lambda: 3, 5) == 3
