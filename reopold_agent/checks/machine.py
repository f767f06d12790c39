"""The machine: limits, memory, disks, clock, the Ray cluster, and room for what the run needs."""

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

from reopold_agent.checks.base import Finding, Status
from reopold_agent.checks.gpu import ask_torch
from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.plan import plan_run
from reopold_agent.planning.architecture import Architecture, find_architecture
from reopold_agent.planning.hardware import GIB, Gpu, find_gpu

_CGROUP = Path("/sys/fs/cgroup")
_OPEN_FILES = 4096
_SHARED_MEMORY = 1 * GIB


def limits(config: TrainConfig) -> Iterator[Finding]:
    """Open files, shared memory, CPU threads."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < _OPEN_FILES:
            most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
            yield Finding("open files", "warning", f"at most {soft} (it may be raised to {most}); "
                          "many environments, pictures and Ray want more",
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
    names = {config.policy.student["name"], config.policy.teacher["name"]}
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
    there = os.cpu_count() or 1
    ours = usable_cpus()
    text = f"{ours:g} of {there} are ours" if ours < there else f"{there}"
    said = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))  # a list, one per level
    chosen = config.engine.threads or (int(said.group()) if said else 0)
    # PyTorch counts the processes it may be placed on, and knows nothing of a quota.
    starts = chosen or len(_affinity())
    if starts > ours:
        threads = max(1, int(ours))
        yield Finding("cpu", "warning", f"{text}, but PyTorch would start {starts} threads, which "
                      "then wait for each other",
                      f"engine.threads={threads} (and OMP_NUM_THREADS={threads})")  # fmt: skip
    else:
        yield Finding("cpu", "ok", f"{text}; PyTorch starts {starts} threads")


def usable_cpus() -> float:
    """CPUs that this process may use: affinity and the container's quota."""
    count = float(len(_affinity()))
    try:
        quota, period = (_CGROUP / "cpu.max").read_text("utf-8").split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else min(count, int(quota) / int(period))


def usable_memory() -> float | None:
    """Bytes of memory that are free for this process; None where that is not said."""
    free: float | None = None
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        most = (_CGROUP / "memory.max").read_text("utf-8").strip()
        used = (_CGROUP / "memory.current").read_text("utf-8").strip()
    except (OSError, StopIteration):
        return free
    return free if most == "max" else min(free, float(most) - float(used))


def clock() -> Iterator[Finding]:
    """A clock that is years behind makes every certificate invalid."""
    newest = Path(__file__).stat().st_mtime
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < newest - 86400:
        made = time.strftime("%Y-%m-%d", time.gmtime(newest))
        text = f"it says {shown}, but these files are of {made}: secure connections fail"
        yield Finding("clock", "problem", text, "Set it: sudo timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", shown)


def ray_cluster(config: TrainConfig) -> Iterator[Finding]:
    """Whether the Ray cluster that the run would join answers."""
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
    """Why no connection can be made; empty if it can."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def disks(
    config: TrainConfig, run: Path, downloads: Sequence[tuple[str, float]]
) -> Iterator[Finding]:
    """Whether the run folder can be written and holds the checkpoints, the cache the downloads.

    Args:
        config: the run's.
        run: its folder, which need not exist.
        downloads: model and bytes of what is not here yet.
    """
    folder = existing(run)
    if error := cannot_write(folder):
        yield Finding("run folder", "problem", f"{folder} cannot be written: {error}",
                      "hydra.run.dir=DIR for another folder")  # fmt: skip
    student = _architecture(config.model.student.path)
    free = shutil.disk_usage(folder).free
    needed = 0.0 if student is None else checkpoint_bytes(config, student)
    count = config.checkpoint.keep + 1
    text = f"{_size(free)} free at {folder}"
    if student is None:
        yield Finding("disk", "info", f"{text}; the model's size is not known")
    else:
        text += f"; checkpoints take about {_size(needed)} ({count} at once, and the final model)"
        yield _room("disk", free, needed, text, "hydra.run.dir=DIR on a larger disk, or "
                    "checkpoint.keep=1")  # fmt: skip
    wanted = sum(size for _, size in downloads)
    if wanted:
        cache = hub_cache()
        place = existing(cache)
        if error := cannot_write(place):
            yield Finding("cache", "problem", f"{place} cannot be written: {error}",
                          "export HF_HOME=DIR")  # fmt: skip
        free = shutil.disk_usage(place).free
        names = ", ".join(name for name, _ in downloads)
        text = f"{_size(free)} free at {cache}; about {_size(wanted)} to download ({names})"
        yield _room("cache", free, wanted, text, "export HF_HOME=DIR on a larger disk")


def checkpoint_bytes(config: TrainConfig, student: Architecture) -> float:
    """Disk that a run needs at its fullest: the checkpoints that are kept, the next one, and the
    student at the end. A checkpoint is the weights and AdamW's two float32 moments of what
    learns; verl's has the weights in Hugging Face's layout too."""
    spec = config.model.student
    width = 4 if spec.dtype == "float32" else 2
    weights = width * student.parameters
    learns = 1.0 if spec.lora is None else 0.02  # an adapter of rank 64 has less
    saved = weights if spec.lora is None else 0.02 * weights
    if config.engine.name == "verl":
        saved = 2 * weights
    teacher = config.model.teacher
    follows = teacher is not None and teacher.follow is not None
    each = saved + 8 * learns * student.parameters + (weights if follows else 0)
    return (config.checkpoint.keep + 1) * each + weights


def memory(words: Sequence[str], config: TrainConfig) -> Iterator[Finding]:
    """The run's memory, as planned, against what there is.

    Args:
        words: of the command line, for `reopold_agent.plan`.
        config: the run's.
    """
    torch = ask_torch()
    on_cpu = config.engine.device == "cpu" or not torch.available
    remote = config.engine.ray_address or os.environ.get("RAY_ADDRESS")
    if config.engine.name == "verl" and not remote and config.engine.device != "cpu":
        each = config.engine.gpus_per_node
        if len(torch.gpus) < each:
            yield Finding("memory", "problem", f"the run wants {each} GPUs on each of "
                          f"{config.engine.nodes} machines; here are {len(torch.gpus)}",
                          "A machine with more, engine.gpus_per_node=N, or the address of a "
                          "cluster: engine.ray_address=HOST:6379")  # fmt: skip
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
    grave = [w for w in found if "does not fit" in w or "cannot start" in w]
    if not grave:
        yield Finding("memory", "ok", f"about {text}")
    for warning in found:
        first, _, rest = warning.partition(". ")
        status: Status = "problem" if warning in grave else "warning"
        yield Finding("memory", status, first, rest)


def existing(path: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def cannot_write(folder: Path) -> str:
    """Why a file cannot be made in the folder; empty if it can."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".reopold-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def hub_cache() -> Path:
    """Where the hub's client keeps what it downloads."""
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
        return Finding(area, "warning", f"{text}: hardly enough", advice)
    return Finding(area, "ok", text)


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.0f} MiB"
