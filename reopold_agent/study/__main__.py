"""Runs a study: ``python -m reopold_agent.study name=ablation``.

Trains every setting with every seed on the embedded tasks, several runs at a time, and writes a
report. The same command continues an interrupted study and runs only what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from reopold_agent.cli.hydra import report_errors
from reopold_agent.study.grid import Run, expand, without_effect
from reopold_agent.study.options import Options, parse, usage


def run(options: Options, command: Sequence[str], say: Callable[[str], None]) -> int:
    """Runs the missing parts of a study, writes its report and returns the exit status.

    Raises:
        ReopoldError: the study cannot be run as asked.
        KeyboardInterrupt: after Ctrl-C, once the runs have been stopped.
    """
    from reopold_agent.study.report import copy_to, write_report
    from reopold_agent.study.run import check_overrides, locked, run_all, work_for

    runs: list[Run] = expand(
        options.study,
        options.out,
        seeds=options.seeds,
        only=options.only,
        steps=options.steps,
        extra=options.extra,
    )
    failures: dict[str, str] = {}
    with locked(options.out):
        if not options.report_only:
            check_overrides(runs, options.out)
            say(f"{options.study.title}: {len(runs)} runs, {options.jobs} at a time")
            for line in without_effect(options.extra, options.study.chosen(options.only)):
                say(f"note: {line}")
            failures = run_all(work_for(runs, options.out), options.jobs, say)
        if failures:
            say(f"{len(failures)} failed: {', '.join(failures)}")
        results = write_report(runs, options.out, command)
    if results.missing:
        say(f"the report leaves out {len(results.missing)} unfinished runs")
    say(f"In {options.out}: README.md, numbers.json and figures")
    if options.docs is not None:
        say(f"copied to {copy_to(options.out, options.docs)}")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    with report_errors("\nStopped. The same command continues."):
        return run(parse(words), ["python", "-m", "reopold_agent.study", *words], _say)
    return 2


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
