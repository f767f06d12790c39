"""The Hugging Face hub: what is cached here, and whether the rest can be reached."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reopold_agent.checks.machine import hub_cache

SECONDS = 5.0

Kind = Literal["models", "datasets"]


@dataclass(frozen=True)
class Answer:
    """What a request brought: the status, or why there is none."""

    status: int = 0
    error: str = ""
    body: bytes = b""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Does not follow: a redirect would carry the token to wherever it points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def request(
    address: str, headers: Mapping[str, str], seconds: float = SECONDS, method: str = "HEAD"
) -> Answer:
    """One request through the proxies that are set, without redirects."""
    try:
        asked = urllib.request.Request(address, headers=dict(headers), method=method)
        with urllib.request.build_opener(_Stay).open(asked, timeout=seconds) as reply:
            return Answer(reply.status, body=reply.read(100_000))
    except urllib.error.HTTPError as error:
        return Answer(error.code)
    except (OSError, ValueError) as error:  # no network, a bad name, an address that is none
        return Answer(error=str(getattr(error, "reason", error)))


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder here looks like ``organisation/name``."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def cached(name: str, kind: Kind, revision: str | None) -> Path | None:
    """The newest snapshot in the cache, whole or not; None if there is none."""
    folder = hub_cache() / f"{kind}--{name.replace('/', '--')}"
    named = folder / "refs" / (revision or "main")
    if named.is_file():
        snapshot = folder / "snapshots" / named.read_text("utf-8").strip()
    elif revision is not None:
        snapshot = folder / "snapshots" / revision
    else:
        return None
    return snapshot if snapshot.is_dir() else None


def hub_token() -> str:
    """The token that the hub's client would send; empty if there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name, "").strip():
            return value
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    try:
        return file.read_text("utf-8").strip()
    except OSError:
        return ""


def is_offline() -> bool:
    """Whether the user forbids the hub's client to use the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def reach(name: str, kind: Kind, revision: str | None) -> tuple[bool, str, str]:
    """Whether a repository of the hub can be had: yes or no, why, and what to do."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    part = "" if kind == "models" else "datasets/"
    file = "config.json" if kind == "models" else "README.md"
    token = hub_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = f"{endpoint}/{part}{name}/resolve/{revision or 'main'}/{file}"
    answer = request(address, headers)
    if answer.status in (200, 204, 302, 307, 308):
        return True, "not here yet; the hub has it", ""
    if answer.status in (401, 403):
        why = "the token may not read it" if token else "it does not exist or needs a token"
        page = f"{endpoint}/{part}{name}"
        return False, f"the hub refuses it: {why}", f"Ask for access at {page}, then: hf auth login"
    if answer.status == 404:
        what = f"the revision '{revision}' of it" if revision else "it"
        return False, f"the hub does not have {what}", "Check the name and the revision."
    reason = answer.error or f"HTTP {answer.status}"
    return False, f"not here, and the hub does not answer: {reason}", ""
