"""HTTP requests that end: one deadline for the whole request, and a limit on the reply's size.

The time limits of httpx restart with every read and write, so a server that sends a byte now and
then would hold a request for ever. `HttpClient` therefore drives httpcore, the engine of httpx,
over a network backend of its own: it counts every operation against the request's deadline, and can
be told which address a name stands for. It uses no proxies, follows no redirects, keeps no cookies.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpcore
import httpx
from typing_extensions import override

from reopold_agent.errors import ConfigError

_LONGEST_MESSAGE = 10_000


class Deadline:
    """When a request must have ended; it is asked before every operation.

    Args:
        until: on `time.monotonic`'s clock.
    """

    def __init__(self, until: float) -> None:
        self._until = until

    @property
    def until(self) -> float:
        """The end, on `time.monotonic`'s clock."""
        return self._until

    @property
    def passed(self) -> bool:
        """Whether the request may not go on."""
        return time.monotonic() >= self.until

    def left(self) -> float:
        """Returns the seconds that are left.

        Raises:
            TimeoutError: none are.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time limit of the request has passed")
        return left

    def heard(self) -> None:
        """Is told of every part of the reply when it arrives."""


class TooLargeError(OSError):
    """A reply is larger than allowed."""


@dataclass(frozen=True)
class HttpReply:
    """A reply, read to its end; the names of ``headers`` are in lower case."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Sends requests over kept connections; used from any number of threads.

    Args:
        resolve: ``resolve(name, port)`` returns the address to connect to; may raise. None leaves
            that to the system. TLS asks for a certificate of the name in any case.
    """

    def __init__(self, resolve: Callable[[str, int], str] | None = None) -> None:
        self._closed = False
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls_context(),
            max_connections=None,
            max_keepalive_connections=None,
            network_backend=_Network(resolve),
        )

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        until: float | Deadline,
        connect_seconds: float | None = None,
        max_bytes: int,
    ) -> HttpReply:
        """Sends a request and reads its reply.

        Args:
            method, url, headers, body: the request; user and password in the URL are not sent.
            until: deadline of the whole request, on `time.monotonic`'s clock, or one that may move.
            connect_seconds: time limit of connecting, TLS included.
            max_bytes: size limit of the reply's body.

        Raises:
            TimeoutError: the deadline has passed.
            TooLargeError: the reply is larger.
            OSError: no connection, or it ended early.
            ValueError: the URL or a header is not a valid one.
        """
        target, host = _parsed(url)
        sent: dict[str | bytes, str | bytes] = {"Host": host, "Accept-Encoding": "identity"}
        sent.update(headers)
        limit = until if isinstance(until, Deadline) else Deadline(until)
        while True:
            connect_until = min(limit.until, time.monotonic() + (connect_seconds or float("inf")))
            connecting, answered = _Connecting(connect_until), False
            limits = {"connect": connecting, "read": limit, "write": limit}
            try:
                with self._pool.stream(
                    method, target, headers=sent, content=body, extensions={"timeout": limits}
                ) as response:
                    answered = True
                    return _read(response, max_bytes, limit)
            except httpcore.LocalProtocolError as error:
                raise ValueError(str(error)) from error
            except (httpcore.RemoteProtocolError, ConnectionError) as error:
                # A server may have closed a kept connection in the meantime: that is no failure.
                if not answered and not connecting.used:
                    continue
                if isinstance(error, ConnectionError):
                    raise
                raise ConnectionError(str(error)) from error
            finally:
                if self._closed:
                    self.close()

    def close(self) -> None:
        """Closes connections; requests under way still end."""
        self._closed = True
        for connection in self._pool.connections:
            if connection.is_idle():
                connection.close()


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Returns a context that trusts the system's certificates, as other programs here do."""
    return ssl.create_default_context()


def proxied_client() -> httpx.Client:
    """Returns a client that uses the proxies of the environment and follows no redirects.

    A redirect would carry a key's header along, to wherever it points.

    Raises:
        ConfigError: a proxy of the environment cannot be used.
    """
    if logging.getLogger("httpx").level == logging.NOTSET:
        # One line per request at INFO, Hydra's level, would bury everything else.
        logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return httpx.Client(
            headers={"Accept-Encoding": "identity"},  # a size limit then holds for what is sent
            verify=tls_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
    except (ImportError, ValueError) as error:  # SOCKS without its package, unknown schemes
        raise ConfigError(
            f"a proxy of the environment cannot be used: {error}\n"
            "Change or unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY."
        ) from error


def read_body(response: httpx.Response, until: float, max_bytes: int) -> bytes:
    """Reads a streamed response.

    Raises:
        TimeoutError: the deadline, on `time.monotonic`'s clock, has passed.
        TooLargeError: it is larger than ``max_bytes``.
    """
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if time.monotonic() > until:
            raise TimeoutError("the reply took too long")
        if len(body) > max_bytes:
            raise TooLargeError(f"the reply is longer than {max_bytes} bytes")
    return bytes(body)


def server_message(body: bytes) -> str:
    """Returns the server's own words from the body of an error, whose form differs by server."""
    try:
        said: Any = json.loads(body)
    except ValueError:
        said = body[:_LONGEST_MESSAGE].decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    return " ".join((said if isinstance(said, str) else json.dumps(said)).split())


def _read(response: httpcore.Response, max_bytes: int, limit: Deadline) -> HttpReply:
    limit.heard()
    headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
    pieces, size = [], 0
    announced = headers.get("content-length", "")
    if announced.isdigit():
        size = int(announced) if int(announced) > max_bytes else 0
    for piece in () if size else response.iter_stream():
        limit.heard()
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            break
    if size > max_bytes:
        raise TooLargeError(f"the reply is longer than {max_bytes} bytes")
    reason = response.extensions.get("reason_phrase", b"").decode("latin-1")
    return HttpReply(response.status, reason, headers, b"".join(pieces))


@lru_cache(maxsize=256)
def _parsed(url: str) -> tuple[httpcore.URL, str]:
    """The target of a request, names encoded and paths quoted, and its ``Host``."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from error
    if parts.scheme not in ("http", "https") or not parts.host or (parts.port or 0) > 65535:
        raise ValueError("the address is not an http(s) address")
    target = httpcore.URL(
        scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path
    )
    return target, parts.netloc.decode("ascii")


class _Connecting(Deadline):
    """The deadline of connecting, which knows whether a connection was made."""

    used = False

    @override
    def left(self) -> float:
        self.used = True
        return super().left()


class _Network(httpcore.NetworkBackend):
    """Connects; a `Deadline` stands where httpcore expects seconds."""

    def __init__(self, resolve: Callable[[str, int], str] | None) -> None:
        self._resolve = resolve

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: Any = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        address = host if self._resolve is None else self._resolve(host, port)
        connected = socket.create_connection((address, port), timeout.left())
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Stream(connected)


class _Stream(httpcore.NetworkStream):
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def read(self, max_bytes: int, timeout: Any = None) -> bytes:
        while True:
            self._socket.settimeout(timeout.left())
            try:
                return self._socket.recv(max_bytes)
            except TimeoutError:
                continue  # the deadline has moved meanwhile, or `left` says that it has passed

    def write(self, buffer: bytes, timeout: Any = None) -> None:
        rest = memoryview(buffer)
        while rest:
            self._socket.settimeout(timeout.left())
            try:
                rest = rest[self._socket.send(rest) :]
            except ConnectionError as error:
                # httpcore then reads what the server said before it hung up.
                raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: Any = None
    ) -> httpcore.NetworkStream:
        self._socket.settimeout(timeout.left())
        try:
            return _Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))
        except BaseException:
            self.close()
            raise

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of a kept connection: the server has closed it
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0))
        return None
