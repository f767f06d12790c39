"""Asks any server with OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenRouter, ...

Each prompt is one POST, which needs no further dependency such as OpenAI's package.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
from typing_extensions import override

from reopold_agent.common.http import TooLargeError, proxied_client, read_body, server_message
from reopold_agent.common.secrets import Secret, public_address
from reopold_agent.errors import ConfigError
from reopold_agent.judges.llm.base import Backend, Completion, How, Prompt
from reopold_agent.judges.llm.failures import (
    Failure,
    TransientError,
    UndecidedError,
    from_status,
    retry_after_seconds,
)

_LARGEST_REPLY = 4 * 1024 * 1024
_FORMATS = ("json_schema", "json_object", "none")


@dataclass(frozen=True)
class ChatSettings:
    """Settings that influence a reply.

    Attributes:
        model: the server's name of the model.
        base_url: the address up to and including "/v1".
        max_output_tokens: most tokens of the reply.
        response_format: how to ask for JSON: "json_schema" (OpenAI, vLLM, llama.cpp),
            "json_object" or "none" for servers that know less. The reply is always validated.
        max_tokens_field: "max_completion_tokens" for OpenAI's own newer models.
    """

    model: str
    base_url: str
    max_output_tokens: int = 1024
    response_format: str = "json_schema"
    max_tokens_field: str = "max_tokens"

    def __post_init__(self) -> None:
        if self.response_format not in _FORMATS:
            raise ConfigError(
                f"judge.response_format='{self.response_format}' must be one of "
                f"{', '.join(_FORMATS)}"
            )
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "judge.base_url must be an http(s) address such as http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ConfigError("judge.base_url must not hold a key; set judge.key_env instead")


class ChatBackend(Backend):
    """A backend for servers with OpenAI's chat completions.

    Args:
        settings: server, model and generation settings.
        key: sent as a bearer token; an empty one is not sent.
        key_env: the variable that holds the key, for messages.

    Raises:
        ConfigError: a proxy that the environment names cannot be used.
    """

    def __init__(self, settings: ChatSettings, key: Secret, key_env: str) -> None:
        self._settings, self._key, self._key_env = settings, key, key_env
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._client = proxied_client()

    @property
    @override
    def name(self) -> str:
        return "openai_compatible"

    @property
    @override
    def model(self) -> str:
        return self._settings.model

    @override
    def settings(self) -> Mapping[str, Any]:
        # Includes the address: two servers may give different models one name.
        return {"temperature": 0, **vars(self._settings)}

    @override
    def describe(self) -> Mapping[str, Any]:
        return {"key": "sent" if self._key else "none"}

    @override
    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        # Raised after the handler, as in `GeminiBackend.ask`: no chained exception holds the key.
        failure: Failure
        try:
            reply = self._post(prompt, timeout)
            if isinstance(reply, Completion):
                text, version = self._key.redact(reply.text), self._key.redact(reply.version)
                return replace(reply, text=text, version=version)
            failure = reply
        except UndecidedError as undecided:
            failure = undecided.redacted(self._key)
        except (OSError, httpx.HTTPError) as error:
            late = isinstance(error, TimeoutError | httpx.TimeoutException)
            words = self._key.redact(f"{type(error).__name__}: {error}")
            kind = "timeout" if late else "connection"
            failure = TransientError(kind, f"{public_address(self._url)}: {words}")
        raise failure

    def _post(self, prompt: Prompt, timeout: float) -> Completion | Failure:
        """Sends one request; returns the completion, or the failure that the status means."""
        headers = {"Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        until = time.monotonic() + timeout
        asked = self._client.stream(
            "POST", self._url, json=self._body(prompt), headers=headers, timeout=timeout
        )
        with asked as response:
            try:
                body = read_body(response, until, _LARGEST_REPLY)
            except (OSError, httpx.HTTPError) as error:
                if response.is_success:
                    if isinstance(error, TooLargeError):
                        raise UndecidedError(How.MALFORMED, str(error)) from error
                    raise
                body = b""  # the status says enough
        if response.is_success:
            return read_completion(body)
        return from_status(
            response.status_code,
            self._key.redact(server_message(body) or response.reason_phrase),
            service=f"the judge at {public_address(self._url)}",
            model=self._settings.model,
            key_hint=f"Check the key in {self._key_env} (judge.key_env); or use judge=none.",
            retry_after=retry_after_seconds(response.headers.get("Retry-After")),
        )

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            "temperature": 0,
            self._settings.max_tokens_field: self._settings.max_output_tokens,
        }
        if self._settings.response_format == "json_schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": json_schema(prompt)},
            }
        elif self._settings.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    @override
    def close(self) -> None:
        self._client.close()


def json_schema(prompt: Prompt) -> dict[str, Any]:
    """Returns the reply's schema as JSON Schema."""
    kind: object = ["string", "null"] if prompt.field == "answer" else "boolean"
    return {
        "type": "object",
        "properties": {prompt.field: {"type": kind}},
        "required": [prompt.field],
        "additionalProperties": False,
    }


def read_completion(body: bytes) -> Completion:
    """Returns the text of a chat completion.

    Raises:
        UndecidedError: the reply was filtered, empty or cut off, or is not a chat completion.
    """
    try:
        reply = json.loads(body)
        choices = reply["choices"]
        usage = reply.get("usage") or {}
        tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        first = choices[0] if choices else None
        finish = first.get("finish_reason") if first else None
        message = (first.get("message") or {}) if first else {}
        text, refusal = message.get("content") or "", message.get("refusal")
        if not isinstance(text, str):
            raise TypeError("content is not a text")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"the reply is not a chat completion: {type(error).__name__}: {error}"
    else:
        if refusal or finish == "content_filter":
            raise UndecidedError(
                How.BLOCKED, "the model refused, or its reply was filtered", tokens=tokens
            )
        if finish == "length":
            reason = "the reply stopped at max_output_tokens; raise judge.max_output_tokens"
            raise UndecidedError(How.TRUNCATED, reason, said=text, tokens=tokens)
        if not text.strip():
            raise UndecidedError(How.EMPTY, "the reply has no text", tokens=tokens)
        return Completion(text, *tokens, version=str(reply.get("model") or ""))
    raise UndecidedError(How.MALFORMED, reason)
