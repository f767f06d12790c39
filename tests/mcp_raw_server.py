"""A server that speaks MCP badly, without the SDK: ``python mcp_raw_server.py BEHAVIOUR``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

behaviour = sys.argv[1]
schema: Any = {"type": "object", "properties": {}}
tools: list[dict[str, Any]] = [{"name": name, "inputSchema": schema} for name in ("look", "die")]
if "RAW_TOOL" in os.environ:
    tools = [json.loads(os.environ["RAW_TOOL"])]


def send(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def listing(cursor: str | None) -> dict[str, Any]:
    if behaviour == "no tools":
        return {"tools": []}
    if behaviour == "bad schema":
        return {"tools": [*tools, {"name": "bad", "inputSchema": {"type": "objct"}}]}
    if behaviour == "bad argument":
        bad = {"type": "object", "properties": {"a": {"type": "objct"}}}
        return {"tools": [*tools, {"name": "bad", "inputSchema": bad}]}
    if behaviour == "remote schema":
        bad = {"type": "object", "properties": {"a": {"$ref": "https://example.org/s.json"}}}
        return {"tools": [*tools, {"name": "bad", "inputSchema": bad}]}
    if behaviour == "draft 7":
        # In draft 7 a list of items is what draft 2020-12 calls prefixItems.
        pair = {"type": "array", "items": [{"type": "integer"}], "additionalItems": False}
        old = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}
        return {"tools": [{"name": "look", "inputSchema": {**old, "properties": {"a": pair}}}]}
    if behaviour == "endless list":
        return {"tools": [], "nextCursor": f"{cursor}+"}
    if behaviour == "two alike":
        return {"tools": tools * 2}
    return {"tools": tools}


def called(number: Any, name: str) -> None:
    if name == "die":
        os._exit(7)
    elif behaviour == "changes":
        send({"method": "notifications/tools/list_changed"})
        send({"method": "notifications/tools/list_changed"})
        send({"id": number, "error": {"code": -32602, "message": "Unknown tool: look"}})
    elif behaviour == "endless line":
        print('{"jsonrpc": "2.0", "text": "', end="")
        while True:
            sys.stdout.write("x" * 65536)
    elif behaviour == "many values":
        send({"id": number, "result": {"content": [], "structuredContent": {"a": [0] * 50_000}}})
    elif behaviour == "wrong result":
        send({"id": number, "result": {"content": "text"}})
    elif behaviour == "wrong json":
        print('{"jsonrpc": "2.0", "id": 1, "result": }', flush=True)
        send({"id": number, "result": {"content": []}})
    elif behaviour == "internal error":
        send({"id": number, "error": {"code": -32603, "message": "out of paper"}})
    elif behaviour == "silent":
        return
    elif behaviour == "stuck once" and not os.path.exists(os.environ["RAW_MARK"]):
        open(os.environ["RAW_MARK"], "x").close()
        time.sleep(600)
    elif behaviour == "picture":
        picture = {"type": "image", "data": os.environ["RAW_PICTURE"], "mimeType": "image/png"}
        send({"id": number, "result": {"content": [picture]}})
    else:
        text = {"pid": str(os.getpid()), "variables": json.dumps(dict(os.environ))}.get(
            behaviour, os.environ.get("SHOP_PASS", "nothing")
        )
        send({"id": number, "result": {"content": [{"type": "text", "text": text}]}})


if behaviour == "hangs":
    time.sleep(600)
if behaviour == "garbage":
    print("This is not JSON.\n[1, 2", flush=True)
    sys.exit(3)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(f"pids {os.getpid()} {child.pid}", file=sys.stderr, flush=True)
if "SHOP_PASS" in os.environ:
    print(f"my password is {os.environ['SHOP_PASS']}", file=sys.stderr, flush=True)

for line in sys.stdin:
    request = json.loads(line)
    number, method = request.get("id"), request["method"]
    if method == "initialize":
        capabilities = {"tools": {"listChanged": True}}
        info = {"name": "raw", "version": "1"}
        version = {"protocolVersion": "2025-06-18", "serverInfo": info}
        send({"id": number, "result": {**version, "capabilities": capabilities}})
    elif method == "tools/list":
        send({"id": number, "result": listing((request.get("params") or {}).get("cursor"))})
        if behaviour == "once":
            sys.exit(0)
    elif method == "tools/call":
        called(number, request["params"]["name"])
    elif number is not None:
        send({"id": number, "error": {"code": -32601, "message": "Method not found"}})
if behaviour == "stubborn":
    time.sleep(600)
