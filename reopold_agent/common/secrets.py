"""What counts as secret, and how it is kept out of everything that is written or raised."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote, urlsplit, urlunsplit

HIDDEN = "[hidden]"

_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_PARAMETERS = "|".join((*_WORDS, "SIG", "SIGNATURE"))  # the last two: of pre-signed addresses
_QUERY = re.compile(rf"(?i)([?&;](?:[\w-]*(?:{_PARAMETERS}))=)[^&\s'\"]+")

_SHORTEST_VALUE = 6
"""A shorter value of a variable ("true", "EMPTY") is a word that messages contain anyway."""

_SHORTEST_KEY = 8
"""Likewise for a key; local servers are given keys such as "ollama"."""


def is_secret_name(name: str) -> bool:
    """Returns whether a variable of that name probably holds a key or a password."""
    return any(word in name.upper() for word in _WORDS)


class Secret:
    """A key that does not show in ``repr``, in a traceback's locals or in a pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Returns the key itself, to be put into a request and nowhere else."""
        return self._value

    def redact(self, text: str) -> str:
        """Returns the text without the key."""
        return _without([self._value], text, _SHORTEST_KEY)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret()"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a key is not pickled; other processes read it from the environment")


class Redactor:
    """Hides secrets in texts: values of variables with secret names, users and keys in addresses.

    Args:
        environment: the variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = set()
        for name, value in environment.items():
            if is_secret_name(name):
                values |= {value, value.strip()}
            for user in _USER.findall(value):  # http_proxy=http://me:password@proxy:3128
                values |= {user, *user.split(":", 1)[1:]}
        values |= {form for v in values for form in (quote(v), quote(v, safe=""), unquote(v))}
        # The longest first: one secret may begin like another.
        self._values = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Returns the text without them."""
        text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))
        return _without(self._values, text, _SHORTEST_VALUE)


def key_from_environment(names: Sequence[str]) -> Secret:
    """Returns the first of these variables that is set; an empty secret if none is."""
    for name in names:
        value = os.environ.get(name, "").strip()
        if value:
            return Secret(value)
    return Secret("")


def public_address(address: str) -> str:
    """Returns an address without user, password, query and fragment: each may hold a key."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    if parts.port:
        host = f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _without(values: Sequence[str], text: str, shortest: int) -> str:
    for value in values:
        if len(value) >= shortest:
            text = text.replace(value, HIDDEN)
    return text
