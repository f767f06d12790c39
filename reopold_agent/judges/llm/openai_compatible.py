"""Any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenRouter, ...

Only the standard library: one POST per prompt.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from reopold_agent.errors import ConfigError
from reopold_agent.judges.llm.base import Completion, How, Prompt
from reopold_agent.judges.llm.failures import (
    JudgeError,
    TransientError,
    UndecidedError,
    from_status,
    retry_after_seconds,
)
from reopold_agent.judges.llm.redact import Secret, public_address

_LARGEST_REPLY = 4 * 1024 * 1024
_FORMATS = ("json_schema", "json_object", "none")


@dataclass(frozen=True)
class ChatSettings:
    """What influences a reply.

    Attributes:
        model: as the server names it.
        base_url: up to and including "/v1".
        max_output_tokens: of the reply.
        response_format: how to ask for JSON: "json_schema" (OpenAI, vLLM, llama.cpp),
            "json_object" or "none" for servers that know less. It is validated in any case.
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key's header along, to wherever it points."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


class ChatBackend:
    """Implements `Backend`.

    Args:
        settings: server, model and generation settings.
        key: sent as a bearer token; an empty one is not sent.
        key_env: the variable that it is from, for messages.
    """

    def __init__(self, settings: ChatSettings, key: Secret, key_env: str) -> None:
        self._settings, self._key, self._key_env = settings, key, key_env
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirects)

    @property
    def name(self) -> str:
        """See `Backend`."""
        return "openai_compatible"

    @property
    def model(self) -> str:
        """See `Backend`."""
        return self._settings.model

    def settings(self) -> Mapping[str, Any]:
        """See `Backend`. Servers may call different models by one name: the address counts."""
        return {"temperature": 0, **vars(self._settings)}

    def describe(self) -> Mapping[str, Any]:
        """See `Backend`."""
        return {"key": "sent" if self._key else "none"}

    def ask(self, prompt: Prompt, timeout: float) -> Completion:
        """See `Backend`."""
        # As in `GeminiBackend.ask`: nothing that holds the request is chained to what is raised.
        failure: TransientError | UndecidedError | JudgeError
        try:
            reply = read_completion(self._post(prompt, timeout))
            return replace(reply, text=self._key.redact(reply.text))
        except urllib.error.HTTPError as error:
            failure = self._status(error, timeout)
        except UndecidedError as undecided:
            failure = UndecidedError(
                undecided.how,
                self._key.redact(str(undecided)),
                said=self._key.redact(undecided.said),
                tokens=undecided.tokens,
            )
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            kind = "timeout" if isinstance(reason, TimeoutError) else "connection"
            words = self._key.redact(f"{type(reason).__name__}: {reason}")
            failure = TransientError(kind, f"{public_address(self._url)}: {words}")
        raise failure

    def _post(self, prompt: Prompt, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        data = json.dumps(self._body(prompt)).encode()
        request = urllib.request.Request(self._url, data, headers, method="POST")
        until = time.monotonic() + timeout
        with self._opener.open(request, timeout=timeout) as response:
            return _read(response, until)

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

    def _status(
        self, error: urllib.error.HTTPError, timeout: float
    ) -> TransientError | UndecidedError | JudgeError:
        with error:
            try:
                body = _read(error, time.monotonic() + timeout).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                body = ""  # the status says enough
        return from_status(
            error.code,
            self._key.redact(_message(body) or str(error.reason)),
            service=f"the judge at {public_address(self._url)}",
            model=self._settings.model,
            key_hint=f"Check the key in {self._key_env} (judge.key_env); or use judge=none.",
            retry_after=retry_after_seconds(error.headers.get("Retry-After")),
        )

    def close(self) -> None:
        """See `Backend`."""


def json_schema(prompt: Prompt) -> dict[str, Any]:
    """The reply's schema, as JSON Schema."""
    kind: object = ["string", "null"] if prompt.field == "answer" else "boolean"
    return {
        "type": "object",
        "properties": {prompt.field: {"type": kind}},
        "required": [prompt.field],
        "additionalProperties": False,
    }


def read_completion(body: bytes) -> Completion:
    """The text of a chat completion.

    Raises:
        UndecidedError: it was filtered, empty or cut off, or is no chat completion.
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
        reason = f"the reply is no chat completion: {type(error).__name__}: {error}"
    else:
        if refusal or finish == "content_filter":
            raise UndecidedError(How.BLOCKED, "the model refused or was filtered", tokens=tokens)
        if finish == "length":
            reason = "the reply stopped at max_output_tokens; raise judge.max_output_tokens"
            raise UndecidedError(How.TRUNCATED, reason, said=text, tokens=tokens)
        if not text.strip():
            raise UndecidedError(How.EMPTY, "the reply has no text", tokens=tokens)
        return Completion(text, *tokens)
    raise UndecidedError(How.MALFORMED, reason)


def _message(body: str) -> str:
    """The server's own words in an error's body, which servers shape differently."""
    try:
        error = json.loads(body)
    except ValueError:
        return body
    for name in ("error", "message", "detail"):
        if isinstance(error, dict) and name in error:
            error = error[name]
    return error if isinstance(error, str) else json.dumps(error)


def _read(response: Any, until: float) -> bytes:
    # In pieces: a socket's timeout restarts with every byte.
    pieces: list[bytes] = []
    size = 0
    while piece := response.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > until:
            raise TimeoutError("the reply took too long")
        if size > _LARGEST_REPLY:
            raise UndecidedError(How.MALFORMED, f"the reply is longer than {_LARGEST_REPLY} bytes")
    length = getattr(response, "length", 0)
    if length:
        raise http.client.IncompleteRead(b"", length)
    return b"".join(pieces)
