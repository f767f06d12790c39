"""Fails when the package's extras no longer resolve against the ordinary package index.

    python .ci/extras.py [--project DIR] [--table]

Two resolvers are asked: uv for each Python (it decides for another Python than the running one,
markers included), and ``pip install --dry-run`` for the running one. Nothing is installed. Local
wheel folders and pip configuration files are left out, as on a user's machine.

Exit status 0: everything resolves, or no index answers (the reason is printed). 1: an extra does
not resolve. A failure is tried again (running out of time is not), and counts only if the
index still answers after it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12")
EXTRAS = ("verl", "vllm", "judge", "video", "hub", "track", "gym", "miniwob")
PLATFORM = "x86_64-unknown-linux-gnu"
SHOWN = ("torch", "torchvision", "transformers", "numpy", "vllm", "verl", "ray", "tensordict")
SECONDS = 400  # for one resolution; 10 to 70 were measured, once 180 on a slow network
PROBE_SECONDS = 60
PYTHON_OF_PIP = f"{sys.version_info.major}.{sys.version_info.minor}"


def environment() -> dict[str, str]:
    """The environment without this machine's own wheel folders."""
    return {**os.environ, "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}


def run(command: list[str], seconds: float) -> tuple[bool, str]:
    """Runs a command; returns whether it went well, and the end of what it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        env=environment(),
        check=False,
    )
    return done.returncode == 0, "\n".join(done.stdout.splitlines()[-25:])


def index_answers() -> tuple[bool, str]:
    """Whether the index has a package that certainly exists."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-cache-dir", "--no-deps"]
        command += ["--retries", "1", "--timeout", "15", "--dest", folder, "iniconfig"]
        try:
            return run(command, PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return False, f"no answer within {PROBE_SECONDS} s"


def resolved(command: list[str]) -> tuple[str, str]:
    """Returns ``yes``, ``no`` or ``no index``, and the end of the resolver's output."""
    words = ""
    for _ in range(2):
        try:
            good, words = run(command, SECONDS)
        except subprocess.TimeoutExpired:  # not tried again: CI's time is bounded
            words = f"no end within {SECONDS} s"
            break
        if good:
            return "yes", words
    there, reason = index_answers()
    return ("no", words) if there else ("no index", reason)


def pins(requirements: Path) -> dict[str, str]:
    """Version by name out of a file that uv wrote."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*?\])?==(\S+)", requirements.read_text(), re.M)
    return {name.lower(): version for name, version in found}


def main() -> int:
    """Runs both resolvers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--table", action="store_true", help="print the pins as a Markdown table")
    arguments = parser.parse_args()
    extras = [word for name in EXTRAS for word in ("--extra", name)]
    wanted = f"{arguments.project}[{','.join(EXTRAS)}]"

    there, reason = index_answers()
    if not there:
        print(f"extras: skipped, no package index answers: {reason}")
        return 0
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for version in PYTHONS:
            out = Path(folder) / f"{version}.txt"
            jobs[f"uv, Python {version}"] = [
                *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", *extras),
                *("--python-version", version, "--python-platform", PLATFORM),
                *("--output-file", str(out), str(arguments.project / "pyproject.toml")),
            ]
        jobs[f"pip, Python {PYTHON_OF_PIP}"] = [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"),
            *("--ignore-installed", wanted),
        ]
        for name, command in jobs.items():
            answer, words = resolved(command)
            if answer == "no index":
                print(f"extras: skipped at {name}, the package index went away: {words}")
                return 0
            if answer == "no":
                print(f"extras: {name}: {wanted} does not resolve:\n{words}")
                return 1
            print(f"extras: {name}: resolves", flush=True)
        for version in PYTHONS:
            rows[version] = pins(Path(folder) / f"{version}.txt")
    if arguments.table:
        print(f"| Python | {' | '.join(SHOWN)} |\n|{'---|' * (len(SHOWN) + 1)}")
        for version, found in rows.items():
            print(f"| {version} | {' | '.join(found.get(name, '-') for name in SHOWN)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
