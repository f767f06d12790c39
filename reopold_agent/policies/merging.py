"""Merges a LoRA adapter into the weights that it was trained with."""

from __future__ import annotations

from typing import Any

from torch import nn


def merge_adapter(model: Any) -> Any:
    """Returns the model without its adapter, whose effect is added to the weights in place.

    If input and output embedding are one tensor (``tie_word_embeddings``) and the adapter changes
    only the input's, they become two, in the weights and in the configuration: peft would add the
    change to both.

    Args:
        model: a model wrapped by peft.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(embedding, "base_layer") and embedding.base_layer.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged = model.merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged
