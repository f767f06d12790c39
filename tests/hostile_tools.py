"""Tools that misbehave, at the top level of a module so that a worker process can import them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from reopold_agent.errors import ToolError
from reopold_agent.tools import EpisodeState, ToolResult
from reopold_agent.types import IMAGE_MARK, Region

LEAK: list[bytearray] = []


# Tools that are safe on a thread


def echoes(query: str) -> ToolResult:
    return ToolResult(f"found {query!r}")


def says_no(state: EpisodeState) -> ToolResult:
    raise ToolError(f"Choose 3 of 4: é漢 \ud800 {IMAGE_MARK} {{braces}}")


def says_much(state: EpisodeState) -> ToolResult:
    raise ToolError("no" * 100_000)


def has_a_bug(state: EpisodeState) -> ToolResult:
    raise ZeroDivisionError("secret path /home")


def asks_to_exit(state: EpisodeState) -> ToolResult:
    sys.exit(3)


def interrupts(state: EpisodeState) -> ToolResult:
    raise KeyboardInterrupt


def recurses(state: EpisodeState) -> ToolResult:
    return recurses(state)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class UnspeakableToolError(ToolError):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def raises_the_unspeakable(state: EpisodeState) -> ToolResult:
    raise UnspeakableError


def tells_the_unspeakable(state: EpisodeState) -> ToolResult:
    raise UnspeakableToolError


def gives_none(state: EpisodeState) -> Any:
    return None


def gives_text(state: EpisodeState) -> Any:
    return "text"


def gives_an_array(state: EpisodeState) -> Any:
    return ToolResult(IMAGE_MARK, (np.zeros((8, 8, 3), np.uint8),))  # type: ignore[arg-type]


def gives_too_few_marks(state: EpisodeState) -> ToolResult:
    return ToolResult("x", (Image.new("RGB", (8, 8)),))


def gives_too_many_marks(state: EpisodeState) -> ToolResult:
    return ToolResult(IMAGE_MARK * 3, (Image.new("RGB", (8, 8)),))


def gives_no_pixels(state: EpisodeState) -> ToolResult:
    return ToolResult(IMAGE_MARK, (Image.new("RGB", (0, 5)),))


def gives_a_thousand_pictures(state: EpisodeState) -> ToolResult:
    return ToolResult(IMAGE_MARK * 1000, (Image.new("RGB", (8, 8)),) * 1000)


def gives_much_text(state: EpisodeState) -> ToolResult:
    return ToolResult("a" * 10_000_000)


def gives_a_bomb(state: EpisodeState, path: str) -> ToolResult:
    Image.MAX_IMAGE_PIXELS = None
    return ToolResult(IMAGE_MARK, (Image.open(path),))


def gives_odd_regions(state: EpisodeState) -> ToolResult:
    return ToolResult("x", regions=("here",))  # type: ignore[arg-type]


def sleeps(state: EpisodeState) -> ToolResult:
    time.sleep(600)
    return ToolResult("too late")


# Tools that need a process


def holds_the_lock(state: EpisodeState) -> ToolResult:
    re.match(r"(a|aa)+$", "a" * 60 + "b")
    return ToolResult("too late")


def exits_at_once(state: EpisodeState) -> ToolResult:
    os._exit(7)


def kills_itself(state: EpisodeState) -> ToolResult:
    os.kill(os.getpid(), signal.SIGKILL)
    return ToolResult("alive")


def kills_its_parent(state: EpisodeState) -> ToolResult:
    os.kill(os.getppid(), signal.SIGKILL)
    return ToolResult("killed it")


def reads_address_zero(state: EpisodeState) -> ToolResult:
    return ToolResult(str(ctypes.string_at(0)))


def takes_at_once(state: EpisodeState, gigabytes: int) -> ToolResult:
    taken = bytearray(gigabytes << 30)
    return ToolResult(str(len(taken)))


def takes_in_children(state: EpisodeState) -> ToolResult:
    code = "import time; a = b'x' * (60 << 20); time.sleep(600)"
    for _ in range(6):
        subprocess.Popen([sys.executable, "-c", code])
    time.sleep(600)
    return ToolResult("too late")


def paints_a_gigapixel(state: EpisodeState) -> ToolResult:
    return ToolResult(IMAGE_MARK, (Image.new("1", (40_000, 30_000)),))


def leaks(state: EpisodeState, megabytes: int) -> ToolResult:
    LEAK.append(bytearray(os.urandom(1 << 10) * (megabytes << 10)))
    return ToolResult(f"{len(LEAK)} {os.getpid()}")


def leaves_children(state: EpisodeState) -> ToolResult:
    plain = subprocess.Popen(["sleep", "600"])
    away = subprocess.Popen(["sleep", "600"], start_new_session=True)
    return ToolResult(f"{plain.pid} {away.pid}")


def leaves_children_and_hangs(state: EpisodeState) -> ToolResult:
    print("children", leaves_children(state).text, flush=True)
    time.sleep(600)
    return ToolResult("too late")


def forks(state: EpisodeState, times: int) -> ToolResult:
    for _ in range(times):
        os.fork()
    time.sleep(600)
    return ToolResult("too late")


def leaves_files_open(state: EpisodeState) -> ToolResult:
    for _ in range(1000):
        os.dup(0)
    return ToolResult("opened")


def writes(state: EpisodeState, path: str) -> ToolResult:
    Path(path).write_text("spoilt")
    return ToolResult("written")


def removes(state: EpisodeState, path: str) -> ToolResult:
    os.remove(path)
    return ToolResult("removed")


def reads(state: EpisodeState, path: str) -> ToolResult:
    return ToolResult(Path(path).read_text()[:100])


def keeps_notes_in_its_folder(state: EpisodeState) -> ToolResult:
    place = Path.home() / "note"
    place.write_text("x")
    return ToolResult(f"{place.read_text()} {Path.cwd() == Path.home()} {place}")


def connects(state: EpisodeState, port: int) -> ToolResult:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return ToolResult(str(connection.recv(5)))


def tells_its_environment(state: EpisodeState) -> ToolResult:
    return ToolResult(" ".join(sorted(os.environ)))


def tells_its_modules(state: EpisodeState) -> ToolResult:
    return ToolResult(" ".join(sorted(sys.modules)))


def tells_its_process(state: EpisodeState) -> ToolResult:
    return ToolResult(str(os.getpid()))


def prints(state: EpisodeState, megabytes: int) -> ToolResult:
    print("noise " + "x" * (megabytes << 20))
    os.write(2, b"error noise\n")
    return ToolResult("printed")


def writes_into_every_descriptor(state: EpisodeState) -> ToolResult:
    for each in range(3, 64):
        try:
            os.write(each, b"\xff" * 64)
        except OSError:
            continue
    return ToolResult("written")


def sends_a_pickle(state: EpisodeState, path: str) -> ToolResult:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path}",)

    data = pickle.dumps(Evil())
    for each in range(3, 64):
        try:
            os.write(each, len(data).to_bytes(4, "big") + bytes(8) + data)
        except OSError:
            continue
    return ToolResult("sent")


def announces_a_huge_frame(state: EpisodeState) -> ToolResult:
    for each in range(3, 64):
        try:
            os.write(each, (2).to_bytes(4, "big") + (1 << 40).to_bytes(8, "big") + b"{}")
        except OSError:
            continue
    time.sleep(600)
    return ToolResult("sent")


def counts(state: EpisodeState) -> ToolResult:
    state.extra["calls"] = [*state.extra.get("calls", []), len(state.images)]
    state.extra["pid"] = os.getpid()
    return ToolResult(str(state.extra["calls"]))


def notes_a_set(state: EpisodeState) -> ToolResult:
    state.extra["seen"] = {1, 2}
    return ToolResult("noted")


def draws_on_a_picture(state: EpisodeState) -> ToolResult:
    picture = state.image(1)
    before = picture.getpixel((5, 5))
    ImageDraw.Draw(picture).rectangle((0, 0, 10, 10), fill=(255, 0, 0))
    picture.putpixel((20, 20), (1, 2, 3))
    return ToolResult(f"{before} {picture.getpixel((5, 5))} {IMAGE_MARK}", (picture,))


def tells_its_metadata(state: EpisodeState) -> ToolResult:
    return ToolResult(json.dumps(dict(state.task.metadata)))


def looks_at_everything(state: EpisodeState) -> ToolResult:
    """Reads pixels in every way that Pillow offers, and all of the state."""
    first = state.images[0]
    task = state.task
    again = task.images[0].open()
    text = [
        first.mode, first.size, np.asarray(state.images[-1]).sum(), first.getpixel((0, 0)),
        first.resize((3, 3)).tobytes(), first.copy() == again, first.histogram()[:3],
        first.convert("L").getextrema(), first.rotate(90, expand=True).size,
        [image.size for image in state.images], state.frames, dict(state.options),
        (task.id, task.question, task.answers, task.is_video, dict(task.metadata)),
    ]  # fmt: skip
    region = Region(1, (0.0, 0.25, 0.5, 1.0))
    shown = first.crop((0, 0, 9, 7)).convert("L")
    return ToolResult(f"{text}{IMAGE_MARK}", (shown,), (region,))
