"""Untrained models of 0.3 to 0.4 million parameters: Qwen2.5-VL for pictures, Qwen2 for text."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH, MERGE = 14, 2
WIDTH: Final = 64
TEXT_WIDTH: Final = 96


def model_config(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, depth: int = 1
) -> Qwen2_5_VLConfig:
    """Returns a configuration with ``layers`` layers for text and ``depth`` for pictures.

    Two values differ from Qwen's. Multimodal RoPE gives a picture's width the lowest frequencies,
    and with Qwen's base of a million neighbouring columns of a 4 x 4 grid look the same; the base
    is 10. Weights with Qwen's initial spread of 0.02 hardly train at this width; it is 0.1.
    """
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
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": _token_id(tokenizer, "<|endoftext|>"),
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
        image_token_id=_token_id(tokenizer, "<|image_pad|>"),
        video_token_id=_token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_token_id(tokenizer, "<|vision_end|>"),
    )


def new_vision_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, layers: int = 2, depth: int = 1
) -> Any:
    """Makes an untrained `Qwen2_5_VLForConditionalGeneration`."""
    config = model_config(tokenizer, layers=layers, depth=depth)
    return _initialised(Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed)


def new_text_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, width: int = TEXT_WIDTH, layers: int = 2
) -> Any:
    """Makes an untrained `Qwen2ForCausalLM`; ``width`` is a multiple of 32.

    Its initial spread is 0.1, as in `model_config`. A RoPE base of 1,000 fits sequences of at most
    some hundred tokens.
    """
    config_class: Any = Qwen2Config  # untyped to mypy when called
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,  # of 32: vLLM's CPU kernels do not support heads of 24
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=_token_id(tokenizer, "<|im_end|>"),
        pad_token_id=_token_id(tokenizer, "<|endoftext|>"),
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return _initialised(Qwen2ForCausalLM, config, tokenizer, seed)


def _token_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]


def _initialised(
    model_class: Any, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Any:
    """Makes a model with seeded weights, without touching the global random state."""
    generation_class: Any = GenerationConfig  # untyped to mypy when called
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = generation_class(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=_token_id(tokenizer, "<|endoftext|>"),
    )
    return model


def image_processor(
    max_pixels: int = 112 * 112, *, mean: float | None = None, spread: float | None = None
) -> Qwen2VLImageProcessorPil:
    """Makes Qwen2-VL's picture processor (PIL, no torchvision) with limits that fit the demo.

    Args:
        max_pixels: upper limit of a picture's height x width.
        mean: of pixels from 0 to 1, the same for all channels; None for CLIP's.
        spread: their standard deviation; None for CLIP's.
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
