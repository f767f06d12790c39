"""The example of a training loop of one's own: short, of public names, and it learns."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from running import environment

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_loop.py"
SOURCE = EXAMPLE.read_text("utf-8")


def test_it_is_short_and_uses_documented_names_only() -> None:
    assert len(SOURCE.splitlines()) <= 40
    tree = ast.parse(SOURCE)
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                names.append(each.name)
                module = getattr(import_module(str(node.module)), each.name).__module__
                entry = rf"<!-- (api: {module}\.{each.name}|members: {module}) -->"
                assert re.search(entry, pages), each.name
    assert [name for name in names if name.startswith("_")] == []


def test_the_student_learns(tmp_path: Path) -> None:
    path = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path,
        env=path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^step (\d): success ([\d.]+), token reward (-?[\d.]+)", done.stdout, re.M)
    assert [int(step) for step, _, _ in found] == list(range(8))
    success, reward = ([float(row[column]) for row in found] for column in (1, 2))
    assert sum(success[-3:]) / 3 > success[0] + 0.1
    assert sum(reward[-3:]) / 3 > reward[0] + 0.2  # closer to the teacher
