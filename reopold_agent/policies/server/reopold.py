"""The client of our own server, `reopold_agent.serve`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from typing_extensions import override

from reopold_agent.common.http import Deadline
from reopold_agent.errors import ModelError, NonFiniteError
from reopold_agent.policies.server import protocol
from reopold_agent.policies.server.clients import Identity, ServerClient, finite, same_ids
from reopold_agent.policies.server.protocol import Served, Vocabulary
from reopold_agent.policies.server.settings import ServerSettings
from reopold_agent.policies.server.transport import Address, AttemptError, StatusError, Transport
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Request,
    Sampling,
    TokenScores,
    Trajectory,
)

_UPLOAD_BYTES = 32 * 2**20
"""Bytes of pixels after which an upload is sent."""

_UPLOADS = 3
"""Most uploads for one request; if they do not suffice, the server's store is too small."""


class ReopoldClient(ServerClient):
    """A client of `reopold_agent.serve`.

    Args:
        settings: the expected model.
        vocabulary: the facts about ids on which the server must agree.
        transport: sends the requests.
    """

    def __init__(
        self, settings: ServerSettings, vocabulary: Vocabulary, transport: Transport
    ) -> None:
        self._settings, self._vocabulary, self._transport = settings, vocabulary, transport
        self.score_batch = settings.score_batch
        self._states = {address: _State() for address in transport.addresses}
        self._hashes: WeakKeyDictionary[EncodedImage, str] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @override
    def check(self, address: Address, deadline: Deadline) -> Identity:
        served = Served.from_json(
            self._transport.exchange(address, "GET", protocol.INFO, None, deadline), address.url
        )
        for name in ("model", "revision"):
            wanted, there = getattr(self._settings, name), getattr(served, name)
            if wanted is not None and wanted != there:
                raise ModelError(
                    f"the server {address.url} has the {name} '{there}', but policy.{name} is "
                    f"'{wanted}'"
                )
        served.check(self._vocabulary, address.url)
        state = self._states[address]
        with state.lock:
            state.served = served
            state.pictures.clear()  # the server may have restarted
        return Identity(served.model, served.weights)

    @override
    def score(
        self,
        address: Address,
        trajectories: Sequence[Trajectory],
        with_entropy: bool,
        deadline: Deadline,
    ) -> list[TokenScores]:
        positions = [np.flatnonzero(t.loss_mask) for t in trajectories]
        body = {
            "sequences": [
                {
                    "ids": t.ids.tolist(),
                    "positions": where.tolist(),
                    "images": [self._hash(image) for image in t.images],
                }
                for t, where in zip(trajectories, positions, strict=True)
            ],
            "with_entropy": with_entropy,
        }
        pictures = [image for t in trajectories for image in t.images]
        answer = self._ask(address, protocol.SCORE, body, pictures, deadline)
        try:
            said = answer["scores"]
            if len(said) != len(trajectories):
                raise ModelError(
                    f"{address.url} gave {len(said)} scores for {len(trajectories)} sequences"
                )
            return [
                self._scores(each, trajectory, where, with_entropy, address.url)
                for each, trajectory, where in zip(said, trajectories, positions, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise _not_ours(address, error) from error

    @override
    def generate(
        self, address: Address, name: str, request: Request, sampling: Sampling, deadline: Deadline
    ) -> Completion:
        served = self._states[address].served
        if served is not None:
            served.check_generates(self._vocabulary, address.url)
        body = {
            "sequence": name,
            "ids": [int(i) for i in request.ids],
            "images": [self._hash(image) for image in request.images],
            "max_tokens": request.max_tokens,
            "seed": [int(i) for i in request.seed],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        answer = self._ask(address, protocol.GENERATE, body, request.images, deadline)
        try:
            if answer["length"] != len(request.ids):
                raise ModelError(
                    f"{address.url} continued {answer['length']} ids instead of {len(request.ids)}"
                )
            ids, finish = answer["ids"], answer["finish"]
            logp, entropy = answer["logp"], answer["entropy"]
            if not ids or not len(ids) == len(logp) == len(entropy) <= request.max_tokens:
                raise ModelError(
                    f"{address.url} answered with {len(ids)} ids, {len(logp)} log-probs and "
                    f"{len(entropy)} entropies where at most {request.max_tokens} were asked for"
                )
            if finish != ("stop" if ids[-1] in self._vocabulary.stop_ids else "length"):
                raise ModelError(f"{address.url} wrongly says that a turn ended by '{finish}'")
            return Completion(
                key=request.key,
                ids=tuple(int(i) for i in ids),
                logp=tuple(finite(logp, "log-probs", address.url)),
                entropy=tuple(finite(entropy, "entropies", address.url)),
                finish=finish,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _not_ours(address, error) from error

    @override
    def release(self, address: Address, names: Sequence[str], deadline: Deadline) -> None:
        body = {"sequences": list(names)}
        self._transport.exchange(address, "POST", protocol.RELEASE, body, deadline)

    def _scores(
        self,
        said: Mapping[str, Any],
        trajectory: Trajectory,
        positions: Any,
        with_entropy: bool,
        url: str,
    ) -> TokenScores:
        length = len(trajectory.ids)
        if said["length"] != length:
            raise ModelError(f"{url} scored {said['length']} ids instead of {length}")
        same_ids(trajectory.ids[positions].tolist(), said["ids"], "ids", url)
        logp, entropy = (np.zeros(length, dtype=np.float32) for _ in range(2))
        for name, array in [("logp", logp), ("entropy", entropy)][: 1 + with_entropy]:
            values = said[name]
            if len(values) != len(positions):
                raise ModelError(
                    f"{url} gave {len(values)} values of {name} for {len(positions)} tokens"
                )
            array[positions] = finite(values, f"values of {name}", url)
        return TokenScores(logp, entropy)

    # Each picture is sent once

    def _ask(
        self,
        address: Address,
        path: str,
        body: Mapping[str, Any],
        images: Sequence[EncodedImage],
        deadline: Deadline,
    ) -> Any:
        pictures = {self._hash(image): image for image in images}
        for _ in range(_UPLOADS):
            self._upload(address, pictures, deadline)
            try:
                return self._transport.exchange(
                    address, "POST", path, {**body, "progress": True}, deadline
                )
            except StatusError as error:
                reply = error.reply if isinstance(error.reply, dict) else {}
                if error.status == 422 and reply.get("kind") == "NonFiniteError":
                    raise NonFiniteError(str(error)) from error
                if error.status != protocol.UNKNOWN_IMAGES:
                    raise
                state = self._states[address]
                with state.lock:
                    state.pictures.difference_update(map(str, reply.get("missing", [])))
        raise AttemptError(
            f"{address.url} has dropped the pictures of a request {_UPLOADS} times; give it a "
            "larger picture_gib",
            down=False,
        )

    def _upload(
        self, address: Address, pictures: Mapping[str, EncodedImage], deadline: Deadline
    ) -> None:
        state = self._states[address]
        # One upload at a time, so that requests that share a picture send it once.
        with state.lock:
            batch: dict[str, Any] = {}
            size = 0
            unknown = [name for name in pictures if name not in state.pictures]
            for number, name in enumerate(unknown):
                batch[name] = protocol.picture_to_json(pictures[name])
                size += pictures[name].pixels.nbytes
                if size >= _UPLOAD_BYTES or number + 1 == len(unknown):
                    self._transport.exchange(
                        address, "POST", protocol.IMAGES, {"images": batch}, deadline
                    )
                    state.pictures.update(batch)
                    batch, size = {}, 0

    def _hash(self, image: EncodedImage) -> str:
        with self._lock:
            found = self._hashes.get(image)
        if found is None:
            found = protocol.picture_hash(image)
            with self._lock:
                self._hashes[image] = found
        return found


class _State:
    """The known state of one server; ``pictures`` are the hashes of the pictures that it has."""

    def __init__(self) -> None:
        self.served: Served | None = None
        self.pictures: set[str] = set()
        self.lock = threading.Lock()


def _not_ours(address: Address, error: Exception) -> ModelError:
    if isinstance(error, ModelError):
        return error
    return ModelError(f"{address.url} sent an answer that is not in the protocol's form: {error!r}")
