"""FLOPs of a forward pass: two per multiply-add of the matrix products and of attention.

Norms, activations and softmax are left out (below one percent of models of this size). A backward
pass costs two forwards; recomputing activations costs one more.
"""

from __future__ import annotations

from collections.abc import Iterable

from reopold_agent.planning.architecture import TextShape, VisionShape


def layers_forward(text: TextShape, tokens: float) -> float:
    """The decoder's matrices without attention and output embedding, for ``tokens`` tokens."""
    return 2.0 * text.layers * text.layer_weights * tokens


def attention_forward(text: TextShape, pairs: float) -> float:
    """Scores and weighted sums for ``pairs`` (query, key) pairs, in all layers."""
    return 4.0 * text.layers * text.heads * text.head_dim * pairs


def logits_forward(text: TextShape, tokens: float) -> float:
    """The output embedding for ``tokens`` tokens."""
    return 2.0 * text.hidden * text.vocab * tokens


def causal_pairs(length: float, start: float = 0.0) -> float:
    """(query, key) pairs of the tokens from ``start`` to ``length`` of a causal sequence."""
    return (length * (length + 1) - start * (start + 1)) / 2


def text_forward(text: TextShape, length: float, logit_tokens: float, start: float = 0.0) -> float:
    """One causal sequence of ``length`` tokens of which the first ``start`` are cached."""
    new = length - start
    return (
        layers_forward(text, new)
        + attention_forward(text, causal_pairs(length, start))
        + logits_forward(text, logit_tokens)
    )


def vision_forward(vision: VisionShape, pictures: Iterable[float]) -> float:
    """The vision tower, for pictures of so many tokens each (``merge**2`` patches a token)."""
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
