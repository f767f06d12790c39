"""Measures the memory that a training step cannot do without, in a process of its own.

`peers` starts it with two arguments: a student's folder, and a JSON list of each row's tokens. The
last line is JSON, in GiB: ``packages``, with torch, transformers and the tokenizer loaded, and
``activations``, what autograd keeps of the decoder's forward pass for the backward pass.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from reopold_agent.common.memory import resident_bytes, return_freed_memory


def activations(decoder: torch.nn.Module, width: int, lengths: list[int]) -> int:
    """Returns the bytes that autograd keeps of passes over rows, weights left out."""
    weights = {each.untyped_storage().data_ptr() for each in decoder.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors are held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for length in lengths:
            decoder(inputs_embeds=torch.zeros(1, length, width))
    return sum(each.untyped_storage().nbytes() for each in kept.values())


def main(folder: str, lengths: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return_freed_memory()
    found = {"packages": resident_bytes(os.getpid())}
    assert len(tokenizer)  # it was in memory
    config = AutoConfig.from_pretrained(folder)
    sees = hasattr(config, "vision_config")
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    decoder = kind.from_pretrained(folder, dtype=torch.float32).train().get_decoder()
    found["activations"] = activations(decoder, config.get_text_config().hidden_size, lengths)
    print(json.dumps({name: value / 2**30 for name, value in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
