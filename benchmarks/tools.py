"""Tools in the rollout's worker threads against VerlTool's tool server, on the same crops.

    python benchmarks/tools.py [--repeats 5] [--server http://127.0.0.1:5000] [--alone]

--alone compares with two lower bounds only, which are printed in any case. The resize alone crops
the same parts out of the decoded pictures and resizes them, on one thread without environment, call
or check. The bare call does what no environment with a thread of its own can leave out: it reads
the call, goes to the thread and back, and passes the part on as the array of Gymnasium's
observation. The rest needs fastapi, uvicorn and aiohttp, which come with the vllm extra.

Ours: an episode's environment runs the call on its thread, and the part is resized for the model.
Theirs: `tool_server.py`, or VerlTool's own server that listens at --server, asked by an asyncio
client with kept connections. Both end with the resized picture in the trainer's process; each has
the two cores to itself in turn. Printed: calls per second, medians over the repeats, and their
ratio; the same for CPU seconds (of all processes), which a busy machine changes less; and the share
of tools in a training step of the embedded task.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import demo_config, demo_loop, last_line
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.demo.tasks import ArrayImage, _photographs
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.workers import Worker
from reopold_agent.tools import find_tool_call
from reopold_agent.tools.crop import pixel_box
from reopold_agent.types import Task

FACTOR, MIN_PIXELS, MAX_PIXELS = 28, 3136, 784_000
LIMITS = PixelLimits(MIN_PIXELS, MAX_PIXELS)


def make_tasks(count: int, width: int, height: int, seed: int) -> list[Task]:
    """Photographs: other parts of the embedded task's two, at the wanted size."""
    rng = np.random.default_rng(seed)
    tasks = []
    for number in range(count):
        photo = _photographs()[number % 2]
        top, left = (int(rng.integers(side // 4)) for side in photo.shape[:2])
        part = Image.fromarray(photo[top:, left:]).resize((width, height))
        tasks.append(Task(str(number), "Which?", ("1",), images=(ArrayImage(np.asarray(part)),)))
    return tasks


def make_actions(tasks: Sequence[Task], calls: int, share: float, seed: int) -> list[list[str]]:
    """For each task, turns that crop a box of this share of each side."""
    rng = np.random.default_rng((seed, 1))

    def action() -> str:
        left, top = rng.uniform(0, 1 - share, 2).round(3).tolist()
        arguments = {"bbox_2d": [left, top, left + share, top + share], "target_image": 1}
        call = json.dumps({"name": "crop_image", "arguments": arguments})
        return f"I will zoom in.\n<tool_call>\n{call}\n</tool_call>"

    return [[action() for _ in range(calls)] for _ in tasks]


def ours(tasks: Sequence[Task], actions: Sequence[Sequence[str]]) -> tuple[float, float, int]:
    """Seconds of all calls, CPU seconds, and pixels that came out."""
    vision = VisionProcessor(Qwen2VLImageProcessorPil())
    calls = len(actions[0])
    options = {"crop_image": {"padding": 0.1}}  # Pixel-Reasoner's, also VerlTool's
    workers = [
        Worker(lambda: PixelReasonerEnv(max_turns=calls + 1, tool_options=options)) for _ in tasks
    ]
    for worker, task in zip(workers, tasks, strict=True):
        worker.call(lambda env, task=task: env.reset(options={"task": task}))
    for worker in workers:
        assert worker.result(60).error is None
    pixels = 0

    def called(env: PixelReasonerEnv, text: str) -> int:
        """As in `RolloutRunner`: the environment's thread also makes the picture's size."""
        (picture,) = env.step(text)[0]["images"]
        return int(vision.encode(picture, LIMITS).pixels.size)

    started, cpu = time.perf_counter(), cpu_seconds(None)
    for number in range(calls):
        for worker, turns in zip(workers, actions, strict=True):
            worker.call(lambda env, text=turns[number]: called(env, text))
        for worker in workers:
            outcome = worker.result(60)
            assert outcome.error is None, outcome.error
            pixels += outcome.value
    seconds, cpu = time.perf_counter() - started, cpu_seconds(None) - cpu
    for worker in workers:
        worker.close()
    return seconds, cpu, pixels


def resize_alone(tasks: Sequence[Task], actions: Sequence[Sequence[str]]) -> tuple[float, int]:
    """CPU seconds, and pixels that came out."""
    pictures = [source.open() for task in tasks for source in task.images]
    calls = [[find_tool_call(text) for text in turns] for turns in actions]
    pixels, cpu = 0, time.process_time()
    for number in range(len(actions[0])):
        for picture, turns in zip(pictures, calls, strict=True):
            call: Any = turns[number]
            box = call.arguments["bbox_2d"]
            part = picture.crop(pixel_box(box, *picture.size, padding=0.1, min_side=28))
            resized = part.resize(LIMITS.resized(part.size, FACTOR), Image.Resampling.BICUBIC)
            pixels += np.asarray(resized).size
    return time.process_time() - cpu, pixels


def bare_calls(tasks: Sequence[Task], actions: Sequence[Sequence[str]]) -> tuple[float, int]:
    """CPU seconds, and pixels that came out."""
    pictures = [source.open() for task in tasks for source in task.images]
    asked = [queue.SimpleQueue() for _ in tasks]
    answers = [queue.SimpleQueue() for _ in tasks]

    def serve(number: int) -> None:
        picture = pictures[number]
        while (text := asked[number].get()) is not None:
            found = json.loads(text[text.index("{") : text.rindex("}") + 1])
            box = found["arguments"]["bbox_2d"]
            part = picture.crop(pixel_box(box, *picture.size, padding=0.1, min_side=28))
            shown = Image.fromarray(np.asarray(part))
            resized = shown.resize(LIMITS.resized(shown.size, FACTOR), Image.Resampling.BICUBIC)
            answers[number].put(np.asarray(resized).size)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    pixels, cpu = 0, time.process_time()
    for number in range(len(actions[0])):
        for each, turns in zip(asked, actions, strict=True):
            each.put(turns[number])
        pixels += sum(each.get() for each in answers)
    cpu = time.process_time() - cpu
    for each, thread in zip(asked, threads, strict=True):
        each.put(None)
        thread.join()
    return cpu, pixels


async def theirs(
    tasks: Sequence[Task], actions: Sequence[Sequence[str]], url: str, tag: str, pid: int | None
) -> tuple[float, float, int]:
    """The same with the tool server; pictures of the prompt are made data URLs in the time."""
    import aiohttp
    from tool_server import decode_image_url, encode_image_url

    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=len(tasks), limit_per_host=len(tasks))
    opened = [[source.open() for source in task.images] for task in tasks]

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def call(number: int, urls: list[str], text: str, last: bool) -> int:
            body = {
                "trajectory_ids": [f"{tag}-{number}"],
                "actions": [text],
                "finish": [False],
                "is_last_step": [last],
                "extra_fields": [{"images": urls}],
            }
            async with session.post(f"{url}/get_observation", json=body) as reply:
                reply.raise_for_status()
                answer = await reply.json()
            assert answer["valids"] == [True], answer
            part = decode_image_url(answer["observations"][0]["image"])
            return part.width * part.height * 3

        async def episode(number: int) -> int:
            urls = [encode_image_url(picture) for picture in opened[number]]
            turns = actions[number]
            return sum(
                [
                    await call(number, urls, text, i + 1 == len(turns))
                    for i, text in enumerate(turns)
                ]
            )

        # Connections are open before the clock starts.
        warm = [encode_image_url(pictures[0]) for pictures in opened]
        await asyncio.gather(*[call(i, [warm[i]], actions[i][0], True) for i in range(len(tasks))])
        started, cpu = time.perf_counter(), cpu_seconds(pid)
        pixels = sum(await asyncio.gather(*[episode(i) for i in range(len(tasks))]))
        return time.perf_counter() - started, cpu_seconds(pid) - cpu, pixels


def cpu_seconds(pid: int | None) -> float:
    """Returns the CPU seconds of this process, and of another one if given."""
    total = time.process_time()
    if pid is not None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def compare(repeats: int, url: str | None, *, pid: int | None) -> None:
    """Prints the ratios; without a server, those to the resize alone."""
    figures: dict[str, float] = {}
    for key, name, width, height, share, count, calls in (
        ("small", "embedded task, 224 x 224, one call an episode", 224, 224, 0.25, 64, 1),
        ("small_four", "embedded task's size, four calls an episode", 224, 224, 0.25, 64, 4),
        ("photographs", "photographs, 1600 x 1200, four calls an episode", 1600, 1200, 0.4, 16, 4),
    ):
        mine: list[float] = []
        other: list[float] = []
        my_cpu = other_cpu = least = bare = 0.0
        for repeat in range(repeats + 1):
            tasks = make_tasks(count, width, height, repeat)
            actions = make_actions(tasks, calls, share, repeat)
            seconds, cpu, pixels = ours(tasks, actions)
            alone, resized = resize_alone(tasks, actions)
            called, same_again = bare_calls(tasks, actions)
            assert pixels == resized == same_again, (pixels, resized, same_again)
            if repeat:  # the first one warms up
                mine.append(count * calls / seconds)
                my_cpu += cpu
                least += alone
                bare += called
            if url is None:
                continue
            http, http_cpu, same = asyncio.run(theirs(tasks, actions, url, f"{name}-{repeat}", pid))
            # VerlTool rounds a box's corners down.
            assert pixels == same if pid else abs(pixels / same - 1) < 0.1, (pixels, same)
            if repeat:
                other.append(count * calls / http)
                other_cpu += http_cpu
        figures[f"{key}_over_resize"] = my_cpu / least
        figures[f"{key}_over_bare"] = my_cpu / bare
        print(
            f"{name}: {1e3 * my_cpu / repeats / count / calls:.2f} CPU milliseconds a call, "
            f"{my_cpu / least:.2f} times the resize alone, {my_cpu / bare:.2f} times the bare call",
            flush=True,
        )
        if not other:
            continue
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        print(
            f"{name}: ours {statistics.median(mine):.0f} calls/s, tool server "
            f"{statistics.median(other):.0f} calls/s, ratio median "
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            + (f", of CPU seconds {other_cpu / my_cpu:.1f}" if pid else ""),
            flush=True,
        )
        figures[f"{key}_over_server"] = 1 / statistics.median(ratios)
    last_line(figures)


def share_of_a_step(repeats: int) -> None:
    folder = Path(tempfile.mkdtemp())
    # A learning rate of almost nothing: every step then has the same kind of episodes.
    loop = demo_loop(demo_config("optimizer.lr=1e-12"), folder)
    collect = loop.collector.collect
    calls: list[Any] = []

    def remember(*arguments: Any, **named: Any) -> Any:
        collected = collect(*arguments, **named)
        calls[:] = [call for t in collected.trajectories for call in t.tool_calls]
        return collected

    loop.collector.collect = remember  # type: ignore[method-assign]
    waits, tools, numbers = [], [], []
    position = 0
    for step in range(repeats + 1):
        position = loop.step(step, position)
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        if step:
            waits.append(row["time/environment"] / row["time/step"])
            tools.append(sum(call.seconds for call in calls) / row["time/step"])
            numbers.append(len(calls))
    loop.close()
    print(
        f"a step of the embedded task ({loop.config.batch.prompts} episodes, median "
        f"{statistics.median(numbers):.0f} tool calls): tools take median "
        f"{statistics.median(tools):.2%} (highest {max(tools):.2%}) of its time, waiting for "
        f"environments, resets included, {statistics.median(waits):.2%} (highest {max(waits):.2%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server", help="a VerlTool server (tool_type pixel_reasoner)")
    parser.add_argument("--alone", action="store_true", help="without a tool server")
    options = parser.parse_args()
    if options.alone:
        compare(options.repeats, None, pid=None)
        return
    if options.server:
        compare(options.repeats, options.server, pid=None)
        return
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tool_server.py"))],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        share_of_a_step(options.repeats)
        compare(options.repeats, f"http://127.0.0.1:{port}", pid=server.pid)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
