"""Plays a few episodes before a run: ``python -m reopold_agent.preflight recipe=paper_agentic``.

Takes the words of ``python -m reopold_agent.train`` and plays 16 episodes with that run's student,
teacher, environment and limits, before any update. Prints how tools are called, where the teacher
disagrees, the gap between sampler and trainer, truncations, success, memory, and the projected
hours of the run; writes no run folder. These settings are its own (docs/preflight.md):

  episodes=16       how many episodes to play
  gpu=, gpus=       GPUs of the run, for the projection, as in `reopold plan`
  --json            machine-readable output

Exit status: 0 the run can start, 2 something would spoil it (two lines say what and what to do).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console

from reopold_agent.cli.groups import SEARCH_PATH, check_once, searched
from reopold_agent.cli.hydra import report_errors
from reopold_agent.common.terminal import is_terminal
from reopold_agent.errors import ConfigError, PreflightError

EPISODES = 16
"""Episodes of a preflight unless a setting says otherwise."""


def parse(words: Sequence[str]) -> tuple[int, list[str], list[str]]:
    """Reads a command line without composing it.

    Returns:
        The number of episodes, the words of the run, and those of its plan, which may have more.

    Raises:
        ConfigError: an option is unknown, or the number is none.
    """
    check_once(words)
    episodes, run, plan = EPISODES, [], []
    for word in words:
        key, _, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word}; known are --json and --help")
        if key == "episodes":
            if not value.isdecimal() or not int(value):
                raise ConfigError(f"episodes must be a positive whole number, got '{value}'")
            episodes = int(value)
        elif key in ("gpu", "gpus"):
            plan.append(word)
        elif key == SEARCH_PATH or not key.startswith("hydra."):  # not the run's folder
            run.append(word)
            plan.append(word)
    return episodes, run, plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    with report_errors(config="train"):
        as_json = "--json" in words
        episodes, run, plan = parse([word for word in searched(words) if word != "--json"])
        # Imported here so that errors of the command line do not wait for PyTorch.
        from reopold_agent.plan.compose import check_hardware
        from reopold_agent.preflight.findings import judged, unfit
        from reopold_agent.preflight.play import play
        from reopold_agent.preflight.projection import project, published
        from reopold_agent.preflight.report import as_values, show
        from reopold_agent.train.settings import compose_run

        config = compose_run(run, with_student=True)
        check_hardware(plan, config)
        errors = Console(stderr=True)
        with errors.status("") if is_terminal(errors) else nullcontext() as spinner:

            def tell(text: str) -> None:
                if spinner is not None:
                    spinner.update(text)

            played = play(config, episodes, tell)
        projection, paper, found = project(played, plan), published(run), judged(played)
        if projection.plan is not None and not projection.on_cpu:
            found += unfit(projection.plan)
        if as_json:
            print(json.dumps(as_values(played, projection, paper, found), indent=2))
        else:
            show(played, projection, paper, found, Console())
        if found and found[0].status == "problem":
            raise PreflightError(f"{found[0].text}\n{found[0].advice}")
        return 0
    return 2  # never reached: errors end the process


if __name__ == "__main__":
    sys.exit(main())
