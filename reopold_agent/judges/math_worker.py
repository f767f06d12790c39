"""Compares expressions in a process of its own: ``python -m reopold_agent.judges.math_worker``.

Speaks JSON lines: one ``{"ready": true}``, then for each request ``{"gold", "answer", ...}`` a
reply ``{"equal": bool}``. It ends when its input does. Computer algebra can hang or eat memory on
a short expression, so each request has a limit of processor seconds, kept by the kernel where it
can be, and the parent kills the process after a limit of wall-clock seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TextIO

_MEMORY = 2 << 30


class OutOfTimeError(BaseException):
    """Not an `Exception`: sympy and math-verify catch those and would go on."""


def main() -> None:
    """Answers requests from the standard input until it closes."""
    # Whatever a library prints must not end up between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    import math_verify  # noqa: F401  # seconds of imports, before any request's clock runs

    _send(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with cpu_limit(float(request.get("cpu_seconds", 2.0))):
                reply: dict[str, Any] = {"equal": compare(request)}
        except OutOfTimeError:
            reply = {"equal": False, "gave_up": "time"}
        except (MemoryError, RecursionError) as error:
            reply = {"equal": False, "gave_up": type(error).__name__}
        except Exception as error:  # anything a parser can do to odd input means "not equal"
            reply = {"equal": False, "error": type(error).__name__}
        _send(replies, reply)


def compare(request: dict[str, Any]) -> bool:
    """Whether math-verify takes the request's ``answer`` for its ``gold``."""
    from math_verify import verify
    from sympy import Basic, MatrixBase

    gold, answer = parse(request["gold"]), parse(request["answer"])
    if not gold or not answer:
        return False
    precision = request.get("precision")
    first, second = gold[0], answer[0]
    if isinstance(first, Basic) and isinstance(second, Basic):
        decided = _numbers_equal(first, second, request)
        if decided is not None:
            return decided
    if not isinstance(first, (Basic, MatrixBase)) or not isinstance(second, (Basic, MatrixBase)):
        return False
    return bool(
        verify(
            gold,
            answer,
            float_rounding=6 if precision is None else precision,
            strict=request.get("strict", True),
            allow_set_relation_comp=request.get("set_relation", False),
            timeout_seconds=None,
        )
    )


def parse(text: str) -> list[Any]:
    """The expression that a LaTeX text stands for, as math-verify reads it."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_text

    # The text is the answer already; delimiters tell math-verify to take it whole.
    found = parse_text(
        f"$${text}$$",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=-1)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # no limit of its own, which needs the main thread's alarm
    )
    return [_imaginary(each) for each in found]


def _imaginary(expression: Any) -> Any:
    """With the imaginary unit in place of an "i" that math-verify took for complex."""
    from sympy import Expr, I, Symbol

    unit = Symbol("i", real=False)
    if not isinstance(expression, Expr) or unit not in expression.free_symbols:
        return expression
    try:
        return expression.subs(unit, I)
    except Exception:  # it is an index, say, and cannot be replaced
        return expression


def _numbers_equal(gold: Any, answer: Any, request: dict[str, Any]) -> bool | None:
    """By value where both are real numbers; None where that cannot tell.

    math-verify rounds to decimals, for which 3e-10 is 0; the comparison here is relative.
    """
    from sympy import Float, Number

    from reopold_agent.judges.numbers import parse_quantity, rounded, significant_match

    if gold.free_symbols or answer.free_symbols or not _is_number(gold) or not _is_number(answer):
        return None
    values = []
    for each in (gold, answer):
        real, imaginary = each.doit().evalf(40).as_real_imag()
        if not isinstance(real, Number) or not isinstance(imaginary, Number):
            return None
        if not real.is_finite or not imaginary.is_finite:
            return None
        values.append((Fraction(str(real)), Fraction(str(imaginary))))
    (a, a_imaginary), (b, b_imaginary) = values
    size = max(abs(part) for value in values for part in value)
    error = max(abs(a - b), abs(a_imaginary - b_imaginary))
    if error <= Fraction(1, 10**25) * size:
        return True
    if not any(each.has(Float) for each in (gold, answer)):
        return None if error <= Fraction(1, 10**12) * size else False
    if max(abs(a_imaginary), abs(b_imaginary)) > Fraction(1, 10**20) * size:
        return None
    precision = request.get("precision")
    if precision is not None:
        return rounded(a, precision) == rounded(b, precision)
    for text, exact in ((request["gold"], b), (request["answer"], a)):
        written = parse_quantity(text)
        if written and written.inexact and significant_match(exact, written.value, written.step):
            return True
    return abs(a - b) <= Fraction(1, 10**9) * abs(a)


def _is_number(value: Any) -> bool:
    from sympy import Expr

    return isinstance(value, Expr) and bool(value.is_number)


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTimeError` after so many processor seconds, or has the kernel end the process.

    The signal's handler runs between byte codes; one huge multiplication is a single byte code.
    For that the kernel's own limit is set a little above; it also ends a worker whose parent died.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    import resource
    import time

    def out_of_time(number: int, frame: object) -> None:
        raise OutOfTimeError

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(time.process_time() + seconds) + 3
    if hard == resource.RLIM_INFINITY or limit <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    previous = signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _send(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
