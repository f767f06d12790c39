"""Pictures at http(s) URLs, for data sets whose rows name them so. Off unless a setting allows it.

A row is somebody else's text: it must not make this machine talk to its own network (a cloud's
metadata service answers at 169.254.169.254), wait for ever or fill its disk. So each address is
looked up once, checked, and then connected to by number, at every redirect again; the whole
download has one time limit and one size limit. Proxies of the environment are not used.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import string
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image

from reopold_agent.data.checks import RowError
from reopold_agent.data.images import BytesImage
from reopold_agent.errors import DataError

MAX_REDIRECTS = 3
_CHUNK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)
_NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)
# ValueError: a URL, host name or header that cannot be one.


def default_cache() -> Path:
    """Where downloaded pictures stay: ``~/.cache/reopold-agent/pictures``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "reopold-agent" / "pictures"


@dataclass(frozen=True)
class UrlRules:
    """What may be downloaded.

    Attributes:
        max_bytes: of one picture.
        seconds: for one picture, redirects included (looking a name up is not: the system bounds
            that).
        allow_private: also from this machine and its own network.
        cache: folder in which pictures are kept by their URL's SHA-256.
    """

    max_bytes: int = 50_000_000
    seconds: float = 30.0
    allow_private: bool = False
    cache: Path = field(default_factory=default_cache)


@dataclass(frozen=True)
class UrlImage:
    """A picture at a URL, downloaded when it is first opened."""

    url: str
    rules: UrlRules

    def open(self) -> Image.Image:
        """See `ImageSource`."""
        kept = self.rules.cache / hashlib.sha256(self.url.encode()).hexdigest()
        if kept.is_file():
            return BytesImage(kept.read_bytes(), shown(self.url)).open()
        data = download(self.url, self.rules)
        image = BytesImage(data, shown(self.url)).open()
        self._keep(kept, data)  # only what is a picture
        return image

    def _keep(self, kept: Path, data: bytes) -> None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as handle:
                handle.write(data)
            Path(handle.name).replace(kept)
        except OSError as error:
            raise DataError(f"cannot keep {shown(self.url)} in {kept.parent}: {error}") from error


def is_url(name: str) -> bool:
    """Whether a picture's name is a URL, of any scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", name, re.IGNORECASE) is not None


def shown(url: str) -> str:
    """A URL for messages: without its query and password, which may be secrets, and not long."""
    plain = url.split("?", 1)[0].split("#", 1)[0]
    plain = re.sub(r"//[^/@]*@", "//", plain)
    return plain if len(plain) <= 200 else plain[:197] + "..."


def url_image(name: str, rules: UrlRules | None) -> UrlImage:
    """The picture of a URL in a row; nothing is downloaded yet.

    Raises:
        RowError: URLs are not allowed, or this is not one of http or https.
    """
    if rules is None:
        raise RowError(
            "URL",
            f"the picture is at a URL ({shown(name)}); data.checks.allow_urls=true downloads it",
        )
    if not re.match(r"https?://[^/?#]", name, re.IGNORECASE):
        raise RowError("URL", f"only http and https URLs can be pictures, got {shown(name)}")
    return UrlImage(name, rules)


def download(url: str, rules: UrlRules) -> bytes:
    """The body of a URL.

    Raises:
        DataError: it is too large, takes too long, redirects too often or to an address that is
            not allowed, or does not answer with 200; names the URL.
    """
    ends = time.monotonic() + rules.seconds
    at = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            body, target = _request(at, rules, ends)
            if target is None:
                return body
            at = urljoin(at, target)
    except _NETWORK_ERRORS as error:
        if isinstance(error, DataError):
            raise
        reason = "it took too long" if time.monotonic() >= ends else f"{error}"[:200]
        raise DataError(f"cannot download {shown(url)}: {reason}") from error
    raise DataError(f"cannot download {shown(url)}: more than {MAX_REDIRECTS} redirects")


def _request(url: str, rules: UrlRules, ends: float) -> tuple[bytes, str | None]:
    """(body, None), or (b"", where a redirect points)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"only http and https URLs can be pictures, got {shown(url)}")
    connection = _Connection(parts, _address(parts, rules), max(0.01, ends - time.monotonic()))
    # Socket time-outs start anew with every byte; this ends the exchange whatever is sent.
    alarm = threading.Timer(max(0.01, ends - time.monotonic()), connection.cut)
    alarm.daemon = True
    alarm.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        path = quote(path, safe=string.punctuation)
        connection.request(
            "GET", path, headers={"User-Agent": "reopold-agent", "Accept": "image/*"}
        )
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return b"", response.getheader("Location") or ""
        if response.status != 200:
            raise DataError(
                f"cannot download {shown(url)}: {response.status} {response.reason[:80]}"
            )
        body = _body(response, url, rules)
        if connection.late:  # what came until the alarm is not the whole
            raise TimeoutError("the time is up")
        return body, None
    finally:
        alarm.cancel()
        connection.close()


def _body(response: http.client.HTTPResponse, url: str, rules: UrlRules) -> bytes:
    too_large = DataError(f"{shown(url)} is larger than {rules.max_bytes} bytes")
    if response.length is not None and response.length > rules.max_bytes:
        raise too_large
    body = bytearray()
    while chunk := response.read(_CHUNK):  # raises IncompleteRead when a chunked body is cut
        body += chunk
        if len(body) > rules.max_bytes:
            raise too_large
    if response.length:  # of a body of known length, what came is returned
        raise http.client.HTTPException("the connection ended early")
    return bytes(body)


def _address(parts: SplitResult, rules: UrlRules) -> tuple[str, int]:
    """The number and port to connect to: the first address of the name, if all are allowed."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    numbers = [str(entry[4][0]) for entry in found]
    for number in numbers:
        if not rules.allow_private and not _is_public(number):
            raise DataError(
                f"{shown(parts.geturl())} is at {number}, an address of this machine or its own "
                "network; data.checks.allow_private_urls=true allows that"
            )
    return numbers[0], port


def _is_public(number: str) -> bool:
    address = ipaddress.ip_address(number.split("%", 1)[0])
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or nat64 or address
    return address.is_global and not address.is_multicast


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, whatever its name means by now."""

    def __init__(self, parts: SplitResult, address: tuple[str, int], seconds: float) -> None:
        if parts.scheme == "https":
            self.default_port = 443
        super().__init__(str(parts.hostname), address[1], timeout=seconds)
        self._number, self.late = address, False
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._raw: socket.socket | None = None

    def connect(self) -> None:
        """Connects by number; TLS still asks for a certificate of the name."""
        self._raw = socket.create_connection(self._number, self.timeout)
        if self.late:
            raise TimeoutError("the time is up")
        self.sock = self._raw
        if self._tls is not None:
            self.sock = self._raw = self._tls.wrap_socket(self._raw, server_hostname=self.host)

    def cut(self) -> None:
        """Ends the exchange from another thread."""
        self.late = True
        if self._raw is not None:
            try:
                self._raw.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it has just ended by itself
