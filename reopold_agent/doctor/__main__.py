"""Checks for what would stop a run: ``python -m reopold_agent.doctor recipe=paper_agentic``.

Checks versions, extras, GPUs, memory, disk, models, data, environment, plugins and keys for the
chosen run. Each finding is ok, info, a warning or a problem, with advice on what to do. Takes the
arguments of ``python -m reopold_agent.train``, and these (docs/doctor.md):

  judge=gemini      check this judge's key too (judge.NAME=VALUE: its settings)
  online=true       ask the judge's service whether it accepts the key and serves the model
  seconds=300       time limit for all checks together
  --json            machine-readable output

Exit status: 0 no problems, 1 problems, 2 wrong arguments. No key, token or password is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

import reopold_agent
from reopold_agent.cli.groups import searched
from reopold_agent.cli.hydra import PROBLEMS_FOUND, report_errors
from reopold_agent.doctor.examine import examine, parse
from reopold_agent.doctor.report import as_json, show
from reopold_agent.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    with report_errors():
        words = searched(words)
        unknown = [w for w in words if w.startswith("-") and w != "--json"]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]}; known are --json and --help")
        request = parse([word for word in words if word != "--json"])
        console = Console()
        found = examine(request, None if "--json" in words else console)
        if "--json" in words:
            print(as_json(found, reopold_agent.__version__))
        else:
            show(found, console)
        return PROBLEMS_FOUND if any(f.status == "problem" for f in found) else 0
    return 2  # never reached: errors end the process


if __name__ == "__main__":
    sys.exit(main())
