"""What the settings say of an MCP server: how it is started or reached."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from reopold_agent.common.secrets import is_secret_name, public_address
from reopold_agent.errors import ConfigError
from reopold_agent.tools.schema import shorten

_FORMS = (
    "A server is given as mcp:COMMAND, mcp:http://HOST:PORT/mcp, {mcp: {command: [...], env: "
    "{...}, cwd: ...}} or {mcp: {url: ..., headers: {...}}}; docs/tools.md."
)
_BY_COMMAND = ("command", "env", "cwd", "session", "start_timeout_s")
_BY_URL = ("url", "headers", "session", "start_timeout_s")
_VARIABLE = re.compile(r"\$(\$|[A-Za-z_]\w*)")
_SECRET_HEADERS = ("AUTH", "COOKIE")


@dataclass(frozen=True)
class Server:
    """How a server is started or reached, as the settings say it: with ``$NAME`` for secrets.

    Attributes:
        command: program and arguments of a server that speaks over its standard input and output.
        url: address of one that speaks over HTTP (the protocol's "streamable HTTP").
        env: variables of the command, besides HOME, LOGNAME, PATH, SHELL, TERM and USER.
        headers: of every request.
        cwd: working directory of the command.
        per_episode: whether each episode has a session (of a command: a process) of its own.
        start_timeout_s: limit of starting it and listing its tools, seconds.
    """

    command: tuple[str, ...] = ()
    url: str = ""
    env: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    cwd: str | None = None
    per_episode: bool = False
    start_timeout_s: float = 60.0

    @property
    def name(self) -> str:
        """What messages call it."""
        if not self.url:
            return shorten(shlex.join(self.command), 120)
        try:
            return public_address(self.url)
        except ValueError:  # a port that is no number, such as $PORT
            return public_address(re.sub(r":[^:/@?#]+(?=[/?#]|$)", "", self.url))

    def expanded(self, text: str, used: dict[str, str] | None = None) -> str:
        """Replaces ``$NAME`` by the environment's variable and ``$$`` by ``$``.

        Args:
            text: with names.
            used: gets the variables that were put in.

        Raises:
            ConfigError: a variable is not set.
        """

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name == "$":
                return "$"
            if name not in os.environ:
                raise ConfigError(
                    f"the MCP server '{self.name}' needs the variable {name}, which is not set\n"
                    f"Run: export {name}=... (or write $$ for a $ that begins no name)"
                )
            if used is not None:
                used[name] = os.environ[name]
            return os.environ[name]

        return _VARIABLE.sub(value, text)


def server_of(given: Any) -> Server:
    """Returns the server that a choice of tools names: what is below ``mcp``, or after ``mcp:``.

    Raises:
        ConfigError: the settings are invalid, or hold a secret.
    """
    if isinstance(given, str):
        address = given.strip()
        given = {"url": address} if _is_address(address) else {"command": address}
    if not isinstance(given, Mapping) or ("command" in given) == ("url" in given):
        raise ConfigError(f"an MCP server needs a command or a url\n{_FORMS}")
    check_names(given, _BY_URL if "url" in given else _BY_COMMAND)
    session = given.get("session", "process")
    if session not in ("process", "episode"):
        raise ConfigError(
            f"session is '{shorten(session)}'\nTake session: process (one for all episodes of a "
            "process) or session: episode (one for each)."
        )
    cwd = given.get("cwd")
    server = Server(
        command=() if "url" in given else _command(given["command"]),
        url=str(given.get("url", "")),
        env=_pairs(given.get("env"), "env"),
        headers=_pairs(given.get("headers"), "headers"),
        cwd=None if cwd is None else str(cwd),
        per_episode=session == "episode",
        start_timeout_s=as_seconds(given.get("start_timeout_s", 60.0), "start_timeout_s"),
    )
    _refuse_secrets(server)
    return server


def _command(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        try:
            command = tuple(shlex.split(given))
        except ValueError as error:
            raise ConfigError(
                f"the command of an MCP server cannot be read: {error}\n"
                "Close its quotation marks, or give it as a list: {mcp: {command: [...]}}."
            ) from error
    elif isinstance(given, Sequence):
        command = tuple(map(str, given))
    else:
        command = ()
    if not command or not command[0]:
        raise ConfigError(f"an MCP server's command is empty\n{_FORMS}")
    return command


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://")) and len(text.split()) == 1


def _pairs(given: Any, setting: str) -> tuple[tuple[str, str], ...]:
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{setting} of an MCP server must be a mapping\n{_FORMS}")
    return tuple((str(name), str(value)) for name, value in (given or {}).items())


def _refuse_secrets(server: Server) -> None:
    """Refuses secrets in the settings: the records of a run would keep them."""
    for setting, pairs, words in (
        ("variable", server.env, ()),
        ("header", server.headers, _SECRET_HEADERS),
    ):
        for name, value in pairs:
            secret = is_secret_name(name) or any(word in name.upper() for word in words)
            if secret and value and not _VARIABLE.search(value):
                raise _secret(server, f"the {setting} {shorten(name)}")
    if server.url:
        if not _is_address(server.url):
            raise ConfigError(
                f"'{shorten(public_address(server.url))}' is no address of an MCP server\n{_FORMS}"
            )
        parts = urlsplit(server.url)
        user = parts.netloc.rpartition("@")[0]
        for text in (user, *parts.query.split("&")):
            name, _, value = text.partition("=")
            if text and (text is user or is_secret_name(name)) and "$" not in (value or text):
                raise _secret(server, "its address")


def _secret(server: Server, what: str) -> ConfigError:
    return ConfigError(
        f"the MCP server '{server.name}' has a secret in its settings ({what}), which the records "
        "of the run would keep\nWrite $NAME there, and set the variable NAME."
    )


def check_names(settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses settings of other names.

    Raises:
        ConfigError: there is one.
    """
    unknown = [str(name) for name in settings if name not in names]
    if unknown:
        raise ConfigError(
            f"an MCP server has no setting '{shorten(unknown[0])}' here; there are: "
            f"{', '.join(names)}\n{_FORMS}"
        )


def as_seconds(given: Any, setting: str) -> float:
    """Returns a setting that is a time in seconds.

    Raises:
        ConfigError: it is not.
    """
    good = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < 1e6
    if not good:
        raise ConfigError(f"{setting} of an MCP server is {given!r}\nGive it a number of seconds.")
    return float(given)
