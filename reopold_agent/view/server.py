"""Serves the page on loopback: only GET, only the run's files, not to pages of other hosts."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from reopold_agent.errors import ConfigError
from reopold_agent.tracking.html import page_json
from reopold_agent.view.page import SCRIPTS, STYLE, asset, served_page
from reopold_agent.view.run import PICTURE_TYPES, Run

HOST = "127.0.0.1"
PORT = 7878
PORTS_TRIED = 20
"""How many ports to try from the given one."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_log = logging.getLogger(__name__)


class ViewerServer(ThreadingHTTPServer):
    """Serves one or two runs until `shutdown`.

    Args:
        runs: one or two.
        port: the first port to try; 0 takes any free port.

    Raises:
        ConfigError: no port was free.
    """

    daemon_threads = True
    # On Windows it would let a second server take the port of one that still listens.
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, runs: Sequence[Run], port: int = PORT) -> None:
        self.runs = list(runs)
        for number in range(port, min(port + PORTS_TRIED, 65536) if port else 1):
            try:
                super().__init__((HOST, number), _Handler)
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
            return
        raise ConfigError(
            f"none of the ports {port} to {port + PORTS_TRIED - 1} is free.\n"
            "Give another with --port, or --port 0 for any free port."
        )

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs errors, except that a browser has disconnected."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | socket.timeout):
            _log.exception("a request failed")


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    server_version, sys_version = "reopold", ""
    protocol_version = "HTTP/1.1"
    timeout = 30.0  # of a connection without requests

    def do_GET(self) -> None:
        if not self._is_ours():
            # A page of a name that now resolves to this machine (DNS rebinding) sends that name.
            self._send(HTTPStatus.FORBIDDEN, b"This server answers to its own address only.")
            return
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.path == "/":
            self._send(HTTPStatus.OK, served_page().encode(), "text/html; charset=utf-8")
        elif parts.path.startswith("/assets/"):
            self._asset(parts.path.removeprefix("/assets/"))
        elif parts.path == "/api/runs":
            self._json({"runs": len(self.server.runs)})
        elif parts.path == "/favicon.ico":  # browsers request it on their own
            self._send(HTTPStatus.NO_CONTENT, b"")
        elif parts.path in ("/api/news", "/api/record", "/api/picture"):
            self._of_run(parts.path.removeprefix("/api/"), query)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"There is no such page.")

    def _is_ours(self) -> bool:
        port = self.server.server_address[1]
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        # Through `ssh -L` the port may differ, but not the name.
        name = host.rpartition(":")[0] if ":" in host else host
        local = name in (HOST, "localhost")
        return local and origin in (None, f"http://{host}", f"http://{HOST}:{port}")

    def _asset(self, name: str) -> None:
        if name == STYLE:
            self._send(HTTPStatus.OK, asset(name).encode(), "text/css; charset=utf-8")
        elif name in SCRIPTS:
            self._send(HTTPStatus.OK, asset(name).encode(), "text/javascript; charset=utf-8")
        else:
            self._send(HTTPStatus.NOT_FOUND, b"There is no such file.")

    def _of_run(self, what: str, query: dict[str, str]) -> None:
        runs = self.server.runs
        try:
            run = runs[_natural(query.get("run", "0"))]
            if what == "picture":
                self._picture(run, query.get("name", ""))
            elif what == "record":
                row = run.record(_natural(query.get("n", "")))
                if row is None:
                    self._send(HTTPStatus.NOT_FOUND, b"This row no longer exists.")
                else:
                    self._json(row)
            else:
                rows, metrics = (_natural(query.get(k, "0")) for k in ("rows", "metrics"))
                known = query.get("generation", ""), query.get("facts", "")
                self._json(run.news(rows, metrics, *known))
        except (ValueError, IndexError):
            self._send(HTTPStatus.BAD_REQUEST, b"There is no such run or row.")
        except OSError as error:
            text = f"The run's folder cannot be read: {error}"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, text.encode())

    def _picture(self, run: Run, name: str) -> None:
        path = run.picture(name)
        if path is None:
            self._send(HTTPStatus.NOT_FOUND, b"There is no such picture in this run.")
        else:
            self._send(HTTPStatus.OK, path.read_bytes(), PICTURE_TYPES[path.suffix])

    def _json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, page_json(value).encode(), "application/json")

    def _send(
        self, status: HTTPStatus, data: bytes, kind: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        _log.debug(format, *arguments)


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value
