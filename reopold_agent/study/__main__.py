"""Runs a study: ``python -m reopold_agent.study name=ablation``.

Trains every setting with every seed on the embedded tasks, several runs at a time, and writes a
report. The same command continues what was interrupted and makes again only what is missing.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reopold_agent.command import errors_for_people
from reopold_agent.errors import ConfigError
from reopold_agent.study.grid import Run, Study, expand
from reopold_agent.study.studies import STUDIES, find_study

USAGE = """\
Usage: python -m reopold_agent.study name=STUDY [key=value ...] [-- training settings]

  name=      one of the studies below
  out=       folder of runs and report (default studies/NAME)
  seeds=     how many, or which: seeds=5, seeds=[0,3] (default: the study's)
  jobs=      runs at the same time (default auto: one per core)
  only=      some of the settings: only=rkl,reopold
  steps=     instead of the study's
  report=    only: make the report again from what has finished, and run nothing
  docs=      copy README.md, numbers.json and figures to this folder too, as docs/study

After -- come settings of python -m reopold_agent.train for all runs: -- optimizer.lr=1e-3.
Stop with Ctrl-C; the same command goes on.

Studies (minutes are rough):
"""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    name: str
    out: Path
    seeds: tuple[int, ...]
    jobs: int
    only: tuple[str, ...] = ()
    steps: int | None = None
    report_only: bool = False
    docs: Path | None = None
    extra: tuple[str, ...] = field(default=())

    @property
    def study(self) -> Study:
        """The study that is asked for."""
        return find_study(self.name)


def parse(words: Sequence[str]) -> Options:
    """Reads the command line.

    Raises:
        ConfigError, UnknownNameError: a word is wrong; says how.
    """
    split = list(words).index("--") if "--" in words else len(words)
    given: dict[str, str] = {}
    known = ("name", "out", "seeds", "jobs", "only", "steps", "report", "docs")
    for word in words[:split]:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"'{word}' is no key=value; --help lists the keys")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ConfigError(
                f"unknown key '{key}'.{hint} Known: {', '.join(known)}. Training settings come "
                f"after --, as in: -- {word}"
            )
        given[key] = value
    if "name" not in given:
        raise ConfigError(f"say which study: name={'|'.join(STUDIES)}")
    study = find_study(given["name"])
    if given.get("report", "only") != "only":
        raise ConfigError(f"report={given['report']} means nothing; report=only exists")
    only = tuple(label for label in given.get("only", "").split(",") if label)
    study.chosen(only)
    jobs = given.get("jobs", "auto")
    return Options(
        name=study.name,
        out=Path(given.get("out", f"studies/{study.name}")).absolute(),
        seeds=_seeds(given.get("seeds", str(study.seeds))),
        jobs=_cores() if jobs == "auto" else _positive("jobs", jobs),
        only=only,
        steps=_positive("steps", given["steps"]) if "steps" in given else None,
        report_only="report" in given,
        docs=Path(given["docs"]).absolute() if "docs" in given else None,
        extra=tuple(words[split + 1 :]),
    )


def usage() -> str:
    """What ``--help`` prints."""
    width = max(map(len, STUDIES))
    cores = _cores()
    lines = [
        f"  {name:<{width}}  {study.title}. {study.mirrors[:1].upper()}{study.mirrors[1:]}.\n"
        f"  {'':<{width}}  {len(study.settings)} settings x {study.seeds} seeds, about "
        f"{study.minutes(cores):.0f} minutes on {cores} cores: "
        f"{', '.join(setting.label for setting in study.settings)}\n"
        for name, study in STUDIES.items()
    ]
    return USAGE + "".join(lines)


def run(options: Options, command: Sequence[str], say: Callable[[str], None]) -> int:
    """Runs what is missing and writes the report; returns the exit status.

    Raises:
        ReopoldError: the study cannot be run as asked.
        KeyboardInterrupt: after Ctrl-C, once the runs have been stopped.
    """
    from reopold_agent.study.report import copy_to, write_report
    from reopold_agent.study.run import check_words, only_one, run_all, work_of

    runs: list[Run] = expand(
        options.study,
        options.out,
        seeds=options.seeds,
        only=options.only,
        steps=options.steps,
        extra=options.extra,
    )
    failures: dict[str, str] = {}
    with only_one(options.out):
        check_words(runs, options.out)
        if not options.report_only:
            say(f"{options.study.title}: {len(runs)} runs, {options.jobs} at a time")
            failures = run_all(work_of(runs, options.out), options.jobs, say)
        if failures:
            say(f"{len(failures)} failed: {', '.join(failures)}")
        results = write_report(runs, options.out, command)
    if results.missing:
        say(f"the report is without {len(results.missing)} runs that have not finished")
    say(f"In {options.out}: README.md, numbers.json and figures")
    if options.docs is not None:
        say(f"copied to {copy_to(options.out, options.docs)}")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    with errors_for_people("\nStopped. The same command continues."):
        return run(parse(words), ["python", "-m", "reopold_agent.study", *words], _say)
    return 2


def _say(line: str) -> None:
    print(line, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seeds(text: str) -> tuple[int, ...]:
    """``5`` is 0 to 4; ``[0,3]`` is what it says."""
    if text.startswith("["):
        found = [_whole("seeds", part) for part in text.strip("[]").split(",") if part.strip()]
        if not found or len(set(found)) != len(found):
            raise ConfigError(f"seeds={text} must name one or more different seeds")
        return tuple(found)
    return tuple(range(_positive("seeds", text)))


def _positive(name: str, text: str) -> int:
    value = _whole(name, text)
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {text}")
    return value


def _whole(name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{name} must be a whole number, got '{text}'") from None
    if value < 0:
        raise ConfigError(f"{name} must not be negative, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
