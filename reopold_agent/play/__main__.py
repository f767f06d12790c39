"""Plays an environment by hand: ``python -m reopold_agent.play env=pixel_reasoner``.

You are the model: you see the question, the pictures and the tools' results, and type what the
model would say. All settings of ``python -m reopold_agent.train`` work (an environment, its data,
the budgets; no model is loaded), and these as well (docs/play.md):

  split=train       or eval, which uses evaluation.max_turns
  index=0           the first task
  seed=N            of the environment; by default a task has the same seed as in every run
  pictures=auto     draw them if the terminal can (kitty, iterm, sixel), else print their paths;
                    blocks draws them coarsely in any terminal with 24-bit colour; path only prints
  folder=DIR        saves pictures there; by default in a new temporary folder
  record=FILE.jsonl append episodes as demonstrations for objective=sft objective.source=recorded
  keep=right        record only episodes with a right answer, or all
  tokenizer=PATH    count tokens as a rollout does: a checkpoint's folder (no weights needed),
                    demo:student or a hub id

Without a terminal, input is read line by line: ... < actions.txt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from reopold_agent.cli.hydra import report_errors
from reopold_agent.play.screen import speaks_utf8
from reopold_agent.play.session import play


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    speaks_utf8()
    with report_errors():
        return play(words, sys.stdin, Console())
    return 2  # never reached: errors end the process


if __name__ == "__main__":
    sys.exit(main())
