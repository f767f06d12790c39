"""Compares expressions in a child process: ``python -m reopold_agent.judges.math_worker``.

It writes JSON lines: first ``{"ready": true}``, then for each request ``{"gold", "answer", ...}`` a
reply ``{"equal": bool}``; it ends with its input. Computer algebra can hang or use much memory on
a short expression, so each request has a limit of processor time, which the kernel enforces where
it can, and the parent kills the process after a limit of wall-clock time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TextIO

_MEMORY = 2 << 30
_DOTS = "\\dots"
_MOST_SYMBOLS = 6
_MOST_POINTS = 40
_ENOUGH_POINTS = 6
_INTEGERS = frozenset({"n", "m", "k"})
"""Variables that may stand for integers only: (-1)^{2n} is 1, and cos(n pi) is (-1)^n."""


class OutOfTimeError(BaseException):
    """The time is up. Not an `Exception`, which sympy and math-verify would catch."""


def main() -> None:
    """Answers requests from standard input until it closes."""
    # What a library prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    import math_verify  # noqa: F401  # takes seconds, which must not count for a request

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
        except Exception as error:  # a parser may raise anything for odd input: not equal
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
    verified = verify(
        gold,
        answer,
        float_rounding=precision if isinstance(precision, int) else 6,
        strict=request.get("strict", True),
        timeout_seconds=None,
    )
    return bool(verified) or _equal_at_points(first, second)


def _equal_at_points(first: Any, second: Any) -> bool:
    """Returns whether two expressions or equations in variables agree at random points.

    Rules for symbols miss identities such as ``ln(x^2) = 2 ln(x)``. A point counts if both sides
    are real there, so that roots and logarithms choose the domain; expressions with the imaginary
    unit are compared at every point. Two equations are the same if their differences of sides are
    multiples of each other. The points are fixed by the seed, so a verdict does not change.
    """
    from sympy import Eq, Expr, Float, Rational, nsimplify
    from sympy.core.function import AppliedUndef

    equations = isinstance(first, Eq) and isinstance(second, Eq)
    if equations:
        first, second = first.lhs - first.rhs, second.lhs - second.rhs
    if not isinstance(first, Expr) or not isinstance(second, Expr):
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    if not symbols or len(symbols) > _MOST_SYMBOLS or (first - second).has(AppliedUndef):
        return False
    # A decimal has the value that is written.
    first, second = (
        nsimplify(each, rational=True) if each.has(Float) else each for each in (first, second)
    )
    for whole in (False, True) if {str(each) for each in symbols} <= _INTEGERS else (False,):
        generator = random.Random(0)
        points = [
            {symbol: Rational(_draw(generator, whole)) for symbol in symbols}
            for _ in range(_MOST_POINTS)
        ]
        if _agree(first, second, points, ratio=equations):
            return True
    return False


def _draw(generator: random.Random, whole: bool) -> Fraction:
    """Returns a whole number from 1 to 60, or a fraction between 1/20 and 60 with a sign."""
    if whole:
        return Fraction(generator.randint(1, 60))
    size = Fraction(round(10**4 * 0.05 * 1200 ** generator.random()), 10**4)
    return size * generator.choice((1, 1, -1))


def _agree(first: Any, second: Any, points: list[Any], *, ratio: bool) -> bool:
    from sympy import I, Pow, log

    everywhere = first.has(I) or second.has(I)
    # Parts that are real on a part of the points only: sqrt(a) sqrt(b) has no negative a and b.
    parts = first.atoms(Pow, log) | second.atoms(Pow, log)
    agreed = 0
    known: Any = None
    for point in points:
        if not everywhere and not all(_is_real(part.subs(point)) for part in parts):
            continue
        mine, wanted = first.subs(point).doit(), second.subs(point).doit()
        if not all(_is_real(each, or_complex=everywhere) for each in (mine, wanted)):
            continue
        if ratio:
            if mine == 0 or wanted == 0:
                continue
            known = wanted / mine if known is None else known
            mine = known * mine
        if not _same_number(mine, wanted):
            return False
        agreed += 1
        if agreed == _ENOUGH_POINTS:
            return True
    return False


def _is_real(value: Any, *, or_complex: bool = False) -> bool:
    from sympy import Number

    real, imaginary = value.evalf(20).as_real_imag()
    if not isinstance(real, Number) or not isinstance(imaginary, Number):
        return False
    if not real.is_finite or not imaginary.is_finite:
        return False
    return or_complex or abs(imaginary) <= abs(real) * Fraction(1, 10**15)


def parse(text: str) -> list[Any]:
    """Returns the expressions that math-verify reads from a LaTeX text."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_text

    # The text is only the answer; the delimiters make math-verify take all of it.
    found = parse_text(
        f"$${text.removesuffix(_DOTS)}$$",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=-1)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # math-verify's own limit needs the main thread's alarm
    )
    return [_imaginary(each) for each in found]


def _imaginary(expression: Any) -> Any:
    """Replaces a symbol "i", which math-verify takes for a complex variable, by the unit."""
    from sympy import Expr, I, Symbol

    unit = Symbol("i", real=False)
    if not isinstance(expression, Expr) or unit not in expression.free_symbols:
        return expression
    try:
        return expression.subs(unit, I)
    except Exception:  # for example an index, which cannot be replaced
        return expression


def _numbers_equal(gold: Any, answer: Any, request: dict[str, Any]) -> bool | None:
    """Compares two numbers by value; returns None if that cannot decide.

    The comparison is relative: math-verify rounds to decimals, which makes 3e-10 equal to 0.
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
        return any(each.has(Float) for each in (gold, answer)) or _same_number(gold, answer)
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


def _same_number(first: Any, second: Any) -> bool:
    """Returns whether two close exact numbers are equal: 2^2023 - 1 is not 2^2023."""
    difference = (first - second).doit()
    if difference.is_Rational:
        return bool(difference == 0)
    # SymPy adds digits until the first is certain, or gives up: then it is taken for zero.
    value = difference.evalf(5, maxn=400)
    return bool(value == 0 or all(part._prec == 1 for part in value.as_real_imag() if part != 0))


def _is_number(value: Any) -> bool:
    from sympy import Expr

    return isinstance(value, Expr) and bool(value.is_number)


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTimeError` after so many seconds of processor time, or ends the process.

    The signal's handler runs between byte codes, but one huge multiplication is a single byte code.
    For that case the kernel's own limit is set slightly higher; it also ends a worker whose parent
    was killed.
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
