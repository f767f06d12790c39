"""Training runs for tests: in this process, or as the command that a user types."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

from reopold_agent.cli.groups import searched
from reopold_agent.config import TrainConfig
from reopold_agent.train.mixture import mixed_words
from reopold_agent.train.settings import load_config
from reopold_agent.train.setup import LocalEngine

SMALL = (
    "steps=4",
    "batch.prompts=4",
    "batch.mini_batch=4",
    "rollout.max_turns=2",
    "rollout.max_turn_tokens=40",
    "rollout.max_response_tokens=110",
    "evaluation.tasks=3",
    "evaluation.curve_tasks=2",
    "evaluation.every=2",
    "evaluation.max_turns=2",
    "engine.device=cpu",
    "engine.threads=1",
)
"""The embedded default in a few seconds. On the CPU, where results repeat bit for bit."""

TIMINGS = ("time/", "tokens_per_second", "seconds", "env_seconds")


def load_script(file: Path) -> Any:
    """Returns a program of the repository, such as a benchmark, as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def composed(*overrides: str) -> tuple[TrainConfig, dict[str, Any]]:
    """Composes the configuration as ``python -m reopold_agent.train`` does."""
    words = mixed_words(searched(overrides))
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return load_config(compose("train", words))


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """A small run in this process; returns its summary."""
    words = [*SMALL, *overrides]
    config, raw = composed(*words)
    return LocalEngine(config, raw, folder, words).run()


def environment() -> dict[str, str]:
    """A user's shell: no colours forced, ``python`` is this one, no network."""
    plain = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "REOPOLD_DEBUG")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{plain.get('PATH', '')}"
    return {**plain, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_plugin(folder: Path, name: str, entry_points: str, **modules: str) -> Path:
    """A package as pip would leave it in ``folder``."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
    return folder


def words(folder: Path, *overrides: str) -> list[str]:
    """Returns the training command as a list of words."""
    module = [sys.executable, "-m", "reopold_agent.train"]
    return [*module, *last_of_each(*SMALL, *overrides), f"hydra.run.dir={folder}"]


def last_of_each(*overrides: str) -> list[str]:
    """Returns overrides of which the last of a setting replaces the others.

    A command with two values for one setting is refused.
    """
    chosen = {each.partition("=")[0].lstrip("+"): each for each in overrides}
    return list(chosen.values())


def command(
    arguments: Sequence[str] | str, cwd: Path, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; returns the text of both streams."""
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        shell=isinstance(arguments, str),
        **settings,
    )


def start(arguments: Sequence[str], cwd: Path, **settings: Any) -> subprocess.Popen[str]:
    """Starts a command in a new process."""
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def run_on_ray(arguments: Sequence[str], seconds: float, **variables: str) -> str:
    """Runs a command that starts Ray, with more environment variables; returns what it said.

    Nothing of it stays: its processes live in sessions of their own.
    """
    process = subprocess.Popen(
        arguments,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        stop_ray()
    assert process.returncode == 0, said[-4000:]
    return said


def stop_ray() -> None:
    """Ends all processes of Ray on this machine."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"]
    subprocess.run(command, check=False, capture_output=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Polls; fails when the process ends first or nothing happens in two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            out, error = process.communicate()
            raise AssertionError(f"it ended early with {process.returncode}:\n{out}\n{error}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError("nothing happened in two minutes")
        time.sleep(0.01)


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; none while it does not exist."""
    if not path.exists():
        return []
    whole = path.read_text("utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def train_rows(folder: Path) -> list[dict[str, Any]]:
    """The training steps of ``metrics.jsonl``."""
    return [row for row in lines(folder / "metrics.jsonl") if row["kind"] == "train"]


def without_timings(value: Any) -> Any:
    """The same rows without what depends on the clock."""
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if not k.startswith(TIMINGS)}
    if isinstance(value, list):
        return [without_timings(item) for item in value]
    return value


def results(folder: Path) -> dict[str, Any]:
    """Returns everything that a run computed, except timings."""
    return {
        name: without_timings(lines(folder / name))
        for name in ("metrics.jsonl", "trajectories.jsonl")
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a folder in Hugging Face layout."""
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Asserts that two sets of weights are equal bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ: {different[:3]}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file of a run except its log and lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("train.log", ".lock")
    }
