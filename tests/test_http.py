"""The HTTP client against servers on loopback: deadlines, sizes, pinned addresses, TLS."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from reopold_agent.common import http
from reopold_agent.common.http import HttpClient, TooLargeError, proxied_client
from reopold_agent.errors import ConfigError

Serve = Callable[[socket.socket], None]


@contextmanager
def serving(serve: Serve) -> Iterator[int]:
    """Yields the port of a server that hands each connection to ``serve`` on a thread."""
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            serve(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def head(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received and (piece := connection.recv(65536)):
        received += piece
    return received


def drip(connection: socket.socket, data: bytes) -> None:
    for i in range(len(data)):
        connection.sendall(data[i : i + 1])
        time.sleep(0.05)


def get(client: HttpClient, url: str, seconds: float = 20.0, body: bytes | None = None) -> bytes:
    until = time.monotonic() + seconds
    return client.request("POST", url, {}, body, until=until, max_bytes=1000).body


def drips_its_head(connection: socket.socket) -> None:
    head(connection)
    drip(connection, b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 1000)


def drips_its_body(connection: socket.socket) -> None:
    head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
    drip(connection, b"x" * 999)


def reads_slowly(connection: socket.socket) -> None:
    while connection.recv(100):
        time.sleep(0.05)


@pytest.mark.parametrize("serve", [drips_its_head, drips_its_body, reads_slowly])
def test_a_request_ends_at_its_deadline_however_bytes_trickle(serve: Serve) -> None:
    with serving(serve) as port:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            get(HttpClient(), f"http://127.0.0.1:{port}/", 0.5, b"x" * 50_000_000)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("announced", [True, False])
def test_a_reply_is_bounded(announced: bool) -> None:
    def serve(connection: socket.socket) -> None:
        head(connection)
        if announced:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        else:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            while True:
                connection.sendall(b"x" * 100)

    with serving(serve) as port, pytest.raises(TooLargeError, match="longer than 1000 bytes"):
        get(HttpClient(), f"http://127.0.0.1:{port}/")


def test_what_a_server_says_before_it_has_read_a_request_is_heard() -> None:
    def serve(connection: socket.socket) -> None:
        head(connection)
        connection.sendall(b"HTTP/1.1 413 Too large\r\nContent-Length: 3\r\n\r\nbig")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(2**20):  # the client gives up by itself
            pass

    with serving(serve) as port:
        assert get(HttpClient(), f"http://127.0.0.1:{port}/", body=b"x" * 1_000_000) == b"big"


def test_a_name_is_resolved_once_and_tls_asks_for_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=x",
         "-addext", "subjectAltName=DNS:pictures.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            while request := head(secured):
                heard.append(request)
                secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    resolved: list[str] = []

    def resolve(name: str, port: int) -> str:
        resolved.append(name)
        return "127.0.0.1"

    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(http, "tls_context", lambda: trusting)
    with serving(serve) as port:
        client = HttpClient(resolve)
        for _ in range(2):
            assert get(client, f"https://me:password@pictures.example:{port}/x y?z=1") == b"ok"
        assert resolved == ["pictures.example"], "the connection is kept"
        assert names == ["pictures.example"]
        assert heard[0].startswith(b"POST /x%20y?z=1 HTTP/1.1\r\n")
        assert f"Host: pictures.example:{port}\r\n".encode() in heard[0]
        assert b"password" not in heard[0]
        assert b"Authorization" not in heard[0]
        with pytest.raises(ssl.SSLCertVerificationError):
            get(client, f"https://other.example:{port}/")
        client.close()


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    def serve(connection: socket.socket) -> None:
        head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with serving(serve) as port:
        assert get(HttpClient(), f"http://127.0.0.1:{port}/") == b"ok"


def test_a_proxy_that_cannot_be_used_is_a_setting_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALL_PROXY", "telnet://127.0.0.1:1")
    with pytest.raises(ConfigError, match="ALL_PROXY"):
        proxied_client()


@pytest.mark.parametrize("url", ["ftp://h/x", "http://", "http://[::1", "http://h:99999/", "h/x"])
def test_addresses_that_are_not_valid_are_value_errors(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        get(HttpClient(), url)
