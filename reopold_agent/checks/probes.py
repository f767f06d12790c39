"""Other processes that are asked something, with a time limit: they may crash or hang."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Probed:
    """What a process said.

    Attributes:
        output: its standard output, stripped.
        error: why there is none: the last line of an error, a signal, or the time limit.
    """

    output: str = ""
    error: str = ""


def run_python(code: str, seconds: float) -> Probed:
    """Runs code in this interpreter, in a process of its own."""
    return run_command([sys.executable, "-c", code], seconds)


def run_command(words: Sequence[str], seconds: float) -> Probed:
    """Runs a command."""
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
        return Probed(error=f"no answer within {seconds:g} seconds")
    except OSError as error:
        return Probed(error=f"{words[0]}: {error.strerror}")
    if done.returncode < 0:
        return Probed(error=f"ended by signal {-done.returncode}")
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return Probed(error=lines[-1].strip() if lines else f"exit status {done.returncode}")
    return Probed(output=done.stdout.strip())
