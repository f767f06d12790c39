"""Keeps keys and passwords out of what is printed, wherever a message got them from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from reopold_agent.tools.sandbox import sounds_secret

HIDDEN = "[hidden]"

_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?i)([?&;](?:[\w-]*(?:key|token|secret|password|passwd|sig))=)[^&\s'\"]+")
_SHORTEST = 6
"""A shorter value ("true", "EMPTY") is a word that other texts have a right to."""


class Redactor:
    """Hides the values of variables that hold secrets, and what stands before an @ in addresses.

    Args:
        environment: the variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = set()
        for name, value in environment.items():
            if sounds_secret(name):
                values |= {value, value.strip()}
            for user in _USER.findall(value):  # http_proxy=http://me:password@proxy:3128
                values |= {user, *user.split(":", 1)[1:]}
        values |= {form for v in values for form in (quote(v), quote(v, safe=""), unquote(v))}
        # The longest first: one secret may begin like another.
        self._values = sorted((v for v in values if len(v) >= _SHORTEST), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text without them."""
        text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text
