"""The Gemini API through Google's own SDK: ``google-genai``, else ``google-generativeai``.

Both speak generateContent to the same service; the older one is deprecated but is what many have
installed. A transport turns an SDK's reply into a `Wire` and its errors into ours; what they mean
is decided here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from reopold_agent.errors import ConfigError, MissingExtraError
from reopold_agent.judges.llm.base import Completion, How, Prompt
from reopold_agent.judges.llm.failures import (
    JudgeError,
    TransientError,
    UndecidedError,
    from_status,
)
from reopold_agent.judges.llm.redact import Secret, key_from_environment, public_address

KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
DEFAULT_MODEL = "gemini-2.0-flash-001"

SAFETY_CATEGORIES = (
    "HARM_CATEGORY_HARASSMENT",
    "HARM_CATEGORY_HATE_SPEECH",
    "HARM_CATEGORY_SEXUALLY_EXPLICIT",
    "HARM_CATEGORY_DANGEROUS_CONTENT",
)
_KEY_HINT = (
    "Check the key in GEMINI_API_KEY (https://aistudio.google.com/apikey) and that it may use "
    "the Generative Language API; or use judge=none."
)
_FINISHED = ("STOP", "FINISH_REASON_UNSPECIFIED", "")


@dataclass(frozen=True)
class GeminiSettings:
    """What influences a reply; see the API's generationConfig and safetySettings.

    Attributes:
        model: as the API names it.
        max_output_tokens: of the reply, thoughts included.
        safety: threshold of all safety categories. The judge reads what models wrote about
            arbitrary pictures; a blocked row is an undecided row, so that nothing is blocked
            unless asked for.
        thinking_budget: tokens of thought for models that think (only ``google-genai``).
    """

    model: str = DEFAULT_MODEL
    max_output_tokens: int = 1024
    safety: str = "BLOCK_NONE"
    thinking_budget: int | None = None

    def schema(self, prompt: Prompt) -> dict[str, Any]:
        """The reply's schema, in the API's dialect."""
        answer: dict[str, Any] = {"type": "STRING", "nullable": True}
        value = answer if prompt.field == "answer" else {"type": "BOOLEAN"}
        return {
            "type": "OBJECT",
            "properties": {prompt.field: value},
            "required": [prompt.field],
        }


@dataclass(frozen=True)
class Wire:
    """What an SDK received, without its types. Enum values are the API's names."""

    text: str = ""
    finish: str = ""
    blocked: str = ""
    candidates: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class HttpStatusError(Exception):
    """The service answered with an error status."""

    def __init__(self, status: int, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class UnreadableError(Exception):
    """The service answered 200 with something that the SDK could not read."""


class Transport(Protocol):
    """One SDK."""

    @property
    def sdk(self) -> str:
        """Package and version, for the record."""
        ...

    def generate(self, prompt: Prompt, timeout: float) -> Wire:
        """One generateContent.

        Raises:
            HttpStatusError: an error status.
            TransientError: no reply (timeout, connection).
            UnreadableError: a reply that is no generateContent response.
        """
        ...

    def close(self) -> None:
        """Releases connections."""
        ...


class GeminiBackend:
    """Implements `Backend` over either SDK.

    Args:
        settings: model and generation settings.
        key: the API key.
        endpoint: another address of the service (tests, proxies); None: the SDK's own.
        sdk: which SDK; "auto" takes ``google-genai`` where it is installed.

    Raises:
        MissingExtraError: neither SDK, or not the one that was asked for, is installed.
        ConfigError: the endpoint would get the key in clear text.
    """

    def __init__(
        self,
        settings: GeminiSettings,
        key: Secret,
        *,
        endpoint: str | None = None,
        sdk: Literal["auto", "google-genai", "google-generativeai"] = "auto",
    ) -> None:
        if endpoint is not None:
            endpoint = _checked(endpoint)
        self._settings, self._key, self._endpoint = settings, key, endpoint
        self._transport = make_transport(settings, key, endpoint, sdk)

    @property
    def name(self) -> str:
        """See `Backend`."""
        return "gemini"

    @property
    def model(self) -> str:
        """See `Backend`."""
        return self._settings.model

    def settings(self) -> Mapping[str, Any]:
        """See `Backend`. Both SDKs ask the same, so that the cache serves both."""
        return {
            "temperature": 0,
            "max_output_tokens": self._settings.max_output_tokens,
            "safety": self._settings.safety,
            "thinking_budget": self._settings.thinking_budget,
            "endpoint": self._shown_endpoint(),
        }

    def describe(self) -> Mapping[str, Any]:
        """See `Backend`."""
        return {"sdk": self._transport.sdk}

    def _shown_endpoint(self) -> str | None:
        return None if self._endpoint is None else public_address(self._endpoint)

    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        """See `Backend`."""
        # An SDK's exception holds the request, its headers and so the key, and raising inside of
        # `except` would chain it to ours: what is raised is made after the handler has ended.
        failure: TransientError | UndecidedError | JudgeError
        try:
            reply = interpret(self._transport.generate(prompt, timeout))
            return replace(reply, text=self._key.redact(reply.text))
        except UndecidedError as undecided:
            failure = UndecidedError(
                undecided.how,
                self._key.redact(str(undecided)),
                said=self._key.redact(undecided.said),
                tokens=undecided.tokens,
            )
        except TransientError as transient:
            failure = TransientError(
                transient.kind, self._key.redact(str(transient)), transient.retry_after
            )
        except UnreadableError as unreadable:
            failure = UndecidedError(How.MALFORMED, self._key.redact(str(unreadable)))
        except HttpStatusError as error:
            failure = from_status(
                error.status,
                self._key.redact(error.message),
                service=f"Gemini at {self._shown_endpoint() or 'Google'}",
                model=self._settings.model,
                key_hint=_KEY_HINT,
                retry_after=error.retry_after,
            )
        raise failure

    def close(self) -> None:
        """See `Backend`."""
        self._transport.close()


def interpret(wire: Wire) -> Completion:
    """The text of a reply.

    Raises:
        UndecidedError: it was blocked, empty or cut off.
    """
    tokens = (wire.input_tokens, wire.output_tokens)
    if wire.blocked not in ("", "BLOCK_REASON_UNSPECIFIED", "BLOCKED_REASON_UNSPECIFIED"):
        raise UndecidedError(How.BLOCKED, f"the prompt was blocked: {wire.blocked}", tokens=tokens)
    if not wire.candidates:
        raise UndecidedError(How.EMPTY, "the reply has no candidates", tokens=tokens)
    if wire.finish == "MAX_TOKENS":
        raise UndecidedError(
            How.TRUNCATED,
            "the reply stopped at max_output_tokens; raise judge.max_output_tokens (thoughts "
            "count) if it happens often",
            said=wire.text,
            tokens=tokens,
        )
    if wire.finish not in _FINISHED:
        reason = f"the reply was stopped: {wire.finish}"
        raise UndecidedError(How.BLOCKED, reason, said=wire.text, tokens=tokens)
    if not wire.text.strip():
        raise UndecidedError(How.EMPTY, "the reply has no text", tokens=tokens)
    return Completion(wire.text, *tokens)


def make_transport(
    settings: GeminiSettings,
    key: Secret,
    endpoint: str | None,
    sdk: Literal["auto", "google-genai", "google-generativeai"],
) -> Transport:
    """The transport of the SDK that is asked for, or of the one that is installed.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: a setting that the older SDK does not know, or an unknown name.
    """
    if sdk not in ("auto", "google-genai", "google-generativeai"):
        raise ConfigError(
            f"judge.sdk='{sdk}' is not known; use auto, google-genai or google-generativeai"
        )
    if sdk != "google-generativeai":
        try:
            from reopold_agent.judges.llm.gemini_genai import GenaiTransport

            return GenaiTransport(settings, key, endpoint)
        except ModuleNotFoundError as error:
            if sdk == "google-genai" or not _is_google(error):
                raise _missing("google-genai", error) from error
    if settings.thinking_budget is not None:
        raise ConfigError(
            "judge.thinking_budget needs google-genai: google-generativeai does not know it. "
            'Run: pip install "reopold-agent[judge]"'
        )
    try:
        from reopold_agent.judges.llm.gemini_legacy import LegacyTransport

        return LegacyTransport(settings, key, endpoint)
    except ModuleNotFoundError as error:
        wanted = "google-genai" if sdk == "auto" else sdk
        raise _missing(wanted, error) from error


def _missing(package: str, error: ModuleNotFoundError) -> Exception:
    if not _is_google(error):
        return error
    return MissingExtraError(package, "judge", "judge=gemini")


def _is_google(error: ModuleNotFoundError) -> bool:
    return (error.name or "").split(".")[0] == "google"


def gemini_key() -> Secret:
    """The key from the environment; empty if there is none."""
    return key_from_environment(KEY_VARIABLES)


def _checked(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise ConfigError(
            f"judge.endpoint={public_address(endpoint)} must be an https address (http only on "
            "this machine): the key is sent to it"
        )
    return endpoint.rstrip("/")


def retry_delay(details: object) -> float | None:
    """Seconds of a ``google.rpc.RetryInfo`` among an error's details, if there is one."""
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
