"""The special tokens of a tokenizer that are words of a turn: tags such as ``<tool_call>``.

Many fine-tuning scripts add the tags that their models write as special tokens. Tools and judges
read them all the same, so they are no control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

_TAG = re.compile(r"</?([A-Za-z][\w-]*)>")
_READ = ("tool_call", "tool_response", "think", "answer")
"""Read by tools, judges and templates; other tags are words if they come in pairs."""


def special_tags(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the tags among a tokenizer's special tokens, with their ids.

    Its named tokens (``<s>``, ``</s>``: beginning, end, padding) are none.
    """
    added = tokenizer.added_tokens_decoder
    names = {token.content for token in added.values()}
    kinds = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    named = {getattr(tokenizer, f"{kind}_token") for kind in kinds}
    found: dict[str, int] = {}
    for i, token in added.items():
        tag = _TAG.fullmatch(token.content) if token.special else None
        if tag is None:
            continue
        pair = {f"<{tag[1]}>", f"</{tag[1]}>"}
        if tag[1] in _READ or (pair <= names and pair.isdisjoint(named)):
            found[token.content] = i
    return found


def split_at(text: str, tokens: Collection[str]) -> list[str]:
    """Splits a text into the tokens that it spells and what is between them."""
    if not tokens:
        return [text]
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
