"""Assembles the page from its assets, for the server and as one file."""

from __future__ import annotations

from importlib import resources
from typing import Any

from reopold_agent.tracking.html import page_json, source_hash

SCRIPTS = (
    "dom.js",
    "source.js",
    "charts.js",
    "overview.js",
    "list.js",
    "pictures.js",
    "tokens.js",
    "episode.js",
    "app.js",
)
"""Scripts in the order in which they depend on each other; not modules, which browsers do not load
from a file."""

STYLE = "style.css"


def asset(name: str) -> str:
    """Returns the text of an asset."""
    return (resources.files("reopold_agent.view") / "assets" / name).read_text(encoding="utf-8")


def served_page() -> str:
    """Returns the page that fetches everything from its server."""
    head = f'<link rel="stylesheet" href="assets/{STYLE}">'
    scripts = "\n".join(f'<script src="assets/{name}" defer></script>' for name in SCRIPTS)
    return asset("page.html").replace("@HEAD@", head).replace("@BODY@", scripts)


def static_page(data: Any) -> str:
    """Returns the page with style, scripts and data in it.

    Its content security policy allows only these scripts and this style, by their hashes, so that
    no text in the data can run.

    Args:
        data: for ``source.js``; see `reopold_agent.view.export`.
    """
    style = asset(STYLE)
    script = "\n".join(asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {source_hash(style)}; "
        f"script-src {source_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    body = (
        f'<script type="application/json" id="data">{page_json(data)}</script>\n'
        f"<script>{script}</script>"
    )
    # Not two replacements in a row: the data may contain the second mark.
    before, _, rest = asset("page.html").partition("@HEAD@")
    middle, _, after = rest.partition("@BODY@")
    return before + head + middle + body + after
