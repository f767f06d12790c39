"""The Hugging Face hub: what is in the local cache, and whether the rest can be reached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reopold_agent.doctor.machine import hub_cache

SECONDS = 5.0

Kind = Literal["models", "datasets"]


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: its status, or why there is none."""

    status: int = 0
    error: str = ""


def request(
    address: str, headers: Mapping[str, str], seconds: float = SECONDS, method: str = "HEAD"
) -> Answer:
    """Sends one request through the proxies that are set; follows no redirects."""
    import httpx

    from reopold_agent.common.http import proxied_client

    try:
        with (
            proxied_client() as client,
            client.stream(method, address, headers=headers, timeout=seconds) as reply,
        ):
            return Answer(reply.status_code)  # the body, which may be large, is not read
    # No network, a name or an address that is not valid, a proxy that cannot be used.
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return Answer(error=str(error) or type(error).__name__)


def is_hub_id(path: str) -> bool:
    """Returns whether a path is not a local folder and looks like ``organisation/name``."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def cached(name: str, kind: Kind, revision: str | None) -> Path | None:
    """Returns the newest snapshot in the cache, complete or not; None if there is none."""
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
    """Returns the token that the hub's client would send; empty if there is none."""
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
    """Returns whether the user forbids the hub's client to use the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def reach(name: str, kind: Kind, revision: str | None) -> tuple[bool, str, str]:
    """Checks whether a repository of the hub can be read: (yes or no, why, what to do)."""
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
