"""Tools in worker processes: the same results as on a thread, and every misbehaviour of a tool."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_tools as hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running import composed

from reopold_agent.common.processes import descendants
from reopold_agent.envs.from_config import make_env
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.errors import ConfigError
from reopold_agent.tools import (
    EpisodeState,
    Isolation,
    Tool,
    ToolResult,
    crop_image,
    select_frames,
    tool,
)
from reopold_agent.tools.base import ToolRunner, on_thread
from reopold_agent.tools.processes import ToolProcesses, address_of
from reopold_agent.tools.sandbox import environment, landlock_version
from reopold_agent.tools.wire import WireError, frame, plain, read_frame
from reopold_agent.types import IMAGE_MARK, Region, Task, ToolCall

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes for tools need fork")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
landlock = pytest.mark.skipif(landlock_version() < 1, reason="this kernel has no Landlock")

MEMORY = 256
PATIENCE = 60.0
"""Seconds; a limit that a call on a busy machine does not reach."""


@pytest.fixture(scope="module")
def processes() -> Iterator[ToolProcesses]:
    made = ToolProcesses(Isolation("process", memory_mb=MEMORY, workers=2))
    yield made
    pids = made.pids()
    made.close()
    assert gone(*pids)


def gone(*pids: int, seconds: float = 20.0) -> bool:
    """Whether these processes end (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident() -> int:
    """This process's memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def state_of(*images: Image.Image, frames: int = 0, **options: Any) -> EpisodeState:
    return EpisodeState(Task("t", "What?", ("1",)), list(images), frames, options)


def call(
    function: Callable[..., Any],
    run: ToolRunner,
    state: EpisodeState | None = None,
    timeout: float = PATIENCE,
    **arguments: Any,
) -> tuple[ToolCall, ToolResult]:
    probe = Tool("probe", function, "For tests.", timeout_s=timeout)
    return probe.call(state or state_of(), arguments, run=run)


def same(one: tuple[ToolCall, ToolResult], other: tuple[ToolCall, ToolResult]) -> bool:
    """All but the seconds; pictures pixel by pixel."""
    return (
        replace(one[0], seconds=0) == replace(other[0], seconds=0)
        and (one[1].text, one[1].regions) == (other[1].text, other[1].regions)
        and [(i.mode, i.size, i.tobytes()) for i in one[1].images]
        == [(i.mode, i.size, i.tobytes()) for i in other[1].images]
    )


def still_good(run: ToolRunner) -> bool:
    """A good call works, as it would have before."""
    state = state_of(noise(90, 70))
    arguments = {"bbox_2d": [0, 0, 0.8, 0.8], "target_image": 1}
    return same(crop_image.call(state, arguments, run=run), crop_image.call(state, arguments))


# The same results


@pytest.mark.parametrize(
    ("which", "arguments"),
    [
        (crop_image, {"bbox_2d": [0.1, 0.2, 0.7, 0.9], "target_image": 1}),
        (crop_image, {"bbox_2d": [10, 20, 300, 200], "target_image": 2}),
        (crop_image, {"bbox_2d": [0, 0, 1, 1], "target_image": 2}),
        (crop_image, {"bbox_2d": [0, 0, 1, 1], "target_image": 3}),
        (crop_image, {"bbox_2d": [0.5, 0.5, 0.5, 0.9], "target_image": 1}),  # no pixels
        (crop_image, {"bbox_2d": [5, 5, 5, 5], "target_image": 1}),
        (crop_image, {"bbox_2d": [0, 0, 3, 3], "target_image": 1}),
        (crop_image, {"bbox_2d": [0, 0, 1, 1], "target_image": 9}),
        (crop_image, {"bbox_2d": "all", "target_image": 1}),
        (select_frames, {"target_frames": [2, 1]}),
        (select_frames, {"target_frames": [3]}),
        (select_frames, {"target_frames": []}),
    ],
)
def test_built_in_tools_give_the_same_pixel_for_pixel(
    processes: ToolProcesses, which: Tool, arguments: Any
) -> None:
    # The second one is larger than one band of rows.
    images = noise(400, 300), noise(1700, 1400, 1), noise(31, 900, 2)
    state = state_of(*images, frames=2, crop_image={"padding": 0.05, "min_side": 4})
    inside = which.call(state, arguments, run=processes)
    assert same(inside, which.call(state, arguments))
    assert inside[0].ok == bool(inside[1].images)


def test_a_tool_sees_the_whole_state_however_it_looks(processes: ToolProcesses) -> None:
    class Source:
        def open(self) -> Image.Image:
            return noise(40, 30)

    task = Task("é", "Wo?\ud800", ("1", "2"), (Source(),), metadata={"a": [1, 2.5, None], "b": {}})
    images = [noise(40, 30), noise(17, 23, 1)]
    state = EpisodeState(task, images, 0, {"probe": {"deep": {"x": True}}})
    inside = call(hostile.looks_at_everything, processes, state)
    assert inside[0].ok, inside
    assert inside[1].regions == (Region(1, (0.0, 0.25, 0.5, 1.0)),)
    assert same(inside, call(hostile.looks_at_everything, on_thread, state))


def test_plain_values_of_a_tasks_metadata_are_sent(
    processes: ToolProcesses, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = {"n": np.int64(3), "pair": (1, 2), "odd": object()}
    task = Task("t", "q", ("1",), metadata=metadata)
    told = call(hostile.tells_its_metadata, processes, EpisodeState(task, []))[1].text
    assert json.loads(told) == {"n": 3, "pair": [1, 2]}
    assert "metadata['odd'] is object" in caplog.text


BEARABLE = [
    (hostile.says_no, {}, "Choose 3 of 4: é漢 \ud800   {braces}"),
    (hostile.says_much, {}, "no" * 4998 + "n..."),
    (hostile.has_a_bug, {}, "The tool probe failed: ZeroDivisionError."),
    (hostile.asks_to_exit, {}, "The tool probe failed: SystemExit."),
    (hostile.interrupts, {}, "The tool probe failed: KeyboardInterrupt."),
    (hostile.recurses, {}, "The tool probe failed: RecursionError."),
    (hostile.raises_the_unspeakable, {}, "The tool probe failed: UnspeakableError."),
    (hostile.tells_the_unspeakable, {}, "UnspeakableToolError"),
    (hostile.gives_none, {}, "failed: it returned None, not a ToolResult."),
    (hostile.gives_text, {}, "failed: it returned a value of type str, not a ToolResult."),
    (hostile.gives_an_array, {}, "a value of type ndarray as a picture, not PIL's Image."),
    (hostile.gives_too_few_marks, {}, "failed: 0 image marks in its text, but 1 images."),
    (hostile.gives_too_many_marks, {}, "failed: 3 image marks in its text, but 1 images."),
    (hostile.gives_no_pixels, {}, "failed: it returned a picture of 0x5 pixels."),
    (hostile.gives_a_thousand_pictures, {}, "it returned 1000 images; the most is 256."),
    (hostile.gives_much_text, {}, "it returned 10000000 characters; the most is 1000000."),
    (hostile.gives_odd_regions, {}, "failed: it returned invalid regions."),
]


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.parametrize(("function", "arguments", "message"), BEARABLE)
def test_the_model_sees_the_same_messages_wherever_tools_run(
    processes: ToolProcesses, where: str, function: Any, arguments: Any, message: str
) -> None:
    before = set(processes.pids())
    run: ToolRunner = processes if where == "process" else on_thread
    record, result = call(function, run, **arguments)
    assert not record.ok
    assert result.images == ()
    assert result.text.startswith("Execution error:\n")
    assert result.text.endswith(message)
    assert "secret" not in result.text
    assert len(result.text) < 10_100
    if where == "process" and before:
        assert before <= set(processes.pids()), "such a tool does no harm to its process"


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_function_without_the_state_does_not_get_it(processes: ToolProcesses, where: str) -> None:
    run: ToolRunner = processes if where == "process" else on_thread
    record, result = call(hostile.echoes, run, query="it")
    assert record.ok
    assert result.text == "found 'it'"
    assert not call(hostile.echoes, run)[0].ok


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_picture_that_unpacks_to_too_much_is_refused_before_it_does(
    processes: ToolProcesses, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Image.new("1", (15_000, 14_000))
    made.save(tmp_path / "bomb.png")
    del made
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own warning is not the test
    run: ToolRunner = on_thread
    pool = ToolProcesses(Isolation("process", memory_mb=MEMORY, read=(str(tmp_path),)))
    if where == "process":
        run = pool
    before = resident()
    record, result = call(hostile.gives_a_bomb, run, path=str(tmp_path / "bomb.png"))
    pool.close()
    assert "failed: it returned more than 200000000 pixels." in result.text
    assert not record.ok
    assert resident() - before < 32 << 20


# What only a process can bear

FATAL = [
    (hostile.exits_at_once, {}, "The tool probe failed: it ended its process with status 7."),
    (hostile.kills_itself, {}, "failed: its process was killed by signal 9 (SIGKILL)."),
    (hostile.reads_address_zero, {}, "failed: its process was killed by signal 11 (SIGSEGV)."),
    (hostile.writes_into_every_descriptor, {}, "failed: its process sent an invalid message"),
    (hostile.announces_a_huge_frame, {}, "failed: its process sent an invalid message"),
]


@linux
@pytest.mark.parametrize(("function", "arguments", "message"), FATAL)
def test_a_tool_that_ends_its_process_ends_no_other(
    processes: ToolProcesses, function: Any, arguments: Any, message: str
) -> None:
    before = resident()
    record, result = call(function, processes, **arguments)
    assert not record.ok
    assert message in result.text
    assert still_good(processes)
    assert resident() - before < 32 << 20


@linux
@pytest.mark.parametrize("function", [hostile.sleeps, hostile.holds_the_lock])
def test_a_tool_that_hangs_is_ended(processes: ToolProcesses, function: Any) -> None:
    assert still_good(processes)
    before = processes.pids()
    record, result = call(function, processes, timeout=0.5)
    assert result == ToolResult("Execution error:\nThe tool did not finish within 0.5 seconds.")
    assert 0.5 <= record.seconds < 30
    (ended,) = set(before) - set(processes.pids())
    assert gone(ended)
    assert still_good(processes)


@linux
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (hostile.takes_at_once, {"gigabytes": 8}, "failed: MemoryError."),
        (hostile.paints_a_gigapixel, {}, "failed: MemoryError."),
        (hostile.takes_in_children, {}, "failed: it used more than 256 MB of memory."),
    ],
)
def test_memory_is_bounded(
    processes: ToolProcesses, function: Any, arguments: Any, message: str
) -> None:
    before = resident()
    result = call(function, processes, **arguments)[1]
    assert result.text.endswith(message)
    assert still_good(processes)
    assert resident() - before < 32 << 20


@linux
def test_a_tool_that_leaks_gets_a_new_process(processes: ToolProcesses) -> None:
    told = []
    for _ in range(12):
        record, result = call(hostile.leaks, processes, megabytes=50)
        assert record.ok
        kept, pid = map(int, result.text.split())
        told.append((kept, pid))
    # More than half of 256 MB is too much to keep.
    assert max(kept for kept, _ in told) == 3
    assert len({pid for _, pid in told}) >= 4
    assert all(pid not in processes.pids() for kept, pid in told if kept == 3)


@linux
def test_a_tool_that_leaves_files_open_gets_a_new_process(processes: ToolProcesses) -> None:
    for _ in range(4):  # the limit of open files alone would break every later call
        result = call(hostile.leaves_files_open, processes)[1]
        assert "failed: OSError" in result.text
        assert still_good(processes)


@linux
def test_children_that_a_call_leaves_behind_are_ended(processes: ToolProcesses) -> None:
    record, result = call(hostile.leaves_children, processes)
    assert record.ok
    assert gone(*map(int, result.text.split()))
    assert still_good(processes)


@linux
def test_children_of_a_call_that_hangs_are_ended(
    processes: ToolProcesses, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = call(hostile.leaves_children_and_hangs, processes, timeout=5.0)[1]
    assert "did not finish within 5 seconds" in result.text
    found = re.search(r"children (\d+) (\d+)", caplog.text)
    assert found
    assert gone(*map(int, found.groups()))
    assert still_good(processes)


@linux
def test_a_tool_that_forks_and_forks_is_ended(processes: ToolProcesses) -> None:
    # Other tests of this process may have left shared pools; their processes are not counted.
    mine = {each for pid in processes.pids() for each in (pid, *descendants(pid))}
    elsewhere = _processes_of_tests() - mine
    result = call(hostile.forks, processes, times=4, timeout=2.0)[1]
    assert "did not finish within 2 seconds" in result.text
    result = call(hostile.forks, processes, times=7)[1]
    assert "failed: it started more than 64 processes" in result.text
    assert still_good(processes)

    def left() -> int:
        """How many run beyond the worker and the one that waits beside it, for each process."""
        return len(_processes_of_tests() - elsewhere) - 2 * len(processes.pids())

    deadline = time.monotonic() + 20  # those that were killed may take a moment to end
    while left() > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() <= 0


def _processes_of_tests() -> set[int]:
    """This process's descendants that run tools (and the one that waits beside each)."""
    found = set()
    for pid in descendants(os.getpid()):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it ended after it was listed
            continue
        if b"tools.worker" in name and _runs(pid):
            found.add(pid)
    return found


@linux
def test_a_tool_cannot_signal_the_processes_around_it(processes: ToolProcesses) -> None:
    record, result = call(hostile.kills_its_parent, processes)
    assert not record.ok
    expected = "PermissionError" if landlock_version() >= 6 else "its process was killed"
    assert expected in result.text
    assert still_good(processes)


# Files, network, environment, output


@landlock
def test_a_tool_writes_only_to_its_own_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "row.txt").write_text("a row")
    home = Path.home() / f"reopold-test-{os.getpid()}"
    pool = ToolProcesses(Isolation("process", read=(str(data),)))
    try:
        for path in (data / "row.txt", data / "new.txt", tmp_path / "new.txt", home):
            result = call(hostile.writes, pool, path=str(path))[1]
            assert "failed: PermissionError" in result.text, path
        assert "PermissionError" in call(hostile.removes, pool, path=str(data / "row.txt"))[1].text
        assert (data / "row.txt").read_text() == "a row"
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "row.txt"]
        assert not home.exists()
        told = call(hostile.keeps_notes_in_its_folder, pool)[1].text.split()
        assert told[:2] == ["x", "True"]
        place = Path(told[2])
        assert place.exists()
    finally:
        pool.close()
    assert not place.parent.exists()


@landlock
def test_a_tool_reads_only_what_it_may(tmp_path: Path) -> None:
    for name in ("data", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "row.txt").write_text("a row")
    pool = ToolProcesses(Isolation("process", read=(str(tmp_path / "data"), "/no/such/folder")))
    try:
        assert call(hostile.reads, pool, path=str(tmp_path / "data" / "row.txt"))[1].text == "a row"
        secrets = [tmp_path / "secret" / "row.txt", "/etc/passwd", f"/proc/{os.getpid()}/environ"]
        for path in secrets:
            assert "PermissionError" in call(hostile.reads, pool, path=str(path))[1].text, path
    finally:
        pool.close()


@landlock
def test_a_tool_of_a_package_installed_in_place_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip install -e leaves it: a hook in site-packages that knows where the package lies."""
    site, source, name = tmp_path / "site", tmp_path / "src" / "placed", f"placed_{os.getpid()}"
    site.mkdir()
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("")
    (source / "look.py").write_text(
        "from reopold_agent.tools import ToolResult\ndef look(state): return ToolResult('seen')\n"
    )
    hook = f"__editable___{name}_finder"
    (site / f"{hook}.py").write_text(
        "import importlib.util, sys\n"
        f"MAPPING = {{{name!r}: {str(source)!r}}}\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name in MAPPING:\n"
        "            file = MAPPING[name] + '/__init__.py'\n"
        "            return importlib.util.spec_from_file_location(\n"
        "                name, file, submodule_search_locations=[MAPPING[name]])\n"
        "sys.meta_path.append(Finder)\n"
    )
    (site / "sitecustomize.py").write_text(f"import {hook}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    importlib.import_module(hook)
    look = importlib.import_module(f"{name}.look").look
    pool = ToolProcesses(Isolation("process"))
    try:
        assert call(look, pool)[1].text == "seen"
    finally:
        pool.close()


def test_without_landlock_writes_are_refused_and_a_warning_is_given_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules["reopold_agent.tools.process"]._warned, "landlock", False)
    pool = ToolProcesses(Isolation("process", workers=2), landlock=False)
    try:
        result = call(hostile.writes, pool, path=str(tmp_path / "new.txt"))[1]
        assert "failed: OSError" in result.text
        assert not (tmp_path / "new.txt").exists() or not (tmp_path / "new.txt").read_text()
        assert "exited" not in call(hostile.exits_at_once, pool)[1].text
        assert still_good(pool)
    finally:
        pool.close()
    assert caplog.text.count("this kernel has no Landlock") == 1


@pytest.mark.skipif(landlock_version() < 4, reason="Landlock of Linux 6.7")
@pytest.mark.parametrize("allowed", [False, True])
def test_a_tool_has_no_network_unless_allowed(
    allowed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_greet, args=(server,), daemon=True).start()
        pool = ToolProcesses(Isolation("process", network=allowed))
        try:
            record, result = call(hostile.connects, pool, port=server.getsockname()[1])
        finally:
            pool.close()
    assert record.ok == allowed
    assert ("hello" if allowed else "failed: PermissionError.") in result.text
    assert ("without tools.network=true" in caplog.text) != allowed


def _greet(server: socket.socket) -> None:
    try:
        server.accept()[0].sendall(b"hello")
    except OSError:
        return  # closed: nobody came


def test_a_tool_does_not_see_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["GEMINI_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "AWS_CREDENTIALS_FILE"]
    for name in (*secrets, "SEARCH_KEY", "COLOUR"):
        monkeypatch.setenv(name, "x")
    pool = ToolProcesses(Isolation("process", environment=("SEARCH_KEY",)))
    try:
        seen = call(hostile.tells_its_environment, pool)[1].text.split()
    finally:
        pool.close()
    assert not set(secrets) & set(seen)
    assert {"SEARCH_KEY", "COLOUR", "PATH"} <= set(seen)
    assert environment((), "/x")["OMP_NUM_THREADS"] == "1"


def test_what_a_tool_prints_goes_to_the_log_bounded(
    processes: ToolProcesses, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        record, result = call(hostile.prints, processes, megabytes=5)
    assert (record.ok, result.text) == (True, "printed")
    assert "noise xxx" in caplog.text
    assert "bytes more" in caplog.text
    assert len(caplog.text) < 10_000
    caplog.clear()
    with caplog.at_level(logging.INFO):  # the next call's log is its own
        assert call(hostile.tells_its_process, processes)[0].ok
    assert "noise" not in caplog.text


def test_a_pickle_that_a_tool_sends_is_never_loaded(
    processes: ToolProcesses, tmp_path: Path
) -> None:
    result = call(hostile.sends_a_pickle, processes, path=str(tmp_path / "loaded"))[1]
    assert "sent an invalid message" in result.text
    assert not (tmp_path / "loaded").exists()
    assert still_good(processes)


def test_a_process_starts_without_pytorch(processes: ToolProcesses) -> None:
    modules = call(hostile.tells_its_modules, processes)[1].text.split()
    assert "reopold_agent.tools.worker" in modules
    assert not {"torch", "transformers", "gymnasium", "ray"} & set(modules)


# The episode


def test_notes_last_for_an_episode_and_across_processes() -> None:
    pool = ToolProcesses(Isolation("process", workers=2))
    try:
        state, other = state_of(), state_of(noise(8, 8))
        assert call(hostile.counts, pool, state)[1].text == "[0]"
        first = state.extra["pid"]
        assert call(hostile.counts, pool, other)[1].text == "[1]"
        call(hostile.exits_at_once, pool)
        assert call(hostile.counts, pool, state)[1].text == "[0, 0]"
        assert state.extra["pid"] != first
    finally:
        pool.close()


@pytest.mark.parametrize("before", [{1}, (1,), {1: 2}, [object()]])
def test_notes_that_json_cannot_hold_are_named(processes: ToolProcesses, before: Any) -> None:
    result = call(hostile.notes_a_set, processes)[1]
    assert "failed: state.extra['seen'] is set; use None, bool," in result.text
    state = state_of()
    state.extra["mine"] = before
    assert "failed: state.extra['mine']" in call(hostile.counts, processes, state)[1].text


def test_drawing_on_a_picture_does_not_change_it_for_the_next_call(
    processes: ToolProcesses,
) -> None:
    picture = noise(50, 40)
    state, pixel = state_of(picture), picture.getpixel((5, 5))
    for _ in range(2):
        result = call(hostile.draws_on_a_picture, processes, state)[1]
        assert result.text == f"{pixel} (255, 0, 0) {IMAGE_MARK}"
        assert result.images[0].getpixel((20, 20)) == (1, 2, 3)
    assert picture.tobytes() == noise(50, 40).tobytes()


def test_pictures_are_sent_once_and_only_when_they_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[int, int]] = []
    tobytes = Image.Image.tobytes

    def count(image: Image.Image, *arguments: Any) -> bytes:
        sent.append(image.size)
        return tobytes(image, *arguments)

    monkeypatch.setattr(Image.Image, "tobytes", count)
    # 8 MB of pictures are kept, 64 / 8: four of these.
    pool = ToolProcesses(Isolation("process", memory_mb=64, workers=1))
    try:
        state = state_of(*[noise(1000, 500 + n, n) for n in range(10)])
        for number in (3, 3, 4, 3, 5, 6, 3):
            arguments = {"bbox_2d": [0, 0, 0.1, 0.1], "target_image": number}
            assert crop_image.call(state, arguments, run=pool)[0].ok
        assert sent == [(1000, 499 + number) for number in (3, 4, 5, 6)]
        for number in (7, 8, 9, 10, 3):
            arguments = {"bbox_2d": [0, 0, 0.1, 0.1], "target_image": number}
            assert crop_image.call(state, arguments, run=pool)[0].ok
        assert sent[4:] == [(1000, 499 + number) for number in (7, 8, 9, 10, 3)]
    finally:
        pool.close()


def test_many_episodes_share_few_processes(processes: ToolProcesses) -> None:
    kinds = [hostile.has_a_bug, hostile.exits_at_once, hostile.counts, hostile.tells_its_process]
    expected = ["ZeroDivisionError", "status 7", "[1]", ""]

    def episode(number: int) -> None:
        state = state_of(noise(60 + number, 50, number))
        which = number % len(kinds)
        result = call(kinds[which], processes, state)[1]
        assert expected[which] in result.text, result.text
        arguments = {"bbox_2d": [0, 0, 0.9, 0.9], "target_image": 1}
        inside = crop_image.call(state, arguments, run=processes)
        assert same(inside, crop_image.call(state, arguments))
        assert len(processes.pids()) <= processes.size

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(episode, range(48)))


def test_waiting_for_a_free_process_is_bounded_too() -> None:
    pool = ToolProcesses(Isolation("process", workers=1))
    try:
        assert still_good(pool)
        with ThreadPoolExecutor(1) as beside:
            hung = beside.submit(call, hostile.sleeps, pool, None, 3.0)
            while pool._idle:
                time.sleep(0.01)
            result = call(hostile.tells_its_process, pool, timeout=0.2)[1]
            assert "No process for tools was free within 0.2 seconds." in result.text
            assert "within 3 seconds" in hung.result()[1].text
        assert still_good(pool)
    finally:
        pool.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork with threads, later Python
def test_a_fork_of_this_process_does_not_keep_a_hung_tool_alive() -> None:
    pool = ToolProcesses(Isolation("process", workers=1))
    child = 0
    try:
        assert still_good(pool)
        child = os.fork()
        if not child:
            time.sleep(600)
            os._exit(0)
        (pid,) = pool.pids()
        record, _ = call(hostile.sleeps, pool, timeout=0.3)
        assert not _runs(pid)
        assert record.seconds < 4  # 5 s is when it would be ended by force
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        pool.close()


@linux
def test_a_process_that_hangs_ends_with_the_one_that_waits_for_it() -> None:
    pool = ToolProcesses(Isolation("process", workers=1))
    try:
        assert still_good(pool)
        (pid,) = pool.pids()
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        with ThreadPoolExecutor(1) as beside:
            hung = beside.submit(call, hostile.holds_the_lock, pool)
            while pool._idle:
                time.sleep(0.01)
            time.sleep(1.0)  # a process that ends before it has the call is replaced
            os.kill(parent, signal.SIGKILL)
            assert gone(pid)
            assert "failed: its process was killed." in hung.result()[1].text
        assert still_good(pool)
    finally:
        pool.close()


# What cannot work is said at once


def _inside() -> Tool:
    def closure(state: EpisodeState) -> ToolResult:
        raise NotImplementedError

    return Tool("closed", closure, "For tests.")


@pytest.mark.parametrize(
    "made",
    [
        _inside,
        lambda: Tool("closed", lambda state: ToolResult("x"), "For tests."),
        lambda: Tool("closed", type("T", (), {"__call__": lambda s, state: None})(), "For tests."),
    ],
)
def test_a_tool_that_no_process_can_find_is_refused_when_the_environment_is_made(
    made: Callable[[], Tool],
) -> None:
    with pytest.raises(ConfigError, match=r"'closed' cannot run in a worker.*isolation=none"):
        PixelReasonerEnv(tools=[made()], tool_isolation="process")
    PixelReasonerEnv(tools=[made()])  # on a thread it may


def test_a_registered_tool_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from reopold_agent.tools import TOOLS

    made = tool("registered_for_test", description="d")(_inside().function)
    try:
        assert address_of(made.shown_as("other")) == {"registered": "registered_for_test"}
        assert address_of(crop_image.shown_as("zoom")) == {
            "module": "reopold_agent.tools.crop",
            "name": "crop_image",
        }
    finally:
        TOOLS._things.pop("registered_for_test", None)


def test_a_module_that_a_process_cannot_import_is_named_when_the_environment_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"fragile_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise RuntimeError('only once')\n"
        "from reopold_agent.tools import ToolResult\ndef look(state): return ToolResult('x')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    look = __import__(name).look
    isolation = Isolation("process", memory_mb=77)
    with pytest.raises(ConfigError, match=r"(?s)'look'.*RuntimeError: only once.*tools\.read"):
        PixelReasonerEnv(tools=[Tool("look", look, "d")], tool_isolation=isolation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("sandbox", "none, plugins or process, got 'sandbox'"),
        ({"mode": "process", "memory": 3}, "unknown settings of tool_isolation: memory"),
        ({"mode": "process", "memory_mb": 3}, "memory_mb must be at least 16"),
        ({"mode": "process", "workers": 0}, "workers must be positive"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PixelReasonerEnv(tool_isolation=settings)


def test_options_of_tools_in_processes_must_be_plain() -> None:
    options = {"crop_image": {"padding": object()}}
    with pytest.raises(ConfigError, match=r"tool_options\['crop_image'\]\['padding'\] is object"):
        PixelReasonerEnv(tool_options=options, tool_isolation="process")


# Environments and runs


def test_an_episode_is_the_same_wherever_its_tools_run() -> None:
    box = {"bbox_2d": [0, 0, 0.5, 0.5], "target_image": 1}
    turns = [
        f'<tool_call>{{"name": "crop_image", "arguments": {json.dumps(box)}}}</tool_call>',
        f'<tool_call>{{"name": "zoom_in", "arguments": {json.dumps(box)}}}</tool_call>',
        '<tool_call>{"name": "crop_image", "arguments": {"bbox_2d": [1], "target_image": 1}}'
        "</tool_call>",
    ]
    seen = []
    for mode in ("none", "process", "plugins"):
        env = PixelReasonerEnv(tool_isolation=mode)
        env.reset(options={"index": 3})
        seen.append([env.step(turn) for turn in turns])
    for other in seen[1:]:
        for (observation, *rest), (expected, *expected_rest) in zip(other, seen[0], strict=True):
            assert observation["text"] == expected["text"]
            for one, two in zip(observation["images"], expected["images"], strict=True):
                assert np.array_equal(one, two)
            assert rest[:3] == expected_rest[:3]
            calls = [info[3]["tool_call"] for info in (rest, expected_rest)]
            assert replace(calls[0], seconds=0) == replace(calls[1], seconds=0)


@pytest.mark.parametrize(
    ("words", "foreign", "own"),
    [
        (("engine=local",), False, False),
        (("engine=verl", "engine.device=cpu"), True, False),
        (("engine=verl", "engine.device=cpu", "tools.isolation=none"), False, False),
        (("tools.isolation=plugins",), True, False),
        (("tools.isolation=process", "tools.memory_mb=512"), True, True),
    ],
)
def test_which_tools_of_a_run_get_a_process(
    words: tuple[str, ...], foreign: bool, own: bool
) -> None:
    config = composed(*words)[0]
    foreign_tool = Tool("tells", hostile.tells_its_process, "For tests.")
    config = replace(
        config, env=replace(config.env, kwargs={"tools": [foreign_tool, "crop_image"]})
    )
    env: Any = make_env(config)
    env.reset(options={"index": 0})
    observation, *_ = env.step('<tool_call>{"name": "tells", "arguments": {}}</tool_call>')
    assert (int(observation["text"]) != os.getpid()) == foreign
    assert (env.unwrapped._runners["crop_image"] is not on_thread) == own


# Nothing is left behind

LEFT = """
    import os, sys, threading, time
    sys.path.insert(0, {tests!r})
    import hostile_tools as hostile
    from reopold_agent.tools import EpisodeState, Isolation, Tool
    from reopold_agent.tools.processes import shared
    from reopold_agent.types import Task

    run = shared(Isolation("process", workers=2))
    state = EpisodeState(Task("t", "q", ("1",)), [])

    def call(function, seconds):
        return Tool("probe", function, "d", timeout_s=seconds).call(state, {{}}, run=run)[1].text

    idle = call(hostile.tells_its_process, 60)
    for hang in (hostile.holds_the_lock, hostile.leaves_children_and_hangs):
        threading.Thread(target=call, args=(hang, 600), daemon=True).start()
    from reopold_agent.common.processes import descendants
    while len(list(descendants(os.getpid()))) < 6:
        time.sleep(0.01)
    print(*descendants(os.getpid()), flush=True)
    {end}
"""


@linux
@pytest.mark.parametrize(
    "end",
    ["os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "sys.exit(0)", "os.abort()"],
)
def test_no_process_outlives_the_run_however_it_ends(end: str, tmp_path: Path) -> None:
    code = textwrap.dedent(LEFT.format(tests=str(Path(__file__).parent), end=end))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 6, done.stderr
    try:
        assert gone(*pids)
        deadline = time.monotonic() + 20
        while list(tmp_path.glob("reopold-tool-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.glob("reopold-tool-*")) == []
    finally:
        for pid in pids:
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)


# The wire


def reader(data: bytes) -> Callable[[int], bytes]:
    left = memoryview(data)

    def read(count: int) -> bytes:
        nonlocal left
        if len(left) < count:
            raise EOFError
        piece, left = bytes(left[:count]), left[count:]
        return piece

    return read


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.booleans(), max_size=4),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 400)), max_size=3),
)
@settings(max_examples=60)
def test_a_frame_comes_back_as_it_was(message: dict[str, Any], sizes: list[Any]) -> None:
    message.pop("sizes", None)
    pictures = [noise(width, height, n) for n, (width, height) in enumerate(sizes)]
    got, images = read_frame(reader(b"".join(frame(message, pictures))))
    assert got == message
    assert [i.tobytes() for i in images] == [p.tobytes() for p in pictures]


json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
)


@settings(max_examples=600)
@given(
    st.binary(max_size=60)
    | st.builds(
        lambda value, pixels: (
            struct.pack(">IQ", len(json.dumps(value)), pixels)
            + json.dumps(value).encode()
            + bytes(60)
        ),
        json_texts | st.fixed_dictionaries({"sizes": json_texts}),
        st.integers(0, 70) | st.integers(0, 2**64 - 1),
    )
)
def test_whatever_comes_is_a_frame_or_refused(data: bytes) -> None:
    try:
        message, images = read_frame(reader(data))
    except (WireError, EOFError):
        return
    assert isinstance(message, dict)
    assert all(image.mode == "RGB" for image in images)


@settings(max_examples=300)
@given(json_texts)
def test_a_plain_value_is_one_that_json_gives_back(value: Any) -> None:
    text = json.dumps(plain(value, "x"))
    again = json.loads(text)
    assert json.dumps(again) == text
    assert repr(again) == repr(value)
