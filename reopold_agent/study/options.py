"""The study command's options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reopold_agent.cli.groups import check_once, prepare_groups, searched
from reopold_agent.errors import ConfigError, suggestion
from reopold_agent.study.grid import Study
from reopold_agent.study.studies import STUDIES, find_study

USAGE = """\
Usage: python -m reopold_agent.study name=STUDY [key=value ...] [-- training settings]

  name=      one of the studies below
  out=       folder of runs and report (default studies/NAME)
  seeds=     how many, or which: seeds=5, seeds=[0,3] (default: the study's)
  jobs=      runs at the same time (default auto: one per core)
  only=      some of the settings: only=rkl,reopold
  steps=     training steps, in place of the study's
  report=    only: make the report again from finished runs; run nothing
  docs=      copy README.md, numbers.json and figures to this folder too, as docs/study

Settings of python -m reopold_agent.train for all runs go after --: -- optimizer.lr=1e-3.
Stop with Ctrl-C; the same command continues.

Studies (minutes are rough):
"""


@dataclass(frozen=True)
class Options:
    """The parsed command line."""

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
        """The requested study."""
        return find_study(self.name)


def parse(words: Sequence[str]) -> Options:
    """Parses the command line.

    Raises:
        ConfigError, UnknownNameError: an argument is wrong.
    """
    split = list(words).index("--") if "--" in words else len(words)
    for part in (words[:split], words[split:]):
        check_once(part)
    given: dict[str, str] = {}
    known = ("name", "out", "seeds", "jobs", "only", "steps", "report", "docs")
    for word in words[:split]:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"'{word}' is not key=value; --help lists the keys")
        if key not in known:
            raise ConfigError(
                f"unknown key '{key}'. {suggestion(key, known)}Known: {', '.join(known)}. "
                f"Training settings come after --, as in: -- {word}"
            )
        given[key] = value
    if "name" not in given:
        raise ConfigError(f"say which study: name={'|'.join(STUDIES)}")
    study = find_study(given["name"])
    if given.get("report", "only") != "only":
        raise ConfigError(f"report={given['report']} is not an option; the only one is report=only")
    only = tuple(label for label in given.get("only", "").split(",") if label)
    study.chosen(only)
    extra = tuple(searched(words[split + 1 :]))
    prepare_groups(extra)
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
        extra=extra,
    )


def usage() -> str:
    """Returns the text of ``--help``."""
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seeds(text: str) -> tuple[int, ...]:
    """Parses seeds: ``5`` stands for 0 to 4, ``[0,3]`` for 0 and 3."""
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
