"""How far the rule grader agrees with labelled pairs.

``python -m reopold_agent.judges.agreement FILE`` reads JSON lines with ``gold``, ``pred``,
``expected`` (1 or 0) and optionally ``options`` and ``note``, and prints the agreement by source
and each disagreement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reopold_agent.errors import DataError
from reopold_agent.judges.rules import grade
from reopold_agent.judges.verdict import Verdict


@dataclass(frozen=True)
class Compared:
    """One labelled pair and this grader's verdict on it."""

    case: Mapping[str, Any]
    verdict: Verdict

    @property
    def agrees(self) -> bool:
        """Whether the verdict is the label."""
        return self.verdict.correct == bool(self.case["expected"])


def read_cases(path: Path) -> list[Mapping[str, Any]]:
    """The labelled pairs of a file.

    Raises:
        DataError: no such file, or a line is not such a pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            case = json.loads(line)
            if not {"gold", "pred", "expected"} <= case.keys():
                raise ValueError("it needs gold, pred and expected")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        cases.append(case)
    return cases


def compare(cases: Iterable[Mapping[str, Any]], *, use_options: bool = True) -> list[Compared]:
    """Grades each pair, by default with the options that its label was given under."""
    compared = []
    for case in cases:
        options = (case.get("options") or {}) if use_options else {}
        verdict = grade(
            case["pred"],
            case["gold"],
            precision=options.get("precision"),
            strict=bool(options.get("strict", True)),
            set_relation=bool(options.get("allow_set_relation_comp", False)),
        )
        compared.append(Compared(case, verdict))
    return compared


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; the exit status is 0 if the agreement is at least ``--at-least``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--at-least", type=float, default=0.0, help="share, for example 0.97")
    parser.add_argument("--no-options", action="store_true", help="ignore the cases' options")
    chosen = parser.parse_args(arguments)
    try:
        compared = compare(read_cases(chosen.file), use_options=not chosen.no_options)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    totals = Counter(str(each.case.get("source", "")) for each in compared)
    agreed = Counter(str(each.case.get("source", "")) for each in compared if each.agrees)
    table = Table("source", "pairs", "agree", "share")
    for source, total in sorted(totals.items()):
        share = f"{agreed[source] / total:.1%}"
        table.add_row(source, str(total), str(agreed[source]), share)
    share_of_all = agreed.total() / max(1, totals.total())
    table.add_row("all", str(totals.total()), str(agreed.total()), f"{share_of_all:.1%}")
    console.print(table)
    for each in compared:
        if not each.agrees:
            case, verdict = each.case, each.verdict
            print(
                f"id {case.get('id')}: label {case['expected']}, here {int(verdict.correct)} "
                f"({verdict.how}); gold {_short(case['gold'])}; extracted "
                f"{_short(verdict.extracted)}; pred ...{_short(case['pred'][-160:])}"
                + (f"; note: {case['note']}" if case.get("note") else "")
            )
    return 0 if share_of_all >= chosen.at_least else 1


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) < 200 else text[:200] + "...")


if __name__ == "__main__":
    raise SystemExit(main())
