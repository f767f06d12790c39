"""Transfers the trainer's weights to a running vLLM engine on the same machine.

Weights travel as safetensors files in shared memory, one bucket at a time: no process holds a
second copy of the model, and nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reopold_agent.errors import ModelError

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
        ModelError: the model has an adapter other than LoRA.
    """
    with tempfile.TemporaryDirectory(dir=_folder(2 * size), prefix="reopold-weights-") as folder:
        path = Path(folder) / "bucket.safetensors"
        for bucket in _buckets(model, dtype, size):
            save_file(bucket, path)
            yield str(path)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields weights by Hugging Face name (without peft's), with LoRA adapters added to their base.

    Raises:
        ModelError: the model has an adapter other than LoRA, or one that unties its embeddings.
    """
    if not hasattr(model, "get_base_model"):
        yield from model.named_parameters()
        return
    base: Any = model
    base = base.get_base_model()
    adapted = {
        name: module for name, module in base.named_modules() if hasattr(module, "base_layer")
    }
    _check_adapter(base, adapted)
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


def _check_adapter(base: Any, adapted: Mapping[str, Any]) -> None:
    """Checks that base weights and `get_delta_weight` give all that the adapter computes."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if embedding in adapted.values() and embedding.base_layer.weight is head.weight:
        raise ModelError(
            "policy.student.name=vllm: model.student.lora changes the input embedding, which is "
            "the output embedding too, and vLLM keeps one for both.\n"
            "Leave embed_tokens out of target_modules, or use policy.student.name=transformers."
        )
    others = [name for name, module in base.named_modules() if hasattr(module, "original_module")]
    others += [
        name
        for name, module in adapted.items()
        if any(getattr(module, "lora_variant", {}))
        or any(getattr(module, "lora_bias", {}).values())
    ]
    if others:
        raise ModelError(
            f"policy.student.name=vllm takes plain LoRA only, and {others[0]} is trained in "
            "another way.\nLeave modules_to_save, use_dora and lora_bias out of "
            "model.student.lora, or use policy.student.name=transformers."
        )


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
