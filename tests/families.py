"""Tiny random models of every family that sees pictures, with their picture processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
SEEING = tuple(_CLASSES)

_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    # More positions of patches than the pictures have, and fewer: they are interpolated.
    "qwen3_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    },
}


def tiny_config(
    kind: str, tokenizer: Any, vision: dict[str, Any] | None = None, **text: Any
) -> Any:
    """Two or three layers, two heads with one key-value head, a tower of as many blocks.

    ``vision`` and ``text`` replace entries of the two configurations.
    """

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    wide = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    entries: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 64,
        "intermediate_size": 96,
        **wide,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "pad_token_id": token("<|endoftext|>"),
        # Positions in time, rows and columns: in three parts, or in Qwen3-VL by turns.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10.0,
            "mrope_interleaved": kind == "qwen3_vl",
            "mrope_section": [6, 5, 5] if kind == "qwen3_vl" else [4, 6, 6],
        },
    }
    if kind == "qwen3_vl":  # the second DeepStack feature is seen by the third layer
        entries |= {"head_dim": 32, "num_hidden_layers": 3}
    return _CLASSES[kind][0](
        text_config={**entries, **text},
        vision_config={**_TOWERS[kind], "initializer_range": 0.15, **(vision or {})},
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def tiny_model(config: Any, seed: int = 0, attention: str = "sdpa") -> Any:
    """A random model in evaluation mode."""
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _CLASSES[config.model_type][1](config).eval()


def picture_processor(kind: str) -> Qwen2VLImageProcessorPil:
    """What the checkpoints' ``preprocessor_config.json`` say, with small pixel limits."""
    patch = 16 if kind == "qwen3_vl" else 14
    token = (2 * patch) ** 2
    more: dict[str, Any] = {"size": {"shortest_edge": token, "longest_edge": 64 * token}}
    if kind == "qwen3_vl":
        more |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen2VLImageProcessorPil(patch_size=patch, **more)


def save_checkpoint(folder: Path, kind: str, tokenizer: Any, seed: int = 0) -> Path:
    """What `hf download` leaves, with a tiny random model."""
    tiny_model(tiny_config(kind, tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    picture_processor(kind).save_pretrained(folder)
    return folder
