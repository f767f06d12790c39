"""Transfers the trainer's weights to a running vLLM engine on the same machine.

Weights travel as safetensors files in shared memory, one bucket at a time: no process holds a
second copy of the model, and nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reopold_agent.policies.lora import merged_weights

_SHARED_MEMORY = Path("/dev/shm")


def written_weights(model: nn.Module, dtype: torch.dtype, size: int) -> Iterator[str]:
    """Writes a copy of a model's weights, with LoRA adapters merged, bucket by bucket.

    Args:
        model: the trainer's model.
        dtype: dtype of floating-point weights in the files.
        size: bytes of a bucket; a larger tensor is a bucket of its own.

    Yields:
        The path of a safetensors file; asking for the next one overwrites it.

    Raises:
        ModelError: the model has an adapter that vLLM cannot follow.
    """
    with tempfile.TemporaryDirectory(dir=_folder(2 * size), prefix="reopold-weights-") as folder:
        path = Path(folder) / "bucket.safetensors"
        for bucket in _buckets(model, dtype, size):
            save_file(bucket, path)
            yield str(path)


@torch.no_grad()
def _buckets(model: nn.Module, dtype: torch.dtype, size: int) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    used = 0
    for name, value in merged_weights(model):
        sent = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        if bucket and used + sent.nbytes > size:
            yield bucket
            bucket, used = {}, 0
        bucket[name] = sent.contiguous()
        used += sent.nbytes
    if bucket:
        yield bucket


def _folder(size: int) -> str | None:
    """Returns shared memory if it has room (containers often have 64 MiB); None: the default."""
    usable = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    if usable and shutil.disk_usage(_SHARED_MEMORY).free >= size:
        return str(_SHARED_MEMORY)
    return None
