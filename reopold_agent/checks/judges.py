"""The judge's key and service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from reopold_agent.checks.base import Finding
from reopold_agent.checks.hub import request
from reopold_agent.judges.llm.gemini import KEY_VARIABLES, gemini_key
from reopold_agent.judges.llm.redact import Secret, key_from_environment, public_address
from reopold_agent.judges.llm.registry import LLM_JUDGES

GOOGLE = "https://generativelanguage.googleapis.com"
_SECONDS = 10.0


def judge_findings(settings: dict[str, Any], online: bool) -> Iterator[Finding]:
    """What is to be said of the judge.

    Args:
        settings: ``name`` and the judge's own.
        online: list its models, which costs nothing and shows whether the key is taken.
    """
    name = str(settings["name"])
    if name == "gemini" or name == "none":
        yield from _gemini(settings, name == "gemini", online)
    elif name == "openai_compatible":
        yield from _openai(settings, online)
    else:
        LLM_JUDGES.get(name)
        yield Finding("keys", "info", f"judge {name}: it needs no key that is known here")


def _gemini(settings: dict[str, Any], chosen: bool, online: bool) -> Iterator[Finding]:
    variable = next((v for v in KEY_VARIABLES if os.environ.get(v, "").strip()), None)
    if variable is None:
        text = f"Gemini: {' and '.join(KEY_VARIABLES)} are not set"
        if chosen:
            yield Finding("keys", "problem", f"{text}; judge=gemini would ask nobody",
                          "Make a key at https://aistudio.google.com/apikey, then: export "
                          f"{KEY_VARIABLES[0]}=...")  # fmt: skip
        else:
            yield Finding("keys", "info", f"{text} (only judge=gemini needs one)")
        return
    yield Finding("keys", "ok", f"Gemini: {variable} is set")
    if chosen and not (_has("google.genai") or _has("google.generativeai")):
        yield Finding("keys", "problem", "judge=gemini, but no SDK of Google's is installed",
                      'pip install "reopold-agent[judge]"')  # fmt: skip
    if online:
        base = str(settings.get("endpoint") or GOOGLE).rstrip("/")
        address = f"{base}/v1beta/models?pageSize=1"
        yield _asked("Gemini", address, {"x-goog-api-key": gemini_key().reveal()}, variable)


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


def _asked(who: str, address: str, headers: dict[str, str], variable: str) -> Finding:
    answer = request(address, headers, _SECONDS, "GET")
    if answer.status == 200:
        return Finding("keys", "ok", f"{who} answers and takes the key")
    if answer.status in (400, 401, 403):
        text = f"{who} does not take the key (HTTP {answer.status})"
        return Finding("keys", "problem", text, f"Check what {variable} holds.")
    reason = answer.error or f"HTTP {answer.status}"
    advice = "Check the network, proxies, and the judge's address."
    return Finding("keys", "problem", f"{who} does not answer: {reason}", advice)


def _has(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False
