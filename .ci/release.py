"""Builds the source archive and the wheel, looks inside, and uses the wheel as a user would.

    python .ci/release.py [--keep DIR] [--build-only]

The archives are built from a copy of what belongs to the repository (the wheel from the source
archive), so that nothing else can get in. The wheel is installed into a fresh virtual environment
with its dependencies; there, with the checkout on no path, `reopold --version` answers, the
labelled pairs are graded, the main job runs two steps and an evaluation a few rows. Needs uv and
setuptools (the extra ``test``).

Exit status 1: something is missing, is there and should not be, or does not work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "reopold_agent"
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
"""Contents of the source archive besides the package."""
MADE = {"PKG-INFO", "setup.cfg"}
"""Files that setuptools adds to it."""
NEEDED = ("configs/train.yaml", "demo/weights/", "py.typed", "types.py")
"""Of the package; a name with a slash at its end stands for at least one file below it."""
SECONDS = 900
MAX_WHEEL_MB = 25


def belonging(root: Path) -> list[str]:
    """Files of a checkout, committed or about to be: not what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.split("\0") if name]
    return sorted(name for name in set(names) if os.path.lexists(root / name))


def copy(root: Path, names: Iterable[str], to: Path) -> None:
    """Copies files, links as links."""
    for name in names:
        goal = to / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_symlink():
            goal.symlink_to(os.readlink(root / name))
        else:
            goal.write_bytes((root / name).read_bytes())


def in_archive(path: Path) -> list[str]:
    """The files of a source archive, without its top folder.

    Raises:
        ValueError: it holds a link, or something outside that folder.
    """
    found = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            inside = PurePosixPath(member.name).parts
            if member.issym() or member.islnk() or ".." in inside or member.name.startswith("/"):
                raise ValueError(f"{path.name}: {member.name} is a link or leads outside")
            if member.isfile():
                found.append("/".join(inside[1:]))
    return found


def in_wheel(path: Path) -> list[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def wrong_with_sdist(names: Sequence[str], package: set[str]) -> list[str]:
    """Returns missing and unwanted files of a source archive."""
    own = {name for name in names if not name.startswith(f"{PACKAGE}.egg-info/")} - MADE
    expected = BESIDE | package
    return [f"the source archive lacks {name}" for name in sorted(expected - own)] + [
        f"the source archive holds {name}" for name in sorted(own - expected)
    ]


def wrong_with_wheel(names: Sequence[str], package: set[str]) -> list[str]:
    """Returns missing and unwanted files of a wheel."""
    info = {name for name in names if ".dist-info/" in name.split("/", 1)[0] + "/"}
    own = set(names) - info
    wrong = [f"the wheel lacks {name}" for name in sorted(package - own)]
    wrong += [f"the wheel holds {name}" for name in sorted(own - package)]
    wrong += [
        f"the wheel has no {PACKAGE}/{needed}"
        for needed in NEEDED
        if not any(name.startswith(f"{PACKAGE}/{needed}") for name in own)
    ]
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        wrong.append("the wheel lacks the license")
    return wrong


def build(work: Path) -> tuple[Path, Path]:
    """The source archive, and the wheel that was built from it."""
    out = work / "dist"
    copy(ROOT, belonging(ROOT), work / "source")
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--no-build-isolation"]
    command += ["--python", sys.executable, "--out-dir", str(out), str(work / "source")]
    subprocess.run(command, check=True, timeout=SECONDS)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def use(wheel: Path, work: Path) -> None:
    """Installs the wheel in a fresh environment and works with it there.

    Raises:
        subprocess.CalledProcessError: a command failed.
        AssertionError: it did not do what it should.
    """
    home = work / "venv"
    venv.create(home, with_pip=True)
    # Neither the checkout nor this environment on any path.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"PATH": f"{home / 'bin'}{os.pathsep}{env.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
    place = work / "elsewhere"
    place.mkdir()

    def run(*command: str) -> str:
        print("$", " ".join(command), flush=True)
        done = subprocess.run(
            command, cwd=place, env=env, check=True, timeout=SECONDS, stdout=subprocess.PIPE
        )
        return done.stdout.decode()

    run("pip", "install", "--quiet", str(wheel))
    run("pip", "check")
    where = run("python", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)").strip()
    assert Path(where).is_relative_to(home), where
    version = run("reopold", "--version").split()[-1]
    assert f"-{version}-" in wheel.name, (version, wheel.name)
    assert "| this project " in run("reopold", "judge", "check")
    small = ["batch.prompts=4", "batch.mini_batch=4", "evaluation.tasks=8", "evaluation.every=0"]
    run("reopold", "train", "env=pixel_reasoner", "steps=2", *small, "hydra.run.dir=run")
    summary = json.loads((place / "run" / "summary.json").read_text("utf-8"))
    assert summary["after"]["n"] == 8, summary
    words = ["benchmark=demo", "model=run", "benchmarks.demo.limit=6", "hydra.run.dir=evaluated"]
    run("reopold", "evaluate", *words)
    results = json.loads((place / "evaluated" / "results.json").read_text("utf-8"))
    assert results["benchmarks"]["demo"]["answers"] == 6, results


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the two archives there")
    parser.add_argument("--build-only", action="store_true", help="do not install the wheel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build(work)
        package = {name for name in belonging(ROOT) if name.startswith(f"{PACKAGE}/")}
        wrong = wrong_with_sdist(in_archive(sdist), package)
        wrong += wrong_with_wheel(in_wheel(wheel), package)
        for path in (sdist, wheel):
            size = path.stat().st_size / 1e6
            print(f"{path.name}: {size:.1f} MB")
            if size > MAX_WHEEL_MB:
                wrong.append(f"{path.name} is larger than {MAX_WHEEL_MB} MB")
        print(*wrong, sep="\n", end="\n" if wrong else "")
        if wrong:
            return 1
        if not options.build_only:
            use(wheel, work)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                path.rename(options.keep / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
