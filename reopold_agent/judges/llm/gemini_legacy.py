"""Gemini through ``google-generativeai``, the deprecated SDK that many still have installed."""

from __future__ import annotations

import importlib
import re
import threading
import warnings
from typing import Any

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

_configuring = threading.Lock()

# By name: the package is frozen and untyped, and the type checker need not have it.
with warnings.catch_warnings():
    # It announces its own deprecation at import; docs/judges.md says so once, for all.
    warnings.simplefilter("ignore", FutureWarning)
    legacy: Any = importlib.import_module("google.generativeai")
legacy_client: Any = importlib.import_module("google.generativeai.client")
api_errors: Any = importlib.import_module("google.api_core.exceptions")
auth_errors: Any = importlib.import_module("google.auth.exceptions")
json_format: Any = importlib.import_module("google.protobuf.json_format")
requests: Any = importlib.import_module("requests")


class LegacyTransport:
    """Implements `Transport` over REST (its other transport, gRPC, takes no plain endpoint)."""

    def __init__(self, settings: GeminiSettings, key: Secret, endpoint: str | None) -> None:
        self._settings = settings
        options = {} if endpoint is None else {"api_endpoint": endpoint}
        # `configure` is global to the process. The client is made here, under a lock, and kept:
        # a second judge with another key or endpoint then does not change this one's.
        with _configuring:
            legacy.configure(api_key=key.reveal(), transport="rest", client_options=options)
            self._client: Any = legacy_client.get_default_generative_client()
        # A redirect would carry the key's header along, to wherever it points.
        self._client.transport._session.max_redirects = 0
        self._safety = dict.fromkeys(SAFETY_CATEGORIES, settings.safety)

    @property
    def sdk(self) -> str:
        """See `Transport`."""
        return f"google-generativeai {legacy.__version__}"

    def generate(self, prompt: Prompt, timeout: float) -> Wire:
        """See `Transport`."""
        model = legacy.GenerativeModel(
            self._settings.model,
            safety_settings=self._safety,
            generation_config={
                "temperature": 0,
                "candidate_count": 1,
                "max_output_tokens": self._settings.max_output_tokens,
                "response_mime_type": "application/json",
                "response_schema": self._settings.schema(prompt),
            },
            system_instruction=prompt.system,
        )
        model._client = self._client
        try:
            reply = model.generate_content(
                prompt.user, request_options={"timeout": timeout, "retry": None}
            )
        except api_errors.GoogleAPICallError as error:
            raise _status(error) from error
        except requests.exceptions.TooManyRedirects as error:
            status = 307 if error.response is None else error.response.status_code
            raise HttpStatusError(int(status), "a redirect", None) from error
        except (requests.exceptions.Timeout, TimeoutError) as error:
            raise TransientError("timeout", f"no reply within {timeout:.1f} s") from error
        except (requests.exceptions.JSONDecodeError, json_format.ParseError, ValueError) as error:
            raise UnreadableError(f"the reply is not the API's: {type(error).__name__}") from error
        except (requests.exceptions.RequestException, auth_errors.TransportError) as error:
            raise TransientError("connection", f"{type(error).__name__}: {error}") from error
        return _wire(reply)

    def close(self) -> None:
        """See `Transport`."""
        self._client.transport.close()


def _status(error: Any) -> HttpStatusError:
    response = getattr(error, "response", None)
    header = response.headers.get("retry-after") if response is not None else None
    waits = [retry_after_seconds(header), retry_delay(error.details)]
    longest = max((wait for wait in waits if wait is not None), default=None)
    message = re.sub(r"^POST \S+: ", "", str(error.message))
    return HttpStatusError(int(error.code or 0), message, longest)


def _wire(reply: Any) -> Wire:
    feedback, usage = reply.prompt_feedback, reply.usage_metadata
    candidates = reply.candidates
    text, finish = "", ""
    if candidates:
        finish = _name(candidates[0].finish_reason)
        text = "".join(part.text for part in candidates[0].content.parts)
    return Wire(
        text=text,
        finish=finish,
        blocked=_name(feedback.block_reason),
        candidates=len(candidates),
        input_tokens=usage.prompt_token_count,
        output_tokens=usage.candidates_token_count,
    )


def _name(value: Any) -> str:
    # Enum values that this frozen SDK does not know come as bare integers.
    return str(getattr(value, "name", value))
