"""The example of a training loop of one's own: short, of public names, and it learns."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("name", ["plain_gymnasium.py", "in_trl.py"])
def test_the_examples_of_other_trainers_are_short(name: str) -> None:
    tree = ast.parse((ROOT / "examples" / name).read_text("utf-8"))
    body = [each for each in tree.body[1:] if not isinstance(each, (ast.Import, ast.ImportFrom))]
    lines = {node.lineno for each in body for node in ast.walk(each) if hasattr(node, "lineno")}
    assert len(lines) < 25


def test_a_trainer_that_knows_only_gymnasium_plays_our_environment(tmp_path: Path) -> None:
    student = ROOT / "reopold_agent" / "demo" / "weights" / "arithmetic_student"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "plain_gymnasium.py"), str(student), "1"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "episode 0: 3 turns, reward 0\n"
