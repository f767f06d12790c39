"""The settings of a policy behind HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from reopold_agent.errors import ConfigError

KINDS = ("auto", "reopold", "vllm")


@dataclass(frozen=True)
class ServerSettings:
    """The settings of ``policy=server``, for one role.

    Attributes:
        urls: addresses such as ``http://10.0.0.2:8100``, without a path; requests take turns.
        kind: ``reopold`` (`reopold_agent.serve`), ``vllm`` (``vllm serve``, text only), or
            ``auto``, which finds out by a request.
        model: the expected name of the served model; null accepts any.
        revision: the expected revision at our server; null accepts any.
        api_key_env: environment variable with the bearer token; none is sent if it is not set.
        connect_seconds: time limit of connecting.
        timeout_seconds: longest time in which an address sends nothing, neither to the request nor
            to another one; an attempt then fails, and if further ones do, too, the run ends. There
            is no limit on the queue or on the length of an answer.
        retries: further attempts after a failed one; if all fail for other reasons than their
            time, the episode is dropped.
        backoff_seconds: pause before the first retry; it doubles with each further one.
        max_backoff_seconds: longest pause, even if a server's ``Retry-After`` asks for more.
        max_in_flight: most requests at once, over all addresses.
        score_batch: most sequences in one request to our server.
        top_logprobs: how many of the most likely ids a vLLM server lists per token; masked ids
            among them are removed from the normalisation. From 0 to the server's
            ``--max-logprobs`` (20), or -1 for all (exact, for tiny vocabularies only).
    """

    urls: list[Any]
    kind: str = "auto"
    model: str | None = None
    revision: str | None = None
    api_key_env: str = "REOPOLD_API_KEY"
    connect_seconds: float = 10.0
    timeout_seconds: float = 600.0
    retries: int = 3
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 30.0
    max_in_flight: int = 32
    score_batch: int = 8
    top_logprobs: int = 5

    def __post_init__(self) -> None:
        if not self.urls:
            raise ConfigError("urls must name at least one server, such as [http://10.0.0.2:8100]")
        for url in self.urls:
            parts = urlsplit(str(url))
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(
                    f"urls: '{url}' must be an http(s) address such as http://10.0.0.2:8100"
                )
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ConfigError(
                    "urls must not hold a key; put it into the variable that api_key_env names"
                )
        if len(set(self.urls)) != len(self.urls):
            raise ConfigError("urls names a server twice")
        if self.kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got '{self.kind}'")
        for name in ("max_in_flight", "score_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("connect_seconds", "timeout_seconds", "max_backoff_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("retries", "backoff_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.top_logprobs < -1:
            raise ConfigError(f"top_logprobs must be -1 or more, got {self.top_logprobs}")
