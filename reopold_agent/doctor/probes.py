"""Runs checks that may crash or hang in separate processes, with a time limit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessResult:
    """Output of a process, or why it failed.

    Attributes:
        output: standard output, stripped.
        error: the last line of an error, a signal, or the time limit; empty on success.
    """

    output: str = ""
    error: str = ""


def run_python(code: str, seconds: float) -> ProcessResult:
    """Runs Python code in a separate process."""
    return run_command([sys.executable, "-c", code], seconds)


def run_command(words: Sequence[str], seconds: float) -> ProcessResult:
    """Runs a command with a time limit."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return ProcessResult(error=f"no answer within {seconds:g} seconds")
    except OSError as error:
        return ProcessResult(error=f"{words[0]}: {error.strerror}")
    if done.returncode < 0:
        return ProcessResult(error=f"ended by signal {-done.returncode}")
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return ProcessResult(error=lines[-1].strip() if lines else f"exit status {done.returncode}")
    return ProcessResult(output=done.stdout.strip())
