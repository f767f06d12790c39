"""Exports the page as one HTML file, pictures included."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reopold_agent.common.files import write_text_atomic
from reopold_agent.common.pictures import to_rgb
from reopold_agent.errors import DataError, StorageError, first_line
from reopold_agent.view.page import static_page
from reopold_agent.view.run import PICTURE_TYPES, Run

DEFAULT_LIMIT = 200

LONGEST_SIDE = 768
"""Pixels to which larger pictures are reduced; boxes stay right, as they are relative."""

POINTS = 2000
"""Most rows of metrics; longer runs are thinned out evenly, except for evaluations."""


def export_page(runs: Sequence[Run], target: Path, *, limit: int = DEFAULT_LIMIT) -> str:
    """Writes the page and returns a line that says what it contains.

    Args:
        runs: one or two.
        target: the HTML file; its folder must exist.
        limit: most episodes of a run; those in both of two runs come first, then others, spread
            evenly over the run.

    Raises:
        DataError: the file cannot be written.
    """
    if not target.parent.is_dir():
        raise DataError(f"there is no folder {target.parent}.\nMake it, or give another --export")
    for run in runs:
        run.load_all()
    keys = [{row["key"] for row in run.summaries} for run in runs]
    shared = set.intersection(*keys) if len(keys) > 1 else set()
    parts = [_run_data(run, limit, shared) for run in runs]
    try:
        write_text_atomic(target, static_page({"runs": parts}))
    except StorageError as error:
        raise DataError(f"{first_line(error)}.\nGive another path to --export") from error
    counts = ", ".join(f"{len(p['records'])} of {p['all']} episodes" for p in parts)
    size = target.stat().st_size / 1e6
    return f"{target}: {counts}, {size:.1f} MB" + (
        "" if all(len(p["records"]) == p["all"] for p in parts) else " (--limit N includes more)"
    )


def _run_data(run: Run, limit: int, shared: set[str]) -> dict[str, Any]:
    """Returns what ``source.js`` reads: metrics and at most ``limit`` episodes."""
    summaries = run.summaries
    first = [row["n"] for row in summaries if row["key"] in shared]
    others = [row["n"] for row in summaries if row["key"] not in shared]
    chosen = _spread(first, limit)
    chosen = sorted(chosen + _spread(others, limit - len(chosen)))
    records: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    for number in chosen:
        record = run.record(number) or {}
        records.append(record)
        for name in _picture_names(record):
            path = run.picture(name)
            if path is not None and name not in pictures:
                pictures[name] = _embedded(path)
    return {
        "facts": run.facts(),
        "metrics": _thinned(run.points),
        "rows": [{**summaries[number], "n": place} for place, number in enumerate(chosen)],
        "records": records,
        "pictures": pictures,
        "all": len(summaries),
        "bad": run.bad,
    }


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """Picks at most ``count`` of the numbers, evenly."""
    if count <= 0:
        return []
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[i * len(numbers) // count] for i in range(count)]


def _thinned(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    every = -(-len(metrics) // POINTS) if metrics else 1
    return [row for i, row in enumerate(metrics) if row.get("kind") == "eval" or i % every == 0]


def _picture_names(record: dict[str, Any]) -> list[str]:
    images = record.get("images")
    named = [image.get("picture") for image in images or [] if isinstance(image, dict)]
    given = record.get("pictures")
    named += given if isinstance(given, list) else []
    return [name for name in named if isinstance(name, str)]


def _embedded(path: Path) -> str:
    """Returns the picture as a data URL; empty if it is damaged, which the page then shows."""
    kind, data = PICTURE_TYPES[path.suffix], path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if max(opened.size) > LONGEST_SIDE:
                image = to_rgb(opened)
                image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                buffer = io.BytesIO()
                image.save(buffer, format="JPEG", quality=85)
                kind, data = "image/jpeg", buffer.getvalue()
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
