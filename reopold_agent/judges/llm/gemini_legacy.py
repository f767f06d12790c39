"""Asks Gemini through ``google-generativeai``, the deprecated SDK, which is still common."""

from __future__ import annotations

import importlib
import re
import threading
import warnings
from typing import Any

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

_configuring = threading.Lock()

# By name, so that the type checker does not need this frozen and untyped package.
with warnings.catch_warnings():
    # The import warns that the package is deprecated, which docs/judges.md says already.
    warnings.simplefilter("ignore", FutureWarning)
    legacy: Any = importlib.import_module("google.generativeai")
legacy_client: Any = importlib.import_module("google.generativeai.client")
api_errors: Any = importlib.import_module("google.api_core.exceptions")
auth_errors: Any = importlib.import_module("google.auth.exceptions")
json_format: Any = importlib.import_module("google.protobuf.json_format")
requests: Any = importlib.import_module("requests")


class LegacyClient(GeminiClient):
    """A client through ``google-generativeai``, over REST: its gRPC accepts no http endpoint."""

    def __init__(self, settings: GeminiSettings, key: Secret, endpoint: str | None) -> None:
        self._settings = settings
        options = {} if endpoint is None else {"api_endpoint": endpoint}
        # `configure` is global to the process. The client is made under a lock and kept, so that
        # a second judge with another key or endpoint does not change it.
        with _configuring:
            legacy.configure(api_key=key.reveal(), transport="rest", client_options=options)
            self._client: Any = legacy_client.get_default_generative_client()
        # A redirect would send the key's header to another address.
        self._client.transport._session.max_redirects = 0
        self._safety = dict.fromkeys(SAFETY_CATEGORIES, settings.safety)

    @property
    @override
    def sdk(self) -> str:
        return f"google-generativeai {legacy.__version__}"

    @override
    def generate(self, prompt: Prompt, timeout: float) -> SdkReply:
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
            raise UnreadableError(
                f"the reply is not in the API's form: {type(error).__name__}"
            ) from error
        except (requests.exceptions.RequestException, auth_errors.TransportError) as error:
            raise TransientError("connection", f"{type(error).__name__}: {error}") from error
        return _reply(reply)

    @override
    def close(self) -> None:
        self._client.transport.close()


def _status(error: Any) -> HttpStatusError:
    response = getattr(error, "response", None)
    header = response.headers.get("retry-after") if response is not None else None
    waits = [retry_after_seconds(header), retry_delay(error.details)]
    longest = max((wait for wait in waits if wait is not None), default=None)
    message = re.sub(r"^POST \S+: ", "", str(error.message))
    return HttpStatusError(int(error.code or 0), message, longest)


def _reply(reply: Any) -> SdkReply:
    feedback, usage = reply.prompt_feedback, reply.usage_metadata
    candidates = reply.candidates
    text, finish = "", ""
    if candidates:
        finish = _name(candidates[0].finish_reason)
        text = "".join(part.text for part in candidates[0].content.parts)
    return SdkReply(
        text=text,
        finish=finish,
        blocked=_name(feedback.block_reason),
        candidates=len(candidates),
        input_tokens=usage.prompt_token_count,
        output_tokens=usage.candidates_token_count,
        version=str(getattr(reply._result, "model_version", "")),
    )


def _name(value: Any) -> str:
    # This frozen SDK gives enum values that it does not know as integers.
    return str(getattr(value, "name", value))
