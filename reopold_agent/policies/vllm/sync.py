"""The trainer's weights into a running vLLM engine on the same machine.

Weights travel as safetensors files in shared memory, one bucket at a time: no process holds a
second copy of the model, and nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reopold_agent.errors import ModelError

_SHARED_MEMORY = Path("/dev/shm")


def written_weights(model: nn.Module, dtype: torch.dtype, size: int) -> Iterator[str]:
    """Writes a model's weights bucket by bucket, LoRA adapters merged; the model is not changed.

    Args:
        model: the trainer's.
        dtype: of floating-point weights in the files.
        size: bytes of a bucket; a larger tensor is a bucket of its own.

    Yields:
        The path of a safetensors file; asking for the next one overwrites it.

    Raises:
        ModelError: an adapter of another kind than LoRA.
    """
    with tempfile.TemporaryDirectory(dir=_folder(2 * size), prefix="reopold-weights-") as folder:
        path = Path(folder) / "bucket.safetensors"
        for bucket in _buckets(model, dtype, size):
            save_file(bucket, path)
            yield str(path)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names (Hugging Face's, without peft's) and values, LoRA adapters added to their base.

    Raises:
        ModelError: an adapter of another kind than LoRA.
    """
    if not hasattr(model, "get_base_model"):
        yield from model.named_parameters()
        return
    base: Any = model
    base = base.get_base_model()
    adapted = {
        name: module for name, module in base.named_modules() if hasattr(module, "base_layer")
    }
    for name, parameter in base.named_parameters():
        layer = next((each for each in adapted if name.startswith(f"{each}.")), None)
        if layer is None:
            yield name, parameter
            continue
        rest = name.removeprefix(f"{layer}.")
        if not rest.startswith("base_layer."):
            continue  # the adapter itself
        value = parameter
        if rest == "base_layer.weight":
            module = adapted[layer]
            if not hasattr(module, "get_delta_weight"):
                raise ModelError(f"cannot merge the adapter of {layer} for vLLM; use LoRA")
            value = parameter + sum(
                module.get_delta_weight(adapter) for adapter in module.active_adapters
            )
        yield f"{layer}.{rest.removeprefix('base_layer.')}", value


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


def _folder(wanted: int) -> str | None:
    """Shared memory where it has room (containers often have 64 MiB), else the usual place."""
    usable = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    if usable and shutil.disk_usage(_SHARED_MEMORY).free >= wanted:
        return str(_SHARED_MEMORY)
    return None
