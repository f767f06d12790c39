"""The embedded tokenizers: Qwen's control tokens and chat format, about a thousand ids.

They are byte-level BPE, so any text can be encoded. Merges may span whole phrases, so that Qwen's
long system message with the tools costs only tens of tokens. Digits are always single tokens, so
that each digit of a coordinate or an answer is a decision of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from tokenizers import (  # type: ignore[import-untyped]  # ships no type information
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOOL_TOKENS: Final = ("<tool_call>", "</tool_call>")
"""Added but not special, as in Qwen: decoding keeps them."""

LONGEST_TOKEN: Final = 128
"""Upper limit on the bytes of one token."""

CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""The format of Qwen2.5-VL's chat template; a test compares the two."""


QWEN_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers split text before merging. `AutoTokenizer` splits like this for every
checkpoint of model type ``qwen2``, whatever its tokenizer.json says (transformers 5)."""


QWEN_TURNS: Final = ("<|im_start|>", "<|im_end|>")
"""Where a turn begins and ends."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 1024,
    *,
    qwen_words: bool = False,
    turns: tuple[str, str] = QWEN_TURNS,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on ``texts``; the same texts give the same tokenizer.

    Args:
        texts: samples of prompts and answers; texts that occur more often are merged earlier.
        vocab_size: upper limit on the number of ids, including control tokens.
        qwen_words: keep merges within Qwen's words and normalise texts as Qwen does (NFC);
            otherwise merges may span anything but digits.
        turns: control tokens for the beginning and end of a turn, in place of Qwen's.
    """
    renamed = dict(zip(QWEN_TURNS, turns, strict=True))
    control = [renamed.get(token, token) for token in CONTROL_TOKENS]
    raw = Tokenizer(models.BPE())
    if qwen_words:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS if qwen_words else r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TOOL_TOKENS),
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    # The tool tokens are cut out first: an added token never takes part in a merge.
    cut = re.compile("|".join(TOOL_TOKENS))
    raw.train_from_iterator((piece for text in texts for piece in cut.split(text)), trainer)
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_TOKENS])
    fast_class: Any = PreTrainedTokenizerFast  # untyped to mypy when called
    tokenizer: PreTrainedTokenizerFast = fast_class(
        tokenizer_object=raw,
        eos_token=turns[1],
        pad_token="<|endoftext|>",
        additional_special_tokens=[*control[1:2], *control[3:]],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        padding_side="right",
    )
    template = CHAT_TEMPLATE
    for token, other in renamed.items():
        template = template.replace(token, other)
    tokenizer.chat_template = template
    return tokenizer
