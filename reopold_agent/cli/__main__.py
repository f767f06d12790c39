"""The ``reopold`` command, which dispatches to all others.

``reopold train env=math`` runs ``python -m reopold_agent.train env=math``: a command is a package
of its own name with a ``main`` that reads ``sys.argv``. It is imported only when it is called, so
that ``reopold --help`` takes no time.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys

import reopold_agent
from reopold_agent.cli.commands import COMMANDS, module_of, usage
from reopold_agent.common.signals import end_interrupt


def main() -> int:
    """Runs the command line and returns the exit status."""
    try:
        status = _dispatch(*(sys.argv[1:] or ["--help"]))
        sys.stdout.flush()  # a closed pipe must raise here, where it is handled
        return status
    except KeyboardInterrupt:  # while the command was still being imported
        end_interrupt()
        return 130
    except BrokenPipeError:  # the reader of the output ended: reopold --help | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(name: str, *words: str) -> int:
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"reopold-agent {reopold_agent.__version__}")
        return 0
    if name not in COMMANDS:
        print(_unknown_command(name), file=sys.stderr)
        return 2
    # Hydra's completion takes `reopold train` for two programs; ours knows the commands.
    if words[:1] in (("-sc",), ("--shell-completion",)):
        name, words = "completion", words[1:]
    sys.argv = [f"reopold {name}", *words]
    status: int | None = importlib.import_module(module_of(name)).main()
    return status or 0


def _unknown_command(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean `reopold {close[0]}`? " if close else ""
    return f"error: there is no command '{name}'.\n  {hint}Commands: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    sys.exit(main())
