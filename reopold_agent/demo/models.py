"""The demo's two models: Qwen2.5-VL with 0.3 million parameters instead of 3 billion."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH, MERGE = 14, 2
WIDTH = 64


def model_config(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, depth: int = 1
) -> Qwen2_5_VLConfig:
    """The configuration for a tokenizer, with so many layers for text and for pictures.

    Two values differ from Qwen's for a reason: multimodal RoPE gives a picture's width the lowest
    frequencies, and with Qwen's base of a million neighbouring columns of a 4 x 4 grid look the
    same, hence a base of 10; an initial spread of 0.02 hardly starts at this width, hence 0.1.
    """

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]

    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10.0,
            "mrope_section": [4, 6, 6],
        },
    }
    vision: dict[str, Any] = {
        "depth": depth,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(depth)),
        "initializer_range": 0.1,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, layers: int = 2, depth: int = 1
) -> Any:
    """An untrained `Qwen2_5_VLForConditionalGeneration`; leaves the global random state alone."""
    # Classes of transformers are untyped to mypy when called; one Any says so for all of them.
    model_class: Any = Qwen2_5_VLForConditionalGeneration
    generation_class: Any = GenerationConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_config(tokenizer, layers=layers, depth=depth))
    model.generation_config = generation_class(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
    )
    return model


def image_processor(
    max_pixels: int = 112 * 112, *, mean: float | None = None, spread: float | None = None
) -> Qwen2VLImageProcessorPil:
    """Qwen2-VL's own picture processor (PIL, no torchvision) with limits that fit the demo.

    Args:
        max_pixels: upper limit of a picture's height x width.
        mean, spread: of pixels from 0 to 1, all channels alike; None for CLIP's.
    """
    statistics: dict[str, Any] = {}
    if mean is not None:
        statistics["image_mean"] = [mean] * 3
    if spread is not None:
        statistics["image_std"] = [spread] * 3
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": 56 * 56, "longest_edge": max_pixels},
        **statistics,
    )
