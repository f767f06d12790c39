"""Measures how often rules and a judge agree with labels: ``python -m reopold_agent.judge check``.

``--help`` lists settings; docs/judges.md describes the file of labelled pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from reopold_agent.cli.hydra import plain_values, report_errors, run_hydra
from reopold_agent.common.files import write_json_atomic
from reopold_agent.config import build
from reopold_agent.errors import ConfigError, suggestion
from reopold_agent.judge.agreement import SHIPPED, ask, by_judge, compare, extractions, read_cases
from reopold_agent.judge.report import RULES, as_values, show
from reopold_agent.judges.llm import NoJudge, make_judge


@dataclass(frozen=True)
class CheckConfig:
    """Settings of a check; see ``configs/judge.yaml``."""

    judge: dict[str, Any]
    file: str | None = None
    all: bool = False
    disagreements: int | None = 10
    output: str | None = None

    def __post_init__(self) -> None:
        if self.disagreements is not None and self.disagreements < 0:
            raise ConfigError("disagreements must be a number of pairs, or null for all")
        if self.output is None:
            return
        output = Path(self.output)
        if output.is_dir() or not output.parent.is_dir():
            raise ConfigError(f"output={output} must be a file in a folder that exists")
        if output.resolve() == Path(self.file or SHIPPED).resolve():
            raise ConfigError(f"output={output} would replace the labelled pairs")


def run(composed: DictConfig) -> None:
    """Grades the pairs by rule, asks the judge, and prints what agrees with the labels."""
    config = build(CheckConfig, plain_values(composed))
    file = Path(config.file or SHIPPED)
    cases = read_cases(file)
    with make_judge(config.judge) as judge:
        rules = compare(cases)
        ways = {RULES: rules}
        requests = extractions(rules, everything=config.all)
        if not isinstance(judge, NoJudge):
            replies = ask(judge, requests)
            left = {i: reply for i, reply in replies.items() if rules[i].verdict.undecided}
            ways["rules, then the judge"] = by_judge(rules, left)
            if config.all:
                ways["the judge alone"] = by_judge(rules, replies)
        facts = {**judge.describe(), "counters": judge.counters(), "responses": len(requests)}
    show(ways, facts, config.disagreements, Console())
    if config.output is not None:
        write_json_atomic(config.output, {"file": str(file), **as_values(ways, facts)})


def prepared_words(words: Sequence[str]) -> list[str]:
    """Returns the arguments for Hydra: without ``check``, and with ``file=`` before FILE.

    Raises:
        ConfigError: the command is not ``check``, or there are two files.
    """
    command, *rest = words or ["--help"]
    if command.startswith("-"):
        return [command, *rest]
    if command != "check":
        hint = suggestion(command, ["check"])
        raise ConfigError(
            f"there is no command '{command}' of judge.\n{hint}`reopold judge check [FILE]` "
            "measures how often rules and a judge agree with labelled pairs."
        )
    prepared: list[str] = []
    for before, word in zip(["", *rest], rest, strict=False):
        if "=" in word or word.startswith("-") or before.startswith("-"):  # --cfg job
            prepared.append(word)
        elif any(each.startswith("file=") for each in prepared):
            raise ConfigError(f"'{word}': there can only be one file. Check one after the other.")
        else:
            escaped = word.replace("'", "\\'")
            prepared.insert(0, f"file='{escaped}'")
    return prepared


def main() -> None:
    """Runs the command."""
    with report_errors():
        sys.argv[1:] = prepared_words(sys.argv[1:])
    stopped = "\nStopped. A judge's replies so far are in its cache; the same command continues."
    run_hydra(run, "judge", sys.argv[1:], stopped)


if __name__ == "__main__":
    main()
