"""Differences between versions of Python, and of libraries on them."""

import sys

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """A string and an enumeration in one, as ``enum.StrEnum``: prints as its value."""

        __str__ = str.__str__


def silence_docstring_checks() -> None:
    """Keeps transformers from printing that parameters of its classes are not documented.

    On Python 3.13, whose docstrings are not indented, it prints such lines to stdout whenever it
    imports a model (transformers 5.10). Call it once transformers is imported.
    """
    module = sys.modules.get("transformers.utils.auto_docstring")
    if module is not None:
        vars(module)["print"] = lambda *_, **__: None


__all__ = ["StrEnum", "silence_docstring_checks"]
