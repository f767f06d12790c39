"""Sends requests to one or several servers of the same model, with retries and time limits.

An attempt may take as long as its server works: it fails when the address has sent nothing for
`timeout_seconds`, neither to this request nor to another. So neither the queue nor the length of an
answer has a limit, and a server that stops ends every wait. (It shows that it works by the parts of
its answers: tokens, or the spaces of `reopold_agent.serve`.) An attempt that fails closes its
connection before the next one begins, so that the server can end it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from typing_extensions import override

from reopold_agent.common.http import Deadline, HttpClient, HttpReply, server_message
from reopold_agent.common.secrets import Secret, public_address
from reopold_agent.errors import ModelServerError, ServerStalledError
from reopold_agent.judges.llm.failures import RETRIED_STATUS, retry_after_seconds
from reopold_agent.policies.server.settings import ServerSettings

T = TypeVar("T")

_LARGEST_REPLY = 512 * 2**20
_LONGEST_MESSAGE = 500


class AttemptError(Exception):
    """An attempt failed, and another one may succeed.

    Attributes:
        retry_after: seconds that the server asks to wait; None if it does not.
        down: whether the whole address failed, so that other addresses are used for a while.
        late: whether the address had sent nothing for too long.
    """

    def __init__(
        self, message: str, *, retry_after: float | None = None, down: bool, late: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after, self.down, self.late = retry_after, down, late


class StatusError(ModelServerError):
    """The server refused a request for good. ``reply`` is its answer if it is JSON."""

    def __init__(self, message: str, status: int, reply: Any) -> None:
        super().__init__(message)
        self.status, self.reply = status, reply


class Address:
    """One server's address and its known state."""

    def __init__(self, url: str) -> None:
        self.url = public_address(url.rstrip("/"))
        self.checking = threading.Lock()
        self.checked = False
        """Whether the server is known to have the right model."""
        self.down_until = 0.0
        self.failures = 0
        self.heard_at = 0.0
        """When it last sent anything, on `time.monotonic`'s clock."""


class Silence(Deadline):
    """Passes when an address has sent nothing for some seconds, to whichever request.

    Args:
        address: whose silence.
        seconds: how long it may last.
    """

    def __init__(self, address: Address, seconds: float) -> None:
        super().__init__(time.monotonic() + seconds)
        self._address, self._seconds = address, seconds

    @property
    @override
    def until(self) -> float:
        return max(self._until, self._address.heard_at + self._seconds)

    @override
    def heard(self) -> None:
        self._address.heard_at = time.monotonic()


class Transport:
    """Distributes requests over several addresses in turn.

    Args:
        settings: addresses and limits.
        key: sent as a bearer token; an empty one is not sent. No message contains it.
        check: raises `ModelError` unless an address serves the right model; called before its
            first use, and again after a failure to answer.
    """

    def __init__(
        self, settings: ServerSettings, key: Secret, check: Callable[[Address, Deadline], None]
    ) -> None:
        self._settings, self._key, self._check = settings, key, check
        self.addresses = [Address(str(url)) for url in settings.urls]
        self._http = HttpClient()
        self._next = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def call(
        self, send: Callable[[Address, Deadline], T], what: str, *, prefer: int | None = None
    ) -> T:
        """Runs ``send(address, deadline)`` with retries and returns what it returns.

        It makes ``retries`` further attempts, and one more for each further address.

        Args:
            send: makes one or several exchanges; raises `AttemptError` where a retry may help.
            what: the purpose, for messages.
            prefer: equal numbers go to the same address while all work, so that the server can
                reuse its computation of a sequence; None takes the next address.

        Raises:
            ServerStalledError: all attempts failed, and one of them because the server was silent.
            ModelServerError: all attempts failed, or the server refused for good.
        """
        settings = self._settings
        late = False
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
                late |= caught.late
                self._note(address, down=caught.down)
                if attempt + 1 < attempts and not (caught.down and self._any_up()):
                    self._closed.wait(self._pause(attempt, caught.retry_after))
            else:
                self._note(address, down=False)
                return result
        message = f"{what} failed after {attempts} attempts; the last: {failure}"
        if late:
            raise ServerStalledError(
                f"{message}\nThe run ends, since going on without what is not answered would "
                f"leave out the longest episodes. See why the server sent nothing for "
                f"timeout_seconds ({settings.timeout_seconds:g}); raise it if it is only slow."
            )
        raise ModelServerError(message)

    def exchange(
        self,
        address: Address,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        deadline: Deadline,
        read: Callable[[bytes], Any] = json.loads,
    ) -> Any:
        """Sends one request and returns the parsed reply.

        Args:
            address: the server.
            method: ``GET`` or ``POST``.
            path: the path at this address.
            body: sent as JSON; None sends no body.
            deadline: of the request.
            read: parses a reply; raises `ValueError`.

        Raises:
            AttemptError: no reply in time, one that cannot be read, or a status after which a retry
                may help.
            StatusError: the server refused the request.
        """
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        reply = self._send(address, method, path, data, deadline)
        status, said_body = reply.status, reply.body
        if status == 200:
            try:
                answer = read(reply.body)
            except ValueError as error:
                raise AttemptError(
                    f"{address.url} answered to {path}, but not in JSON: {error}", down=True
                ) from error
            if not isinstance(answer, dict) or answer.get("error") is None:
                return answer
            # The reply had begun when the request failed; its status is within.
            status, said_body = int(answer.get("status") or 500), json.dumps(answer).encode()
        where = f"{address.url} answered HTTP {status} to {path}"
        said = self._key.redact(server_message(said_body))[:_LONGEST_MESSAGE]
        if status in RETRIED_STATUS or status >= 500:
            raise AttemptError(
                f"{where}: {said}",
                retry_after=retry_after_seconds(reply.headers.get("retry-after")),
                down=status != 429,
            )
        if status in (401, 403):
            name = self._settings.api_key_env
            raise StatusError(f"{where}: {said}; check the key in {name} (api_key_env)", status, "")
        raise StatusError(f"{where}: {said}", status, _parsed(said_body))

    def close(self) -> None:
        """Closes idle connections and ends pauses; requests under way are still completed."""
        self._closed.set()
        self._http.close()

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
            address.checked = False  # another server may answer there next time
            seconds = max(1.0, self._settings.backoff_seconds) * 2.0 ** min(address.failures - 1, 8)
            pause = min(seconds, self._settings.max_backoff_seconds)
            address.down_until = time.monotonic() + pause

    def _pause(self, attempt: int, retry_after: float | None) -> float:
        settings = self._settings
        # With jitter, so that requests that failed together do not retry together.
        seconds = settings.backoff_seconds * 2.0 ** min(attempt, 16) * random.uniform(0.5, 1.0)
        return min(max(seconds, retry_after or 0.0), settings.max_backoff_seconds)

    def _attempt(self, address: Address, send: Callable[[Address, Deadline], T]) -> T:
        deadline = Silence(address, self._settings.timeout_seconds)
        if not address.checked:
            with address.checking:
                if not address.checked:
                    self._check(address, deadline)
                    address.checked = True
        return send(address, deadline)

    # One exchange

    def _send(
        self, address: Address, method: str, path: str, data: bytes | None, deadline: Deadline
    ) -> HttpReply:
        headers = {"Accept": "application/json"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        try:
            return self._http.request(
                method,
                address.url + path,
                headers,
                data,
                until=deadline,
                connect_seconds=self._settings.connect_seconds,
                max_bytes=_LARGEST_REPLY,
            )
        except OSError as error:
            words = self._key.redact(f"{type(error).__name__}: {error}")
            raise AttemptError(
                f"{address.url}{path}: {words}", down=True, late=deadline.passed
            ) from None


def _parsed(reply: bytes) -> Any:
    try:
        return json.loads(reply)
    except ValueError:
        return None
