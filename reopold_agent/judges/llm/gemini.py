"""Asks the Gemini API through Google's SDK: ``google-genai``, else ``google-generativeai``.

Both send generateContent requests to the same service; the older one is deprecated, but
many users have it installed. A client converts an SDK's reply to an `SdkReply` and its errors to
ours; this module interprets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

from typing_extensions import override

from reopold_agent.common.secrets import Secret, key_from_environment, public_address
from reopold_agent.errors import ConfigError, MissingExtraError
from reopold_agent.judges.llm.base import Backend, Completion, How, Prompt
from reopold_agent.judges.llm.failures import (
    Failure,
    TransientError,
    UndecidedError,
    from_status,
)
from reopold_agent.judges.llm.gemini_types import (
    DEFAULT_MODEL,
    GeminiClient,
    GeminiSettings,
    HttpStatusError,
    SdkReply,
    UnreadableError,
)

KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
_KEY_HINT = (
    "Check the key in GEMINI_API_KEY (https://aistudio.google.com/apikey) and that it may use "
    "the Generative Language API; or use judge=none."
)
_MODEL_HINT = (
    f"Set judge.model={DEFAULT_MODEL}, or a model of https://ai.google.dev/gemini-api/docs/models. "
    "Answers that were already judged are kept: the same command continues."
)
_FINISHED = ("STOP", "FINISH_REASON_UNSPECIFIED", "")


class GeminiBackend(Backend):
    """A backend for the Gemini API, through either SDK.

    Args:
        settings: model and generation settings.
        key: the API key.
        endpoint: another address of the service (tests, proxies); None takes the SDK's default.
        sdk: which SDK; "auto" prefers ``google-genai`` if it is installed.

    Raises:
        MissingExtraError: the requested SDK, or for "auto" either of them, is not installed.
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
        self._client = make_client(settings, key, endpoint, sdk)

    @property
    @override
    def name(self) -> str:
        return "gemini"

    @property
    @override
    def model(self) -> str:
        return self._settings.model

    @override
    def settings(self) -> Mapping[str, Any]:
        # Both SDKs send the same request, so they share cached replies.
        return {
            "temperature": 0,
            "max_output_tokens": self._settings.max_output_tokens,
            "safety": self._settings.safety,
            "thinking_budget": self._settings.thinking_budget,
            "endpoint": self._shown_endpoint(),
        }

    @override
    def describe(self) -> Mapping[str, Any]:
        return {"sdk": self._client.sdk}

    def _shown_endpoint(self) -> str | None:
        return None if self._endpoint is None else public_address(self._endpoint)

    @override
    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        # An SDK's exception holds the request with the key in its headers, and raising inside
        # `except` would chain it to ours. Therefore the failure is raised after the handler.
        failure: Failure
        try:
            reply = interpret(self._client.generate(prompt, timeout))
            return replace(reply, text=self._key.redact(reply.text))
        except UndecidedError as undecided:
            failure = undecided.redacted(self._key)
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
                model_hint=_MODEL_HINT,
                retry_after=error.retry_after,
            )
        raise failure

    @override
    def close(self) -> None:
        self._client.close()


def interpret(reply: SdkReply) -> Completion:
    """Returns the text of a reply.

    Raises:
        UndecidedError: the reply was blocked, empty or cut off.
    """
    tokens = (reply.input_tokens, reply.output_tokens)
    if reply.blocked not in ("", "BLOCK_REASON_UNSPECIFIED", "BLOCKED_REASON_UNSPECIFIED"):
        raise UndecidedError(How.BLOCKED, f"the prompt was blocked: {reply.blocked}", tokens=tokens)
    if not reply.candidates:
        raise UndecidedError(How.EMPTY, "the reply has no candidates", tokens=tokens)
    if reply.finish == "MAX_TOKENS":
        raise UndecidedError(
            How.TRUNCATED,
            "the reply stopped at max_output_tokens; if this happens often, raise "
            "judge.max_output_tokens (thoughts count)",
            said=reply.text,
            tokens=tokens,
        )
    if reply.finish not in _FINISHED:
        reason = f"the reply was stopped: {reply.finish}"
        raise UndecidedError(How.BLOCKED, reason, said=reply.text, tokens=tokens)
    if not reply.text.strip():
        raise UndecidedError(How.EMPTY, "the reply has no text", tokens=tokens)
    return Completion(reply.text, *tokens, version=reply.version)


def make_client(
    settings: GeminiSettings,
    key: Secret,
    endpoint: str | None,
    sdk: Literal["auto", "google-genai", "google-generativeai"],
) -> GeminiClient:
    """Returns a client through the requested SDK, or through one that is installed.

    Raises:
        MissingExtraError: the SDK is not installed.
        ConfigError: the older SDK does not know a setting, or the SDK's name is unknown.
    """
    if sdk not in ("auto", "google-genai", "google-generativeai"):
        raise ConfigError(
            f"judge.sdk='{sdk}' is not known; use auto, google-genai or google-generativeai"
        )
    if sdk != "google-generativeai":
        try:
            from reopold_agent.judges.llm.gemini_genai import GenaiClient

            return GenaiClient(settings, key, endpoint)
        except ModuleNotFoundError as error:
            if sdk == "google-genai" or not _is_google(error):
                raise _missing("google-genai", error) from error
    if settings.thinking_budget is not None:
        raise ConfigError(
            "judge.thinking_budget needs google-genai: google-generativeai does not know it. "
            'Run in the clone: pip install -e ".[judge]"'
        )
    try:
        from reopold_agent.judges.llm.gemini_legacy import LegacyClient

        return LegacyClient(settings, key, endpoint)
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
    """Returns the key from the environment; empty if no variable is set."""
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
