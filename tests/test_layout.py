"""What lies where in the repository, and what an import or an installation brings along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HEAVY = ("torchvision", "verl", "vllm", "peft", "ray", "datasets", "wandb", "mlflow", "av")


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
    modules = _imported("import reopold_agent.train, reopold_agent.engines.local")
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
    modules = _imported("import reopold_agent, reopold_agent.train, reopold_agent.hydra_groups")
    assert not modules & {*HEAVY, "torch", "transformers", "sklearn", "matplotlib"}
