"""The types that `GeminiBackend` and the clients of Google's two SDKs exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from reopold_agent.judges.llm.base import Prompt

DEFAULT_MODEL = "gemini-flash-latest"
"""Google's alias of its current Flash model (ai.google.dev/gemini-api/docs/models). Fixed names
stop being served: the paper's `gemini-2.0-flash-001` on 1 June 2026."""

SAFETY_CATEGORIES = (
    "HARM_CATEGORY_HARASSMENT",
    "HARM_CATEGORY_HATE_SPEECH",
    "HARM_CATEGORY_SEXUALLY_EXPLICIT",
    "HARM_CATEGORY_DANGEROUS_CONTENT",
)


@dataclass(frozen=True)
class GeminiSettings:
    """Settings that influence a reply: the API's generationConfig and safetySettings.

    Attributes:
        model: the API's name of the model.
        max_output_tokens: most tokens of the reply, thoughts included.
        safety: threshold of all safety categories. By default nothing is blocked: the judge reads
            texts about arbitrary pictures, and a blocked row would be undecided.
        thinking_budget: most tokens of thoughts, for models that think (``google-genai`` only).
    """

    model: str = DEFAULT_MODEL
    max_output_tokens: int = 8192
    safety: str = "BLOCK_NONE"
    thinking_budget: int | None = None

    def schema(self, prompt: Prompt) -> dict[str, Any]:
        """Returns the reply's schema in the API's dialect."""
        answer: dict[str, Any] = {"type": "STRING", "nullable": True}
        value = answer if prompt.field == "answer" else {"type": "BOOLEAN"}
        return {
            "type": "OBJECT",
            "properties": {prompt.field: value},
            "required": [prompt.field],
        }


@dataclass(frozen=True)
class SdkReply:
    """A reply of the API, without the SDK's types. Enum values are the API's names.

    ``version`` is the model that answered, which an alias does not tell.
    """

    text: str = ""
    finish: str = ""
    blocked: str = ""
    candidates: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    version: str = ""


class HttpStatusError(Exception):
    """The service answered with an error status."""

    def __init__(self, status: int, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class UnreadableError(Exception):
    """The service answered 200 with something that the SDK could not read."""


class GeminiClient(Protocol):
    """A client of the Gemini API through one SDK."""

    @property
    def sdk(self) -> str:
        """The SDK's package and version, for the record."""
        ...

    def generate(self, prompt: Prompt, timeout: float) -> SdkReply:
        """Sends one generateContent request.

        Raises:
            HttpStatusError: the service answered with an error status.
            TransientError: no reply came (timeout, connection).
            UnreadableError: the reply is not a generateContent response.
        """
        ...

    def close(self) -> None:
        """Releases connections."""
        ...


def retry_delay(details: object) -> float | None:
    """Returns the seconds of a ``google.rpc.RetryInfo`` in an error's details, or None."""
    if isinstance(details, Mapping):
        if str(details.get("@type", "")).endswith("google.rpc.RetryInfo"):
            text = str(details.get("retryDelay", "")).removesuffix("s")
            try:
                return max(0.0, float(text))
            except ValueError:
                return None
        found = [retry_delay(value) for value in details.values()]
    elif isinstance(details, (list, tuple)):
        found = [retry_delay(value) for value in details]
    else:
        return None
    return next((seconds for seconds in found if seconds is not None), None)
