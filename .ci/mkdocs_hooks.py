"""Hooks that extend the pages of ``docs/`` for the documentation site.

A page may link to any file or folder of the repository with a relative link, as GitHub wants it.
On the site each such target becomes a page of its own under ``files/``: a Markdown file as it is,
a folder as a list, anything else as highlighted text. So the links work in both places, without
the address of a host, and a target that does not exist fails the build.

CHANGELOG.md and CONTRIBUTING.md become pages of the navigation (`ROOT_PAGES`).

Comments, which GitHub does not show, become what only the site can show:

- ``<!-- settings: NAME ... -->``: tables of settings (`mkdocs_settings`);
- ``<!-- api: NAME -->`` below a heading and a sentence: the object's signature and docstring in
  place of both, of which the link ``[Source]`` stays;
- ``<!-- members: MODULE -->``: the signatures and docstrings of a module's members.
"""

from __future__ import annotations

import importlib
import logging
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = "files"
"""Folder of the site where the repository's files go."""
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the top folder that are pages of the site's navigation."""
HOME = {"README.md": "index.md", **ROOT_PAGES}
"""Files that have a page of their own outside ``files/``."""

_log = logging.getLogger("mkdocs.hooks.repository")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
_CODE = re.compile(r"(`[^`\n]*`)")
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_SETTINGS = re.compile(r"<!-- settings: ([\w.: ]+) -->")
_API = re.compile(r"^##+ `[^\n]*\n(?:[^#\n][^\n]*\n)*?<!-- api: ([\w.]+) -->$", re.MULTILINE)
_MEMBERS = re.compile(r"^<!-- members: ([\w.]+) -->$", re.MULTILINE)
_LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".yaml": "yaml",
    ".sh": "bash",
    ".json": "json",
    ".cff": "yaml",
}
_BINARY = (".png", ".jpg", ".gz", ".npz", ".safetensors")
_sources: dict[str, str] = {}
"""Repository path of each page that was generated from a file."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for everything outside ``docs/`` that a page links to, and for what that links
    to in turn."""
    _sources.clear()
    for path, uri in ROOT_PAGES.items():
        if (ROOT / path).is_file():
            _sources[uri] = path
            files.append(File.generated(config, uri, content=(ROOT / path).read_text("utf-8")))
    waiting = [
        (_sources.get(page.src_uri, f"docs/{page.src_uri}"), target)
        for page in files.documentation_pages()
        for target in _targets(page.content_string)
    ]
    while waiting:
        source, target = waiting.pop()
        path = _repository_path(source, target)
        if path is None or path in HOME or path.startswith("docs/"):
            continue
        if not (ROOT / path).exists():
            _log.warning("'%s' links to '%s', which is not in the repository", source, target)
            continue
        uri = _uri(path)
        if uri in _sources:
            continue
        # A folder's links start inside it.
        _sources[uri] = f"{path}/" if (ROOT / path).is_dir() else path
        content = _content(path)
        files.append(File.generated(config, uri, content=content))
        waiting += [(_sources[uri], each) for each in _targets(content)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links that leave ``docs/`` to the pages that stand for their targets."""
    own = page.file.src_uri
    source = _sources.get(own, f"docs/{own}")

    def pointed(target: str) -> str:
        path = _repository_path(source, target)
        if path is None or (path.startswith("docs/") and source.startswith("docs/")):
            return target
        _, hashmark, anchor = target.partition("#")
        goal = HOME.get(path) or (path[5:] if path.startswith("docs/") else _uri(path))
        return posixpath.relpath(goal, posixpath.dirname(own) or ".") + hashmark + anchor

    markdown = _with_links(markdown, pointed)
    if not source.startswith("docs/"):  # a file that only mentions these comments
        return markdown
    markdown = _API.sub(_documented, markdown)
    markdown = _MEMBERS.sub(_members, markdown)
    return _SETTINGS.sub(lambda found: _settings(found[1].split()), markdown)


def _documented(entry: re.Match[str]) -> str:
    source = re.search(r"\[Source\]\([^)]+\)", entry[0])
    return f"::: {entry[1]}\n\n{source[0] if source else ''}\n"


def _members(found: re.Match[str]) -> str:
    options = {"heading_level": 3, "show_root_heading": "false", "show_root_toc_entry": "false"}
    lines = [f"      {name}: {value}" for name, value in options.items()]
    return "\n".join([f"::: {found[1]}", "    options:", *lines])


def _settings(names: list[str]) -> str:
    # Imported again for each build: `mkdocs serve` keeps the process.
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        return str(importlib.import_module("mkdocs_settings").tables(names))
    finally:
        sys.path.pop(0)


def _uri(path: str) -> str:
    if (ROOT / path).is_dir():
        return f"{PAGES}/{path}/index.md"
    # The last suffix stays in the name: deploy/slurm.sh is files/deploy/slurm.sh/.
    return f"{PAGES}/{path}" if path.endswith(".md") else f"{PAGES}/{path}.md"


def _repository_path(source: str, target: str) -> str | None:
    """Where a link of the file ``source`` points, from the top; None outside the repository."""
    place = target.partition("#")[0]
    if not place or re.match(r"[a-z][a-z0-9+.-]*:", place) or place.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), place))
    return None if path.startswith("..") else path


def _content(path: str) -> str:
    place = ROOT / path
    if place.is_dir():
        return f"# {path}\n\n" + "\n".join(f"- [{name}]({name})" for name in _inside(path)) + "\n"
    text = place.read_text("utf-8")
    if path.endswith(".md"):
        return text
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=2))
    return f"# {path}\n\n{fence}{_LANGUAGES.get(place.suffix, 'text')}\n{text}\n{fence}\n"


def _inside(folder: str) -> list[str]:
    """The files below a folder that belong to the repository (not caches, not binary files)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = done.stdout.splitlines()
    if done.returncode:  # an unpacked archive is no git checkout
        names = [
            os.path.relpath(path, ROOT)
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    kept = [name for name in names if (ROOT / name).suffix not in _BINARY]
    return sorted(os.path.relpath(name, folder) for name in kept if (ROOT / name).is_file())


def _targets(markdown: str) -> list[str]:
    found: list[str] = []

    def seen(target: str) -> str:
        found.append(target)
        return target

    _with_links(markdown, seen)
    return found


def _with_links(markdown: str, change: Callable[[str], str]) -> str:
    """The text with every link's target changed, code left as it is."""
    return "".join(
        piece if code else _LINK.sub(lambda m: m[1] + change(m[2]) + m[3], piece)
        for code, piece in _pieces(markdown)
    )


def _pieces(markdown: str) -> Iterator[tuple[bool, str]]:
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
            yield True, line
        elif mark and mark[1].startswith(fence):
            fence = ""
            yield True, line
        elif fence:
            yield True, line
        else:
            for piece in _CODE.split(line):
                yield piece.startswith("`"), piece
