"""Embeds data and scripts in HTML pages, so that no text of a model can run there."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from reopold_agent.common.files import to_json


def page_json(value: Any) -> str:
    """Returns strict JSON that is safe in a script element and anywhere else in a page.

    "<" is escaped, so that no string can close the element or open a comment. The output is ASCII:
    U+2028 and U+2029, which end a line in older JavaScript, and lone surrogates are escaped too.
    """
    return json.dumps(to_json(value), allow_nan=False).replace("<", "\\u003c")


def source_hash(text: str) -> str:
    """Returns the source with which a Content-Security-Policy allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
