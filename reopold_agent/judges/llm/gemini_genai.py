"""Gemini through ``google-genai``, Google's current SDK."""

from __future__ import annotations

import importlib
import logging
from typing import Any

# Not `from google import genai`: absent, that would be an ImportError without a name.
import google.genai as genai
from google.genai import errors, types

from reopold_agent.judges.llm.base import Prompt
from reopold_agent.judges.llm.failures import TransientError, retry_after_seconds
from reopold_agent.judges.llm.gemini import (
    SAFETY_CATEGORIES,
    GeminiSettings,
    HttpStatusError,
    UnreadableError,
    Wire,
    retry_delay,
)
from reopold_agent.judges.llm.redact import Secret


def _network_errors(name: str) -> tuple[type[Exception], ...]:
    """Errors of that name in the HTTP clients that releases of the SDK are built on."""
    found = []
    for client in ("httpx", "httpx2"):
        try:
            found.append(getattr(importlib.import_module(client), name))
        except ModuleNotFoundError as error:
            if error.name != client:
                raise  # installed but broken: that is not ours to hide
    return tuple(found)


_TIMEOUTS, _TRANSPORT = _network_errors("TimeoutException"), _network_errors("TransportError")


class GenaiTransport:
    """Implements `Transport`. The SDK's own retries are off: ours know the limits."""

    def __init__(self, settings: GeminiSettings, key: Secret, endpoint: str | None) -> None:
        self._settings = settings
        for name in ("httpx", "httpx2"):
            # One line per request at INFO, Hydra's level, would bury everything else.
            if logging.getLogger(name).level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.WARNING)
        # Newer releases ask v1, older ones v1beta, which both SDKs know and which has all fields.
        options: dict[str, Any] = {"api_version": "v1beta"}
        if endpoint is not None:
            options["base_url"] = endpoint
        if "client_args" in types.HttpOptions.model_fields:
            # A redirect would carry the key's header along, to wherever it points.
            options["client_args"] = {"follow_redirects": False}
        # Not Vertex, whatever the environment says: a key is what was looked for.
        self._client = genai.Client(
            vertexai=False, api_key=key.reveal(), http_options=types.HttpOptions(**options)
        )
        self._safety = [
            types.SafetySetting(
                category=types.HarmCategory(category),
                threshold=types.HarmBlockThreshold(settings.safety),
            )
            for category in SAFETY_CATEGORIES
        ]

    @property
    def sdk(self) -> str:
        """See `Transport`."""
        return f"google-genai {genai.__version__}"

    def generate(self, prompt: Prompt, timeout: float) -> Wire:
        """See `Transport`."""
        thinking = self._settings.thinking_budget
        config = types.GenerateContentConfig(
            system_instruction=prompt.system,
            temperature=0,
            candidate_count=1,
            max_output_tokens=self._settings.max_output_tokens,
            response_mime_type="application/json",
            response_schema=self._settings.schema(prompt),
            safety_settings=self._safety,
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
            thinking_config=(
                None if thinking is None else types.ThinkingConfig(thinking_budget=thinking)
            ),
            http_options=types.HttpOptions(timeout=max(1, int(timeout * 1000))),
        )
        try:
            reply = self._client.models.generate_content(
                model=self._settings.model, contents=prompt.user, config=config
            )
        except errors.APIError as error:
            raise _status(error) from error
        except _TIMEOUTS as error:
            raise TransientError("timeout", f"no reply within {timeout:.1f} s") from error
        except _TRANSPORT as error:
            raise TransientError("connection", f"{type(error).__name__}: {error}") from error
        # JSON that is none, or whose values have other types than the API's.
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UnreadableError(f"the reply is not the API's: {type(error).__name__}") from error
        return _wire(reply)

    def close(self) -> None:
        """See `Transport`."""
        close = getattr(self._client, "close", None)  # since 1.44
        if close is not None:
            close()


def _status(error: errors.APIError) -> HttpStatusError:
    header = None
    response = getattr(error, "response", None)
    if response is not None:
        header = response.headers.get("retry-after")
    waits = [retry_after_seconds(header), retry_delay(error.details)]
    longest = max((wait for wait in waits if wait is not None), default=None)
    return HttpStatusError(int(error.code), str(error.message or error.status or ""), longest)


def _wire(reply: types.GenerateContentResponse) -> Wire:
    feedback, usage = reply.prompt_feedback, reply.usage_metadata
    candidates = reply.candidates or []
    text, finish = "", ""
    if candidates:
        first = candidates[0]
        finish = _name(first.finish_reason)
        parts = (first.content.parts or []) if first.content else []
        text = "".join(part.text or "" for part in parts if not getattr(part, "thought", None))
    spent = 0
    if usage is not None:
        thoughts = getattr(usage, "thoughts_token_count", None)
        spent = (usage.candidates_token_count or 0) + (thoughts or 0)
    return Wire(
        text=text,
        finish=finish,
        blocked=_name(feedback.block_reason) if feedback else "",
        candidates=len(candidates),
        input_tokens=(usage.prompt_token_count or 0) if usage is not None else 0,
        output_tokens=spent,
    )


def _name(value: Any) -> str:
    # Values that the SDK does not know yet come as plain text.
    return "" if value is None else str(getattr(value, "value", value))
