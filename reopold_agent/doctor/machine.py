"""Checks the machine: limits, memory, disks, clock and the Ray cluster against the run's needs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from reopold_agent.common.memory import CGROUP, usable_memory
from reopold_agent.config import TrainConfig
from reopold_agent.doctor.base import Finding, Status
from reopold_agent.doctor.gpu import ask_torch
from reopold_agent.errors import ConfigError
from reopold_agent.plan.compose import plan_run
from reopold_agent.plan.hardware import GIB, Gpu, find_gpu
from reopold_agent.policies.architecture import Architecture, find_architecture

_OPEN_FILES = 4096
_SHARED_MEMORY = 1 * GIB


def limits(config: TrainConfig) -> Iterator[Finding]:
    """Checks limits of open files, shared memory and CPU threads."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < _OPEN_FILES:
            most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
            yield Finding("open files", "warning", f"at most {soft} (can be raised to {most}); "
                          "many environments, pictures and Ray need more",
                          "ulimit -n 65536 in the shell that starts the run")  # fmt: skip
        else:
            yield Finding("open files", "ok", f"at most {soft}")
    yield from _shared_memory(config)
    yield from _threads(config)


def _shared_memory(config: TrainConfig) -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total
    names = config.policy.names
    needed = config.engine.name == "verl" or "vllm" in names
    text = f"/dev/shm has {_size(size)}"
    if size >= _SHARED_MEMORY:
        yield Finding("shared memory", "ok", text)
    else:
        yield Finding("shared memory", "problem" if needed else "info",
                      f"{text}; Ray and vLLM need more, and fail with a bus error",
                      "docker run --shm-size=16g (Kubernetes: an emptyDir of medium Memory)",
                      )  # fmt: skip


def _threads(config: TrainConfig) -> Iterator[Finding]:
    present = os.cpu_count() or 1
    usable = usable_cpus()
    text = f"{usable:g} of {present} usable" if usable < present else f"{present}"
    variable = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))  # a list, one per level
    chosen = config.engine.threads or (int(variable.group()) if variable else 0)
    # PyTorch counts the CPUs that it may run on and ignores a quota.
    starts = chosen or len(_affinity())
    if starts > usable:
        threads = max(1, int(usable))
        yield Finding("cpu", "warning", f"{text}, but PyTorch would start {starts} threads, which "
                      "would wait for each other",
                      f"engine.threads={threads} (and OMP_NUM_THREADS={threads})")  # fmt: skip
    else:
        yield Finding("cpu", "ok", f"{text}; PyTorch starts {starts} threads")


def usable_cpus() -> float:
    """Returns how many CPUs this process may use, by affinity and the container's quota."""
    count = float(len(_affinity()))
    try:
        quota, period = (CGROUP / "cpu.max").read_text("utf-8").split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else min(count, int(quota) / int(period))


def clock() -> Iterator[Finding]:
    """Checks that the clock is not behind, which would make every certificate invalid."""
    newest = Path(__file__).stat().st_mtime
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < newest - 86400:
        made = time.strftime("%Y-%m-%d", time.gmtime(newest))
        text = f"it shows {shown}, but these files are of {made}: secure connections will fail"
        yield Finding("clock", "problem", text, "Set it: sudo timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", shown)


def ray_cluster(config: TrainConfig) -> Iterator[Finding]:
    """Checks that the Ray cluster that the run would join answers."""
    address = config.engine.ray_address or os.environ.get("RAY_ADDRESS")
    if not address or config.engine.name != "verl":
        return
    if address in ("auto", "local"):
        yield Finding("ray", "info", f"address '{address}': found or started by Ray itself")
        return
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    text = f"{parts.hostname}:{parts.port}"
    if error := cannot_connect(parts.hostname or "", parts.port or 6379):
        yield Finding("ray", "problem", f"no cluster at {text}: {error}",
                      "ray start --head --port=6379 on its first machine, or unset RAY_ADDRESS "
                      "and engine.ray_address to start one here")  # fmt: skip
    else:
        yield Finding("ray", "ok", f"something answers at {text}")


def cannot_connect(host: str, port: int, seconds: float = 5.0) -> str:
    """Returns why no connection can be made; empty if it can."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def disks(
    config: TrainConfig, run: Path, downloads: Sequence[tuple[str, float]]
) -> Iterator[Finding]:
    """Checks that the run folder is writable, and that checkpoints and downloads fit on the disks.

    Args:
        config: the run's configuration.
        run: its folder, which need not exist.
        downloads: names and bytes of models that must be downloaded.
    """
    folder = existing(run)
    if error := cannot_write(folder):
        yield Finding("run folder", "problem", f"{folder} cannot be written: {error}",
                      "hydra.run.dir=DIR for another folder")  # fmt: skip
    student = None if ask_torch().error else _architecture(config.model.student.path)
    free = shutil.disk_usage(folder).free
    needed = 0.0 if student is None else checkpoint_bytes(config, student)
    count = config.checkpoint.keep + 1
    text = f"{_size(free)} free at {folder}"
    if student is None:
        yield Finding("disk", "info", f"{text}; the model's size is unknown")
    else:
        text += f"; checkpoints take about {_size(needed)} ({count} at once, and the final model)"
        yield _room("disk", free, needed, text, "hydra.run.dir=DIR on a larger disk, or "
                    "checkpoint.keep=1")  # fmt: skip
    download = sum(size for _, size in downloads)
    if download:
        cache = hub_cache()
        place = existing(cache)
        if error := cannot_write(place):
            yield Finding("cache", "problem", f"{place} cannot be written: {error}",
                          "export HF_HOME=DIR")  # fmt: skip
        free = shutil.disk_usage(place).free
        names = ", ".join(name for name, _ in downloads)
        text = f"{_size(free)} free at {cache}; about {_size(download)} to download ({names})"
        yield _room("cache", free, download, text, "export HF_HOME=DIR on a larger disk")


def checkpoint_bytes(config: TrainConfig, student: Architecture) -> float:
    """Returns the disk that a run needs at most: kept and next checkpoints, and the final model.

    A checkpoint holds the weights (of LoRA the adapter's), and AdamW's two float32 moments of
    trained weights; verl's holds the weights in Hugging Face layout, too.
    """
    spec = config.model.student
    width = 4 if spec.dtype == "float32" else 2
    weights = width * student.parameters
    trained = 1.0 if spec.lora is None else 0.02  # an adapter of rank 64 has less
    saved = weights if spec.lora is None else 0.02 * weights
    if config.engine.name == "verl":
        saved *= 2
    teacher = config.model.teacher
    follows = teacher is not None and teacher.follow is not None
    each = saved + 8 * trained * student.parameters + (weights if follows else 0)
    return (config.checkpoint.keep + 1) * each + weights


def memory(words: Sequence[str], config: TrainConfig) -> Iterator[Finding]:
    """Compares the memory that the run is planned to need with this machine's.

    Args:
        words: arguments of the command line, for `reopold_agent.plan`.
        config: the run's configuration.
    """
    torch = ask_torch()
    if torch.error:  # importing it here, to count parameters, could end this process
        yield Finding("memory", "info", "not planned: PyTorch does not load")
        return
    on_cpu = config.engine.device == "cpu" or not torch.available
    remote = config.engine.ray_address or os.environ.get("RAY_ADDRESS")
    if config.engine.name == "verl" and not remote and config.engine.device != "cpu":
        each = config.engine.gpus_per_node
        if len(torch.gpus) < each:
            yield Finding("memory", "problem", f"the run needs {each} GPUs on each of "
                          f"{config.engine.nodes} machines; this one has {len(torch.gpus)}",
                          "Use a machine with more, engine.gpus_per_node=N, or a cluster: "
                          "engine.ray_address=HOST:6379")  # fmt: skip
    available = usable_memory() if on_cpu else min(float(g["memory"]) for g in torch.gpus)
    planned_on_cpu = on_cpu and config.engine.name == "local"
    gpu = find_gpu("h100_80gb")
    extra: list[str] = []
    if planned_on_cpu and config.engine.precision == "auto":
        extra = ["engine.precision=float32"]
    if available is not None and (planned_on_cpu or not on_cpu):
        name = "this machine's memory" if planned_on_cpu else "this machine's GPU"
        gpu = replace(gpu, name=name, memory=available)
    yield from _planned([*words, *extra], gpu, planned_on_cpu)


def _planned(words: Sequence[str], gpu: Gpu, cpu: bool) -> Iterator[Finding]:
    try:
        plan = plan_run(words, gpu)
    except ConfigError as error:
        text = str(error).splitlines()[0]
        yield Finding(
            "memory", "info", f"not planned: {text}", "python -m reopold_agent.plan --help"
        )
        return
    needs = [(role.role, *role.peak) for role in plan.memory]
    text = "; ".join(f"{role}, {phase}: {_size(size)}" for role, phase, size in needs)
    text += f" of {_size(gpu.memory)} ({gpu.name})"
    found = [w for w in plan.warnings if not (cpu and "GPU" in w and "does not fit" not in w)]
    severe = [w for w in found if "does not fit" in w or "cannot start" in w]
    if not severe:
        yield Finding("memory", "ok", f"about {text}")
    for warning in found:
        first, _, rest = warning.partition(". ")
        status: Status = "problem" if warning in severe else "warning"
        yield Finding("memory", status, first, rest)


def existing(path: Path) -> Path:
    """Returns the folder, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def cannot_write(folder: Path) -> str:
    """Returns why no file can be created in the folder; empty if one can."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".reopold-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def hub_cache() -> Path:
    """Returns where the hub's client stores its downloads."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _affinity() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)  # macOS


def _architecture(path: str) -> Architecture | None:
    try:
        return find_architecture(path)
    except ConfigError:
        return None


def _room(area: str, free: float, needed: float, text: str, advice: str) -> Finding:
    if free < needed:
        return Finding(area, "problem", f"{text}: not enough", advice)
    if free < 1.2 * needed:
        return Finding(area, "warning", f"{text}: barely enough", advice)
    return Finding(area, "ok", text)


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.0f} MiB"
