"""Runs inside vLLM's worker processes: masks ids and loads weights in place.

vLLM mixes `WorkerExtension` into its worker class (``worker_extension_cls``) and calls its methods
by name (``collective_rpc``). Both are public interfaces; nothing is patched.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


class WorkerExtension:
    """Methods that vLLM mixes into its worker, which provides ``model_runner``."""

    model_runner: Any

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Keeps weights replaceable, before vLLM loads them."""
        keep_weights_replaceable()
        return super().__new__(cls)

    def mask_ids(self, allowed_ids: int, forbidden_ids: list[int]) -> int:
        """Gives ids probability 0 in all later computations of this model.

        vLLM applies logits processors when it samples, but not to the log-probs of sampled or
        prompt tokens; the mask is therefore applied to the logits themselves.

        Args:
            allowed_ids: size of the tokenizer; further rows of the output embedding are padding.
            forbidden_ids: further ids to mask.

        Returns:
            Number of layers of this model that compute logits.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        places = [m for m in self.model_runner.model.modules() if isinstance(m, LogitsProcessor)]
        for place in places:
            place.register_forward_hook(_Mask(allowed_ids, forbidden_ids))
        return len(places)

    def load_file(self, path: str) -> int:
        """Replaces the weights in a safetensors file, by their Hugging Face names.

        Returns:
            Number of tensors read.
        """
        with safe_open(path, framework="pt", device="cpu") as tensors:
            names = list(tensors.keys())
            with torch.no_grad():
                self.model_runner.model.load_weights(
                    (name, tensors.get_tensor(name)) for name in names
                )
        return len(names)


def keep_weights_replaceable() -> None:
    """Keeps weights replaceable on a CPU; call it in a worker process before vLLM loads a model.

    On a CPU vLLM packs weights for oneDNN after loading and drops the originals, so that they
    could no longer be replaced. This is vLLM's own switch, read when weights are processed.
    """
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False


class _Mask:
    """Forward hook of the layer that computes the logits."""

    def __init__(self, allowed_ids: int, forbidden_ids: list[int]) -> None:
        self._allowed = allowed_ids
        self._forbidden = torch.tensor(forbidden_ids, dtype=torch.int64)

    def __call__(self, module: nn.Module, inputs: Any, logits_NV: Tensor | None) -> Tensor | None:
        if logits_NV is None:  # not on the rank that samples
            return None
        logits_NV[:, self._allowed :] = -torch.inf
        if len(self._forbidden):
            if self._forbidden.device != logits_NV.device:
                self._forbidden = self._forbidden.to(logits_NV.device)
            logits_NV.index_fill_(1, self._forbidden, -torch.inf)
        return logits_NV
