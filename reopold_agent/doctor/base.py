"""Runs checks independently, each within its time limit, and collects their findings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from reopold_agent.common.bounded import DeadlineError, run_bounded
from reopold_agent.errors import ReopoldError

Status: TypeAlias = Literal["ok", "info", "warning", "problem"]
"""``info`` is neither good nor bad, such as a missing extra that the run does not need."""


@dataclass(frozen=True)
class Finding:
    """A result of a check.

    Attributes:
        area: what was checked, in one or two words.
        status: the result.
        text: what was found.
        advice: what to do, with the exact command or setting; empty if there is nothing to do.
    """

    area: str
    status: Status
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """Something to check.

    Attributes:
        area: as in its findings.
        run: returns the findings; an exception becomes a finding.
        seconds: time limit.
    """

    area: str
    run: Callable[[], Iterable[Finding]]
    seconds: float = 10.0


def run_checks(
    checks: Sequence[Check], seconds: float, before: Callable[[Check], None] | None = None
) -> list[Finding]:
    """Runs checks in order.

    Args:
        checks: what to check.
        seconds: time limit for all together; remaining checks are reported as not run.
        before: called before each check.
    """
    end = time.monotonic() + seconds
    found: list[Finding] = []
    for check in checks:
        left = end - time.monotonic()
        if left <= 0:
            text = f"not checked: the {seconds:g} seconds for all checks are over"
            found.append(Finding(check.area, "warning", text, "Give more time: seconds=600"))
            continue
        if before is not None:
            before(check)
        found += _run(check, min(check.seconds, left))
    return found


def _run(check: Check, seconds: float) -> list[Finding]:
    try:
        return run_bounded(lambda: list(check.run()), seconds)
    except DeadlineError:
        text = f"no result after {seconds:.0f} seconds"
        return [Finding(check.area, "problem", text, "This check hangs; examine this by hand.")]
    except ReopoldError as error:
        first, _, rest = str(error).partition("\n")
        return [Finding(check.area, "problem", first, rest.strip())]
    except Exception as error:  # a check that fails must not hide the others
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return [Finding(check.area, "warning", text, "This is a bug: please report it.")]
