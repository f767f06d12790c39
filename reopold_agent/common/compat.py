"""What the newer standard library has and Python 3.10 lacks."""

import sys

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """A string and an enumeration in one, as ``enum.StrEnum``: prints as its value."""

        __str__ = str.__str__


__all__ = ["StrEnum"]
