"""A child that follows its parent, as vLLM's engine processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reopold_agent.orphans import SWITCH

PARENT = """
import multiprocessing, sys, time
from reopold_agent.orphans import follow_parent

def child(path):
    follow_parent()
    open(path, "w").write(str(multiprocessing.current_process().pid))
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],)).start()
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's prctl")
@pytest.mark.parametrize("switch", ["1", "0"])
def test_the_child_of_a_killed_parent_ends_if_asked_to(tmp_path: Path, switch: str) -> None:
    script, path = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    environment = {**os.environ, SWITCH: switch}
    parent = subprocess.Popen([sys.executable, str(script), str(path)], env=environment)
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = int(path.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (20 if switch == "1" else 0.5)
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        assert alive(child) == (switch != "1")
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)
