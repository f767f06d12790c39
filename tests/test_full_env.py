"""Against the stack that real Qwen2.5-VL users run: torchvision's processor and qwen-vl-utils.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_data import real_data

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.types import Message

pytestmark = pytest.mark.full_env

LIMITS = PixelLimits(256 * 28 * 28, 1280 * 28 * 28)


@pytest.fixture(scope="module")
def qwen_vl_utils() -> Any:
    return pytest.importorskip("qwen_vl_utils", reason="needs the full environment")


def photos() -> list[Image.Image]:
    files = sorted(p for p in real_data("photos").iterdir() if p.suffix != ".jsonl")
    found = [Image.open(file).convert("RGB") for file in files]
    return [*found, found[0].resize((300, 41)), found[0].resize((33, 700))]


def vision() -> VisionProcessor:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    return VisionProcessor(Qwen2VLImageProcessorPil())


def test_resize_agrees_with_qwen_vl_utils(qwen_vl_utils: Any) -> None:
    ours = vision()
    for photo in photos():
        content = {
            "type": "image",
            "image": photo,
            "min_pixels": LIMITS.min_pixels,
            "max_pixels": LIMITS.max_pixels,
        }
        (theirs,), _ = qwen_vl_utils.process_vision_info([{"role": "user", "content": [content]}])
        encoded = ours.encode(photo, LIMITS)
        assert encoded.pixels.shape[:2] == (theirs.height, theirs.width)
        difference = np.abs(encoded.pixels.astype(int) - np.asarray(theirs).astype(int))
        assert difference.max() <= 1


def test_patches_agree_with_torchvisions_processor(qwen_vl_utils: Any) -> None:
    from transformers import Qwen2VLImageProcessor

    ours = vision()
    theirs = Qwen2VLImageProcessor()
    for photo in photos():
        encoded = ours.encode(photo, LIMITS)
        values, grids = ours.patches([encoded])
        reference = theirs(
            images=[Image.fromarray(encoded.pixels)], do_resize=False, return_tensors="pt"
        )
        assert grids.tolist() == reference["image_grid_thw"].tolist()
        np.testing.assert_allclose(values.numpy(), reference["pixel_values"].numpy(), atol=1e-5)


def test_prompt_ids_agree_with_the_real_processor(qwen_vl_utils: Any) -> None:
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(real_data("qwen_tokenizer"))
    size = {"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )
    ours = vision()
    first, second = photos()[:2]
    images = [ours.encode(photo, LIMITS) for photo in (first, second)]
    question = "What does the sign say?\n\n[1, 2] and 3.14?"
    ids, _ = ChatRenderer(tokenizer).prompt(
        [
            Message("system", ("You are a helpful assistant.",)),
            Message("user", (images[0], images[1], question)),
        ]
    )
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}],
        },
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    reference = processor(text=[text], images=[first, second], return_tensors="pt")
    assert ids == reference["input_ids"][0].tolist()
