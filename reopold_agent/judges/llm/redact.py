"""Keeps the key out of everything that is written or raised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

HIDDEN = "[key]"

_SHORTEST_SECRET = 8
"""Local servers are given keys such as "EMPTY": hiding those would mangle ordinary words."""


class Secret:
    """A key that does not show itself in ``repr``, in a traceback's locals or in a pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself, to be put into a request and nowhere else."""
        return self._value

    def redact(self, text: str) -> str:
        """The text without the key."""
        if len(self._value) < _SHORTEST_SECRET:
            return text
        return text.replace(self._value, HIDDEN)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret()"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a key is not pickled; other processes read it from the environment")


def key_from_environment(names: Sequence[str]) -> Secret:
    """The first of these variables that is set; an empty secret if none is."""
    for name in names:
        value = os.environ.get(name, "").strip()
        if value:
            return Secret(value)
    return Secret("")


def public_address(address: str) -> str:
    """An address without user, password, query and fragment, any of which may hold a key."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    if parts.port:
        host = f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
