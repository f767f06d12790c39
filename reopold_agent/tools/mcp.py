"""Tools of MCP servers: ``tools=[mcp:COMMAND]``.

A choice of tools says how to start or reach a server of the Model Context Protocol. Each of its
tools becomes a `Tool`. The connection, which needs the SDK (extra ``mcp``), is in
`reopold_agent.tools.mcp_client`; all environments of a process share it.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from PIL import Image
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from reopold_agent.common.bounded import DeadlineError, run_bounded
from reopold_agent.common.pictures import decode
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
from reopold_agent.tools.mcp_settings import Server, as_seconds, check_names, server_of
from reopold_agent.tools.schema import DEFAULT_DRAFT, shorten
from reopold_agent.types import IMAGE_MARK

PREFIX = "mcp:"
"""How a choice begins that names a server: ``mcp:COMMAND ARGS`` or ``mcp:http://HOST/mcp``."""

_CHOICE = ("mcp", "only", "as", "timeout_s")


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


def is_server(choice: object) -> TypeGuard[str | Mapping[str, Any]]:
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
    check_names(settings, _CHOICE)
    server = server_of(settings["mcp"])
    timeout_s = as_seconds(settings.get("timeout_s", 20.0), "timeout_s")
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


# Names and schemas


def _only(given: Any, tools: Mapping[str, Tool], server: Server) -> list[str]:
    if given is None:
        return list(tools)
    if not isinstance(given, Sequence):
        raise ConfigError(f"only is {given!r}\nGive the names of tools: {{mcp: ..., only: [...]}}.")
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
