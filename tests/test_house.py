"""docs/house.md agrees with the code: layers, rooms, classes, places and the reading order."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reopold_agent"
PAGE = (ROOT / "docs" / "house.md").read_text("utf-8")


def part(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_layers_are_those_of_import_linter() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = [c["layers"] for c in contracts["contracts"] if c["type"] == "layers"]
    checked = [
        {room.strip().removeprefix("reopold_agent.") for room in layer.split("|")}
        for layer in layers
    ]
    (picture,) = re.findall(r"```\n(start .*?)```", part("The rooms"), re.DOTALL)
    shown = [set(line[11:].split()) for line in picture.splitlines()]
    assert shown == checked


def test_every_room_is_described() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", part("The rooms"), re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert described == folders | modules


def test_every_folder_it_names_exists() -> None:
    folders = re.findall(r"`([\w./]+)/`", PAGE)
    assert len(folders) > 5
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


def defined(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_class_is_defined_where_its_link_leads() -> None:
    named = re.findall(r"\[`(\w+)`\]\(\.\./([\w/.]+\.py)\)", part("Why each class exists"))
    assert len(named) > 25
    for name, path in named:
        assert name in defined(ROOT / path), f"{name} is not in {path}"


def test_the_entry_point_groups_are_those_of_the_registries() -> None:
    named = set(re.findall(r"`(reopold_agent\.\w+)`", part("Where to add what")))
    source = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    groups = set(re.findall(r'Registry\(\s*"[^"]+", "(reopold_agent\.\w+)"', source))
    groups |= set(re.findall(r'_LlmJudges\(\s*"[^"]+", "(reopold_agent\.\w+)"', source))
    assert named == groups


def imported(file: Path) -> set[str]:
    """The files of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reopold_agent"):
            place = ROOT / str(node.module).replace(".", "/")
            found |= {place.with_suffix(".py"), place / "__init__.py"}
            found |= {place / f"{each.name}.py" for each in node.names}
    return {path for path in found if path.is_file()}


def test_each_file_of_the_reading_order_is_used_by_one_before_it() -> None:
    listed = re.findall(
        r"^\d+\. \[([\w/.]+)\]\(\.\./([\w/.]+)\)", part("Following one training step"), re.MULTILINE
    )
    assert [f"reopold_agent/{shown}" for shown, _ in listed] == [path for _, path in listed]
    files = [ROOT / path for _, path in listed]
    assert files[:2] == [PACKAGE / "types.py", PACKAGE / "train" / "loop.py"]
    used: set[Path] = set()
    for file in files[1:]:
        assert file == files[1] or file in used, f"{file} is used by none of those before it"
        direct = imported(file)
        # What a package exports counts as imported from where it is defined.
        used |= direct | {i for f in direct if f.name == "__init__.py" for i in imported(f)}
