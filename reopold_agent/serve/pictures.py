"""Stores the pictures that clients have sent, so that each is sent only once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.errors import ConfigError, DataError
from reopold_agent.policies.server.protocol import picture_hash, picture_pixels
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.types import EncodedImage


class MissingPicturesError(Exception):
    """A request names pictures that are not stored (any more): ``hashes``."""

    def __init__(self, hashes: Sequence[str]) -> None:
        super().__init__(f"{len(hashes)} pictures are not known here; send them first")
        self.hashes = list(hashes)


class PictureStore:
    """Pictures by the hash of their pixels; used from many threads.

    Args:
        vision: the model's picture processor; None for text-only models.
        max_bytes: most bytes of pixels; the least recently used pictures are removed first.
    """

    def __init__(self, vision: VisionProcessor | None, max_bytes: int = 2 * 2**30) -> None:
        self._vision, self._max_bytes = vision, max_bytes
        self._bytes = 0
        self._pictures: OrderedDict[str, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, name: str, said: Mapping[str, Any]) -> None:
        """Stores a picture that a client has sent.

        Raises:
            DataError: it is not a picture, does not have this hash, or does not have the size
                that this model's processor gives.
        """
        if self._vision is None:
            raise DataError("this model reads text only")
        try:
            image = self._vision.adopt(picture_pixels(said))
        except ConfigError as error:
            raise DataError(str(error)) from error
        if list(image.grid) != said.get("grid"):
            raise DataError(
                f"the picture's grid is {list(image.grid)} for this model and {said.get('grid')} "
                "for the client: their patches have different sizes"
            )
        if picture_hash(image) != name:
            raise DataError("the picture is not the one that its hash names")
        with self._lock:
            if name in self._pictures:
                return
            self._pictures[name] = image
            self._bytes += image.pixels.nbytes
            while self._bytes > self._max_bytes and len(self._pictures) > 1:
                self._bytes -= self._pictures.popitem(last=False)[1].pixels.nbytes

    def get(self, names: Sequence[str]) -> dict[str, EncodedImage]:
        """Returns the pictures with these names.

        Raises:
            MissingPicturesError: some are not stored.
        """
        with self._lock:
            missing = [name for name in dict.fromkeys(names) if name not in self._pictures]
            if missing:
                raise MissingPicturesError(missing)
            for name in names:
                self._pictures.move_to_end(name)
            return {name: self._pictures[name] for name in names}
