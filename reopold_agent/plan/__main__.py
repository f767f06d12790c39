"""Plans a run before it is started: ``python -m reopold_agent.plan recipe=paper_agentic gpus=8``.

Memory per GPU, tokens, FLOPs and seconds of a step, GPU-hours, and what does not fit. Takes the
settings of ``python -m reopold_agent.train`` and these (docs/plan.md):

  gpus=8            number of GPUs; null: as in the engine's settings
  gpu=h100_80gb     model of the GPUs; of a recipe for another GPU that one
  mfu=0.4           share of peak FLOP/s that is achieved
  bandwidth=0.8     share of peak memory bandwidth that decoding achieves
  overhead=0.02     seconds of a decoding iteration besides memory traffic
  prompt=, pictures=, response=, observation=
                    mean text tokens of a prompt, pictures in it, tokens of a response, and tokens
                    that tools return
  schedule=shared   all GPUs do each part in turn, as in the paper; pools: our verl engine
  measured=RUN      rates and, for the same environment, lengths from a finished run

The exit status is 0 if the run fits, 1 if neither it nor what the plan tried does, 2 for wrong
settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from reopold_agent.cli.groups import searched
from reopold_agent.cli.hydra import report_errors
from reopold_agent.cli.messages import program
from reopold_agent.plan.compose import paper_plans, plan_run
from reopold_agent.plan.report import as_values, print_paper, print_plan

DOES_NOT_FIT = 1
"""Exit status of a plan that does not fit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog=program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="plain values instead of tables")
    parser.add_argument("--paper", action="store_true", help="compare with the paper's GPU-hours")
    console = Console(width=None if sys.stdout.isatty() else 160)
    with report_errors(config="train"):
        options = parser.parse_args(searched(sys.argv[1:] if argv is None else argv))
        if options.paper:
            print_paper(paper_plans(), console)
            return 0
        plan = plan_run(options.words)
        if options.json:
            print(json.dumps(as_values(plan), indent=2))
        else:
            print_plan(plan, console)
        return 0 if plan.fits else DOES_NOT_FIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
