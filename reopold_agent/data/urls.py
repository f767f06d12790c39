"""Pictures at http(s) URLs, for data sets whose rows name them so. Off unless a setting allows it.

A row is somebody else's text: it must not make this machine talk to its own network (a cloud's
metadata service answers at 169.254.169.254), wait for ever or fill its disk. So each name is looked
up once, its addresses are checked, and the connection goes to the checked address; every redirect
is treated the same. The whole download has one time limit and one size limit. Proxies of the
environment are not used.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from PIL import Image

from reopold_agent.common.files import cache_folder
from reopold_agent.config import DataChecks
from reopold_agent.data.checks import RowError
from reopold_agent.data.images import BytesImage
from reopold_agent.errors import DataError

MAX_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)


def default_cache() -> Path:
    """Returns the folder of downloaded pictures: ``~/.cache/reopold-agent/pictures``."""
    return cache_folder() / "pictures"


@dataclass(frozen=True)
class UrlRules:
    """What may be downloaded.

    Attributes:
        max_bytes: of one picture.
        seconds: for one picture, redirects included (but not the look-up of names, which the
            system bounds).
        allow_private: whether this machine and its own network are allowed too.
        cache: folder in which pictures are kept by their URL's SHA-256.
    """

    max_bytes: int = 50_000_000
    seconds: float = 30.0
    allow_private: bool = False
    cache: Path = field(default_factory=default_cache)


def url_rules(checks: DataChecks) -> UrlRules | None:
    """Returns what the settings allow; None if no picture may be downloaded."""
    if not checks.allow_urls:
        return None
    return UrlRules(checks.url_max_bytes, checks.url_seconds, checks.allow_private_urls)


@dataclass(frozen=True)
class UrlImage:
    """A picture at a URL, downloaded when it is first opened."""

    url: str
    rules: UrlRules

    def open(self) -> Image.Image:
        """Opens the picture from the cache, or downloads it."""
        kept = self.rules.cache / hashlib.sha256(self.url.encode()).hexdigest()
        if kept.is_file():
            return BytesImage(kept.read_bytes(), shown(self.url)).open()
        data = download(self.url, self.rules)
        image = BytesImage(data, shown(self.url)).open()
        self._keep(kept, data)  # only what is a picture
        return image

    def content(self) -> str:
        """Returns the URL without its query, which may be a signature that changes."""
        return self.url.split("?", 1)[0]

    def _keep(self, kept: Path, data: bytes) -> None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as handle:
                handle.write(data)
            Path(handle.name).replace(kept)
        except OSError as error:
            raise DataError(f"cannot keep {shown(self.url)} in {kept.parent}: {error}") from error


def is_url(name: str) -> bool:
    """Returns whether a picture's name is a URL, of any scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", name, re.IGNORECASE) is not None


def shown(url: str) -> str:
    """Returns a URL for messages: shortened, without query and password, which may be secret.

    Unlike `public_address` it also takes what is not a valid URL.
    """
    plain = url.split("?", 1)[0].split("#", 1)[0]
    plain = re.sub(r"//[^/@]*@", "//", plain)
    return plain if len(plain) <= 200 else plain[:197] + "..."


def url_image(name: str, rules: UrlRules | None) -> UrlImage:
    """Returns the picture of a URL in a row; nothing is downloaded yet.

    Raises:
        RowError: URLs are not allowed, or this one is not http or https.
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
    """Returns the body of a URL.

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
    except (OSError, ValueError) as error:  # ValueError: not a valid URL, host name or header
        if isinstance(error, DataError):
            raise
        reason = "it took too long" if time.monotonic() >= ends else f"{error}"[:200]
        raise DataError(f"cannot download {shown(url)}: {reason}") from error
    raise DataError(f"cannot download {shown(url)}: more than {MAX_REDIRECTS} redirects")


def _request(url: str, rules: UrlRules, ends: float) -> tuple[bytes, str | None]:
    """Returns (body, None), or (b"", where a redirect points)."""
    # Imported here: it takes a quarter of a second, and most data sets have no URLs.
    from reopold_agent.common.http import HttpClient, TooLargeError

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"only http and https URLs can be pictures, got {shown(url)}")
    client = HttpClient(lambda name, port: _checked_address(name, port, url, rules))
    headers = {"User-Agent": "reopold-agent", "Accept": "image/*"}
    try:
        reply = client.request("GET", url, headers, until=ends, max_bytes=rules.max_bytes)
    except TooLargeError as error:
        raise DataError(f"{shown(url)} is larger than {rules.max_bytes} bytes") from error
    finally:
        client.close()
    if reply.status in _REDIRECTS:
        return b"", reply.headers.get("location", "")
    if reply.status != 200:
        raise DataError(f"cannot download {shown(url)}: {reply.status} {reply.reason[:80]}")
    return reply.body, None


def _checked_address(name: str, port: int, url: str, rules: UrlRules) -> str:
    """Returns the first address of a host name if all are allowed.

    Raises:
        DataError: one of them belongs to this machine or its own network.
    """
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not rules.allow_private and not _is_public(address):
            raise DataError(
                f"{shown(url)} is at {address}, an address of this machine or its own "
                "network; data.checks.allow_private_urls=true allows that"
            )
    return addresses[0]


def _is_public(number: str) -> bool:
    address = ipaddress.ip_address(number.split("%", 1)[0])
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or nat64 or address
    return address.is_global and not address.is_multicast
