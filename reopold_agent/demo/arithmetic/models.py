"""The embedded mathematics' models: `Qwen2ForCausalLM` with 0.3 million parameters."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WIDTH: Final = 96


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """An untrained model for the tokenizer; leaves the global random state alone.

    As in the pixel demo, the weights start with a spread of 0.1: Qwen's 0.02 hardly starts at
    this width. A RoPE base of 1,000 fits sequences of at most some hundred tokens.
    """

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]

    # Classes of transformers are untyped to mypy when called; one Any says so for all of them.
    config_class: Any = Qwen2Config
    model_class: Any = Qwen2ForCausalLM
    generation_class: Any = GenerationConfig
    end, pad = token("<|im_end|>"), token("<|endoftext|>")
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,  # of 32: vLLM's CPU kernels know no head of 24
        num_key_value_heads=3,
        max_position_embeddings=1024,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = generation_class(
        do_sample=True, temperature=1.0, top_p=1.0, eos_token_id=end, pad_token_id=pad
    )
    return model
