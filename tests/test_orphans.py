"""Child processes: a pool of them, and one that follows its parent as vLLM's engines do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reopold_agent.common.bounded import DeadlineError
from reopold_agent.common.processes import SWITCH, ChildProcess, ProcessPool

PARENT = """
import multiprocessing, sys, time
from reopold_agent.common.processes import follow_parent

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


ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


class Echo(ChildProcess):
    def __init__(self) -> None:
        super().__init__(
            lambda theirs: subprocess.Popen(
                [sys.executable, "-c", ECHO], stdin=theirs.fileno(), stdout=theirs.fileno()
            )
        )

    def ask(self, seconds: float = 60) -> bytes:
        self._deadline = time.monotonic() + seconds
        self._send(b"hello\n")
        view = memoryview(bytearray(100))
        return bytes(view[: self._receive(view)])


def test_a_process_that_misses_its_deadline_is_killed_and_replaced() -> None:
    pool = ProcessPool(Echo, 1)
    with pool.lend() as process:
        assert process.ask() == b"hello\n"
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineError), pool.lend() as same:
        same.ask(0.3)
    assert same is process
    assert not alive(process.pid)
    with pool.lend() as other:
        assert other.ask() == b"hello\n"
        with pytest.raises(DeadlineError, match="no process was free"), pool.lend(0.05):
            pass
    assert pool.pids() == [other.pid]
    pool.close()
    assert not alive(other.pid)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_leaves_the_processes_to_its_parent() -> None:
    pool = ProcessPool(Echo, 1)
    with pool.lend() as process:
        assert process.ask() == b"hello\n"
    child = os.fork()
    if not child:
        known = pool.pids()
        pool.close()
        os._exit(len(known))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pool.lend() as same:
        assert same is process
        assert same.ask() == b"hello\n"
    pool.close()
