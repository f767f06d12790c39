"""Ctrl-C where a shell started the command with SIGINT ignored, as it does in the background."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import start, train_rows, wait_until, words

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="asks Linux which signals are ignored"
)

STUDENT = Path(__file__).parents[1] / "reopold_agent" / "demo" / "weights" / "student"
COMMANDS = {
    "train": words(Path("run")),
    "evaluate": [sys.executable, "-m", "reopold_agent.evaluate", "benchmark=demo"],
    "study": [sys.executable, "-m", "reopold_agent.study", "name=ablation", "seeds=1"],
    "serve": [
        sys.executable,
        "-m",
        "reopold_agent.serve",
        f"model={STUDENT}",
        "port=0",
    ],
    "play": [sys.executable, "-m", "reopold_agent.play", "env=pixel_reasoner"],
    "doctor": [sys.executable, "-m", "reopold_agent.doctor"],
    "preflight": [sys.executable, "-m", "reopold_agent.preflight"],
    "plan": [sys.executable, "-m", "reopold_agent.plan", "recipe=paper_agentic"],
    "reopold": [sys.executable, "-m", "reopold_agent.cli", "plan", "recipe=paper_agentic"],
}


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ignores_sigint(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask.split()[1], 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_in_the_background_accepts_ctrl_c(name: str, tmp_path: Path) -> None:
    process = start(COMMANDS[name], tmp_path, stdin=subprocess.PIPE, preexec_fn=ignore_sigint)
    wait_until(lambda: not ignores_sigint(process), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error


def test_ctrl_c_in_code_that_is_compiled_from_text(tmp_path: Path) -> None:
    """As in the middle of a dataclass while modules are imported."""
    (tmp_path / "command.py").write_text(
        "from reopold_agent.cli.hydra import report_errors\n"
        "with report_errors():\n"
        "    exec('raise KeyboardInterrupt')\n"
    )
    process = start([sys.executable, "-m", "command"], tmp_path)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")


@pytest.mark.slow
def test_a_training_in_the_background_of_a_script_saves(tmp_path: Path) -> None:
    command = words(tmp_path / "run", "steps=50", "checkpoint.every=0", "evaluation.tasks=1")
    script = '"$@" & echo $!; wait $!'
    process = start(["bash", "-c", script, "bash", *command], tmp_path)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    wait_until(lambda: len(train_rows(tmp_path / "run")) >= 1, process)
    subprocess.run(["kill", "-INT", str(number)], check=True)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Continue with:" in error
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
