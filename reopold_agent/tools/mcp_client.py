"""Connections to MCP servers, with the protocol's official SDK.

The SDK is asynchronous. One daemon thread of this process runs its event loop, and the threads of
the environments wait for what they have asked. What a server sends is bounded here, since the SDK
reads a message of any size: `MAX_BYTES` and `MAX_VALUES` per message.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx2
from mcp import Client, MCPError, types
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from pydantic import TypeAdapter, ValidationError

import reopold_agent
from reopold_agent.common.bounded import DeadlineError
from reopold_agent.common.guard import GRACE_SECONDS, NOT_STARTED
from reopold_agent.common.secrets import Redactor
from reopold_agent.errors import (
    ConfigError,
    ToolError,
    ToolProcessError,
    ToolResultError,
    first_line,
)
from reopold_agent.tools.base import EpisodeState
from reopold_agent.tools.mcp_settings import Server
from reopold_agent.tools.schema import shorten

_log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
"""Most bytes of one message: pictures of 48 MB in all, as base64."""

MAX_VALUES = 1_000_000
"""Most values in lists and objects of a message: each takes some hundred bytes once it is read."""

MAX_TOOLS, MAX_PAGES = 1000, 100
"""Most tools of a server, and most parts in which it may list them."""

LOGGED_BYTES = 20_000
"""Bytes of a server's standard error that are logged, per start of it."""

EXIT_SECONDS = 2.0
"""Time for a server to end by itself once its standard input is closed."""

PROBE_SECONDS = 5.0
"""Time for a server that answered nothing during a call to list its tools, or it counts as hung."""

PAUSE_SECONDS = 10.0
"""A server that did not start again is tried again after this time."""

_REPLY: TypeAdapter[Any] = TypeAdapter(types.CallToolResult | types.InputRequiredResult)
_GUARD = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from reopold_agent.common.guard import main; main()"
)
_ROOT = str(Path(reopold_agent.__file__).parents[1])

T = TypeVar("T")


class _TooMuchError(httpx2.StreamError):
    """A message is larger than allowed; of a StreamError the SDK makes the reply to its request."""


class _Bound:
    """Counts what belongs to one message."""

    def __init__(self) -> None:
        self._bytes = self._values = 0

    def add(self, data: bytes | bytearray) -> None:
        """Counts a part of the message.

        Raises:
            _TooMuchError: the message is larger than allowed.
        """
        self._bytes += len(data)
        if self._bytes > MAX_BYTES:
            raise _TooMuchError(f"it sent a message of more than {MAX_BYTES >> 20} MB")
        # Texts have such characters too, but a result has a million characters at most.
        self._values += data.count(b",") + data.count(b"[") + data.count(b"{")
        if self._values > MAX_VALUES:
            raise _TooMuchError(f"it sent a message of more than {MAX_VALUES} values")


class Connection:
    """A server's session, which is opened again once if it has ended between two calls.

    All its methods without underscore are for other threads than that of the event loop.

    Args:
        server: the server.
        restarts: whether to open it again; False for a session whose state would be lost.
    """

    def __init__(self, server: Server, *, restarts: bool = True) -> None:
        self._server, self._restarts = server, restarts
        self._session: _Session | None = None
        self._opening: asyncio.Task[_Session] | None = None
        self._tools: list[types.Tool] | None = None
        self._told_change = self._ended = False
        self._retry_at, self._failure = 0.0, ""

    def tools(self) -> list[types.Tool]:
        """Returns the tools that the server had when it was first connected to.

        Raises:
            ConfigError: it does not start.
        """
        try:
            if self._tools is None:
                session = _wait(self._opened(), None)
                if self._server.per_episode:
                    _wait(session.close(), None)  # the episodes open their own
        except ToolProcessError as error:
            raise ConfigError(
                f"the MCP server '{self._server.name}' does not start: {error}\n"
                + (
                    "Check the address, and that the server is running."
                    if self._server.url
                    else "Run its command in a shell to see more."
                )
            ) from error
        return list(self._tools or ())

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> types.CallToolResult:
        """Calls a tool.

        Raises:
            DeadlineError: the time is up; the call is cancelled.
            ToolError: the server refuses the call as invalid.
            ToolProcessError: the server has ended, or did not start again, or failed.
            ToolResultError: its reply is not one, or too large.
        """
        return _wait(self._call(name, arguments), seconds)

    async def _call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        for attempt in (1, 2):
            session = await self._opened()
            try:
                return await session.call(name, arguments)
            except _LostError as error:
                if attempt == 2 or not error.again:
                    raise ToolProcessError(str(error)) from error
        raise AssertionError("unreachable")

    async def _opened(self) -> _Session:
        if self._session is not None and self._session.alive:
            return self._session
        if self._opening is None:
            if self._ended:
                raise ToolProcessError("its session was closed")
            if self._session is not None and not self._restarts:
                await self._session.close()
                raise ToolProcessError(self._session.reason)
            if time.monotonic() < self._retry_at:
                raise ToolProcessError(self._failure)
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(self._opening_done)
        # Shielded: a call that runs out of time does not stop a start that others wait for.
        return await asyncio.shield(self._opening)

    def _opening_done(self, task: asyncio.Task[_Session]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # retrieved, even if nobody waits any more

    async def _open(self) -> _Session:
        if self._session is not None:
            await self._session.close()  # its process may hold what the next one needs
            _log.warning(
                "the MCP server '%s' is connected to again: %s",
                self._server.name,
                self._session.reason,
            )
        session = _Session(self._server, self._changed)
        try:
            listed = await session.open()
        except ToolProcessError as error:
            if self._tools is not None:
                self._retry_at, self._failure = time.monotonic() + PAUSE_SECONDS, str(error)
            raise
        if self._tools is None:
            self._tools = listed
        elif [_shape(tool) for tool in listed] != [_shape(tool) for tool in self._tools]:
            self._changed()
        self._session = session
        return session

    def _changed(self) -> None:
        if not self._told_change:
            self._told_change = True
            _log.warning(
                "the MCP server '%s' has changed its tools; this run goes on with those that it "
                "had at the start",
                self._server.name,
            )

    async def _close(self) -> None:
        self._ended = True
        if self._opening is not None:
            self._opening.cancel()
        if self._session is not None:
            await self._session.close()


class _LostError(Exception):
    """The session has ended. ``again``: the call has certainly not reached the server."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class _Session:
    """One session, from its opening to its end, in a task of its own.

    Attributes:
        alive: whether calls can be made.
    """

    def __init__(self, server: Server, changed: Any) -> None:
        self.alive = self._ending = self._hurry = False
        self._reason = ""
        self._server, self._changed = server, changed
        self._client: Client | None = None
        self._unreached = False
        self._stop = asyncio.Event()
        self._logged = self._odd_lines = 0
        self._last_words = b""
        self._hide = Redactor({})
        self._task: asyncio.Task[None] | None = None
        self._answered_at = 0.0
        self._probe: asyncio.Task[None] | None = None

    async def open(self) -> list[types.Tool]:
        """Opens it and returns the server's tools.

        Raises:
            ToolProcessError: that fails, or takes too long.
            ConfigError: a variable of the settings is not set.
        """
        ready: asyncio.Future[list[types.Tool]] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(ready))
        seconds = self._server.start_timeout_s
        try:
            first = asyncio.FIRST_COMPLETED
            both: set[asyncio.Future[Any]] = {self._task, ready}
            await asyncio.wait(both, timeout=seconds, return_when=first)
            if ready.done():
                return ready.result()
            if self._task.done():
                self._task.result()  # a ConfigError
                raise ToolProcessError(self.reason)
            raise ToolProcessError(
                f"it did not answer within {seconds:g} seconds (start_timeout_s){self._said()}"
            )
        finally:
            if not (ready.done() and self.alive):
                await self.close()

    async def close(self) -> None:
        """Ends it, and waits for the end of the server's process."""
        if self._ending and self._task is not None:
            # It is ending by itself, and about to say why.
            await asyncio.wait({self._task}, timeout=EXIT_SECONDS + 2 * GRACE_SECONDS)
        self._end("its session was closed")
        if self._task is None:
            return
        if self._client is None:
            self._task.cancel()  # it may be waiting for the server
        await asyncio.wait({self._task})

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Calls a tool; raises as `Connection.call` does.

        Raises:
            _LostError: the session has ended.
        """
        if self._client is None or not self.alive:
            raise _LostError(self.reason, again=True)
        params = types.CallToolRequestParams(name=name, arguments=arguments)
        began = time.monotonic()
        try:
            # Not call_tool, which checks the output against a schema, and may fetch documents.
            reply = await self._client.session.send_request(
                types.CallToolRequest(params=params), _REPLY
            )
        except asyncio.CancelledError:
            # A session of one episode is not opened again, so it may go on to hang.
            if self._answered_at < began and self._probe is None and not self._server.per_episode:
                self._probe = asyncio.create_task(self._end_if_hung(self._client, began))
            raise
        except MCPError as error:
            self._answered_at = time.monotonic()
            if error.code == types.INVALID_PARAMS:
                raise ToolError(self._hide(error.message)) from error
            if error.code == types.INVALID_REQUEST and error.message == "Session terminated":
                self._end("its server has ended the session")
                raise _LostError(self.reason, again=True) from error
            if error.code == types.CONNECTION_CLOSED:
                if error.message == "Connection closed" and self._task and not self._reason:
                    # It is ending, and about to say why.
                    await asyncio.wait({self._task}, timeout=EXIT_SECONDS + 2 * GRACE_SECONDS)
                if self._stop.is_set():
                    raise _LostError(self.reason, again=self._unreached) from error
            words = shorten(self._hide(error.message), 1000)
            raise ToolProcessError(f"its server answered with an error: {words}") from error
        except ValidationError as error:
            raise ToolResultError(
                f"its server sent an invalid result ({self._hide(_invalid(error))})"
            ) from error
        self._answered_at = time.monotonic()
        if not isinstance(reply, types.CallToolResult):
            raise ToolResultError("its server asks for input from a user, which there is not")
        return reply

    async def _end_if_hung(self, client: Client, began: float) -> None:
        """Ends the session if its server does not list its tools either.

        Args:
            client: the session's.
            began: time of the call since which it has answered nothing.
        """
        listing = asyncio.ensure_future(client.list_tools())
        await asyncio.wait({listing}, timeout=PROBE_SECONDS)
        self._probe = None
        if listing.done():
            listing.exception()  # an answer too, or the end of the session
            return
        listing.cancel()
        if self._answered_at < began:
            self._hurry = True
            self._end(f"its server answered nothing for {time.monotonic() - began:.0f} seconds")

    async def _run(self, ready: asyncio.Future[list[types.Tool]]) -> None:
        transport = self._by_url() if self._server.url else self._by_command()
        info = types.Implementation(name="reopold-agent", version=reopold_agent.__version__)
        try:
            client = Client(transport, client_info=info, message_handler=self._heard, cache=None)
            async with client:
                listed = await self._list(client)
                self._client, self.alive = client, True
                if not ready.done():
                    ready.set_result(listed)
                await self._stop.wait()
        except ConfigError:
            raise
        except Exception as error:
            self._end(self._explained(error))
        finally:
            self._client = None
            self._end("its session was closed")

    @property
    def reason(self) -> str:
        """Why it has ended: the first cause, since others follow from it."""
        return self._reason

    def _end(self, reason: str) -> None:
        self.alive = False
        self._reason = self._reason or reason
        self._stop.set()

    async def _list(self, client: Client) -> list[types.Tool]:
        found: list[types.Tool] = []
        cursor = None
        for _ in range(MAX_PAGES):
            try:
                page = await client.list_tools(cursor=cursor)
            except MCPError as error:
                if error.code == types.METHOD_NOT_FOUND:
                    return []
                raise
            except ValidationError as error:
                raise ToolProcessError(
                    f"its list of tools is invalid ({_invalid(error)})"
                ) from error
            found += page.tools
            cursor = page.next_cursor
            if cursor is None or len(found) > MAX_TOOLS:
                break
        if cursor is not None or len(found) > MAX_TOOLS:
            raise ToolProcessError(f"it lists more than {MAX_TOOLS} tools, or without end")
        return found

    async def _heard(self, message: object) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self._changed()

    def _explained(self, error: BaseException) -> str:
        """Returns why the session has ended, from what its tasks have raised."""
        causes = list(_leaves(error))
        self._unreached = all(
            isinstance(e, httpx2.ConnectError | httpx2.ConnectTimeout) for e in causes
        )
        if all(isinstance(e, MCPError) and e.code == types.CONNECTION_CLOSED for e in causes):
            return "its server has closed the connection"
        first = next((e for e in causes if not isinstance(e, MCPError)), causes[0])
        if self._unreached:
            return f"its server cannot be reached ({self._hide(shorten(str(first), 300))})"
        if isinstance(first, ToolProcessError | _TooMuchError):
            return str(first)
        words = shorten(self._hide(first_line(first)), 300)
        return f"its server's connection failed ({type(first).__name__}: {words}){self._said()}"

    # HTTP

    @contextlib.asynccontextmanager
    async def _by_url(self) -> AsyncIterator[Any]:
        used: dict[str, str] = {}
        url = self._server.expanded(self._server.url, used)
        headers = {k: self._server.expanded(v, used) for k, v in self._server.headers}
        self._hide = _redactor(used)
        try:
            client = httpx2.AsyncClient(
                headers={**headers, "Accept-Encoding": "identity"},  # the limit is for what is sent
                timeout=httpx2.Timeout(30.0, read=None, pool=None),  # each call has its limit
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                event_hooks={"response": [_limit]},
            )
        except (ImportError, ValueError) as error:  # proxies of the environment
            raise ConfigError(
                f"a proxy of the environment cannot be used: {error}\n"
                "Change or unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY."
            ) from error
        async with (
            client,
            streamable_http_client(
                url, http_client=client, max_sse_event_size=MAX_BYTES
            ) as streams,
        ):
            yield streams

    # Commands

    @contextlib.asynccontextmanager
    async def _by_command(self) -> AsyncIterator[Any]:
        used: dict[str, str] = {}
        command = [self._server.expanded(each, used) for each in self._server.command]
        env = {k: self._server.expanded(v, used) for k, v in self._server.env}
        self._hide = _redactor(used)
        lifeline, ours = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _GUARD, _ROOT, str(lifeline), *command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**get_default_environment(), **env},
                cwd=self._server.cwd,
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            os.close(ours)
            raise ToolProcessError(f"{error}") from error
        finally:
            os.close(lifeline)
        inward, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        write, outward = anyio.create_memory_object_stream[SessionMessage](0)
        assert process.stdin is not None
        assert process.stderr is not None
        errors = asyncio.create_task(self._read_errors(process.stderr))
        reading = asyncio.create_task(self._read(process, inward, errors))
        writing = asyncio.create_task(self._write(process.stdin, outward))
        try:
            yield read, write
        except Exception as error:
            self._end(self._explained(error))  # before the process is told to end
            raise
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    process.stdin.close()
                    if self._hurry or not await _ended(process, EXIT_SECONDS):
                        os.write(ours, b"\n")
                        if not await _ended(process, 2 * GRACE_SECONDS):
                            process.kill()
                            await _ended(process, GRACE_SECONDS)
            finally:
                os.close(ours)
                for task in (reading, writing, errors):
                    task.cancel()
                await asyncio.wait({reading, writing, errors})
                for stream in (inward, read, write, outward):
                    stream.close()
                # Nothing public closes the pipes if something else still holds the other ends.
                getattr(process, "_transport").close()  # noqa: B009

    async def _read(
        self, process: asyncio.subprocess.Process, inward: Any, errors: asyncio.Task[None]
    ) -> None:
        """Passes on the messages of a server's output, one per line, until its end."""
        assert process.stdout
        line, bound = bytearray(), _Bound()
        try:
            while chunk := await process.stdout.read(1 << 16):
                *ends, rest = chunk.split(b"\n")
                for part in ends:
                    bound.add(part)
                    line += part
                    await self._pass_on(bytes(line), inward)
                    line, bound = bytearray(), _Bound()
                bound.add(rest)
                line += rest
            self.alive, self._ending = False, True
            # What the server says of its end comes by another pipe.
            await _ended(process, EXIT_SECONDS)
            await asyncio.wait({errors}, timeout=GRACE_SECONDS)
            status = process.returncode
            how = "its server has closed its output"
            if status is not None:
                how = f"its server has ended (status {status})"
            if status == NOT_STARTED:
                how = "its command cannot be started"
            self._end(f"{how}{self._said()}")
        except _TooMuchError as error:
            self._hurry = True  # it would go on writing
            self._end(str(error))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # the session has ended
        inward.close()

    async def _pass_on(self, line: bytes, inward: Any) -> None:
        try:
            message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
        except ValueError:
            if line.strip() and self._odd_lines < 5:
                self._odd_lines += 1
                self._last_words = line[:2000]
                _log.warning(
                    "the MCP server '%s' wrote a line that is no message: %s",
                    self._server.name,
                    self._hide(shorten(line[:400].decode("utf-8", "replace"), 200)),
                )
            return
        await inward.send(SessionMessage(message))

    async def _write(self, stdin: asyncio.StreamWriter, outward: Any) -> None:
        try:
            async for each in outward:
                text = each.message.model_dump_json(by_alias=True, exclude_unset=True)
                stdin.write(text.encode() + b"\n")
                await stdin.drain()
        except OSError:
            return  # the server has ended, which the reader notices

    async def _read_errors(self, stderr: asyncio.StreamReader) -> None:
        while data := await stderr.read(1 << 14):
            self._last_words = (self._last_words + data)[-2000:]
            if self._logged < LOGGED_BYTES:
                shown = data[: LOGGED_BYTES - self._logged].decode("utf-8", "replace").rstrip()
                self._logged += len(data)
                more = " ... (the rest is not logged)" if self._logged >= LOGGED_BYTES else ""
                _log.info("MCP server '%s': %s%s", self._server.name, self._hide(shown), more)

    def _said(self) -> str:
        """Returns the last line that the server wrote, to be put after a reason."""
        lines = self._hide(self._last_words.decode("utf-8", "replace")).strip().splitlines()
        return f": {shorten(lines[-1].strip(), 300)}" if lines else ""


class _Limited(httpx2.AsyncByteStream):
    """The body of a response, which ends with an error where a message gets too large.

    Args:
        inner: the body.
        events: whether it is a stream of events, with a message in each.
    """

    def __init__(self, inner: Any, *, events: bool) -> None:
        self._inner, self._events = inner, events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        bound, tail = _Bound(), b""
        async for chunk in self._inner:
            if self._events:
                seen = (tail + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                tail = chunk[-3:]
                if b"\n\n" in seen:
                    bound = _Bound()
            bound.add(chunk)
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _limit(response: httpx2.Response) -> None:
    """Limits what is read of a response."""
    kind = response.headers.get("content-encoding", "identity").lower()
    if kind != "identity":
        await response.aclose()
        raise ToolProcessError(f"its server sends packed data ({shorten(kind)})")
    events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
    response.stream = _Limited(response.stream, events=events)


async def _ended(process: asyncio.subprocess.Process, seconds: float) -> bool:
    """Waits for a process; ``process.wait`` would also wait until its pipes are closed."""
    until = time.monotonic() + seconds
    while process.returncode is None:
        if time.monotonic() >= until:
            return False
        await asyncio.sleep(0.01)
    return True


def _redactor(used: dict[str, str]) -> Redactor:
    return Redactor({f"{name}_SECRET": value for name, value in used.items()})


def _invalid(error: ValidationError) -> str:
    """Returns the place and the reason of the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    return shorten(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 300)


def _shape(tool: types.Tool) -> tuple[Any, ...]:
    return tool.name, tool.description, tool.input_schema


def _leaves(error: BaseException) -> list[BaseException]:
    """Returns the exceptions of a group and of groups in it, or the exception."""
    inner = getattr(error, "exceptions", None)
    return [leaf for each in inner for leaf in _leaves(each)] if inner else [error]


# The event loop, and the connections of this process

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
_connections: dict[tuple[int, Server], Connection] = {}
_episodes: dict[tuple[int, Server, int], Connection] = {}


def connection(server: Server, state: EpisodeState | None = None) -> Connection:
    """Returns this process's connection to a server.

    Args:
        server: the server.
        state: an episode that has a session of its own; it is closed when the state is gone.
    """
    # A fork gets connections of its own, as it has no thread that runs the event loop.
    pid = os.getpid()
    with _lock:
        if state is None:
            return _connections.setdefault((pid, server), Connection(server))
        place = pid, server, id(state)
        found = _episodes.get(place)
        if found is None:
            found = _episodes[place] = Connection(server, restarts=False)
            weakref.finalize(state, _forget, place).atexit = False  # `close` does it then
        return found


def close() -> None:
    """Ends all connections of this process, and the servers that it has started."""
    pid = os.getpid()
    with _lock:
        open_ones = [
            c for (owner, *_), c in [*_connections.items(), *_episodes.items()] if owner == pid
        ]
        _connections.clear()
        _episodes.clear()
        loop = _loops.get(pid)
    if loop is None or not open_ones:
        return

    async def close_all() -> None:
        await asyncio.gather(*(each._close() for each in open_ones), return_exceptions=True)

    with contextlib.suppress(DeadlineError):
        _wait(close_all(), EXIT_SECONDS + 4 * GRACE_SECONDS)


atexit.register(close)


def _forget(place: tuple[int, Server, int]) -> None:
    """Ends the session of an episode that is over."""
    found = _episodes.pop(place, None)
    loop = _loops.get(os.getpid())
    if found is not None and loop is not None and place[0] == os.getpid():
        asyncio.run_coroutine_threadsafe(found._close(), loop)


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        pid = os.getpid()
        if pid not in _loops:
            for name, level in (
                ("mcp.client", logging.CRITICAL),  # what fails is reported here
                ("mcp.shared", logging.CRITICAL),
                ("httpx2", logging.WARNING),  # one line per request otherwise
            ):
                if logging.getLogger(name).level == logging.NOTSET:
                    logging.getLogger(name).setLevel(level)
            loop = _loops[pid] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, daemon=True, name="reopold-mcp").start()
        return _loops[pid]


def _wait(work: Coroutine[Any, Any, T], seconds: float | None) -> T:
    """Runs a coroutine on the event loop and waits for it.

    Raises:
        DeadlineError: the time is up; the coroutine is cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        if future.done() and not future.cancelled():
            raise  # the coroutine's own
        future.cancel()
        raise DeadlineError(f"no result within {seconds:g} seconds") from None
    except BaseException:
        future.cancel()  # Ctrl-C
        raise
