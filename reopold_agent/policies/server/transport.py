"""HTTP to one or several servers of the same model: kept connections, time limits, retries.

Only the standard library. Every wait has a limit: a request ends, one way or the other, within
(retries + addresses) x (`timeout_seconds` + `max_backoff_seconds`).
"""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from reopold_agent.errors import ModelServerError
from reopold_agent.judges.llm.failures import RETRIED_STATUS, retry_after_seconds
from reopold_agent.judges.llm.redact import Secret, public_address
from reopold_agent.policies.server.settings import ServerSettings

T = TypeVar("T")

_LARGEST_REPLY = 512 * 2**20
_LONGEST_MESSAGE = 500


class AttemptError(Exception):
    """An attempt failed in a way that another attempt may not.

    Attributes:
        retry_after: seconds that the server asks one to wait, if it does.
        down: the address itself is in trouble, so others should be asked for a while.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, down: bool) -> None:
        super().__init__(message)
        self.retry_after, self.down = retry_after, down


class StatusError(ModelServerError):
    """The server refused a request for good. ``reply`` is what it said, parsed if it is JSON."""

    def __init__(self, message: str, status: int, reply: Any) -> None:
        super().__init__(message)
        self.status, self.reply = status, reply


class Address:
    """One server: its kept connections and what is known of its state."""

    def __init__(self, url: str) -> None:
        self.url = public_address(url.rstrip("/"))
        parts = urlsplit(url.rstrip("/"))
        self.host, self.port, self.prefix = parts.hostname or "", parts.port, parts.path
        self.context = ssl.create_default_context() if parts.scheme == "https" else None
        self.idle: deque[_Connection] = deque()
        self.checking = threading.Lock()
        self.checked = False
        """Whether the model that it serves is known to be the right one."""
        self.down_until = 0.0
        self.failures = 0


class Transport:
    """Sends requests to addresses that take turns.

    Args:
        settings: addresses and limits.
        key: sent as a bearer token; an empty one is not sent. It appears in no message.
        check: makes sure that an address serves the right model; called before its first use and
            again after it was out of reach. Raises `ModelError` if not.
    """

    def __init__(
        self, settings: ServerSettings, key: Secret, check: Callable[[Address, float], None]
    ) -> None:
        self._settings, self._key, self._check = settings, key, check
        self.addresses = [Address(str(url)) for url in settings.urls]
        self._next = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def call(
        self, send: Callable[[Address, float], T], what: str, *, prefer: int | None = None
    ) -> T:
        """Runs ``send(address, deadline)`` with retries and returns what it returns.

        There are ``retries`` further attempts, and one for each further address.

        Args:
            send: does one or several exchanges; raises `AttemptError` where a retry may help.
            what: is being asked for, for messages.
            prefer: use the same address for the same number while all are well, so that what a
                server has computed for a sequence is found again; None takes turns.

        Raises:
            ModelServerError: all attempts failed, or the server refused for good.
        """
        settings = self._settings
        attempts = settings.retries + len(self.addresses)
        failure: AttemptError | None = None
        for attempt in range(attempts):
            if self._closed.is_set():
                raise ModelServerError(f"{what}: the connection was closed")
            address = self._pick(prefer)
            try:
                result = self._attempt(address, send)
            except AttemptError as caught:
                failure = caught
                self._note(address, down=caught.down)
                if attempt + 1 < attempts and not (caught.down and self._any_up()):
                    self._closed.wait(self._pause(attempt, caught.retry_after))
            else:
                self._note(address, down=False)
                return result
        raise ModelServerError(f"{what} failed after {attempts} attempts; the last: {failure}")

    def exchange(
        self,
        address: Address,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        deadline: float,
    ) -> Any:
        """One request and its reply, parsed.

        Args:
            address: which server.
            method: ``GET`` or ``POST``.
            path: below the address.
            body: sent as JSON; None sends none.
            deadline: on `time.monotonic`'s clock.

        Raises:
            AttemptError: no reply, not in time, no JSON, or a status that may be gone soon.
            StatusError: the server refused.
        """
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        status, headers, reply = self._send(address, method, path, data, deadline)
        where = f"{address.url} answered HTTP {status} to {path}"
        said = "" if status == 200 else self._key.redact(_said(reply))[:_LONGEST_MESSAGE]
        if status in RETRIED_STATUS or status >= 500:
            raise AttemptError(
                f"{where}: {said}",
                retry_after=retry_after_seconds(headers.get("Retry-After")),
                down=status != 429,
            )
        if status in (401, 403):
            name = self._settings.api_key_env
            raise StatusError(f"{where}: {said}; check the key in {name} (api_key_env)", status, "")
        if status != 200:
            raise StatusError(f"{where}: {said}", status, _parsed(reply))
        try:
            return json.loads(reply)
        except ValueError as error:
            raise AttemptError(f"{where} with no JSON: {error}", down=True) from error

    def close(self) -> None:
        """Ends kept connections and waits between attempts; requests under way still end."""
        self._closed.set()
        for address in self.addresses:
            while address.idle:
                address.idle.pop().close()

    # Which address, and how long to wait

    def _pick(self, prefer: int | None) -> Address:
        now = time.monotonic()
        with self._lock:
            if prefer is None:
                self._next += 1
                prefer = self._next
            count = len(self.addresses)
            order = [self.addresses[(prefer + i) % count] for i in range(count)]
            up = [address for address in order if address.down_until <= now]
            return up[0] if up else min(order, key=lambda address: address.down_until)

    def _any_up(self) -> bool:
        now = time.monotonic()
        return any(address.down_until <= now for address in self.addresses)

    def _note(self, address: Address, *, down: bool) -> None:
        with self._lock:
            if not down:
                address.failures = 0
                return
            address.failures += 1
            address.checked = False  # who answers next may be another server
            seconds = max(1.0, self._settings.backoff_seconds) * 2.0 ** min(address.failures - 1, 8)
            pause = min(seconds, self._settings.max_backoff_seconds)
            address.down_until = time.monotonic() + pause

    def _pause(self, attempt: int, retry_after: float | None) -> float:
        settings = self._settings
        # Spread, so that requests that failed together do not come back together.
        seconds = settings.backoff_seconds * 2.0 ** min(attempt, 16) * random.uniform(0.5, 1.0)
        return min(max(seconds, retry_after or 0.0), settings.max_backoff_seconds)

    def _attempt(self, address: Address, send: Callable[[Address, float], T]) -> T:
        deadline = time.monotonic() + self._settings.timeout_seconds
        if not address.checked:
            with address.checking:
                if not address.checked:
                    self._check(address, deadline)
                    address.checked = True
        return send(address, deadline)

    # One exchange

    def _send(
        self, address: Address, method: str, path: str, data: bytes | None, deadline: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {"Accept": "application/json"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        while True:
            found = _take(address)
            connection = found or _Connection(address, self._settings.connect_seconds)
            try:
                reply = connection.exchange(method, address.prefix + path, data, headers, deadline)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A server may have closed a kept connection in the meantime: that is no failure.
                if found is not None and isinstance(error, ConnectionError):
                    continue
                words = self._key.redact(f"{type(error).__name__}: {error}")
                raise AttemptError(f"{address.url}{path}: {words}", down=True) from None
            if connection.reusable and not self._closed.is_set():
                address.idle.append(connection)
            else:
                connection.close()
            return reply


def _take(address: Address) -> _Connection | None:
    try:
        return address.idle.pop()
    except IndexError:
        return None


class _Connection(http.client.HTTPConnection):
    """A connection whose exchanges end at a deadline, however slowly bytes arrive."""

    def __init__(self, address: Address, connect_seconds: float) -> None:
        self._context = address.context
        self.default_port = 443 if self._context else 80
        super().__init__(address.host, address.port, timeout=connect_seconds)
        self.reusable = False

    def connect(self) -> None:
        super().connect()
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)

    def exchange(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Sends a request and reads its reply whole."""
        self.reusable = False
        if self.sock is None:
            self.connect()
        self.sock.settimeout(_left(deadline))
        self.request(method, path, body=data, headers=dict(headers))
        self.response_class = partial(_Response, deadline=deadline)  # type: ignore[assignment]
        response = self.getresponse()
        reply = response.read(_LARGEST_REPLY + 1)
        if len(reply) > _LARGEST_REPLY:
            raise http.client.HTTPException(f"the reply is longer than {_LARGEST_REPLY} bytes")
        if response.length:  # of the bytes that were announced, these are missing
            raise http.client.IncompleteRead(b"", response.length)
        self.reusable = not response.will_close
        return response.status, response.headers, reply


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, deadline))


class _TimedReader(io.RawIOBase):
    """A socket's bytes until a deadline: the socket's own timeout restarts with every byte."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time limit of the attempt is over")
    return left


def _parsed(reply: bytes) -> Any:
    try:
        return json.loads(reply)
    except ValueError:
        return None


def _said(reply: bytes) -> str:
    """The server's own words in an error's body, which servers shape differently."""
    said: Any = _parsed(reply)
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    if said is None:
        said = reply[:_LONGEST_MESSAGE].decode("utf-8", "replace")
    return " ".join((said if isinstance(said, str) else json.dumps(said)).split())
