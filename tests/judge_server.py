"""A local HTTP server that judges are tested against: scripted replies, recorded requests."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Seen:
    """One request as it came over the wire."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


@dataclass
class Reply:
    """A scripted reply. ``body`` may be raw bytes."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    trickle: float = 0.0
    """Seconds between single bytes."""
    reset: bool = False
    cut: bool = False
    """End after half of the body."""


Script = Callable[[Seen, int], Reply]
"""From the request and its number (from 0) to the reply."""


class Server:
    """``script`` may be replaced between requests."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class HttpServer(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass  # clients of these tests disconnect in the middle

        self.http = HttpServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        raw = handler.rfile.read(length)
        seen = Seen(
            handler.path,
            {name.lower(): value for name, value in handler.headers.items()},
            json.loads(raw),
            time.monotonic(),
        )
        with self.lock:
            number = len(self.seen)
            self.seen.append(seen)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.script(seen, number)
            time.sleep(0 if reply.reset else reply.delay)
        finally:
            # Before the reply is sent: its receiver may send another request at once.
            with self.lock:
                self.in_flight -= 1
        send_reply(handler, reply)


def send_reply(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    if reply.reset:
        # Lingering for no time makes closing a reset.
        option = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        handler.connection.shutdown(socket.SHUT_RD)
        handler.close_connection = True
        handler.connection.close()
        return
    body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    handler.send_response(reply.status)
    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if reply.cut:
        handler.wfile.write(body[: len(body) // 2])
        handler.close_connection = True
        return
    for piece in [body[i : i + 1] for i in range(len(body))] if reply.trickle else [body]:
        handler.wfile.write(piece)
        handler.wfile.flush()
        time.sleep(reply.trickle)


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    server = Server(script)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def gemini_text(text: str, finish: str = "STOP", **more: Any) -> Reply:
    """generateContent's reply with one candidate."""
    candidate = {
        "content": {"role": "model", "parts": [{"text": text}]},
        "finishReason": finish,
        "index": 0,
    }
    return Reply({"candidates": [candidate], **USAGE, **more})


USAGE: dict[str, Any] = {
    "usageMetadata": {"promptTokenCount": 101, "candidatesTokenCount": 7, "totalTokenCount": 108},
    "modelVersion": "gemini-3.8-flash-001",
}


def google_error(status: int, message: str, name: str, **more: Any) -> Reply:
    """An error in the form of Google's services."""
    headers = more.pop("headers", {})
    error = {"code": status, "message": message, "status": name, **more}
    return Reply({"error": error}, status=status, headers=headers)


def chat_text(text: str | None, finish: str = "stop") -> Reply:
    """A chat completion in OpenAI's form."""
    message = {"role": "assistant", "content": text}
    return Reply(
        {
            "id": "x",
            "object": "chat.completion",
            "model": "judge-v2",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 55, "completion_tokens": 6, "total_tokens": 61},
        }
    )


def install_judge(folder: Path, answer: str) -> None:
    """Writes a package with a judge that always gives this answer, as pip would install it."""
    (folder / "their_judge.py").write_text(
        "from reopold_agent.judges.llm import LLM_JUDGES, Completion, JudgeMaker, judge_of\n"
        "class Mine:\n"
        "    name, model = 'mine', 'v1'\n"
        "    def settings(self): return {}\n"
        "    def describe(self): return {}\n"
        f'    def ask(self, prompt, timeout): return Completion(\'{{"answer": "{answer}"}}\')\n'
        "    def close(self): pass\n"
        "make = lambda settings: judge_of(Mine(), settings, concurrency=2)\n"
        "LLM_JUDGES.register('mine', JudgeMaker('mine', make))\n"
        "MAKER = JudgeMaker('maker', make)\n"
    )
    info = folder / "their_judge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-judge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[reopold_agent.judges]\nwhole = their_judge\nmaker = their_judge:MAKER\n"
    )
