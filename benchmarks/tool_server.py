"""VerlTool's way to run tools, reduced to what its design needs: a tool server behind HTTP.

A model of ``verl_tool/servers/tool_server.py`` and ``tools/pixel_reasoner.py`` (TIGER-AI-Lab/
verl-tool at 980962b), so that `tools.py` can compare with it: FastAPI on uvicorn, one POST
``/get_observation`` per call with the trajectory's id, the action's text and, each time, all its
pictures as JPEG data URLs; the server keeps the decoded pictures of a trajectory, crops in a
thread pool, resizes, and sends the part back as a JPEG data URL.

Left out, which makes it faster: the router process in front of its workers, its hash of every
request for deduplication, its log of sizes, Ray.
"""

import asyncio
import base64
import io
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from PIL import Image
from pydantic import BaseModel, Field
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from reopold_agent.tools.crop import pixel_box

FACTOR, MIN_PIXELS, MAX_PIXELS = 28, 3136, 784_000


class ActionRequest(BaseModel):
    trajectory_ids: list[str] = Field(..., min_length=1)
    actions: list[str] = Field(..., min_length=1)
    extra_fields: list[dict[str, Any]] | None = None
    finish: list[bool] | None = None
    is_last_step: list[bool] | None = None


class AgentResponse(BaseModel):
    observations: list[str | dict[str, Any]]
    dones: list[bool]
    valids: list[bool]
    processing_time_ms: float | None = None


def encode_image_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def decode_image_url(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split("base64,", 1)[1]))).convert("RGB")


def resized(image: Image.Image) -> Image.Image:
    """Its ``process_image`` (qwen-vl-utils' ``fetch_image``), with this benchmark's limits."""
    height, width = smart_resize(image.height, image.width, FACTOR, MIN_PIXELS, MAX_PIXELS)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def crop(image: Image.Image, arguments: dict[str, Any]) -> Image.Image:
    """The same box as our tool's."""
    box = pixel_box(arguments["bbox_2d"], image.width, image.height, padding=0.1, min_side=28)
    return resized(image.crop(box))


def make_app() -> FastAPI:
    app = FastAPI()
    pool = ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4))
    pictures: dict[str, list[Image.Image]] = {}
    semaphore = asyncio.Semaphore(256)

    async def limited() -> Any:
        async with semaphore:
            yield

    def run(trajectory: str, action: str, extra: dict[str, Any]) -> tuple[Any, bool]:
        try:
            call = json.loads(action.split("<tool_call>")[1].split("</tool_call>")[0])
        except (IndexError, ValueError):
            return "", False
        if trajectory not in pictures:
            pictures[trajectory] = [decode_image_url(url) for url in extra["images"]]
        mine = pictures[trajectory]
        part = crop(mine[call["arguments"]["target_image"] - 1], call["arguments"])
        mine.append(part)
        text = f"Here is the cropped image. (Image Size: {part.width}x{part.height})\n<image>"
        return {"obs": text, "image": encode_image_url(part)}, True

    @app.post("/get_observation", response_model=AgentResponse)
    async def get_observation(request: ActionRequest, _: None = Depends(limited)) -> Any:
        loop = asyncio.get_running_loop()
        extra = request.extra_fields or [{} for _ in request.trajectory_ids]
        done = await asyncio.gather(
            *[
                loop.run_in_executor(pool, run, *each)
                for each in zip(request.trajectory_ids, request.actions, extra, strict=True)
            ]
        )
        for trajectory, last in zip(
            request.trajectory_ids, request.is_last_step or [], strict=False
        ):
            if last:
                pictures.pop(trajectory, None)
        return AgentResponse(
            observations=[observation for observation, _ in done],
            dones=[False] * len(done),
            valids=[valid for _, valid in done],
        )

    return app


def main() -> None:
    """Serves on a free port of this machine and prints it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(make_app(), log_level="error", access_log=False, backlog=8192)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
