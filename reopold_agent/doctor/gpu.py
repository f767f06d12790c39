"""Checks PyTorch, its GPUs, and torchvision."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from reopold_agent.config import TrainConfig
from reopold_agent.doctor.base import Finding, Status
from reopold_agent.doctor.probes import run_command, run_python
from reopold_agent.plan.hardware import GIB

TORCH_SECONDS = 90.0
"""Importing PyTorch with CUDA from a cold network disk takes up to a minute."""

_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"

_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    there = torch.cuda.is_available()
    gpus = []
    for i in range(torch.cuda.device_count() if there else 0):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": about.name, "memory": total, "free": free,
                     "capability": f"{about.major}.{about.minor}",
                     "bfloat16": about.major >= 8 or torch.version.hip is not None})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "hip": getattr(torch.version, "hip", None), "available": there, "gpus": gpus,
                  "warnings": [str(w.message).splitlines()[0] for w in caught
                           if "CUDA" in str(w.message) or "driver" in str(w.message)]}))
"""


@dataclass(frozen=True)
class Torch:
    """What PyTorch reports about itself and the GPUs it sees; ``error`` if it does not load."""

    error: str = ""
    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    available: bool = False
    gpus: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def ask_torch() -> Torch:
    """Imports PyTorch in a separate process, once."""
    probe = run_python(_TORCH, TORCH_SECONDS)
    if probe.error:
        return Torch(error=probe.error)
    values: dict[str, Any] = json.loads(probe.output.splitlines()[-1])
    lists = {name: tuple(values[name]) for name in ("gpus", "warnings")}
    return Torch(**{**values, **lists})


def is_used(config: TrainConfig) -> bool:
    """Returns whether a run computes on an NVIDIA GPU of this machine."""
    torch = ask_torch()
    return config.engine.device != "cpu" and torch.available and torch.cuda is not None


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: whether it is present, its version, and a line about each GPU."""

    present: bool
    version: str = ""
    gpus: tuple[str, ...] = ()
    error: str = ""


@lru_cache(maxsize=1)
def ask_driver() -> Driver:
    """Asks ``nvidia-smi``, or the kernel without it, once."""
    in_kernel = _DRIVER.read_text("utf-8", "replace") if _DRIVER.is_file() else ""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", in_kernel)
    version = found.group(1) if found else ""
    if shutil.which("nvidia-smi") is None:
        return Driver(bool(in_kernel), version)
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    probe = run_command(["nvidia-smi", query, "--format=csv,noheader"], 20)
    if probe.error:
        return Driver(bool(in_kernel), version, error=probe.error)
    gpus = tuple(line.strip() for line in probe.output.splitlines() if line.strip())
    return Driver(bool(gpus), gpus[0].rpartition(",")[2].strip() if gpus else version, gpus)


def torch_and_gpus(config: TrainConfig | None) -> Iterator[Finding]:
    """Checks that PyTorch loads and sees the GPUs of this machine.

    Args:
        config: the run's configuration, which may require a GPU.
    """
    torch, driver = ask_torch(), ask_driver()
    if torch.error:
        text = f"PyTorch does not load: {torch.error}"
        yield Finding("torch", "problem", text, "pip install --force-reinstall torch")
        return
    build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPU only"
    name = f"torch {torch.version} ({build})"
    if driver.error:
        yield Finding("gpu", "warning", f"nvidia-smi fails: {driver.error}",
                      "The driver and its tools may have different versions: restart the machine "
                      "or container, or reinstall the driver.")  # fmt: skip
    device = "" if config is None else config.engine.device
    if torch.available:
        yield Finding("torch", "ok", f"{name}, driver {driver.version or 'of unknown version'}")
        yield from _each_gpu(torch, config)
    elif torch.cuda and driver.present:
        yield Finding(
            "torch",
            "problem",
            f"{name} cannot use the GPU ({'; '.join(torch.warnings) or 'for an unknown reason'}); "
            f"driver {driver.version or 'of unknown version'}",
            f"Update NVIDIA's driver for CUDA {torch.cuda}, or install a torch for this driver: "
            "https://pytorch.org/get-started/locally. In a container: docker run --gpus all",
        )
    elif driver.present:
        shown = "; ".join(driver.gpus) or f"driver {driver.version}"
        yield Finding(
            "torch",
            "problem",
            f"{name} cannot use the NVIDIA GPU of this machine ({shown})",
            "pip install --force-reinstall torch (from PyPI, which is built for CUDA)",
        )
    elif device.startswith("cuda"):
        yield Finding("torch", "problem", f"{name}: engine.device={device}, but "
                      "there is no GPU", "Use engine.device=auto")  # fmt: skip
    elif torch.cuda:
        yield Finding(
            "torch",
            "info",
            f"{name}, but no GPU: the CPU build would be several GB smaller",
            # torchvision must come from the same index.
            f"pip install --force-reinstall torch torchvision {_CPU_INDEX}",
        )
    else:
        yield Finding("torch", "ok", f"{name}; no GPU here")


def _each_gpu(torch: Torch, config: TrainConfig | None) -> Iterator[Finding]:
    precision = "auto" if config is None else config.engine.precision
    for number, gpu in enumerate(torch.gpus):
        size = f"{gpu['memory'] / GIB:.0f} GiB, {gpu['free'] / GIB:.0f} free"
        text = f"GPU {number}: {gpu['name']}, {size}, compute capability {gpu['capability']}"
        if gpu["free"] < 0.8 * gpu["memory"]:
            yield Finding("gpu", "warning", f"{text}: others use it", "See nvidia-smi.")
        elif gpu["bfloat16"] or precision == "float32":
            yield Finding("gpu", "ok", text)
        else:
            yield Finding("gpu", "warning", f"{text}: it does not support bfloat16, the default "
                          "on GPUs", "Set engine.precision=float32 and model dtypes to float32 or "
                          "float16")  # fmt: skip


def torchvision(config: TrainConfig | None) -> Iterator[Finding]:
    """Checks that torchvision, if installed, was built for this torch and loads."""
    try:
        version = metadata.version("torchvision")
        lines = metadata.requires("torchvision") or []
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        yield Finding("torchvision", "info", "not installed; only vLLM and video files need it")
        return
    probe = run_python(
        "import torch, torchvision; torchvision.ops.nms; print(torchvision.__version__)",
        TORCH_SECONDS,
    )
    required = next((str(n.specifier) for n in map(Requirement, lines) if n.name == "torch"), "")
    if not probe.error:
        yield Finding("torchvision", "ok", f"{version} loads with torch {torch}")
        return
    pair = f"{version} (built for torch{required}) with torch {torch}"
    status: Status = "warning"
    if config is not None and (config.engine.name == "verl" or _uses_vllm(config)):
        status = "problem"
    index = f" {_CPU_INDEX}" if "+cpu" in torch else ""
    yield Finding(
        "torchvision",
        status,
        f"{pair} does not load: {probe.error}",
        f"Install both from the same index: pip install --force-reinstall torch torchvision{index}",
    )


def _uses_vllm(config: TrainConfig) -> bool:
    return "vllm" in config.policy.names
