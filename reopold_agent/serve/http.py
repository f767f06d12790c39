"""The HTTP server of `reopold_agent.serve`: the protocol's paths around a `PolicyService`.

The standard library's threading server keeps the base install small, and is enough: requests wait
for the model, not for HTTP, and a client keeps at most a few dozen connections.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

import numpy as np

from reopold_agent.common.secrets import Secret
from reopold_agent.errors import DataError, ModelError, NonFiniteError
from reopold_agent.policies.server import protocol
from reopold_agent.serve.pictures import MissingPicturesError, PictureStore
from reopold_agent.serve.service import BusyError, PolicyService
from reopold_agent.types import EncodedImage, Request, Sampling, StopReason, Trajectory

_Working: TypeAlias = "Callable[[], None] | None"

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 120.0
"""A connection without traffic for this long is closed."""


class PolicyServer(ThreadingHTTPServer):
    """Serves one policy on one address; ``serve_forever`` runs it.

    Args:
        host, port: where to listen; port 0 takes a free one, which is in ``server_address``.
        service: runs the policy.
        pictures: the pictures that clients have sent.
        served: the facts about the model that clients get.
        token: if not empty, requests must carry it as a bearer token.
        max_body_bytes: size of the largest accepted request.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        host: str,
        port: int,
        service: PolicyService,
        pictures: PictureStore,
        served: protocol.Served,
        *,
        token: Secret | None = None,
        max_body_bytes: int = 256 * 2**20,
    ) -> None:
        self.service, self.pictures, self.served = service, pictures, served
        self.token = token or Secret("")
        self.max_body_bytes = max_body_bytes
        super().__init__((host, port), _Handler)

    # The protocol's paths

    def score(self, body: Mapping[str, Any], working: _Working) -> dict[str, Any]:
        """Answers ``/v1/score``; ``working`` is called now and then while the model works."""
        sequences = _list(body, "sequences")
        with_entropy = bool(body.get("with_entropy", False))
        pictures = self.pictures.get([name for each in sequences for name in _images(each)])
        trajectories = [self._trajectory(each, pictures) for each in sequences]
        scores = self.service.score(trajectories, with_entropy=with_entropy, working=working)
        answers = []
        for trajectory, score in zip(trajectories, scores, strict=True):
            positions = np.flatnonzero(trajectory.loss_mask)
            answers.append(
                {
                    "length": len(trajectory.ids),
                    "ids": trajectory.ids[positions].tolist(),
                    "logp": _finite(score.logp[positions].tolist(), "log-probs"),
                    "entropy": _finite(score.entropy[positions].tolist(), "entropies")
                    if with_entropy
                    else None,
                }
            )
        return {"scores": answers}

    def generate(self, body: Mapping[str, Any], working: _Working) -> dict[str, Any]:
        """Answers ``/v1/generate``; ``working`` is as of `score`."""
        ids = self._ids(body, "ids")
        names = _images(body)
        pictures = self.pictures.get(names)
        try:
            sampling = Sampling(float(body["temperature"]), float(body["top_p"]))
            name, seed = str(body["sequence"]), protocol.ids_from_json(body["seed"], "seed")
            max_tokens = int(body["max_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a turn needs {error}") from error
        request = Request(0, ids, [pictures[n] for n in names], max_tokens, tuple(seed))
        done = self.service.generate(name, request, sampling, working)
        if done.error is not None:
            raise RuntimeError(done.error)
        return {
            "length": len(ids),
            "ids": list(done.ids),
            "logp": _finite(done.logp, "log-probs"),
            "entropy": _finite(done.entropy, "entropies"),
            "finish": done.finish,
        }

    def release(self, body: Mapping[str, Any], _: _Working) -> dict[str, Any]:
        """Answers ``/v1/release``."""
        names = [str(name) for name in _list(body, "sequences")]
        return {"released": self.service.release(names)}

    def take_pictures(self, body: Mapping[str, Any], _: _Working) -> dict[str, Any]:
        """Answers ``/v1/images``."""
        said = body.get("images")
        if not isinstance(said, dict) or not all(isinstance(p, dict) for p in said.values()):
            raise DataError("images must map hashes to pictures")
        for name, picture in said.items():
            self.pictures.put(name, picture)
        return {"stored": len(said)}

    def _ids(self, body: Mapping[str, Any], name: str) -> list[int]:
        ids = protocol.ids_from_json(body.get(name), name)
        rows = self.served.vocabulary.rows or self.served.vocabulary.size
        if not ids or max(ids) >= rows:
            raise DataError(f"{name} must hold ids below {rows}, and at least one")
        return ids

    def _trajectory(
        self, said: Mapping[str, Any], pictures: Mapping[str, EncodedImage]
    ) -> Trajectory:
        ids = np.array(self._ids(said, "ids"), dtype=np.int64)
        positions = protocol.ids_from_json(said.get("positions"), "positions")
        if any(not 0 < i < len(ids) for i in positions) or sorted(set(positions)) != positions:
            raise DataError("positions must increase and lie within the ids, after the first")
        mask = np.zeros(len(ids), dtype=np.bool_)
        mask[positions] = True
        zeros = np.zeros(len(ids), dtype=np.float32)
        return Trajectory(
            task_id="",
            index=0,
            sample=0,
            prompt_length=positions[0] if positions else len(ids),
            ids=ids,
            loss_mask=mask,
            logp=zeros,
            entropy=zeros,
            images=[pictures[name] for name in _images(said)],
            turns=[],
            stop_reason=StopReason.ANSWER,
            reward=0.0,
            success=False,
        )


class _Handler(BaseHTTPRequestHandler):
    server: PolicyServer
    protocol_version = "HTTP/1.1"
    server_version = "reopold-agent"
    sys_version = ""
    timeout = _IDLE_SECONDS
    _begun = False
    """Whether the reply has begun before there is an answer."""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == protocol.HEALTH:  # needs no token: load balancers ask it
            self._reply(200, {"status": "ok", "waiting": self.server.service.waiting})
        elif not self._allowed():
            self._reply(401, {"error": "a bearer token is needed"})
        elif self.path == protocol.INFO:
            self._reply(200, self.server.served.to_json())
        else:
            self._reply(404, {"error": f"there is no {self.path[:100]}"})

    def do_POST(self) -> None:
        self._begun = False
        body = self._body()
        if body is None:
            return
        paths: dict[str, Callable[[Mapping[str, Any], _Working], dict[str, Any]]] = {
            protocol.SCORE: self.server.score,
            protocol.GENERATE: self.server.generate,
            protocol.RELEASE: self.server.release,
            protocol.IMAGES: self.server.take_pictures,
        }
        answer = paths.get(self.path)
        if answer is None:
            self._reply(404, {"error": f"there is no {self.path[:100]}"})
            return
        try:
            said = json.loads(body)
            if not isinstance(said, dict):
                raise DataError("the body must be a JSON object")
            self._reply(200, answer(said, self._beat if said.get("progress") else None))
        except MissingPicturesError as error:
            self._reply(protocol.UNKNOWN_IMAGES, {"error": str(error), "missing": error.hashes})
        except BusyError as error:
            self._reply(503, {"error": str(error)}, {"Retry-After": "1"})
        except NonFiniteError as error:
            self._reply(422, {"error": str(error), "kind": "NonFiniteError"})
        except (DataError, ModelError, ValueError) as error:
            self._reply(400, {"error": str(error), "kind": type(error).__name__})
        except ConnectionError:
            self.close_connection = True  # the client has hung up
        except Exception as error:
            _log.exception("%s failed", self.path)
            self._reply(500, {"error": f"{type(error).__name__}: {error}"})

    def _body(self) -> bytes | None:
        """Returns the request's body; or refuses it, ends the connection and returns None."""
        length = self.headers.get("Content-Length", "")
        if not self._allowed():
            problem, status = "a bearer token is needed", 401
        elif not length.isdigit():
            problem, status = "Content-Length is needed", 411
        elif int(length) > self.server.max_body_bytes:
            problem, status = f"at most {self.server.max_body_bytes} bytes are accepted", 413
        else:
            return self.rfile.read(int(length))
        # A client that still sends would not read the answer: let it finish, within a limit.
        left = min(int(length) if length.isdigit() else 0, 2 * self.server.max_body_bytes)
        while left > 0 and (piece := self.rfile.read(min(left, 2**20))):
            left -= len(piece)
        self.close_connection = True
        self._reply(status, {"error": problem}, {"Connection": "close"})
        return None

    def _allowed(self) -> bool:
        token = self.server.token
        given = self.headers.get("Authorization", "").encode()
        return not token or hmac.compare_digest(given, f"Bearer {token.reveal()}".encode())

    def _reply(
        self, status: int, said: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        if self._begun:
            said = said if status == 200 else {**said, "status": status}
            self._chunk(json.dumps(said, allow_nan=False).encode())
            self._chunk(b"")
            return
        data = json.dumps(said, allow_nan=False).encode()
        self.send_response(status)
        more = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**more, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _beat(self) -> None:
        """Sends a space, which JSON allows before a value, to tell that the model works.

        Raises:
            OSError: the client has hung up.
        """
        if not self._begun:
            self._begun = True
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        self._chunk(b" ")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    said = body.get(name)
    if not isinstance(said, list):
        raise DataError(f"{name} must be a list")
    return said


def _images(said: Any) -> list[str]:
    names = said.get("images", []) if isinstance(said, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError("a sequence must be an object, and its images a list of hashes")
    return names


def _finite(values: Sequence[float], what: str) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"the model's {what} are not finite")
    return list(values)
