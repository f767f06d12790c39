"""Asks Gemini through ``google-genai``, Google's current SDK."""

from __future__ import annotations

import importlib
import logging
from typing import Any

# Not `from google import genai`: without the package, its ImportError would have no name.
import google.genai as genai
from google.genai import errors, types
from typing_extensions import override

from reopold_agent.common.secrets import Secret
from reopold_agent.judges.llm.base import Prompt
from reopold_agent.judges.llm.failures import TransientError, retry_after_seconds
from reopold_agent.judges.llm.gemini_types import (
    SAFETY_CATEGORIES,
    GeminiClient,
    GeminiSettings,
    HttpStatusError,
    SdkReply,
    UnreadableError,
    retry_delay,
)


def _network_errors(name: str) -> tuple[type[Exception], ...]:
    """Returns the errors of this name in the HTTP clients that the SDK's releases use."""
    found = []
    for client in ("httpx", "httpx2"):
        try:
            found.append(getattr(importlib.import_module(client), name))
        except ModuleNotFoundError as error:
            if error.name != client:
                raise  # installed but broken: the user has to see it
    return tuple(found)


_TIMEOUTS, _TRANSPORT = _network_errors("TimeoutException"), _network_errors("TransportError")


class GenaiClient(GeminiClient):
    """A client through ``google-genai``. The SDK's retries are off, since ours obey the limits."""

    def __init__(self, settings: GeminiSettings, key: Secret, endpoint: str | None) -> None:
        self._settings = settings
        for name in ("httpx", "httpx2"):
            # At INFO, Hydra's level, one line per request would hide everything else.
            if logging.getLogger(name).level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.WARNING)
        # Newer releases default to v1; both SDKs know v1beta, which has all fields.
        options: dict[str, Any] = {"api_version": "v1beta"}
        if endpoint is not None:
            options["base_url"] = endpoint
        if "client_args" in types.HttpOptions.model_fields:
            # A redirect would send the key's header to another address.
            options["client_args"] = {"follow_redirects": False}
        # Never Vertex, even if the environment selects it: this backend uses an API key.
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
    @override
    def sdk(self) -> str:
        return f"google-genai {genai.__version__}"

    @override
    def generate(self, prompt: Prompt, timeout: float) -> SdkReply:
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
        # Invalid JSON, or values of other types than the API's.
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UnreadableError(
                f"the reply is not in the API's form: {type(error).__name__}"
            ) from error
        return _reply(reply)

    @override
    def close(self) -> None:
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


def _reply(reply: types.GenerateContentResponse) -> SdkReply:
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
    return SdkReply(
        text=text,
        finish=finish,
        blocked=_name(feedback.block_reason) if feedback else "",
        candidates=len(candidates),
        input_tokens=(usage.prompt_token_count or 0) if usage is not None else 0,
        output_tokens=spent,
        version=reply.model_version or "",
    )


def _name(value: Any) -> str:
    # The SDK gives values that it does not know as plain text.
    return "" if value is None else str(getattr(value, "value", value))
