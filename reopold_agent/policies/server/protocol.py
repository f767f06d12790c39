"""Defines the JSON messages between `reopold_agent.serve` and its clients (docs/server.md).

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
"""Version of the messages, raised with every change that an older version would misread."""

HEALTH, INFO, IMAGES = "/health", "/v1/info", "/v1/images"
SCORE, GENERATE, RELEASE = "/v1/score", "/v1/generate", "/v1/release"

UNKNOWN_IMAGES = 409
"""Status for a request that names pictures that the server does not have (any more)."""

_MOST_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class Vocabulary:
    """Facts about token ids on which both sides must agree, so that log-probs are comparable.

    Attributes:
        size: number of ids that the tokenizer knows.
        forbidden_ids: sorted; they have probability 0, as do all ids from ``size`` on.
        stop_ids: sorted; a turn ends with the first of these.
        image_token_id: the placeholder of a merged patch; None for text-only models.
        fingerprint: the result of `tokenizer_fingerprint`; None if unknown.
        rows: rows of the output embedding, padding included; None if unknown.
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
        model: the checkpoint's name, as given to the server.
        revision: the revision on the hub, if one was given.
        vocabulary: the model's vocabulary.
        policy: the policy that generates and scores there: ``transformers``, ``vllm``, ...
        entropy: whether scores can come with entropies.
        weights: what tells the weights from others (`loading.known_weights`); None if unknown, as
            at servers of earlier versions.
    """

    model: str
    revision: str | None
    vocabulary: Vocabulary
    policy: str
    entropy: bool
    weights: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the answer as JSON values."""
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
            ModelError: the server uses another version of the protocol, or another protocol.
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
                    weights=said.get("weights"),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{url} is not a reopold_agent.serve: {error!r} in its info"
            ) from error
        raise ModelError(
            f"{url} uses version {version} of the protocol, but this side uses {PROTOCOL}; install "
            "the same version of reopold-agent on both machines"
        )

    def check(self, wanted: Vocabulary, url: str) -> None:
        """Checks that ids mean the same on both sides.

        Raises:
            VocabularyMismatchError: they do not; the message names the server and its model.
        """
        who = f"the server {url} has the model '{self.model}', whose"
        served = self.vocabulary
        for name, mine, theirs in (
            ("tokenizer knows another number of ids", wanted.size, served.size),
            ("tokenizer is another one", wanted.fingerprint, served.fingerprint),
            ("forbidden ids are others", wanted.forbidden_ids, served.forbidden_ids),
        ):
            if mine != theirs and None not in (mine, theirs):
                raise VocabularyMismatchError(f"{who} {name}: {theirs} there, {mine} here")
        if wanted.image_token_id is not None and wanted.image_token_id != served.image_token_id:
            raise VocabularyMismatchError(
                f"{who} image placeholder is id {served.image_token_id} there and "
                f"{wanted.image_token_id} here"
                if served.image_token_id is not None
                else f"the server {url} has the model '{self.model}', which reads text only, but "
                "the student sees pictures"
            )

    def check_generates(self, wanted: Vocabulary, url: str) -> None:
        """Checks that turns end with the same ids on both sides, which only generation needs.

        Raises:
            ModelError: they do not.
        """
        theirs = self.vocabulary.stop_ids
        if wanted.stop_ids != theirs:
            setting = "true" if set(wanted.stop_ids) > set(theirs) else "false"
            raise ModelError(
                f"the server {url} ends turns with the ids {theirs}, this run with "
                f"{wanted.stop_ids}.\nStart the server with stop_at_tool_call={setting} (the run's "
                "rollout.stop_at_tool_call), and with the run's chat_template if it has one."
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of the sorted vocabulary: equal only if ids mean the same tokens."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number}\0{token}\0".encode())
    return digest.hexdigest()


def picture_hash(image: EncodedImage) -> str:
    """Returns a picture's name in messages: the SHA-256 of its pixels and its grid."""
    digest = hashlib.sha256(repr((image.pixels.shape, image.grid)).encode())
    digest.update(np.ascontiguousarray(image.pixels).tobytes())
    return digest.hexdigest()


def picture_to_json(image: EncodedImage) -> dict[str, Any]:
    """Returns a picture as JSON values: its final pixels as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(buffer, "PNG", compress_level=1)
    return {"png": base64.b64encode(buffer.getvalue()).decode("ascii"), "grid": list(image.grid)}


def picture_pixels(said: Mapping[str, Any]) -> PixelArray:
    """Returns the pixels of `picture_to_json`, (height, width, 3) uint8.

    Raises:
        DataError: the value is not an RGB picture as PNG, or it is too large.
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
    """Returns a list of token ids after checking it.

    Raises:
        DataError: the value is not a list of token ids.
    """
    if not isinstance(said, list) or not all(type(i) is int and i >= 0 for i in said):
        raise DataError(f"{what} must be a list of token ids")
    return said


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str | None:
    """Returns a text that says where two id sequences differ; None if they are equal."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} ids instead of {len(ours)}"
    if list(ours) == list(theirs):
        return None
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"id {theirs[at]} instead of {ours[at]} at position {at}"
