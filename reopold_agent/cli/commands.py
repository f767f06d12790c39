"""The commands of ``reopold`` and its help text."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """What a command does, and an example."""

    summary: str
    example: str


COMMANDS = {
    "train": Command("train a student", "reopold train env=pixel_reasoner"),
    "evaluate": Command("evaluate a model on benchmarks", "reopold evaluate env=math model=RUN"),
    "study": Command("train a grid of settings and seeds", "reopold study name=ablation"),
    "view": Command("look at a run in the browser", "reopold view RUN"),
    "play": Command("play an environment by hand", "reopold play env=pixel_reasoner"),
    "doctor": Command("find what would stop a run on this machine", "reopold doctor"),
    "plan": Command(
        "estimate memory, time and GPU-hours of a run",
        "reopold plan recipe=paper_agentic gpus=8",
    ),
    "preflight": Command(
        "play a few episodes before a run", "reopold preflight recipe=paper_agentic"
    ),
    "compare": Command("compare evaluations", "reopold compare RUN RUN"),
    "judge": Command("measure a judge on labelled pairs", "reopold judge check judge=gemini"),
    "export": Command("write a student for other programs", "reopold export RUN DIR"),
    "serve": Command("serve a model to other machines", "reopold serve model=DIR"),
    "completion": Command(
        "tab completion for bash, zsh or fish", 'eval "$(reopold completion bash)"'
    ),
}


_END = """\

`reopold COMMAND --help` explains a command; `reopold --version` prints the version.
Exit status: 0 success, 1 a check found problems or there is a bug (with a traceback), 2 an error
that you can fix, 130 Ctrl-C, 143 SIGTERM. REOPOLD_DEBUG=1 shows the traceback of every error.
"""


def module_of(command: str) -> str:
    """Returns the module whose ``main`` runs a command."""
    elsewhere = {
        "completion": "reopold_agent.cli.completion",
        "export": "reopold_agent.train.export.__main__",
    }
    return elsewhere.get(command, f"reopold_agent.{command}.__main__")


def usage() -> str:
    """Returns the text of ``reopold --help``."""
    width = max(map(len, COMMANDS))
    summaries = max(len(command.summary) for command in COMMANDS.values())
    lines = [
        f"  {name:<{width}}  {command.summary:<{summaries}}  {command.example}"
        for name, command in COMMANDS.items()
    ]
    return "Usage: reopold COMMAND [ARGUMENTS]\n\n" + "\n".join(lines) + "\n" + _END
