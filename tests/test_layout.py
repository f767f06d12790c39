"""The layout of the repository, and what an import or an installation includes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from setuptools import find_packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HEAVY = ("torchvision", "verl", "vllm", "peft", "ray", "datasets", "wandb", "mlflow", "av")


def tracked() -> list[Path]:
    """The files that the repository holds; skips where git does not know (a source archive)."""
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("needs the git repository")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


# Folders of a machine. Not the path of an address, nor /tmp; docker/ has a machine of its own.
MACHINE = re.compile(r"(?<![\w.:/~}-])/(?:work\b|(?:home|root|Users|mnt)/\w)(?:[\w.-]|/\w)*")


def test_no_file_names_a_path_of_a_machine() -> None:
    found = []
    for file in tracked():
        own = file == Path(__file__) or file.parent == ROOT / "docker"
        if own or file.suffix in (".png", ".safetensors"):
            continue
        paths = MACHINE.findall(file.read_text("utf-8", errors="ignore"))
        found += [f"{file.relative_to(ROOT)}: {path}" for path in paths]
    assert found == []


def test_git_ignores_what_commands_write() -> None:
    folders = ("runs", "results", "studies")  # default folders of train, evaluate and study
    found = [file for file in tracked() if file.relative_to(ROOT).parts[0] in folders]
    assert found == []
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "check-ignore", *(f"{name}/file" for name in folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [f"{name}/file" for name in folders]


def is_module(path: Path) -> bool:
    return path.suffix == ".py" and path.name != "__init__.py"


def test_the_house_has_few_rooms() -> None:
    """A room is a folder or module at the top of the package, or another folder of code."""
    package = ROOT / "reopold_agent"
    modules = {path.name for path in package.iterdir() if is_module(path)}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    others = {file.relative_to(ROOT).parts[0] for file in tracked() if file.suffix == ".py"}
    assert len(modules) <= 8, modules
    assert len(modules) + len(folders) + len(others - {"reopold_agent"}) <= 31


def test_no_module_imports_itself_in_a_circle() -> None:
    """Also not in a function: a lazy import that closes a circle shows a name in the wrong file."""
    grimp = pytest.importorskip("grimp", reason='comes with import-linter: pip install -e ".[dev]"')
    graph = grimp.build_graph("reopold_agent", exclude_type_checking_imports=True, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which holds the circle


@pytest.mark.parametrize("name", ["envs", "tools", "judges", "configs"])
def test_the_top_level_folders_are_links_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"reopold_agent/{name}"  # relative: a clone can lie anywhere
    assert (link / "__init__.py").is_file()


def test_only_our_own_name_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    where = project["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(str(ROOT), include=where["include"], exclude=where.get("exclude", ()))
    assert {name.split(".")[0] for name in found} == {"reopold_agent"}
    folders = {
        str(path.parent.relative_to(ROOT)).replace(os.sep, ".")
        for path in (ROOT / "reopold_agent").rglob("__init__.py")
    }
    assert folders == set(found)
    for path in (ROOT / "reopold_agent").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path} would not be installed"


def test_every_data_file_of_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    package = ROOT / "reopold_agent"
    patterns = project["tool"]["setuptools"]["package-data"]["reopold_agent"]
    shipped = {file for pattern in patterns for file in package.glob(pattern) if file.is_file()}
    present = {
        file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert present - shipped == set()
    assert package / "configs" / "train.yaml" in shipped
    assert package / "py.typed" in shipped


def _imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT.parent,  # the installed package, not the folder one stands in
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_training_needs_no_extra() -> None:
    modules = _imported("import reopold_agent.train, reopold_agent.train.setup")
    assert "torch" in modules  # else this test looked at nothing
    assert not modules & set(HEAVY)


def test_environments_need_no_torch() -> None:
    modules = _imported(
        "import gymnasium, reopold_agent.envs\n"
        "env = gymnasium.make('reopold/PixelReasoner-v0')\n"
        "env.reset(seed=0)\n"
    )
    assert not modules & {*HEAVY, "torch", "transformers"}


def test_the_command_line_is_ready_without_torch() -> None:
    modules = _imported("import reopold_agent, reopold_agent.train, reopold_agent.cli.groups")
    assert not modules & {*HEAVY, "torch", "transformers", "sklearn", "matplotlib"}
