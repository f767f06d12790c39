"""``reopold COMMAND``: all commands under one name.

A command is a module of this package with a ``main`` that reads ``sys.argv``; so
``reopold train env=math`` is ``python -m reopold_agent.train env=math``. Nothing is imported here
that takes time: a command's module is imported when it is called.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import NamedTuple

import reopold_agent


class Command(NamedTuple):
    """One command: its module, what it does, and a line to try it with."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "train": Command("train", "train a student", "reopold train env=pixel_reasoner"),
    "evaluate": Command(
        "evaluate", "evaluate a model on benchmarks", "reopold evaluate benchmark=demo model=RUN"
    ),
    "study": Command(
        "study.__main__", "train a grid of settings and seeds", "reopold study name=ablation"
    ),
    "view": Command("view", "look at a run in the browser", "reopold view RUN"),
    "play": Command("play", "play an environment by hand", "reopold play env=pixel_reasoner"),
    "doctor": Command("doctor", "check this machine, and say what to mend", "reopold doctor"),
    "plan": Command(
        "plan",
        "estimate memory, time and GPU-hours of a run",
        "reopold plan recipe=paper_agentic gpus=8",
    ),
    "compare": Command("compare", "compare evaluations", "reopold compare RUN RUN"),
    "serve": Command("serve", "serve a model to other machines", "reopold serve model=DIR"),
    "completion": Command(
        "completion", "tab completion for bash, zsh or fish", 'eval "$(reopold completion bash)"'
    ),
}

_END = """\

`reopold COMMAND --help` says more of each; `reopold --version` the version.
Exit status: 0 fine, 1 a check found problems (or a bug: with a traceback), 2 something you can
mend, 130 Ctrl-C, 143 SIGTERM. REOPOLD_DEBUG=1 shows the traceback of every error.
"""


def usage() -> str:
    """What ``reopold`` and ``reopold --help`` print."""
    width = max(map(len, COMMANDS))
    summaries = max(len(command.summary) for command in COMMANDS.values())
    lines = [
        f"  {name:<{width}}  {command.summary:<{summaries}}  {command.example}"
        for name, command in COMMANDS.items()
    ]
    return "Usage: reopold COMMAND [WORDS]\n\n" + "\n".join(lines) + "\n" + _END


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        status = _run(*(sys.argv[1:] or ["--help"]))
        sys.stdout.flush()  # here, where a closed pipe can still be taken quietly
        return status
    except KeyboardInterrupt:  # before the command could take it, while it was being imported
        return 130
    except BrokenPipeError:  # whoever read the output is gone: reopold --help | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(name: str, *words: str) -> int:
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"reopold-agent {reopold_agent.__version__}")
        return 0
    if name not in COMMANDS:
        print(_unknown(name), file=sys.stderr)
        return 2
    # Hydra would complete `reopold` and `train` as two programs; ours knows the commands.
    if words[:1] in (("-sc",), ("--shell-completion",)):
        name, words = "completion", words[1:]
    sys.argv = [f"reopold {name}", *words]
    found: int | None = importlib.import_module(f"reopold_agent.{COMMANDS[name].module}").main()
    return found or 0


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean `reopold {close[0]}`? " if close else ""
    return f"error: there is no command '{name}'.\n  {hint}Commands: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    sys.exit(main())
