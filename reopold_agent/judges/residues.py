"""Compares congruences: "x \\equiv 7 \\pmod{11}", "7 (mod 11)", "18 \\bmod 11"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from reopold_agent.judges.text import latex_plain

_CONGRUENCE = re.compile(
    r"(.+?)\s*,?\s*(?:\\pmod|\(?\s*(?:\\b?mod|(?<![A-Za-z\\])mod(?:ulo)?))(?![A-Za-z])"
    r"\s*\{?\s*(\w+(?:\s*[-+^]\s*\w+)*)\s*\}?\s*\)?[\s.$]*"
)
_INTEGER = re.compile(r"-?\d+")
_INTEGERS = re.compile(r"(?:[A-Za-z]\s*=)?\s*-?\d+(?:\s*(?:,|or|and)\s*(?:[A-Za-z]\s*=)?\s*-?\d+)*")


@dataclass(frozen=True)
class _Congruence:
    value: str
    modulus: str

    def reduced(self) -> str:
        """Returns the value with integers as their remainders, if it has nothing but integers."""
        if not (self.modulus.isdecimal() and int(self.modulus) and _INTEGERS.fullmatch(self.value)):
            return self.value
        return _INTEGER.sub(lambda found: str(int(found[0]) % int(self.modulus)), self.value)


def same_residue(answer: str, expected: str, same: Callable[[str, str], bool]) -> bool | None:
    """Returns whether congruences are equal: to one modulus, with values of the same remainder.

    A side without a modulus must equal the other's value, or its remainder: "18 mod 11" is 7, but
    18 is not "7 mod 11".

    Args:
        answer, expected: the two.
        same: compares an answer with an expected one.

    Returns:
        None if neither is a congruence, or if only one is and its value is not that of the other,
        which may be another way of writing it.
    """
    mine, wanted = _read(answer), _read(expected)
    if mine is not None and wanted is not None:
        return same(mine.modulus, wanted.modulus) and (
            same(mine.value, wanted.value) or same(mine.reduced(), wanted.reduced())
        )
    if mine is not None and (same(mine.value, expected) or same(mine.reduced(), expected)):
        return True
    if wanted is not None and (same(answer, wanted.value) or same(answer, wanted.reduced())):
        return True
    return None


def _read(answer: str) -> _Congruence | None:
    if "mod" not in answer:
        return None
    # One space at most: on many the pattern would take quadratic time.
    found = _CONGRUENCE.fullmatch(" ".join(latex_plain(answer).replace("$", "").split()))
    if found is None:
        return None
    value = re.sub(r"\s*(?:\\equiv(?![a-z])|≡|\\cong(?![a-z]))\s*", " = ", found[1])
    return _Congruence(value.strip(), found[2])
