"""Tools of MCP servers: real servers over standard input and HTTP, and bad ones."""

from __future__ import annotations

import base64
import contextlib
import gc
import gzip
import http.server
import importlib.util
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_pages import ROOT, blocks, commands
from mcp_server import png
from running import composed, environment, lines, start, train, train_rows
from test_envs import call

from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.from_config import make_env
from reopold_agent.errors import ConfigError, MissingExtraError, UnknownNameError
from reopold_agent.tools import EpisodeState, Isolation, Tool
from reopold_agent.tools.mcp import is_server, server_tools
from reopold_agent.types import IMAGE_MARK, Task, TaskSource

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mcp") is None, reason='needs the extra: pip install -e ".[mcp]"'
)

TESTS = Path(__file__).parent
SERVER = TESTS / "mcp_server.py"
RAW = TESTS / "mcp_raw_server.py"
SHORT = ("evaluation.tasks=1", "evaluation.every=0", "evaluation.teacher=false")
GOOD = {"mcp": {"command": [sys.executable, str(SERVER)]}}


def raw(behaviour: str, **more: Any) -> dict[str, Any]:
    settings = {"command": [sys.executable, "-S", str(RAW), behaviour], **more}
    return {"mcp": settings}


class Room(ToolEnv):
    """An environment with any tools."""

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        return [Task("room", "What is on the shelf?", ("7",))]


def tools_of(choice: Any) -> dict[str, Tool]:
    return {tool.name: tool for tool in server_tools(choice)}


def state() -> EpisodeState:
    return EpisodeState(Task("a", "Question?", ("1",)), [])


def told(tool: Tool, seconds: float | None = None, **arguments: Any) -> str:
    """What the model reads."""
    return tool.call(state(), arguments, seconds=seconds)[1].text


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    from reopold_agent.tools import mcp_client

    mcp_client.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The same server behind HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(port)], stdout=-3, stderr=-3, env=environment()
    )
    for _ in range(400):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


@pytest.fixture(params=["command", "address"])
def served(request: pytest.FixtureRequest) -> Any:
    if request.param == "command":
        return GOOD
    return f"mcp:{request.getfixturevalue('address')}"


# What works


def test_an_environment_gets_a_servers_tools_beside_its_own(served: Any) -> None:
    env = Room(tools=["select_frames", served])
    assert [tool.name for tool in env.tools][:3] == ["select_frames", "add", "draw"]
    _, info = env.reset(seed=0)
    assert '"name": "add", "description": "Adds two numbers."' in info["system_prompt"]
    observation, *_, info = env.step(call("add", {"a": 40, "b": 2}))
    assert (observation["text"], info["tool_call"].ok) == ("42", True)
    observation, *_ = env.step(call("draw", {"side": 30}))
    assert observation["text"] == IMAGE_MARK
    assert observation["images"][0].shape == (30, 30, 3)
    assert observation["images"][0][0, 0].tolist() == [250, 10, 10]
    assert env.episode is not None
    assert len(env.episode.images) == 1


def test_arguments_are_checked_before_the_call(served: Any) -> None:
    add = tools_of(served)["add"]
    assert told(add, a=1, b="x") == "Execution error:\n'b': 'x' is not of type 'integer'."
    assert "'b' is a required property" in told(add, a=1)


def test_a_servers_error_is_a_message_to_the_model(served: Any) -> None:
    refuse = tools_of(served)["refuse"]
    made, result = refuse.call(state(), {})
    assert not made.ok
    assert result.text.startswith("Execution error:\n")
    assert "there is no such shelf" in result.text
    assert IMAGE_MARK not in result.text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("resource", "the text of a"),
        ("picture", IMAGE_MARK),
        ("data", "[file:///d: data of a/b, which cannot be shown]"),
        ("audio", "[audio (audio/wav), which cannot be shown]"),
        ("link", "[link to x: https://example.org/x]"),
        ("structured", '{"a": [1, "ü"]}'),
        ("nothing", ""),
        ("mark", "a   in a text"),
        ("failed", "Execution error:\nThe call failed."),
        ("broken", "Execution error:\nThe tool blocks failed: its picture is not a readable pict"),
        ("no base64", "Execution error:\nThe tool blocks failed: its picture is not base64."),
        ("many", "Execution error:\nThe tool blocks failed: it returned more than 256 images."),
    ],
)
def test_every_kind_of_content(kind: str, text: str) -> None:
    shown = told(tools_of(GOOD)["blocks"], kind=kind)
    assert shown == text or (kind == "broken" and shown.startswith(text))


def test_results_have_the_limits_of_all_tools(served: Any, monkeypatch: Any) -> None:
    from reopold_agent.tools import mcp, mcp_client

    tools = tools_of(served)
    assert "returned 1000001 characters; the most is" in told(tools["repeat"], times=1_000_001)
    monkeypatch.setattr(mcp, "MAX_PIXELS", 100)
    assert "the limit is 100" in told(tools["draw"], side=11)
    assert told(tools["draw"], side=10) == IMAGE_MARK
    monkeypatch.setattr(mcp_client, "MAX_BYTES", 1 << 20)
    text = told(tools["repeat"], times=2 << 20)
    assert "it sent a message of more than 1 MB" in text
    assert told(tools["add"], a=1, b=1) == "2"  # the run goes on


def test_a_call_that_takes_too_long_is_cancelled(
    served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sleep = tools_of({**(served if served == GOOD else {"mcp": served[4:]}), "timeout_s": 0.2})
    began = time.monotonic()
    text = sleep["sleep"].call(state(), {"span": 60})[1].text
    assert text == "Execution error:\nThe tool did not finish within 0.2 seconds."
    text = sleep["sleep"].call(state(), {"span": 60}, seconds=0.1)[1].text
    assert text == "Execution error:\nThe tool did not finish within 0.1 seconds."
    assert time.monotonic() - began < 5
    assert told(sleep["add"], a=1, b=2) == "3"
    if served == GOOD:
        for _ in range(100):
            if "a call was cancelled" in caplog.text:
                return
            time.sleep(0.05)
        raise AssertionError("the server was not told")


def test_calls_run_at_once_and_share_one_server(served: Any) -> None:
    tools = tools_of(served)
    began = time.monotonic()
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(told(tools["sleep"], span=1)))
        for _ in range(120)  # more than HTTP clients usually have connections
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == ["slept 1.0"] * 120
    assert time.monotonic() - began < 20
    assert told(tools["pid"]) == told(tools_of(served)["pid"])


def test_tools_are_not_run_in_worker_processes_and_can_be_pickled() -> None:
    env = Room(tools=[GOOD], tool_isolation=Isolation(mode="process"))
    env.reset(seed=0)
    assert env.step(call("add", {"a": 1, "b": 2}))[0]["text"] == "3"
    again = pickle.loads(pickle.dumps(env.tools[0]))
    assert told(again, a=2, b=2) == "4"


def test_each_episode_may_have_a_session_of_its_own() -> None:
    env = Room(tools=[raw("pid", session="episode")])
    seen = []
    for _ in range(2):
        env.reset(seed=0)
        seen += [env.step(call("look"))[0]["text"] for _ in range(2)]
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert "has ended (status 7)" in env.step(call("die"))[0]["text"]
    # Its state would be lost without a word.
    assert "has ended (status 7)" in env.step(call("look"))[0]["text"]
    env.end_episode()
    gc.collect()
    for pid in (seen[0], seen[2]):
        wait_for_end(int(pid))


# Names


def test_names_can_be_chosen_and_changed() -> None:
    assert list(tools_of({**GOOD, "only": ["pid", "add"]})) == ["pid", "add"]
    renamed = tools_of({**GOOD, "only": ["pid", "add"], "as": {"add": "plus"}})
    assert list(renamed) == ["pid", "plus"]
    assert told(renamed["plus"], a=1, b=1) == "2"
    assert list(tools_of({**GOOD, "only": "add", "as": "shop_*"})) == ["shop_add"]


def test_two_tools_of_one_name_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"one name: .*\n.*as: 'files_\*'"):
        Room(tools=[GOOD, {**GOOD, "only": ["add"]}])
    Room(tools=[GOOD, {**GOOD, "only": ["add"], "as": "other_*"}])
    with pytest.raises(ConfigError, match="two tools 'look'"):
        server_tools(raw("two alike"))


# Bad input


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("mcp", "command is empty"),
        ("mcp:", "command is empty"),
        ("mcp:python 'x", "cannot be read: No closing quotation"),
        ({"mcp": {}}, "needs a command or a url"),
        ({"mcp": {"command": "x", "url": "http://x"}}, "needs a command or a url"),
        ({"mcp": 3}, "needs a command or a url"),
        ({"mcp": {"command": ["x"], "headers": {}}}, "no setting 'headers' here"),
        ({"mcp": "x", "onyl": []}, "no setting 'onyl' here"),
        ({"mcp": {"command": ["x"], "env": "A=1"}}, "env of an MCP server must be a mapping"),
        ({"mcp": {"command": ["x"], "session": "turn"}}, "session is 'turn'"),
        ({"mcp": "x", "timeout_s": -1}, "timeout_s of an MCP server is -1"),
        ({"mcp": {"url": "ftp://x"}}, "no address of an MCP server"),
        ("mcp:no-such-program --fast", r"does not start: .*cannot be started.*\nRun its command"),
        ("mcp:http://127.0.0.1:9/mcp", r"does not start: its server cannot be reached.*\nCheck"),
        ({"mcp": {"command": ["true"], "cwd": "/nowhere"}}, "does not start: .*nowhere"),
        ("mcp:true", r"does not start: its server has ended \(status 0\)"),
        ({**GOOD, "only": ["ad"]}, r"has no tool 'ad'\nIt has: add, "),
        ({**GOOD, "only": []}, "takes none"),
        ({**GOOD, "only": 3}, "only is 3"),
        ("mcp:http://127.0.0.1:x9/mcp?key=$REOPOLD_UNSET", "'http://127.0.0.1/mcp' needs the"),
        ({**GOOD, "as": {"ad": "b"}}, "has no tool 'ad'"),
        ({**GOOD, "as": "b"}, "new names by a pattern"),
        (raw("no tools"), "has no tools\nCheck"),
        (raw("bad schema"), r"its list of tools is invalid \(tools.2.inputSchema.type: "),
        (raw("bad argument"), r"'bad' with an invalid input schema: 'objct' .*\n.*only:"),
        (raw("remote schema"), r"'bad' with an invalid input schema: .*example.org"),
        (raw("garbage"), r"has ended \(status 3\): .*\[1, 2"),
        (raw("endless list"), "lists more than 1000 tools, or without end"),
        (raw("hangs", start_timeout_s=0.3), r"did not answer within 0.3 seconds"),
        (raw("x", env={"A": "$REOPOLD_UNSET"}), "needs the variable REOPOLD_UNSET"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_two_lines(choice: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        server_tools(choice)
    assert len(str(found.value).splitlines()) == 2


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.delitem(sys.modules, "reopold_agent.tools.mcp_client", raising=False)
    monkeypatch.delattr("reopold_agent.tools.mcp_client", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install -e "\.\[mcp\]"'):
        server_tools(GOOD)


def test_other_names_are_no_servers() -> None:
    assert not any(map(is_server, ("crop_image", {"name": "mcp:x"}, "mcpx")))
    with pytest.raises(UnknownNameError):
        Room(tools=["mcpx"])


def test_a_server_that_dies_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    tools = tools_of(raw("pid"))
    before = told(tools["look"])
    assert told(tools["die"]) == (
        "Execution error:\nThe tool die failed: its server has ended (status 7)."
    )
    after = told(tools["look"])
    assert after.isdigit()
    assert after != before
    os.kill(int(after), signal.SIGKILL)
    wait_for_end(int(after))
    time.sleep(0.3)  # until the end of its output is read
    assert told(tools["look"]).isdigit()
    assert caplog.text.count("is connected to again") == 2


def test_a_server_that_does_not_start_again_is_a_message(tmp_path: Path) -> None:
    once = tmp_path / "once"
    script = textwrap.dedent(
        f"""
        import os, runpy, sys
        sys.argv = ["server", "once"]
        if os.path.exists({str(once)!r}):
            sys.exit("no more")
        open({str(once)!r}, "w").close()
        runpy.run_path({str(RAW)!r})
        """
    )
    look = tools_of({"mcp": {"command": [sys.executable, "-c", script]}})["look"]
    first = told(look)
    for _ in range(50):  # it may still be seen alive
        if "no more" in first:
            break
        first = told(look)
    assert first.endswith("its server has ended (status 1): no more.")
    began = time.monotonic()
    assert told(look) == first  # at once, without a further start
    assert time.monotonic() - began < 1


def test_http_sessions_are_opened_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is stopped and started stands for a server that is started again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(SERVER), str(port)]

    def run() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(words, stdout=-3, stderr=-3, env=environment())
        for _ in range(400):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        return process

    from reopold_agent.tools import mcp_client

    monkeypatch.setattr(mcp_client, "PAUSE_SECONDS", 0.0)
    process = run()
    try:
        add = tools_of(f"mcp:http://127.0.0.1:{port}/mcp")["add"]
        assert told(add, a=1, b=1) == "2"
        process.kill()
        process.wait()
        assert "its server cannot be reached" in told(add, a=1, b=1)
        process = run()
        assert told(add, a=1, b=1) == "2"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("changes", "Execution error:\nUnknown tool: look"),
        ("endless line", "it sent a message of more than 1 MB."),
        ("many values", "it sent a message of more than 10000 values."),
        ("wrong result", "its server sent an invalid result ("),
        ("wrong json", ""),
        ("internal error", "its server answered with an error: out of paper."),
        ("silent", "The tool did not finish within 0.3 seconds."),
    ],
)
def test_what_a_server_does_wrong_in_a_call_is_a_message(
    behaviour: str, words: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from reopold_agent.tools import mcp_client

    monkeypatch.setattr(mcp_client, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(mcp_client, "MAX_VALUES", 10_000)
    look = tools_of({**raw(behaviour), "timeout_s": 0.3 if behaviour == "silent" else 10})["look"]
    assert words in told(look)
    assert words in told(look)
    if behaviour == "changes":
        assert caplog.text.count("has changed its tools") == 1
    if behaviour == "wrong json":
        assert "wrote a line that is no message" in caplog.text


def test_a_server_that_hangs_in_a_call_is_started_again(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from reopold_agent.tools import mcp_client

    monkeypatch.setattr(mcp_client, "PROBE_SECONDS", 0.3)
    stuck = raw("stuck once", env={"RAW_MARK": str(tmp_path / "mark")})
    look = tools_of({**stuck, "timeout_s": 0.3})["look"]
    assert "did not finish within 0.3 seconds" in told(look)
    until = time.monotonic() + 20
    while told(look, seconds=5) != "nothing":
        assert time.monotonic() < until
        time.sleep(0.1)
    assert re.search(
        r"connected to again: its server answered nothing for \d+ seconds", caplog.text
    )


def test_a_server_that_answers_other_requests_is_left_alone(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from reopold_agent.tools import mcp_client

    monkeypatch.setattr(mcp_client, "PROBE_SECONDS", 0.5)
    look = tools_of({**raw("silent", env={"SHOP": "1"}), "timeout_s": 0.2})["look"]
    for _ in range(6):
        assert "did not finish within 0.2 seconds" in told(look)
    assert "connected to again" not in caplog.text


class BadHttp(http.server.BaseHTTPRequestHandler):
    """An MCP server that answers calls badly; the address says how."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number, how = request.get("id"), self.path.strip("/")
        if request["method"] == "initialize":
            info = {"serverInfo": {"name": "bad", "version": "1"}, "capabilities": {"tools": {}}}
            self.reply({"id": number, "result": {"protocolVersion": "2025-06-18", **info}})
        elif request["method"] == "tools/list":
            look = {"name": "look", "inputSchema": {"type": "object"}}
            self.reply({"id": number, "result": {"tools": [look]}})
        elif request["method"] != "tools/call":
            self.send_error(202 if number is None else 404)
        elif how == "packed":
            self.send(gzip.compress(b" " * 100), "application/json", "gzip")
        elif how == "page":
            self.send(b"<p>hello</p>", "text/html")
        elif how == "broken":
            self.send(b"{]", "application/json")
        elif how == "failing":
            self.send_error(500)
        elif how == "refusing":
            self.send_error(401)
        else:
            kind = "text/event-stream" if how == "events" else "application/json"
            with contextlib.suppress(OSError):
                self.send(b"data: ", kind, length=1 << 40)
                while True:
                    self.wfile.write(b"x" * 65536)

    def reply(self, message: dict[str, Any]) -> None:
        self.send(json.dumps({"jsonrpc": "2.0", **message}).encode(), "application/json")

    def send(self, body: bytes, kind: str, packed: str = "identity", length: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Encoding", packed)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bad_address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadHttp)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("packed", "its server sends packed data (gzip)"),
        ("page", "Unexpected content type: text/html"),
        ("broken", "Failed to parse JSON response"),
        ("failing", "its server answered with an error: Server returned an error response"),
        ("refusing", "its server answered with an error: Server returned an error response"),
        ("endless", "it sent a message of more than 1 MB"),
        ("events", "its server answered with an error: SSE stream"),
    ],
)
def test_what_a_server_does_wrong_over_http_is_a_message(
    how: str, words: str, bad_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reopold_agent.tools import mcp_client

    monkeypatch.setattr(mcp_client, "MAX_BYTES", 1 << 20)
    look = tools_of(f"mcp:{bad_address}/{how}")["look"]
    assert words in told(look)
    assert words in told(look)


def test_schemas_of_another_draft_are_checked_by_it() -> None:
    look = tools_of(raw("draft 7"))["look"]
    assert told(look, a=[1]) == "nothing"
    assert "Additional items are not allowed" in told(look, a=[1, 2])


# Secrets


def test_secrets_are_passed_and_never_shown(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SHOP_VALUE", "abcdefgh-secret")
    look = tools_of(raw("says", env={"SHOP_PASS": "$SHOP_VALUE"}))["look"]
    assert told(look) == "abcdefgh-secret"  # what the server does with it is its business
    for _ in range(100):
        if "my password is" in caplog.text:
            break
        time.sleep(0.05)
    assert "my password is [hidden]" in caplog.text
    headers = {"Authorization": "Bearer $SHOP_VALUE", "X-Plain": "a $$"}
    header = tools_of({"mcp": {"url": address, "headers": headers}})["header"]
    assert told(header, name="authorization") == "Bearer abcdefgh-secret"
    assert told(header, name="x-plain") == "a $"
    assert "abcdefgh-secret" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"command": ["x"], "env": {"SHOP_TOKEN": "hunter22"}},
        {"url": "http://h/mcp", "headers": {"authorization": "Bearer hunter22"}},
        {"url": "http://h/mcp", "headers": {"X-Api-Key": "hunter22"}},
        {"url": "http://me:hunter22@h/mcp"},
        {"url": "http://h/mcp?api_key=hunter22"},
    ],
)
def test_secrets_in_the_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"secret in its settings.*\nWrite \$NAME") as found:
        server_tools({"mcp": settings})
    assert "hunter22" not in str(found.value)


def test_a_server_sees_few_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REOPOLD_OTHER", "1")
    seen = json.loads(told(tools_of(raw("variables", env={"B": "2"}))["look"]))
    assert "REOPOLD_OTHER" not in seen
    assert (seen["B"], seen["PATH"]) == ("2", os.environ["PATH"])


# Processes


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    for _ in range(400):
        if not running(pid):
            return
        time.sleep(0.025)
    raise AssertionError(f"process {pid} is still running")


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_no_server_outlives_the_program(how: str, tmp_path: Path) -> None:
    """One that ignores the end of its input and SIGTERM, with a child in a session of its own."""
    code = textwrap.dedent(
        f"""
        import logging, sys, time
        logging.basicConfig(level=logging.INFO)
        from reopold_agent.tools.mcp import server_tools
        server_tools({raw("stubborn")!r})
        if {how!r} == "kill":
            time.sleep(600)
        """
    )
    process = start([sys.executable, "-c", code], tmp_path)
    assert process.stderr is not None
    line = next(each for each in process.stderr if "pids" in each)
    pids = [int(each) for each in re.findall(r"pids (\d+) (\d+)", line)[0]]
    if how == "kill":
        assert all(map(running, pids))
        process.kill()
    process.communicate()
    for pid in pids:
        wait_for_end(pid)


# Training


def test_a_student_that_calls_a_servers_tool_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's tool looks like the one that the embedded student calls."""
    shown = make_env(composed()[0]).unwrapped.tools[0].schema()["function"]
    tool = {**shown, "inputSchema": shown.pop("parameters")}
    monkeypatch.setenv("SHOP_VALUE", "abcdefgh-secret")
    monkeypatch.setenv("SHOP_TOOL", json.dumps(tool))
    monkeypatch.setenv("SHOP_PICTURE", base64.b64encode(png(40)).decode())
    variables = "{RAW_TOOL: $SHOP_TOOL, RAW_PICTURE: $SHOP_PICTURE, SHOP_KEY: $SHOP_VALUE}"
    server = f"{{command: [{sys.executable}, -S, {RAW}, picture], env: {variables}}}"
    train(tmp_path, *SHORT, "steps=2", f"+env.kwargs.tools=[{{mcp: {server}}}]")
    results = [
        turn
        for line in lines(tmp_path / "trajectories.jsonl")
        for turn in line["turns"]
        if turn.get("tool_call")
    ]
    assert results, "the student has called it"
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert b"abcdefgh-secret" not in file.read_bytes(), file


def test_the_documents_command_trains_with_the_documents_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "tools.md"
    found = [each for block in blocks(page) for each in commands(block)]
    ours = next(each.words for each in found if "examples/mcp_server.py" in " ".join(each.words))
    assert ours[:3] == ("python", "-m", "reopold_agent.train")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", environment()["PATH"])  # `python` is this one
    train(tmp_path, *SHORT, *ours[3:])
    assert len(train_rows(tmp_path)) == 2
    assert "draw_bars" in (tmp_path / "trajectories.jsonl").read_text("utf-8")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))["env"]["kwargs"]["tools"]
    assert saved == ["crop_image", "mcp:python examples/mcp_server.py"]


def test_the_documents_server_draws_and_multiplies() -> None:
    tools = tools_of(f"mcp:{sys.executable} {ROOT / 'examples' / 'mcp_server.py'}")
    assert told(tools["multiply"], first=6, second=7) == "42.0"
    picture = tools["draw_bars"].call(state(), {"values": [0, 100]})[1].images[0]
    assert picture.size == (48, 112)
    assert picture.getpixel((34, 50)) == (0, 0, 128)
    assert picture.getpixel((10, 50)) == (255, 255, 255)
    assert "Execution error" in told(tools["draw_bars"], values=[])
