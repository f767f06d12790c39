"""What can go wrong with a judge, in three kinds: try again, this row, or the whole judge."""

from __future__ import annotations

import email.utils
import re
import time

from reopold_agent.errors import ReopoldError
from reopold_agent.judges.llm.base import How

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that may be gone at the next attempt (529: overloaded, at some providers)."""

_LONGEST_MESSAGE = 500


class JudgeError(ReopoldError, RuntimeError):
    """Nothing can be asked of this judge; the message says what to do."""


class TransientError(Exception):
    """An attempt failed in a way that another attempt may not.

    Attributes:
        kind: for the counters, "http_503".
        retry_after: seconds that the provider asks one to wait, if it does.
    """

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class UndecidedError(Exception):
    """This prompt gets no usable reply. ``said`` is what came, for the record.

    ``tokens`` is (input, output): a truncated or malformed reply has been paid for.
    """

    def __init__(
        self, how: How, message: str, *, said: str = "", tokens: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(message)
        self.how, self.said, self.tokens = how, said, tokens


def from_status(
    status: int,
    message: str,
    *,
    service: str,
    model: str,
    key_hint: str,
    retry_after: float | None = None,
) -> TransientError | UndecidedError | JudgeError:
    """The failure that an HTTP status means. The message is the provider's, key already gone.

    Args:
        status: as answered.
        message: the provider's own words.
        service: for messages, "Gemini at https://...".
        model: the model that was asked.
        key_hint: what to do about a refused key.
        retry_after: seconds, from the header or the body.
    """
    message = " ".join(message.split())[:_LONGEST_MESSAGE].rstrip(".")
    if status in RETRIED_STATUS or status >= 500:
        return TransientError(f"http_{status}", f"HTTP {status}: {message}", retry_after)
    if status == 413 or (status == 400 and re.search(r"token count|context.length", message, re.I)):
        return UndecidedError(How.TOO_LONG, f"HTTP {status}: {message}")
    if status in (401, 403) or (status == 400 and re.search(r"api.?key", message, re.I)):
        advice = key_hint
    elif status == 404:
        advice = f"Check the judge's model ('{model}') and endpoint."
    elif 300 <= status < 400:
        advice = "The endpoint redirects; give the address that it redirects to."
    else:
        advice = f"The request was refused; check the judge's settings and model ('{model}')."
    return JudgeError(f"{service} answered HTTP {status}: {message}. {advice}")


def retry_after_seconds(header: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header: a number or a date; None if absent or unreadable."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        # mktime_tz reads the date's own zone; parsedate_tz gives None for anything else.
        parsed = email.utils.parsedate_tz(header)
        if parsed is None:
            return None
        seconds = email.utils.mktime_tz(parsed) - time.time()
    return max(seconds, 0.0) if seconds == seconds and seconds != float("inf") else None
