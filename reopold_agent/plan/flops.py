"""Counts FLOPs of a forward pass: two per multiply-add of matrix products and attention.

Norms, activations and softmax are left out (below one percent for models of this size). A backward
pass costs two forwards; recomputing activations costs one more.
"""

from __future__ import annotations

from collections.abc import Iterable

from reopold_agent.policies.architecture import TextShape, VisionShape


def layers_forward(text: TextShape, tokens: float) -> float:
    """Counts FLOPs of the decoder's matrices, without attention and output embedding."""
    return 2.0 * text.layers * text.layer_weights * tokens


def attention_forward(text: TextShape, pairs: float) -> float:
    """Counts FLOPs of scores and weighted sums for ``pairs`` (query, key) pairs, in all layers."""
    return 4.0 * text.layers * text.heads * text.head_dim * pairs


def logits_forward(text: TextShape, tokens: float) -> float:
    """Counts FLOPs of the output embedding for ``tokens`` tokens."""
    return 2.0 * text.hidden * text.vocab * tokens


def causal_pairs(length: float, start: float = 0.0) -> float:
    """Counts (query, key) pairs of the tokens from ``start`` to ``length`` of a causal sequence."""
    return (length * (length + 1) - start * (start + 1)) / 2


def text_forward(text: TextShape, length: float, logit_tokens: float, start: float = 0.0) -> float:
    """Counts FLOPs of a causal sequence of ``length`` tokens, the first ``start`` cached."""
    new = length - start
    return (
        layers_forward(text, new)
        + attention_forward(text, causal_pairs(length, start))
        + logits_forward(text, logit_tokens)
    )


def vision_forward(vision: VisionShape, pictures: Iterable[float]) -> float:
    """Counts FLOPs of the vision tower, given tokens per picture (``merge**2`` patches each)."""
    total = 0.0
    for tokens in pictures:
        patches = tokens * vision.merge**2
        dense = 2.0 * patches * (vision.depth * vision.block_weights)
        embed = 2.0 * patches * vision.patch_values * vision.width
        merger = 2.0 * tokens * vision.merger_weights
        windows = vision.depth - vision.full_blocks
        seen = windows * min(vision.window_patches, patches) + vision.full_blocks * patches
        total += dense + embed + merger + 4.0 * vision.width * patches * seen
    return total
