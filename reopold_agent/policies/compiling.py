"""Compiles the parts of a model's layers that lie between attentions, with ``torch.compile``.

These are the norms and the feed-forward networks: chains of element-wise operations around large
products, each of which reads and writes all activations when it runs by itself. Attention stays as
it is: it calls kernels of its own, and finds packed rows in Python.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reopold_agent.errors import ConfigError, first_line

_VARIANTS = 64
"""Most forms in which PyTorch compiles one class of module: with and without gradient, rows of one
token or of many, student and teacher. Beyond, it would go on uncompiled; its default is 8."""


def compile_layers(model: nn.Module) -> int:
    """Compiles what lies between the attentions of a model's layers, each at its first use.

    Call it after the model has got its LoRA adapter. A copy of the model is not compiled.

    Returns:
        The number of modules that are compiled.
    """
    # The older of its two names: PyTorch 2.6 knows no other.
    torch._dynamo.config.cache_size_limit = _VARIANTS
    parts = [
        part
        for layers in model.modules()
        if isinstance(layers, nn.ModuleList)
        for layer in layers
        for part in layer.children()
        if "Attention" not in type(part).__name__
    ]
    for part in parts:
        part.compile(dynamic=True)
    return len(parts)


def check_compiler(device: torch.device) -> None:
    """Compiles a small function.

    Raises:
        ConfigError: it cannot be compiled on the device.
    """
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, whichever it is
        what = "Triton" if device.type == "cuda" else "a C++ compiler (g++)"
        raise ConfigError(
            f"engine.compile=true cannot compile here: {first_line(error)}\n"
            f"Install {what}, or leave engine.compile out."
        ) from error


def _small(values: Tensor) -> Tensor:
    return values.sigmoid() * values
