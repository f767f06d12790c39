"""Settings of a vLLM engine, and their conversion to vLLM's own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from reopold_agent.common.processes import SWITCH
from reopold_agent.errors import ConfigError

_WORKER = "reopold_agent.policies.vllm.worker.WorkerExtension"


@dataclass(frozen=True)
class VllmSettings:
    """``policy=vllm``; one engine serves one role.

    Attributes:
        dtype: dtype of the computation; null follows ``engine.precision``.
        gpu_memory_utilization: share of the GPU's memory for the engine, including weights.
        kv_cache_gib: size of the key-value cache; null takes what the share above leaves on a
            GPU, and 1 GiB on a CPU.
        max_model_len: longest sequence in tokens; null uses the model's own limit. Longer
            episodes are dropped and counted.
        tensor_parallel_size: GPUs that share the model.
        gpus: which GPUs, as in CUDA_VISIBLE_DEVICES ("1", "2,3"); null uses the process's own.
        enforce_eager: run without compilation and CUDA graphs; null does so on a CPU only.
        max_num_seqs: turns (or scored trajectories) computed together.
        max_images: most pictures of one sequence.
        score_chunk: most tokens of one forward pass; longer sequences are read in parts. In
            scoring it bounds the full-vocabulary log-probs that vLLM holds (float32, tokens x
            vocabulary; vllm #5907). On a CPU a part is at least one whole sequence.
        seed: seed of the engine, for samples of requests without their own; null: that of the run.
        seeded_requests: give each turn a seed of its own, so that its samples depend on no other
            turn; null: on a CPU. On a GPU vLLM would draw such turns' tokens one by one, about
            2.5 ms a step of 256 sequences, and rounding differs between batches anyway.
        seconds: an engine that computes no token for so long has stopped, which ends the run; also
            the time limit of loading weights. There is none on a request or its queue.
        start_seconds: time limit of the start.
        retries: further attempts after a failed request, before the episode is dropped.
        sleep: free GPU memory while the trainer computes (vLLM's sleep mode).
        bucket_mib: most weights in transit at once during synchronisation.
        engine: further settings by vLLM's names (`vllm.EngineArgs`), applied last.
    """

    dtype: str | None = None
    gpu_memory_utilization: float = 0.4
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpus: str | None = None
    enforce_eager: bool | None = None
    max_num_seqs: int = 64
    max_images: int = 16
    score_chunk: int = 2048
    seed: int | None = None
    seeded_requests: bool | None = None
    seconds: float = 600.0
    start_seconds: float = 900.0
    retries: int = 1
    sleep: bool = False
    bucket_mib: int = 1024
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> bool:
        """Whether each turn has a seed of its own, on this machine."""
        given = self.seeded_requests
        return not torch.cuda.is_available() if given is None else given

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_num_seqs", "max_images", "score_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gpu_memory_utilization", "seconds", "start_seconds", "bucket_mib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.retries < 0:
            raise ConfigError(f"retries must not be negative, got {self.retries}")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(
                f"dtype must be float32, bfloat16, float16 or null, got '{self.dtype}'"
            )


def engine_arguments(
    settings: VllmSettings,
    *,
    path: str,
    revision: str | None,
    dtype: str,
    longest: int,
    has_vision: bool,
    max_pixels: int | None,
    seed: int,
    **more: Any,
) -> dict[str, Any]:
    """Returns keyword arguments of `vllm.EngineArgs`.

    Args:
        settings: settings of the role.
        path, revision: the checkpoint.
        dtype: dtype of the computation unless the settings give one.
        longest: tokens of the longest sequence that the model can read.
        has_vision: whether the model takes pictures.
        max_pixels: pixels of the largest picture; None leaves that to the checkpoint.
        seed: of the engine unless the settings give one.
        more: further arguments, such as ``trust_remote_code``.
    """
    on_cpu = not torch.cuda.is_available()
    kv_cache = settings.kv_cache_gib if not on_cpu or settings.kv_cache_gib else 1.0
    longest = settings.max_model_len or longest
    # vLLM's CPU build cannot rewind a seeded request's random generator, which it does between
    # the parts of a prompt (RuntimeError: CPU Generator does not use offset).
    in_parts = not on_cpu
    arguments: dict[str, Any] = {
        "model": path,
        "revision": revision,
        "dtype": settings.dtype or dtype,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": None if kv_cache is None else int(kv_cache * 2**30),
        "max_model_len": longest,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": max(
            settings.score_chunk, settings.max_num_seqs, 0 if in_parts else longest
        ),
        "seed": seed if settings.seed is None else settings.seed,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": in_parts,
        "enable_sleep_mode": settings.sleep,
        # Otherwise the checkpoint's sampling defaults (top_k, penalties) would apply.
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": _WORKER,
        **more,
    }
    if on_cpu and settings.tensor_parallel_size == 1:
        arguments["distributed_executor_backend"] = "uni"
    if has_vision:
        arguments["limit_mm_per_prompt"] = {"image": settings.max_images, "video": 0}
        # The pictures sent already have their final size. The engine sizes its memory by the
        # largest one, which for Qwen2.5-VL's own limits has 12.8 million pixels.
        most = {} if max_pixels is None else {"max_pixels": max_pixels}
        arguments["mm_processor_kwargs"] = {"do_resize": False, **most}
    return {**arguments, **settings.engine}


@contextmanager
def start_environment(settings: VllmSettings) -> Iterator[None]:
    """Sets environment variables for the start of vLLM's processes, except those the user set."""
    on_cpu = not torch.cuda.is_available()
    defaults = {
        # Forking a process in which PyTorch has threads may hang.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # `make_engine` starts a process in any case. On a CPU vLLM would start one more for the
        # model, to bind OpenMP's threads to cores, which is not useful here.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if on_cpu else "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        SWITCH: "1",
    }
    if on_cpu:
        # Several engines and the trainer share the cores, so none may reserve any.
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    changes = {name: value for name, value in defaults.items() if name not in os.environ}
    if settings.gpus is not None:
        changes["CUDA_VISIBLE_DEVICES"] = settings.gpus
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
