"""A tool call on a thread against one in a worker process.

    python benchmarks/tool_isolation.py [--repeats 30]

The same `crop_image` call of an episode, on a thread of this process (`tools.isolation=none`) and
in a worker process (`tools.isolation=process`): a first call, for which the picture has to be sent,
and later ones, for which it is there already. Printed: milliseconds, medians over the repeats, and
the ratio; then what a worker process takes to start, and what replacing one that hangs adds to the
call's time limit.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from reopold_agent.tools import EpisodeState, Isolation, Tool, ToolResult, crop_image
from reopold_agent.tools.base import ToolRunner, on_thread
from reopold_agent.tools.processes import ToolProcesses
from reopold_agent.types import Task

PICTURES = (
    ("embedded task's picture, 224 x 224, a quarter of each side", 224, 224, 0.25),
    ("photograph, 4000 x 3000 (12 MP), a tenth of each side", 4000, 3000, 0.1),
    ("photograph, 4000 x 3000 (12 MP), half of each side", 4000, 3000, 0.5),
)


def hang(state: EpisodeState) -> ToolResult:
    time.sleep(600)
    return ToolResult("too late")


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def crop_twice(pixels: np.ndarray, share: float, run: ToolRunner) -> tuple[float, float]:
    """A new episode's first call and its second one."""
    state = EpisodeState(Task("t", "Which?", ("1",)), [Image.fromarray(pixels)])
    box = {"bbox_2d": [0.3, 0.3, 0.3 + share, 0.3 + share], "target_image": 1}

    def call() -> None:
        record, _ = crop_image.call(state, box, run=run)
        assert record.ok, record.error

    return milliseconds(call), milliseconds(call)


def compare(repeats: int, processes: ToolProcesses) -> None:
    for name, width, height, share in PICTURES:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rows = [
            (*crop_twice(pixels, share, on_thread), *crop_twice(pixels, share, processes))
            for _ in range(repeats)
        ]
        _, thread, first, later = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{name}: thread {thread:.2f} ms; process {later:.2f} ms ({later / thread:.1f} x), "
            f"first call of an episode {first:.2f} ms ({first / thread:.1f} x)",
            flush=True,
        )


def start_and_replace(repeats: int, processes: ToolProcesses) -> None:
    def start() -> None:
        fresh = ToolProcesses(Isolation("process"))
        fresh.check([crop_image], {})
        stops.append(fresh)

    stops: list[ToolProcesses] = []
    starts = [milliseconds(start) for _ in range(repeats)]
    for each in stops:
        each.close()
    limit = 0.2
    # By the module's name: a process cannot import what is defined in a script that is running.
    probe = Tool("hang", importlib.import_module("tool_isolation").hang, "Hangs.", timeout_s=limit)
    state = EpisodeState(Task("t", "Which?", ("1",)), [])

    def hung() -> None:
        record, _ = probe.call(state, {}, run=processes)
        assert record.error is not None
        assert "did not finish" in record.error

    beyond = [milliseconds(hung) - 1000 * limit for _ in range(repeats)]
    print(f"start of a process with the tool imported: {_spread(starts)}")
    print(
        f"a call that hangs, beyond its limit, the next process's start included: {_spread(beyond)}"
    )


def _spread(values: Sequence[float]) -> str:
    return f"median {statistics.median(values):.0f} ms (highest {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    processes = ToolProcesses(Isolation("process", workers=1))
    try:
        processes.check([crop_image], {})
        compare(repeats, processes)
        start_and_replace(max(3, repeats // 5), processes)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
