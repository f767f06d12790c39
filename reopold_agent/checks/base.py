"""Findings, and how checks are run: each within its time, none ends the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from reopold_agent.errors import ReopoldError, ToolTimeoutError
from reopold_agent.tools.base import run_bounded

Status: TypeAlias = Literal["ok", "info", "warning", "problem"]
"""``info`` is neither good nor bad: an extra that nobody needs is absent."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: what it is about, one or two words.
        status: how it is.
        text: what was found.
        advice: what to do, with the exact command or setting; empty where there is nothing to do.
    """

    area: str
    status: Status
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        area: as of its findings.
        run: gives the findings; what it raises becomes one.
        seconds: it may take.
    """

    area: str
    run: Callable[[], Iterable[Finding]]
    seconds: float = 10.0


def run_checks(
    checks: Sequence[Check], seconds: float, before: Callable[[Check], None] | None = None
) -> list[Finding]:
    """Runs checks in order.

    Args:
        checks: what to look at.
        seconds: for all of them together; what does not fit is reported as not looked at.
        before: called before each check.
    """
    end = time.monotonic() + seconds
    found: list[Finding] = []
    for check in checks:
        left = end - time.monotonic()
        if left <= 0:
            text = f"not looked at: the {seconds:g} seconds for all checks are over"
            found.append(Finding(check.area, "warning", text, "Give more time: seconds=600"))
            continue
        if before is not None:
            before(check)
        found += _run(check, min(check.seconds, left))
    return found


def _run(check: Check, seconds: float) -> list[Finding]:
    try:
        return run_bounded(lambda: list(check.run()), seconds)
    except ToolTimeoutError:
        text = f"no result after {seconds:.0f} seconds"
        return [Finding(check.area, "problem", text, "Something there hangs: look at it by hand.")]
    except ReopoldError as error:
        first, _, rest = str(error).partition("\n")
        return [Finding(check.area, "problem", first, rest.strip())]
    except Exception as error:  # a check that fails must not hide the others
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return [Finding(check.area, "warning", text, "This is a bug of ours: please report it.")]
