"""Tools of MCP servers: ``tools=[mcp:COMMAND]``.

A choice of tools says how to start or reach a server of the Model Context Protocol. Each of its
tools becomes a `Tool`. The connection, which needs the SDK (extra ``mcp``), is in
`reopold_agent.tools.mcp_client`; all environments of a process share it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from PIL import Image
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from reopold_agent.common.bounded import DeadlineError, run_bounded
from reopold_agent.common.pictures import decode
from reopold_agent.common.secrets import is_secret_name, public_address
from reopold_agent.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    ToolError,
    ToolResultError,
    ToolTimeoutError,
    first_line,
)
from reopold_agent.tools.base import (
    MAX_PICTURES,
    MAX_PIXELS,
    EpisodeState,
    Tool,
    ToolResult,
    usable,
)
from reopold_agent.tools.schema import DEFAULT_DRAFT, shorten
from reopold_agent.types import IMAGE_MARK

PREFIX = "mcp:"
"""How a choice begins that names a server: ``mcp:COMMAND ARGS`` or ``mcp:http://HOST/mcp``."""

_FORMS = (
    "A server is given as mcp:COMMAND, mcp:http://HOST:PORT/mcp, {mcp: {command: [...], env: "
    "{...}, cwd: ...}} or {mcp: {url: ..., headers: {...}}}; docs/tools.md."
)
_CHOICE = ("mcp", "only", "as", "timeout_s")
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
        return public_address(self.url) if self.url else shorten(shlex.join(self.command), 120)

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


@dataclass(frozen=True)
class ServerTool:
    """The function behind a tool: calls it on the server.

    Attributes:
        server: the server, which is connected to when this is first called in a process.
        name: what the server calls the tool.
    """

    server: Server
    name: str

    def __call__(self, state: EpisodeState, **arguments: Any) -> ToolResult:
        """Calls the tool without a limit of its own; `run` has one."""
        return self._result(arguments, state, 1e6)

    def run(
        self, tool: Tool, state: EpisodeState, arguments: dict[str, Any], seconds: float, /
    ) -> ToolResult:
        """Calls the tool for at most ``seconds``; then the server is told that it is cancelled."""
        return self._result(arguments, state, seconds)

    def _result(
        self, arguments: Mapping[str, Any], state: EpisodeState, seconds: float
    ) -> ToolResult:
        until = time.monotonic() + seconds
        client = _client()
        connection = client.connection(self.server, state if self.server.per_episode else None)
        try:
            reply = connection.call(self.name, dict(arguments), seconds)
            if not any(_is_picture(block) for block in reply.content):
                return usable(result_of(reply), state.images)
            # Opening a picture may take long.
            return run_bounded(
                lambda: usable(result_of(reply), state.images), until - time.monotonic()
            )
        except DeadlineError:
            raise ToolTimeoutError(f"The tool did not finish within {seconds:g} seconds.") from None


def is_server(choice: object) -> bool:
    """Whether a choice of tools (`reopold_agent.envs.base.ToolChoice`) names an MCP server."""
    if isinstance(choice, Mapping):
        return "mcp" in choice
    return isinstance(choice, str) and (choice == "mcp" or choice.startswith(PREFIX))


def server_tools(choice: str | Mapping[str, Any]) -> list[Tool]:
    """Returns a server's tools, in its order; connects to it unless this process already has.

    Args:
        choice: ``mcp:...``, or a mapping with ``mcp`` and optionally ``only`` (names of the tools
            to take), ``as`` (new names: a mapping, or a pattern such as ``files_*``) and
            ``timeout_s``.

    Raises:
        ConfigError: the choice is invalid, the server does not start, or its tools cannot be used.
        MissingExtraError: the SDK is not installed.
    """
    if isinstance(choice, str):
        choice = {"mcp": choice[len(PREFIX) :]}
    settings = dict(choice)
    _known(settings, _CHOICE)
    server = _server(settings["mcp"])
    timeout_s = _seconds(settings.get("timeout_s", 20.0), "timeout_s")
    listed = _client().connection(server).tools()
    if not listed:
        raise ConfigError(
            f"the MCP server '{server.name}' has no tools\nCheck its settings, or leave it out."
        )
    tools = {}
    for each in listed:
        if each.name in tools:
            raise ConfigError(
                f"the MCP server '{server.name}' has two tools '{shorten(each.name)}'\n"
                "Leave the server out: a call could mean either."
            )
        function = ServerTool(server, each.name)
        tools[each.name] = Tool(
            each.name,
            function,
            (each.description or each.title or each.name).strip(),
            timeout_s=timeout_s,
            input_schema=_checked_schema(each.input_schema, each.name, server),
            runner=function.run,
        )
    chosen = _only(settings.get("only"), tools, server)
    names = _names(settings.get("as"), chosen, tools, server)
    return [replace(tools[own], name=name) for own, name in names.items()]


def result_of(reply: Any) -> ToolResult:
    """Returns the result that a server's reply (``mcp.types.CallToolResult``) stands for.

    Raises:
        ToolError: the server says that the call failed; its words are for the model.
        ToolResultError: a picture cannot be opened, or there are too many or too large ones.
    """
    texts: list[str] = []
    images: list[Image.Image] = []
    for block in reply.content:
        if not _is_picture(block):
            texts.append(_words(block).replace(IMAGE_MARK, " "))
            continue
        if len(images) == MAX_PICTURES:
            raise ToolResultError(f"it returned more than {MAX_PICTURES} images")
        left = MAX_PIXELS - sum(image.width * image.height for image in images)
        images.append(_picture(block, left))
        texts.append(IMAGE_MARK)
    if reply.structured_content is not None and len(images) == len(texts):
        data = json.dumps(reply.structured_content, ensure_ascii=False)
        texts.append(data.replace(IMAGE_MARK, " "))
    text = "\n".join(texts)
    if reply.is_error:
        raise ToolError(text.replace(IMAGE_MARK, " ").strip() or "The call failed.")
    return ToolResult(text, tuple(images))


# Content of a reply


def _is_picture(block: Any) -> bool:
    return block.type == "image" or (
        block.type == "resource"
        and getattr(block.resource, "blob", None) is not None
        and (block.resource.mime_type or "").startswith("image/")
    )


def _picture(block: Any, max_pixels: int) -> Image.Image:
    data = block.data if block.type == "image" else block.resource.blob
    try:
        return decode(base64.b64decode(data, validate=True), "its picture", max_pixels)
    except (binascii.Error, ValueError) as error:  # DataError is a ValueError too
        reason = str(error) if isinstance(error, DataError) else "its picture is not base64"
        raise ToolResultError(reason) from error


def _words(block: Any) -> str:
    """Returns a block's text, or what it is if it cannot be shown."""
    if block.type == "text":
        return str(block.text)
    if block.type == "resource":
        text = getattr(block.resource, "text", None)
        if text is not None:
            return str(text)
        kind = block.resource.mime_type or "unknown type"
        return f"[{shorten(block.resource.uri)}: data of {shorten(kind)}, which cannot be shown]"
    if block.type == "resource_link":
        return f"[link to {shorten(block.name)}: {shorten(block.uri, 400)}]"
    kind = getattr(block, "mime_type", None)
    return f"[{block.type}{f' ({shorten(kind)})' if kind else ''}, which cannot be shown]"


# Settings


def _server(given: Any) -> Server:
    if isinstance(given, str):
        address = given.strip()
        given = {"url": address} if _is_address(address) else {"command": address}
    if not isinstance(given, Mapping) or ("command" in given) == ("url" in given):
        raise ConfigError(f"an MCP server needs a command or a url\n{_FORMS}")
    _known(given, _BY_URL if "url" in given else _BY_COMMAND)
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
        start_timeout_s=_seconds(given.get("start_timeout_s", 60.0), "start_timeout_s"),
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


def _known(settings: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = [str(name) for name in settings if name not in names]
    if unknown:
        raise ConfigError(
            f"an MCP server has no setting '{shorten(unknown[0])}' here; there are: "
            f"{', '.join(names)}\n{_FORMS}"
        )


def _seconds(given: Any, setting: str) -> float:
    good = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < 1e6
    if not good:
        raise ConfigError(f"{setting} of an MCP server is {given!r}\nGive it a number of seconds.")
    return float(given)


# Names and schemas


def _only(given: Any, tools: Mapping[str, Tool], server: Server) -> list[str]:
    if given is None:
        return list(tools)
    wanted = [given] if isinstance(given, str) else [str(name) for name in given]
    _each_known(wanted, tools, server)
    if not wanted:
        raise ConfigError("only: [] takes none of an MCP server's tools\nLeave the server out.")
    return wanted


def _names(
    given: Any, chosen: Sequence[str], tools: Mapping[str, Tool], server: Server
) -> dict[str, str]:
    """Returns what the model calls each chosen tool."""
    if given is None:
        return {name: name for name in chosen}
    if isinstance(given, Mapping):
        _each_known(list(map(str, given)), tools, server)
        return {name: str(given.get(name, name)) for name in chosen}
    if not isinstance(given, str) or given.count("*") != 1:
        raise ConfigError(
            f"as is {shorten(repr(given))}\nGive an MCP server's tools new names by a pattern such "
            "as 'files_*', or by a mapping from their own names."
        )
    return {name: given.replace("*", name) for name in chosen}


def _each_known(names: Sequence[str], tools: Mapping[str, Tool], server: Server) -> None:
    for name in names:
        if name not in tools:
            raise ConfigError(
                f"the MCP server '{server.name}' has no tool '{shorten(name)}'\n"
                f"It has: {shorten(', '.join(tools), 1000)}."
            )


def _checked_schema(schema: Mapping[str, Any], name: str, server: Server) -> Mapping[str, Any]:
    """Returns a tool's schema.

    Raises:
        ConfigError: it is no JSON schema of an object, or refers to another document.
    """
    try:
        draft = validator_for(schema, default=DEFAULT_DRAFT)
        draft.check_schema(dict(schema))
        if schema.get("type") != "object":
            raise ValueError("its type is not 'object'")
        document = Resource.from_contents(dict(schema), default_specification=DRAFT202012)
        resolver = Registry().with_resource("", document).resolver()
        for reference in _references(schema):
            resolver.lookup(reference)
    except (SchemaError, Unresolvable, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"the MCP server '{server.name}' has a tool '{shorten(name)}' with an invalid input "
            f"schema: {shorten(reason, 300)}\nTake its other tools: {{mcp: ..., only: [...]}}."
        ) from error
    return schema


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _client() -> Any:
    try:
        from reopold_agent.tools import mcp_client
    except ImportError as error:
        raise MissingExtraError("mcp", "mcp", "tools=[mcp:...]") from error
    return mcp_client
