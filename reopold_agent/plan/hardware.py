"""GPUs: figures of their data sheets, and the rates that they achieve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reopold_agent.errors import ConfigError, UnknownNameError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU.

    Attributes:
        memory: bytes available to a process.
        flops: peak FLOP/s, dense bfloat16.
        bandwidth: memory bandwidth, bytes/s.
        link: bandwidth to neighbouring GPUs in one direction, bytes/s.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    source: str


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100_80gb", 79.1 * GIB, 989e12, 3.35e12, 450e9, "NVIDIA's H100 SXM data sheet"),
        Gpu("h100_pcie", 79.1 * GIB, 756e12, 2.0e12, 64e9, "NVIDIA's H100 PCIe data sheet"),
        Gpu("h200", 139.8 * GIB, 989e12, 4.8e12, 450e9, "NVIDIA's H200 SXM data sheet"),
        Gpu("a100_80gb", 79.1 * GIB, 312e12, 2.039e12, 300e9, "NVIDIA's A100 SXM data sheet"),
        Gpu("a100_40gb", 39.4 * GIB, 312e12, 1.555e12, 300e9, "NVIDIA's A100 SXM data sheet"),
        Gpu("l40s", 44.4 * GIB, 362e12, 0.864e12, 32e9, "NVIDIA's L40S data sheet"),
        Gpu("rtx_4090", 23.5 * GIB, 165e12, 1.008e12, 32e9, "NVIDIA's Ada whitepaper"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU of the table.

    Raises:
        UnknownNameError: lists the known GPUs.
    """
    if name not in GPUS:
        raise UnknownNameError("GPU", name, sorted(GPUS))
    return GPUS[name]


@dataclass(frozen=True)
class Rate:
    """An assumed or measured figure with its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Rates:
    """Rates that the hardware achieves.

    Attributes:
        train: FLOP/s per GPU of the update.
        score: FLOP/s per GPU of passes without gradient (teacher, old log-probs, prompts).
        bandwidth: bytes/s of memory per GPU in decoding.
        iteration: seconds of a decoding iteration besides memory traffic.
    """

    train: Rate
    score: Rate
    bandwidth: Rate
    iteration: Rate


MFU = 0.411
"""Share of peak FLOP/s in all passes but decoding. Only this and `ITERATION_SECONDS` are fitted, to
one of the paper's five settings (`paper.FITTED_ON`)."""

ITERATION_SECONDS = 0.0236
"""Seconds of a decoding iteration besides memory traffic: scheduler, sampling, kernel launches."""

BANDWIDTH_SHARE = 0.8
"""Assumed share of peak memory bandwidth in decoding. `ITERATION_SECONDS` matters more."""


def assumed_rates(
    gpu: Gpu,
    mfu: float | None = None,
    bandwidth_share: float | None = None,
    iteration_seconds: float | None = None,
) -> Rates:
    """Returns rates of a GPU from its data sheet; arguments replace assumptions.

    Raises:
        ConfigError: a share outside (0, 1], or negative seconds.
    """
    for name, share in (("mfu", mfu), ("bandwidth", bandwidth_share)):
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"{name} is a share of the GPU's peak, in (0, 1]; got {share}")
    if iteration_seconds is not None and iteration_seconds < 0:
        raise ConfigError(f"overhead must not be negative, got {iteration_seconds}")
    fitted = "fitted to the paper's 1.5B mathematics (docs/plan.md)"
    share = MFU if mfu is None else mfu
    why = fitted if mfu is None else "given"
    compute = Rate(share * gpu.flops, f"{share:.3g} of {gpu.flops / 1e12:.0f} TFLOP/s: {why}")
    part = BANDWIDTH_SHARE if bandwidth_share is None else bandwidth_share
    why = "assumed" if bandwidth_share is None else "given"
    traffic = f"{part:.3g} of {gpu.bandwidth / 1e12:.3g} TB/s: {why}"
    seconds = ITERATION_SECONDS if iteration_seconds is None else iteration_seconds
    return Rates(
        train=compute,
        score=compute,
        bandwidth=Rate(part * gpu.bandwidth, traffic),
        iteration=Rate(seconds, fitted if iteration_seconds is None else "given"),
    )
