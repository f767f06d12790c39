"""Attention over packed rows: several rows one after the other in one sequence, without padding.

Padded rows spend memory and time on padding: with lengths that are spread exponentially, more than
on the rows.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from reopold_agent.config import EngineConfig
from reopold_agent.errors import ConfigError


def packed_kernel(engine: EngineConfig, device: str) -> str | None:
    """Returns the attention kernel of a run's packed rows; None where it pads them.

    Args:
        engine: the settings ``packed`` and ``attention``.
        device: type of the device that computes, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the kernel that is asked for is not installed, or does not run there.
    """
    asked, on_gpu = engine.attention, device == "cuda"
    if asked in _GPU_KERNELS:
        package, advice = _GPU_KERNELS[asked]
        if not on_gpu:
            raise ConfigError(
                f"engine.attention={asked} needs an NVIDIA GPU, and this run computes on a CPU.\n"
                "Use engine.attention=auto, which takes sdpa there."
            )
        if asked not in installed_kernels():
            raise ConfigError(
                f"engine.attention={asked} needs {package}, which is not installed.\n"
                f"Run {advice}, or use engine.attention=auto, which takes what there is."
            )
    packed = on_gpu if engine.packed is None else engine.packed
    if not packed:
        return None
    if asked != "auto":
        return asked
    return installed_kernels()[0] if on_gpu else "sdpa"


def installed_kernels() -> list[str]:
    """Returns the kernels of packed rows that a GPU can use here, fastest first."""
    kernels = ["sdpa"]
    if torch.__version__ >= "2.11":  # 2.10's has neither scale nor window
        kernels.insert(0, "varlen")
    if find_spec("flash_attn") is not None:
        kernels.insert(0, "flash_attention_2")
    return kernels


_GPU_KERNELS = {
    "flash_attention_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "varlen": ("PyTorch 2.11 or later", "pip install -U torch"),
}
"""What each kernel that needs a GPU needs besides, and how to get that."""
