"""The failures of a judge: of one attempt, of one row, or of the whole judge."""

from __future__ import annotations

import email.utils
import re
import time
from typing import TypeAlias

from reopold_agent.common.secrets import Secret
from reopold_agent.errors import ReopoldError
from reopold_agent.judges.llm.base import How

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which another attempt may succeed (529: overloaded, at some providers)."""

_LONGEST_MESSAGE = 500


class JudgeError(ReopoldError, RuntimeError):
    """This judge cannot answer any request; the message says what to do."""


class TransientError(Exception):
    """An attempt failed, and another one may succeed.

    Attributes:
        kind: the failure's name in the counters, such as "http_503".
        retry_after: seconds that the provider asks to wait; None if it does not.
    """

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class UndecidedError(Exception):
    """This prompt gets no usable reply.

    Attributes:
        how: the outcome.
        said: the text of the reply, for the record.
        tokens: (input, output), because a truncated or malformed reply costs money too.
    """

    def __init__(
        self, how: How, message: str, *, said: str = "", tokens: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(message)
        self.how, self.said, self.tokens = how, said, tokens

    def redacted(self, key: Secret) -> UndecidedError:
        """Returns the same failure without the key, which a server may have echoed."""
        said = key.redact(self.said)
        return UndecidedError(self.how, key.redact(str(self)), said=said, tokens=self.tokens)


Failure: TypeAlias = "TransientError | UndecidedError | JudgeError"


def from_status(
    status: int,
    message: str,
    *,
    service: str,
    model: str,
    key_hint: str,
    model_hint: str = "",
    retry_after: float | None = None,
) -> Failure:
    """Returns the failure that an HTTP status means.

    Args:
        status: the HTTP status.
        message: the provider's message, without the key.
        service: the service's name in messages, such as "Gemini at https://...".
        model: the judge's model.
        key_hint: what to do if the key is refused.
        model_hint: what to do if there is no such model.
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
        advice = f"Check the judge's model ('{model}') and endpoint. {model_hint}".rstrip()
    elif 300 <= status < 400:
        advice = "The endpoint redirects; give the address that it redirects to."
    else:
        advice = f"The request was refused; check the judge's settings and model ('{model}')."
    return JudgeError(f"{service} answered HTTP {status}: {message}. {advice}")


def retry_after_seconds(header: str | None) -> float | None:
    """Returns the seconds of a ``Retry-After`` header, a number or a date; None if unreadable."""
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
