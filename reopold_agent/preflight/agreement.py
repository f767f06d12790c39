"""Compares student and teacher on the episodes' own text and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.policies.loading import Processing
from reopold_agent.policies.templates import ChatTemplate
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import sample_prompts
from reopold_agent.types import EncodedImage

_SHOWN = 40
"""Characters of a differing text that a message shows."""


def different_ids(student: Processing, teacher: Processing, texts: Iterable[str]) -> str | None:
    """Returns where the tokenizers give other ids for one text; None if they nowhere do.

    Two tokenizers may have one vocabulary and still cut a text differently (other merges, another
    normalisation); the teacher was then trained on other ids than the student writes.

    Args:
        student, teacher: the models' tokenizers.
        texts: what the episodes contain.
    """
    for text in texts:
        ids = [_ids(each.tokenizer, text) for each in (student, teacher)]
        if ids[0] == ids[1]:
            continue
        at = next(i for i, (one, other) in enumerate(zip_longest(*ids)) if one != other)
        shown = student.tokenizer.decode(ids[0][at : at + 8])[:_SHOWN]
        pieces = [each[at : at + 3] for each in ids]
        return f"{shown!r} is {pieces[0]} for the student and {pieces[1]} for the teacher"
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def different_pictures(
    student: Processing, teacher: Processing, images: Sequence[EncodedImage]
) -> str | None:
    """Returns a picture of which the processors' own limits make other tokens; None without one.

    In this process the teacher gets the student's pixels, but it was trained with those that its
    own limits give, and a server resizes to them.

    Args:
        student, teacher: the models' picture processors.
        images: the pictures as the episodes show them.
    """
    if student.vision is None or teacher.vision is None:
        return None
    for image in images:
        height, width = image.pixels.shape[:2]
        tokens = [_own_tokens(each, width, height) for each in (student.vision, teacher.vision)]
        if tokens[0] != tokens[1]:
            return (
                f"a picture of {width}x{height} pixels has {tokens[0]} tokens for the student's "
                f"processor and {tokens[1]} for the teacher's"
            )
    return None


def _own_tokens(vision: VisionProcessor, width: int, height: int) -> int:
    low, high = pixel_limits(vision)
    size = PixelLimits(low, high).resized((width, height), vision.factor)
    return size[0] * size[1] // vision.factor**2


def pixel_limits(vision: VisionProcessor) -> tuple[int, int]:
    """Returns the smallest and the largest number of pixels that a processor resizes to."""
    size: Any = vision.processor.size
    return int(size["shortest_edge"]), int(size["longest_edge"])


def is_known_template(student: Processing, teachers: Iterable[Processing]) -> bool:
    """Returns whether a model's own chat template writes prompts as the run's does.

    True where nothing can be compared: no template can be rendered, or no model has one.

    Args:
        student: with the template of the run, and its own beside it if a setting gave another.
        teachers: with their own.
    """
    template = student.tokenizer.chat_template
    own = template.own if isinstance(template, ChatTemplate) else template
    found = [sample_prompts(student.tokenizer, own)] if isinstance(own, str) else []
    found += [sample_prompts(each.tokenizer) for each in teachers if each.tokenizer.chat_template]
    theirs = [prompts for prompts in found if prompts is not None]
    ours = sample_prompts(student.tokenizer)
    if ours is None or not theirs:
        return True
    # Templates that differ only in the system message that they add have one form in common.
    return any(one == other for each in theirs for one, other in zip(ours, each, strict=True))


def different_prompts(student: Processing, teacher: Processing) -> str | None:
    """Returns where the teacher's own chat template differs from the prompts of the run.

    None if it writes the same, or cannot be rendered.
    """
    ours, theirs = sample_prompts(student.tokenizer), sample_prompts(teacher.tokenizer)
    for one, other in zip(ours or (), theirs or (), strict=False):
        if one != other:
            at = next(i for i, (a, b) in enumerate(zip_longest(one, other)) if a != b)
            return f"{one[at : at + _SHOWN]!r}, where its own has {other[at : at + _SHOWN]!r}"
    return None
