"""Resizes each picture once, so that student, teacher and trainer see the same pixels.

They share one `EncodedImage`, which holds the resized picture as uint8 (8 times smaller than the
model's float patches, which are computed when needed). Grid and number of placeholder tokens are
fixed at encoding time, so they always match the features.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent.common.pictures import to_rgb
from reopold_agent.common.pixels import PixelLimits, padded
from reopold_agent.errors import ConfigError
from reopold_agent.types import EncodedImage, PixelArray


class VisionProcessor:
    """Turns pictures into `EncodedImage`, and these into a model's input patches.

    Resizing and normalisation follow the checkpoint's own Qwen2-VL image processor (PIL backend;
    torchvision is not needed).
    """

    def __init__(
        self, processor: Qwen2VLImageProcessorPil, *, cache_bytes: int = 512 * 2**20
    ) -> None:
        self.processor = processor
        self.factor = int(processor.patch_size) * int(processor.merge_size)
        self._encoded: _ByteLimitedCache[bytes, EncodedImage] = _ByteLimitedCache(cache_bytes)
        self._patches: _ByteLimitedCache[int, Tensor] = _ByteLimitedCache(cache_bytes)

    def encode(self, image: PixelArray | Image.Image, limits: PixelLimits) -> EncodedImage:
        """Resizes (bicubic) to a multiple of patch x merge within the limits, on any thread.

        Equal pictures under equal limits give the same object, so that the samples of a group
        share their prompt. Qwen's rule rejects pictures whose sides differ by more than a factor
        of 200, but a student may request such a crop: it is padded with grey first.
        """
        array = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
            raise ConfigError(
                "a picture must be a non-empty (height, width, 3) uint8 array, got "
                f"shape {array.shape}, dtype {array.dtype}"
            )
        # Of a photograph this takes a fifth of the resize's time: twice as fast as BLAKE2 where the
        # processor has instructions for it, and nobody attacks this cache.
        digest = hashlib.sha1(np.ascontiguousarray(array).data, usedforsecurity=False)
        digest.update(repr((array.shape, limits)).encode())
        key = digest.digest()
        found = self._encoded.get(key)
        if found is not None:
            return found
        array = _limit_aspect(array)
        size = limits.resized((array.shape[1], array.shape[0]), self.factor)
        if size != (array.shape[1], array.shape[0]):
            resized = Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
            array = np.asarray(resized)
        elif isinstance(image, np.ndarray):
            array = array.copy()  # the environment may draw on its own array later
        return self._encoded.put(key, self.adopt(array), array.nbytes)

    def adopt(self, pixels: PixelArray) -> EncodedImage:
        """Returns an `EncodedImage` of pixels that `encode` has already resized, here or elsewhere.

        Raises:
            ConfigError: a side is not a multiple of patch x merge.
        """
        height, width = pixels.shape[:2]
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"a picture of {height} x {width} pixels was not resized: its sides must be "
                f"multiples of {self.factor}"
            )
        patch = int(self.processor.patch_size)
        grid = (1, height // patch, width // patch)
        tokens = grid[1] * grid[2] // int(self.processor.merge_size) ** 2
        return EncodedImage(pixels=pixels, grid=grid, tokens=tokens)

    def patches(self, images: Sequence[EncodedImage]) -> tuple[Tensor, Tensor]:
        """Computes the model's inputs for pictures, in order.

        Returns:
            ``pixel_values`` (sum of t*h*w, 3 * 2 * patch**2) float32 and ``image_grid_thw``
            (number of pictures, 3) int64, both on the CPU.
        """
        parts = []
        for image in images:
            part = self._patches.get(image.key)
            if part is None:
                features: Any = self.processor(
                    images=[image.pixels],
                    do_resize=False,
                    input_data_format="channels_last",
                    return_tensors="pt",
                )
                part = features["pixel_values"]
                if tuple(features["image_grid_thw"][0].tolist()) != image.grid:
                    raise RuntimeError("the image processor changed the size of an encoded picture")
                part = self._patches.put(image.key, part, part.nbytes)
            parts.append(part)
        return torch.cat(parts), torch.tensor([image.grid for image in images])


def _limit_aspect(array: PixelArray) -> PixelArray:
    height, width = array.shape[:2]
    columns, rows = padded((width, height))
    if (rows, columns) == (height, width):
        return array
    whole = np.full((rows, columns, 3), 128, dtype=np.uint8)
    whole[:height, :width] = array
    return whole


_K = TypeVar("_K")
_V = TypeVar("_V")


class _ByteLimitedCache(Generic[_K, _V]):
    """A least-recently-used cache for several threads, limited by its values' bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._entries: OrderedDict[_K, tuple[_V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _K) -> _V | None:
        with self._lock:
            return self._found(key)

    def put(self, key: _K, value: _V, size: int) -> _V:
        """Keeps and returns the value, or the one that another thread has put meanwhile."""
        with self._lock:
            found = self._found(key)
            if found is not None:
                return found
            self._entries[key] = (value, size)
            self._bytes += size
            while self._bytes > self._max_bytes and len(self._entries) > 1:
                self._bytes -= self._entries.popitem(last=False)[1][1]
            return value

    def _found(self, key: _K) -> _V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]
