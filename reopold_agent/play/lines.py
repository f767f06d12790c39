"""Reads the player's lines from a terminal, with history and completion, or from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import IO

from reopold_agent.tools.parse import CLOSE, OPEN

END = "/end"

Completer = Callable[[str], Sequence[str]]
"""Returns the possible completions of the last word of the line up to the cursor."""


class Lines:
    """Reads what the player types.

    Args:
        source: standard input, or a file of lines. If it and standard output are a terminal,
            lines can be edited, the arrows bring earlier ones back, and the tab completes.
        echo: called with prompt and line where nobody types, so that a log can be read.
        complete: what the tab offers.
    """

    def __init__(self, source: IO[str], echo: Callable[[str], None], complete: Completer) -> None:
        self._source, self._echo = source, echo
        self._typed = source is sys.stdin and source.isatty() and sys.stdout.isatty()
        if self._typed:
            _set_up_readline(complete)

    def line(self, prompt: str) -> str | None:
        """Returns the next line without its line break; None at the end of the input."""
        if self._typed:
            try:
                text = input(prompt)
            except EOFError:
                print()
                return None
        else:
            read = self._source.readline()
            if not read:
                return None
            text = read.removesuffix("\n").removesuffix("\r")
            self._echo(f"{prompt}{text}")
        # An undecodable byte has become a lone surrogate, which no tokenizer accepts.
        return text.encode("utf-8", "replace").decode("utf-8")

    def rest_of_call(self, first: str) -> str:
        """Returns the turn that begins with ``first``; reads on until an opened call is closed."""
        text = first
        while text.count(OPEN) > text.count(CLOSE):
            more = self.line("... ")
            if more is None or more.strip() == END:
                break
            text += f"\n{more}"
        return text

    def block(self) -> str:
        """Returns the lines up to ``/end`` or the end of the input, unchanged."""
        found = []
        while (more := self.line("... ")) is not None and more.strip() != END:
            found.append(more)
        return "\n".join(found)


def _set_up_readline(complete: Completer) -> None:
    try:
        import readline
    except ImportError:  # Windows has no history and completion
        return

    def candidates(word: str, number: int) -> str | None:
        line = readline.get_line_buffer()[: readline.get_endidx()]
        found = [each for each in complete(line) if each.startswith(word)]
        return found[number] + " " if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(candidates)
    # macOS brings libedit under readline's name, with another language of settings.
    edit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if edit else "tab: complete")
