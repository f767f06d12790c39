"""Saves a trained model whole, and checks that what was written is that model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reopold_agent.common.memory import discard_pages, usable_memory
from reopold_agent.errors import ModelError
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.loading import LoadedModel, ModelSpec, load_model
from reopold_agent.policies.logprobs import token_logprobs
from reopold_agent.policies.lora import without_adapter

_NATS = {torch.float32: 0.01}
_NATS_OF_HALF = 0.5
"""Most that log-probs may differ, on average, after rounding to the dtype of the weights."""


def save_checked(
    model: LoadedModel, folder: Path, ids: Sequence[int], *, dtype: str | None = None
) -> bool:
    """Writes a complete model, with a LoRA adapter merged, and compares it with the trained one.

    Log-probs of a short sequence are computed before anything is merged, and again with the model
    that was read back from the files, whose weights must also equal those in memory. It is read
    back into the CPU's memory, and takes the place of the model there weight by weight. Where that
    memory is too small, the log-probs are those of the model in memory, after merging.

    Args:
        model: cannot be used afterwards.
        folder: where to write; it holds a bad model if this raises.
        ids: the sequence, such as a question and its answer.
        dtype: dtype of the written weights; None keeps the model's.

    Returns:
        Whether the files were read back.

    Raises:
        ModelError: what was written is not the model.
    """
    trained = _logprobs(model.adapter.model, ids)
    model.save(folder, merge=True, dtype=dtype)
    merged = without_adapter(model.adapter.model)
    written = read_back(folder, model.spec, str(merged.dtype).removeprefix("torch."))
    if written is not None:
        _compare_weights(written, merged)
    difference = float(
        (_logprobs(merged if written is None else written, ids) - trained).abs().mean()
    )
    allowed = _NATS.get(merged.dtype, _NATS_OF_HALF)
    if not difference <= allowed:
        raise ModelError(
            f"the saved student is not the trained one: its log-probs differ by {difference:.3g} "
            f"nats on average, more than the {allowed} of rounding"
        )
    return written is not None


def read_back(folder: Path, spec: ModelSpec, dtype: str) -> Any | None:
    """Loads a saved model into the CPU's memory; returns None if that is too small.

    Args:
        folder: has the whole model.
        spec: how the model was loaded before it was trained.
        dtype: dtype of the saved weights.

    Raises:
        ModelError: a file is missing or damaged, or lacks weights.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = usable_memory()
    if free is not None and free < 1.2 * size:
        return None
    plain = replace(spec.saved_in(folder), dtype=dtype)
    return load_model(plain, "saved student", torch.device("cpu")).adapter.model


@torch.no_grad()
def _logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """Returns the log-probs of all ids but the first, on the CPU."""
    adapter = ModelAdapter(model.eval(), None, None)  # without autocast, which would add noise
    ids_BT = torch.tensor([list(ids)], device=adapter.device)
    positions_3BT = torch.arange(len(ids), device=adapter.device).expand(3, 1, -1)
    hidden_BTD = adapter.hidden_states(ids_BT, positions_3BT, [], None)
    logp_N, _ = token_logprobs(hidden_BTD[0, :-1], adapter.head.weight, ids_BT[0, 1:])
    return logp_N.cpu()


def _compare_weights(written: Any, merged: Any) -> None:
    """Compares the weights of two models, and frees the second's as it goes.

    Raises:
        ModelError: some differ.
    """
    found = dict(written.named_parameters(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for name, value in merged.named_parameters(remove_duplicate=False):
        names.setdefault(value, []).append(name)
    differing = []
    for value, same in names.items():
        here = value.detach().to("cpu")
        differing += [n for n in same if n not in found or not torch.equal(found[n], here)]
        # The file's is now in memory in its place: the two models are never held whole. The loaded
        # weights of a file are one mapping, which ends only with the last of them.
        if value.device.type == "cpu" and value.is_contiguous():
            discard_pages(value.data_ptr(), value.nbytes)
        value.data = value.new_empty(0)
    if differing:
        raise ModelError(
            f"the saved student is not the trained one: {len(differing)} weights differ, the first "
            f"is {differing[0]}"
        )
