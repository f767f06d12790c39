"""The judge's client against the ideal: requests in flight at a server that takes 200 ms each.

    python benchmarks/judge.py [--requests 1280] [--concurrency 64] [--repeats 3]

The server runs in a separate process on this machine. Ideal is concurrency / latency. Measures the
installed SDKs of Google and the OpenAI-compatible judge, with the cache on disk, as in an
evaluation. Printed: replies per second, best of the repeats, and their ratio to the ideal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reopold_agent.errors import MissingExtraError
from reopold_agent.judges.llm import Extract, ProseJudge, make_judge

TEXT = '{"answer": "B"}'
GEMINI = {
    "candidates": [
        {"content": {"role": "model", "parts": [{"text": TEXT}]}, "finishReason": "STOP"}
    ],
    "usageMetadata": {"promptTokenCount": 500, "candidatesTokenCount": 5, "totalTokenCount": 505},
}
CHAT = {
    "choices": [{"message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 5},
}


async def serve(latency: float) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await asyncio.sleep(latency)
                reply = CHAT if b"chat/completions" in head else GEMINI
                body = json.dumps(reply).encode()
                start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                writer.write(start + b"%d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()  # the client has finished

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(judge: ProseJudge, requests: int, tag: str) -> float:
    response = "So I look at the picture again and count. " * 40
    list(judge.run(Extract("Which?", f"{response} warm {tag} {i}") for i in range(8)))
    started = time.perf_counter()
    replies = list(judge.run(Extract("Which?", f"{response} {tag} {i}") for i in range(requests)))
    seconds = time.perf_counter() - started
    assert len(replies) == requests
    assert all(reply.extracted == "B" and not reply.cached for reply in replies)
    return requests / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1280)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="be the server (used by itself)")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.latency))
        return
    os.environ["GEMINI_API_KEY"] = "AIza-benchmark-0000"
    command = [sys.executable, __file__, "--serve", "--latency", str(options.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        ideal = options.concurrency / options.latency
        print(f"ideal: {ideal:.0f} replies/s")
        variants: dict[str, dict[str, Any]] = {
            "google-genai": {"name": "gemini", "sdk": "google-genai", "endpoint": url},
            "google-generativeai": {
                "name": "gemini",
                "sdk": "google-generativeai",
                "endpoint": url,
            },
            "openai_compatible": {
                "name": "openai_compatible",
                "model": "m",
                "base_url": url + "/v1",
            },
        }
        for name, config in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                cache = str(Path(folder) / "judge.sqlite")
                more = {"concurrency": options.concurrency, "cache": cache}
                try:
                    judge = make_judge({**config, **more})
                except MissingExtraError as error:
                    print(f"{name:20} not measured: {error}")
                    continue
                with judge:
                    rates = [
                        measure(judge, options.requests, f"{name} {i}")
                        for i in range(options.repeats)
                    ]
                print(f"{name:20} {max(rates):6.1f} replies/s  {max(rates) / ideal:6.1%} of ideal")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
