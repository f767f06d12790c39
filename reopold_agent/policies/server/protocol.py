"""What `reopold_agent.serve` and its clients say to each other, as JSON (docs/server.md).

Both sides import this module, so that they cannot disagree.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from reopold_agent.errors import DataError, ModelError, VocabularyMismatchError
from reopold_agent.types import EncodedImage, PixelArray

PROTOCOL = 1
"""Changes with every change of the messages that an older side would misread."""

HEALTH, INFO, IMAGES = "/health", "/v1/info", "/v1/images"
SCORE, GENERATE, RELEASE = "/v1/score", "/v1/generate", "/v1/release"

UNKNOWN_IMAGES = 409
"""Status of a request about pictures that the server does not (or no longer) have."""

_MOST_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class Vocabulary:
    """What two sides must agree on before one believes the other's log-probs.

    Attributes:
        size: number of ids the tokenizer knows.
        forbidden_ids: sorted; they have probability 0, besides those from ``size`` on.
        stop_ids: sorted; a turn ends with the first of these.
        image_token_id: the placeholder of a merged patch; None for text-only models.
        fingerprint: of the tokenizer; None if it is not known.
        rows: of the output embedding, padding included; None if that is not known.
    """

    size: int
    forbidden_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    image_token_id: int | None
    fingerprint: str | None = None
    rows: int | None = None

    @property
    def masked(self) -> list[int]:
        """The ids that have probability 0, as far as they are known."""
        return [*self.forbidden_ids, *range(self.size, self.rows or self.size)]


@dataclass(frozen=True)
class Served:
    """A server's answer to ``/v1/info``.

    Attributes:
        model: as it was asked to load.
        revision: on the hub, if one was named.
        vocabulary: of that model.
        policy: ``transformers``, ``vllm`` ...: what generates and scores there.
        entropy: whether scores can come with entropies.
    """

    model: str
    revision: str | None
    vocabulary: Vocabulary
    policy: str
    entropy: bool

    def to_json(self) -> dict[str, Any]:
        """As it goes over the wire."""
        return {
            "protocol": PROTOCOL,
            **vars(self),
            "vocabulary": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in vars(self.vocabulary).items()
            },
        }

    @classmethod
    def from_json(cls, said: Any, url: str) -> Served:
        """Reads the answer of the server at ``url``.

        Raises:
            ModelError: it speaks another version of the protocol, or another protocol.
        """
        try:
            version = said["protocol"]
            if version == PROTOCOL:
                words = dict(said["vocabulary"])
                for name in ("forbidden_ids", "stop_ids"):
                    words[name] = tuple(int(i) for i in words[name])
                return cls(
                    model=str(said["model"]),
                    revision=said["revision"],
                    vocabulary=Vocabulary(**words),
                    policy=str(said["policy"]),
                    entropy=bool(said["entropy"]),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{url} is no reopold_agent.serve: {error!r} in its info") from error
        raise ModelError(
            f"{url} speaks version {version} of the protocol and this side {PROTOCOL}; install "
            "the same version of reopold-agent on both"
        )

    def check(self, wanted: Vocabulary, url: str) -> None:
        """Makes sure that ids mean the same on both sides.

        Raises:
            VocabularyMismatchError: they do not; the message names the server and its model.
        """
        who = f"the server {url} has the model '{self.model}', whose"
        his = self.vocabulary
        for name, mine, theirs in (
            ("tokenizer knows another number of ids", wanted.size, his.size),
            ("tokenizer is another one", wanted.fingerprint, his.fingerprint),
            ("forbidden ids are others", wanted.forbidden_ids, his.forbidden_ids),
        ):
            if mine != theirs and None not in (mine, theirs):
                raise VocabularyMismatchError(f"{who} {name}: {theirs} there, {mine} here")
        if wanted.image_token_id is not None and wanted.image_token_id != his.image_token_id:
            raise VocabularyMismatchError(
                f"{who} image placeholder is id {his.image_token_id} there and "
                f"{wanted.image_token_id} here"
                if his.image_token_id is not None
                else f"the server {url} has the model '{self.model}', which reads text only, but "
                "the student sees pictures"
            )

    def check_generates(self, wanted: Vocabulary, url: str) -> None:
        """Makes sure that turns end with the same ids on both sides; scoring does not mind.

        Raises:
            ModelError: they do not.
        """
        if wanted.stop_ids != self.vocabulary.stop_ids:
            raise ModelError(
                f"the server {url} ends turns with the ids {self.vocabulary.stop_ids}, this run "
                f"with {wanted.stop_ids}; give the server the run's stop_at_tool_call"
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with every id that means another token (SHA-256 over the sorted vocabulary)."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number}\0{token}\0".encode())
    return digest.hexdigest()


def picture_hash(image: EncodedImage) -> str:
    """A picture's name on the wire: of its pixels and its grid."""
    digest = hashlib.sha256(repr((image.pixels.shape, image.grid)).encode())
    digest.update(np.ascontiguousarray(image.pixels).tobytes())
    return digest.hexdigest()


def picture_to_json(image: EncodedImage) -> dict[str, Any]:
    """A picture as it goes over the wire: its final pixels as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(buffer, "PNG", compress_level=1)
    return {"png": base64.b64encode(buffer.getvalue()).decode("ascii"), "grid": list(image.grid)}


def picture_pixels(said: Mapping[str, Any]) -> PixelArray:
    """The pixels of `picture_to_json`, (height, width, 3) uint8.

    Raises:
        DataError: it is no RGB picture as PNG, or too large.
    """
    try:
        raw = base64.b64decode(said["png"], validate=True)
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
            if picture.mode != "RGB" or picture.width * picture.height > _MOST_PIXELS:
                raise DataError(
                    f"a picture must be RGB with at most {_MOST_PIXELS} pixels, got "
                    f"{picture.mode} of {picture.width} x {picture.height}"
                )
            return np.asarray(picture)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"a picture must come as a base64 PNG: {error!r}") from error


def ids_from_json(said: Any, what: str) -> list[int]:
    """A list of token ids.

    Raises:
        DataError: it is none.
    """
    if not isinstance(said, list) or not all(type(i) is int and i >= 0 for i in said):
        raise DataError(f"{what} must be a list of token ids")
    return said


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str | None:
    """Where two id sequences differ, in words; None if they are equal."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} ids instead of {len(ours)}"
    if list(ours) == list(theirs):
        return None
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"id {theirs[at]} instead of {ours[at]} at position {at}"
