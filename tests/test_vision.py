"""One resize for all models: encoded pictures against Qwen's own image processor."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.errors import ConfigError
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.types import EncodedImage

TOKEN = 28 * 28


def qwens_own(picture: Any, limits: PixelLimits) -> tuple[torch.Tensor, torch.Tensor]:
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    )
    output: Any = processor(images=[Image.fromarray(picture)], return_tensors="pt")
    return output["pixel_values"], output["image_grid_thw"]


@given(
    st.integers(0, 1000),
    st.integers(1, 260),
    st.integers(1, 260),
    st.sampled_from([(TOKEN, TOKEN), (4 * TOKEN, 16 * TOKEN), (TOKEN, 1000 * TOKEN), (3000, 5000)]),
)
def test_patches_and_grid_equal_qwens_own(
    vision: VisionProcessor, seed: int, height: int, width: int, limits: tuple[int, int]
) -> None:
    if max(height, width) > 190 * min(height, width):
        return
    picture, bounds = random_picture(seed, height, width), PixelLimits(*limits)
    encoded = vision.encode(picture, bounds)
    patches, grids = vision.patches([encoded])
    expected, expected_grids = qwens_own(picture, bounds)
    assert grids.tolist() == expected_grids.tolist() == [list(encoded.grid)]
    assert patches.dtype == torch.float32
    assert torch.equal(patches, expected)
    rows, columns = encoded.pixels.shape[:2]
    assert encoded.grid == (1, rows // 14, columns // 14)
    assert rows % 28 == columns % 28 == 0
    assert encoded.tokens == rows * columns // TOKEN == len(patches) // 4
    assert encoded.pixels.dtype == np.uint8


def test_limits_hold(vision: VisionProcessor) -> None:
    big = vision.encode(random_picture(1, 300, 500), PixelLimits(TOKEN, 20 * TOKEN))
    assert 10 < big.tokens <= 20
    small = vision.encode(random_picture(1, 10, 14), PixelLimits(9 * TOKEN, 20 * TOKEN))
    assert 9 <= small.tokens <= 20


def test_several_pictures_keep_their_order(vision: VisionProcessor) -> None:
    limits = PixelLimits(TOKEN, 64 * TOKEN)
    pictures = [random_picture(i, 28 * (1 + i), 56) for i in range(3)]
    encoded = [vision.encode(p, limits) for p in pictures]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1]):
        patches, grids = vision.patches([encoded[i] for i in order])
        expected = [qwens_own(pictures[i], limits) for i in order]
        assert torch.equal(patches, torch.cat([e[0] for e in expected]))
        assert torch.equal(grids, torch.cat([e[1] for e in expected]))


def test_equal_pictures_under_equal_limits_are_one_object() -> None:
    vision = VisionProcessor(Qwen2VLImageProcessorPil())
    limits = PixelLimits(TOKEN, 16 * TOKEN)
    picture = random_picture(1, 60, 90)
    one = vision.encode(picture, limits)
    assert vision.encode(picture.copy(), PixelLimits(TOKEN, 16 * TOKEN)) is one
    assert vision.encode(Image.fromarray(picture), limits) is one
    assert vision.encode(np.asfortranarray(picture), limits) is one
    others = [
        vision.encode(picture, PixelLimits(TOKEN, 4 * TOKEN)),
        vision.encode(picture.transpose(1, 0, 2), limits),
        vision.encode(picture[:, ::-1], limits),
        vision.encode(picture.reshape(90, 60, 3), limits),  # the same bytes in another shape
    ]
    keys = {one.key, *(o.key for o in others)}
    assert len(keys) == 5


def test_an_encoded_picture_does_not_change_with_the_environments_array() -> None:
    vision = VisionProcessor(Qwen2VLImageProcessorPil())
    limits = PixelLimits(TOKEN, 16 * TOKEN)
    picture = random_picture(2, 56, 56)  # no resize needed: nothing would copy it
    before = picture.copy()
    encoded = vision.encode(picture, limits)
    picture[:] = 0
    assert np.array_equal(encoded.pixels, before)
    assert torch.equal(vision.patches([encoded])[0], qwens_own(before, limits)[0])


def test_caches_are_bounded_and_a_forgotten_picture_comes_back_equal() -> None:
    vision = VisionProcessor(Qwen2VLImageProcessorPil(), cache_bytes=3 * 56 * 56 * 3)
    limits = PixelLimits(TOKEN, 16 * TOKEN)
    pictures = [random_picture(i, 56, 56) for i in range(9)]
    encoded = [vision.encode(p, limits) for p in pictures]
    patches = [vision.patches([e])[0].clone() for e in encoded]
    again = vision.encode(pictures[0], limits)
    assert again is not encoded[0]
    assert again.key != encoded[0].key
    assert np.array_equal(again.pixels, encoded[0].pixels)
    assert vision.encode(pictures[8], limits) is encoded[8]
    for one, patch in zip(encoded, patches, strict=True):
        assert torch.equal(vision.patches([one])[0], patch)
    assert vision._encoded._bytes <= 3 * 56 * 56 * 3
    assert len(vision._patches._entries) == 1


def test_equal_pictures_are_one_object_on_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find nothing in the cache and resize; the first to be done is kept."""
    vision = VisionProcessor(Qwen2VLImageProcessorPil())
    meet = threading.Barrier(2, timeout=30)
    adopt = vision.adopt

    def wait(pixels: Any) -> EncodedImage:
        meet.wait()
        return adopt(pixels)

    monkeypatch.setattr(vision, "adopt", wait)
    picture = random_picture(1, 200, 120)
    limits = PixelLimits(TOKEN, 4 * TOKEN)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: vision.encode(picture.copy(), limits), range(2))
    assert one is other


def test_a_picture_in_use_outlives_one_that_is_not() -> None:
    vision = VisionProcessor(Qwen2VLImageProcessorPil(), cache_bytes=2 * 56 * 56 * 3)
    limits = PixelLimits(TOKEN, 16 * TOKEN)
    used, idle, new = (random_picture(i, 56, 56) for i in range(3))
    first, second = vision.encode(used, limits), vision.encode(idle, limits)
    assert vision.encode(used, limits) is first
    vision.encode(new, limits)
    assert vision.encode(used, limits) is first
    assert vision.encode(idle, limits) is not second


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 401), (30, 30_000)])
def test_a_very_thin_picture_is_padded_and_not_refused(
    vision: VisionProcessor, shape: tuple[int, int]
) -> None:
    encoded = vision.encode(random_picture(0, *shape), PixelLimits(TOKEN, 300 * TOKEN))
    patches, _ = vision.patches([encoded])
    assert len(patches) == encoded.tokens * 4
    assert encoded.tokens <= 300


def test_pil_modes_become_rgb(vision: VisionProcessor) -> None:
    limits = PixelLimits(TOKEN, 16 * TOKEN)
    grey = Image.fromarray(random_picture(3, 56, 56)[..., 0])
    encoded = vision.encode(grey, limits)
    assert encoded.pixels.shape == (56, 56, 3)
    assert np.array_equal(encoded.pixels[..., 0], encoded.pixels[..., 2])
    clear = vision.encode(Image.new("RGBA", (40, 40)), limits)
    assert np.all(clear.pixels == 255)
    vision.encode(Image.new("P", (40, 40)), limits)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((28, 28), np.uint8),
        np.zeros((28, 28, 4), np.uint8),
        np.zeros((28, 28, 3), np.float32),
        np.zeros((0, 28, 3), np.uint8),
        np.zeros((3, 28, 28), np.uint8),
    ],
)
def test_what_is_not_a_picture_is_refused(vision: VisionProcessor, array: Any) -> None:
    with pytest.raises(ConfigError, match="uint8"):
        vision.encode(array, PixelLimits(TOKEN, 16 * TOKEN))


@pytest.mark.parametrize("limits", [(0, 10), (10, 9), (-5, 5)])
def test_impossible_limits_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="pixel limits"):
        PixelLimits(*limits)


def test_keys_are_unique_and_images_compare_by_identity() -> None:
    pixels = np.zeros((28, 28, 3), np.uint8)
    one, two = (EncodedImage(pixels, (1, 2, 2), 1) for _ in range(2))
    assert one.key != two.key
    assert one != two
    assert len({one, two}) == 2
