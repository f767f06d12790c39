"""The code blocks and commands of README and documentation, for their tests.

``python tests/docs_pages.py`` copies files anew into the blocks that show them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
SHELL = ("", "bash", "sh", "shell", "console")

_FENCE = re.compile(r"^(\s*)(`{3,})\s*([^`]*)$")
_SKIP = re.compile(r"<!-- test: skip \((.+)\) -->")
_FILE = re.compile(r"<!-- file: (\S+) -->")
_PROGRAM = re.compile(r"\b(?:python\d?|reopold(?:-\w+)?|pip)\s")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``skip`` is the reason of a mark before it, or None; ``file`` the file of the
    repository that a mark before it says it shows."""

    page: str
    line: int
    language: str
    text: str
    skip: str | None
    file: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block: its program and its words."""

    place: str
    words: tuple[str, ...]


def blocks(path: Path, root: Path = ROOT) -> Iterator[Block]:
    """The fenced blocks of a Markdown file."""
    skip: str | None = None
    file: str | None = None
    opened: tuple[int, str, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = (number, fence[1], fence[2], fence[3].strip()), []
            elif line.strip():
                mark = _SKIP.fullmatch(line.strip())
                skip = mark[1] if mark else None
                shown = _FILE.fullmatch(line.strip())
                file = shown[1] if shown else None
        elif fence and fence[2].startswith(opened[2]) and not fence[3].strip():
            start, indent, _, language = opened
            text = "\n".join(each.removeprefix(indent) for each in lines) + "\n"
            yield Block(str(path.relative_to(root)), start, language, text, skip, file)
            opened = skip = file = None
        else:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"{path}:{opened[0]}: a fence without an end")


def commands(block: Block) -> Iterator[Command]:
    """Returns the commands of a shell block that the tests check, anywhere in a line."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    for line in joined.splitlines():
        if not _PROGRAM.search(line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word.strip(";&|"):
                words.append(word)
                continue
            if {"<", ">"} & set(words):  # from a file, or to one
                words = words[: min(words.index(sign) for sign in "<>" if sign in words)]
            while words and (words[0] in ("do", "$", "time") or re.match(r"[A-Z_]+=", words[0])):
                words.pop(0)
            if words and re.fullmatch(r"python\d?|reopold(-\w+)?|pip", words[0]):
                yield Command(block.place, tuple(words))
            words = []


def all_blocks() -> list[Block]:
    """Returns the code blocks of all pages."""
    return [block for page in PAGES for block in blocks(page)]


def with_files(text: str, root: Path = ROOT) -> str:
    """A page with its blocks below ``<!-- file: PATH -->`` replaced by the files of today."""
    block = re.compile(r"(<!-- file: (\S+) -->\n(`{3,})\w*\n).*?(?=^\3$)", re.DOTALL | re.MULTILINE)
    return block.sub(lambda found: found[1] + (root / found[2]).read_text("utf-8"), text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_files(page.read_text("utf-8")), "utf-8")
