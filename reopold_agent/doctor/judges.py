"""Checks the judge's key and service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from reopold_agent.common.secrets import Secret, key_from_environment, public_address
from reopold_agent.doctor.base import Finding
from reopold_agent.doctor.hub import request
from reopold_agent.judges.llm.gemini import KEY_VARIABLES, gemini_key
from reopold_agent.judges.llm.gemini_types import DEFAULT_MODEL
from reopold_agent.judges.llm.registry import LLM_JUDGES

GOOGLE = "https://generativelanguage.googleapis.com"
_SECONDS = 10.0


def judge_findings(settings: dict[str, Any], online: bool) -> Iterator[Finding]:
    """Checks the judge's key.

    Args:
        settings: ``name`` and settings of the judge.
        online: ask the service for its models, or for Gemini's model, which costs nothing and
            shows whether the key is accepted.
    """
    name = str(settings["name"])
    if name == "gemini" or name == "none":
        yield from _gemini(settings, name == "gemini", online)
    elif name == "openai_compatible":
        yield from _openai(settings, online)
    else:
        LLM_JUDGES.get(name)
        yield Finding("keys", "info", f"judge {name}: it needs no key that the doctor knows")


def _gemini(settings: dict[str, Any], chosen: bool, online: bool) -> Iterator[Finding]:
    variable = next((v for v in KEY_VARIABLES if os.environ.get(v, "").strip()), None)
    if variable is None:
        text = f"Gemini: {' and '.join(KEY_VARIABLES)} are not set"
        if chosen:
            yield Finding("keys", "problem", f"{text}; judge=gemini would not ask Gemini",
                          "Create a key at https://aistudio.google.com/apikey, then: export "
                          f"{KEY_VARIABLES[0]}=...")  # fmt: skip
        else:
            yield Finding("keys", "info", f"{text} (only judge=gemini needs one)")
        return
    yield Finding("keys", "ok", f"Gemini: {variable} is set")
    if chosen and not (_has("google.genai") or _has("google.generativeai")):
        yield Finding("keys", "problem", "judge=gemini, but no Google SDK is installed",
                      'pip install -e ".[judge]"')  # fmt: skip
    # `judge=none` has no model of its own.
    model = str(settings.get("model") or DEFAULT_MODEL).removeprefix("models/")
    if online:
        base = str(settings.get("endpoint") or GOOGLE).rstrip("/")
        headers = {"x-goog-api-key": gemini_key().reveal()}
        yield _asked("Gemini", f"{base}/v1beta/models/{model}", headers, variable, model)
    elif chosen:
        text = f"Gemini was not asked whether it serves '{model}' (online=true asks)"
        yield Finding("keys", "info", text)


def _openai(settings: dict[str, Any], online: bool) -> Iterator[Finding]:
    variable = str(settings.get("key_env") or "")
    key = key_from_environment([variable] if variable else [])
    text = f"{variable} is {'set' if key else 'not set'}" if variable else "no key"
    base = str(settings.get("base_url") or "").rstrip("/")
    where = public_address(base)
    yield Finding("keys", "ok" if key else "info", f"judge at {where}: {text}")
    if online:
        yield _asked(f"judge at {where}", f"{base}/models", _bearer(key), variable)


def _bearer(key: Secret) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.reveal()}"} if key else {}


def _asked(
    who: str, address: str, headers: dict[str, str], variable: str, model: str | None = None
) -> Finding:
    """Asks a service at an address that needs the key; ``model`` is the one there, if it is one."""
    answer = request(address, headers, _SECONDS, "GET")
    if answer.status == 200 and model is not None:
        return Finding("keys", "ok", f"{who} accepts the key and serves '{model}'")
    if answer.status == 404 and model is not None:
        return Finding("keys", "problem", f"{who} does not serve the model '{model}'",
                       f"Set judge.model={DEFAULT_MODEL}, or a model of "
                       "https://ai.google.dev/gemini-api/docs/models.")  # fmt: skip
    if answer.status == 200:
        return Finding("keys", "ok", f"{who} answers and accepts the key")
    if answer.status in (400, 401, 403):
        text = f"{who} rejects the key (HTTP {answer.status})"
        return Finding("keys", "problem", text, f"Check the value of {variable}.")
    reason = answer.error or f"HTTP {answer.status}"
    advice = "Check the network, proxies, and the judge's address."
    return Finding("keys", "problem", f"{who} does not answer: {reason}", advice)


def _has(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed either
        return False
