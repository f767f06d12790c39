"""Memory that an environment holds for a large picture, as multiples of the picture's raw size.

    python benchmarks/picture_memory.py [--width 4000] [--height 3000] [--environments 4]

Environments run on their own threads, as in a rollout; what they show is encoded for the model and
dropped. Measured: the growth of the process's resident memory per environment while all of them
have begun an episode and wait for the student, after a crop, after the answer, and after an episode
that the runner ends early. Raw size: 3 bytes per pixel. (Pillow keeps RGB in 4 bytes per pixel, so
one decoded copy is 1.33.)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.envs.base import end_episode
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.workers import Worker
from reopold_agent.types import Task

LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD = -3

CROP = {"bbox_2d": [0.4, 0.4, 0.5, 0.5], "target_image": 1}
CALL = f"<tool_call>{json.dumps({'name': 'crop_image', 'arguments': CROP})}</tool_call>"


@dataclass(frozen=True)
class Photograph:
    """A picture as a file's bytes."""

    data: bytes

    def open(self) -> Image.Image:
        """Returns the decoded picture."""
        return Image.open(io.BytesIO(self.data)).convert("RGB")


def photograph(width: int, height: int) -> Photograph:
    """Makes a picture of that size."""
    ramp = np.linspace(0, 255, width * height * 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp.reshape(height, width, 3)).save(buffer, "JPEG")
    return Photograph(buffer.getvalue())


def resident() -> int:
    """Returns the resident memory of this process in bytes, without what malloc keeps unused."""
    gc.collect()
    LIBC.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    """Prints the measurements, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--environments", type=int, default=4)
    given = parser.parse_args()
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back to the system at once
    task = Task("1", "Which?", ("7",), images=(photograph(given.width, given.height),))
    vision = VisionProcessor(Qwen2VLImageProcessorPil())
    limits = PixelLimits(200704, 1003520)

    def make() -> list[Worker]:
        return [
            Worker(lambda: PixelReasonerEnv(data={"eval": [task], "train": [task]}))
            for _ in range(given.environments)
        ]

    workers = make()

    def everywhere(call: Callable[[Any], Any]) -> None:
        for worker in workers:
            worker.call(call)
        for worker in workers:
            outcome = worker.result(60)
            assert outcome.error is None, outcome.error
            for picture in outcome.value[0]["images"]:
                vision.encode(picture, limits)

    raw = 3 * given.width * given.height

    def report(what: str) -> None:
        print(f"{what:<28} {(resident() - before) / raw / len(workers):6.2f} x raw")

    def begin(env: Any) -> Any:
        return env.reset(options={"split": "train", "index": 0})

    everywhere(begin)  # loads and caches everything but what an environment holds
    for worker in workers:
        worker.close()
    workers = make()
    before = resident()
    everywhere(begin)
    report("an episode has begun")
    everywhere(lambda env: env.step(CALL))
    report("after a crop")
    everywhere(begin)
    everywhere(lambda env: env.step("\\boxed{7}"))
    report("idle after the answer")
    everywhere(begin)
    for worker in workers:
        worker.tell(end_episode)
    everywhere(lambda env: ({"images": ()},))  # waits for it
    report("idle after an early end")


if __name__ == "__main__":
    main()
