"""Data and scripts within an HTML page, so that nothing a model said can run there."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from reopold_agent.tracking.files import to_json


def page_json(value: Any) -> str:
    """Strict JSON for a script element, and safe anywhere else in a page.

    "<" is escaped, so that no string can close the element or open a comment. All is ASCII: U+2028
    and U+2029, which end a line in older JavaScript, and half surrogates are escapes too.
    """
    return json.dumps(to_json(value), allow_nan=False).replace("<", "\\u003c")


def source_hash(text: str) -> str:
    """What a Content-Security-Policy allows exactly this script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
