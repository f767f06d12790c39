"""That the extras resolve, agree with verl's own pins, and that CI's check of it can fail."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import importlib.metadata
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from reopold_agent.errors import MissingExtraError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CHECK = ROOT / ".ci" / "extras.py"
EXTRAS = ("verl", "vllm", "judge", "video", "hub", "track", "gym", "miniwob")

needs_uv = pytest.mark.skipif(
    importlib.util.find_spec("uv") is None, reason='needs uv: pip install -e ".[test]"'
)
needs_verl = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("verl", "vllm")),
    reason="needs the full environment",
)


@functools.cache
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    table = project()["project"]
    assert isinstance(table, dict)
    lines = table["optional-dependencies"][extra] if extra else table["dependencies"]
    return {found.name.lower(): found for found in map(Requirement, lines)}


def write_wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> None:
    """A wheel without code, in a simple index's folder."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    wheel = place / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(text)}\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)


BACKEND = """
import pathlib
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "sample-1.dist-info")
    info.mkdir()
    extras = pathlib.Path("METADATA").read_text()
    (info / "METADATA").write_text(extras)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name
"""


def write_project(folder: Path, vllm: str) -> Path:
    """A project with this package's extras, each of which needs the wheel of its name."""
    folder.mkdir()
    needs = {extra: f"sample-{extra}" for extra in EXTRAS} | {"vllm": vllm}
    table = "\n".join(f'{extra} = ["{need}"]' for extra, need in needs.items())
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "sample"\nversion = "1"\n'
        f"[project.optional-dependencies]\n{table}\n"
    )
    lines = [f"Provides-Extra: {e}\nRequires-Dist: {n}; extra == '{e}'" for e, n in needs.items()]
    head = "Metadata-Version: 2.1\nName: sample\nVersion: 1\n"
    (folder / "METADATA").write_text(head + "\n".join(lines) + "\n")
    (folder / "backend.py").write_text(BACKEND)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Says nothing."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """The address of a package index on the loopback with one wheel per extra."""
    folder = tmp_path / "index"
    write_wheel(folder, "iniconfig", "2.0")
    for extra in EXTRAS:
        write_wheel(folder, f"sample_{extra}", "1.0")
    for place in folder.iterdir():
        place.rename(place.with_name(place.name.replace("_", "-")))
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def check(folder: Path, address: str) -> subprocess.CompletedProcess[str]:
    """CI's check of the project in ``folder``, against the index at ``address``."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    return subprocess.run(
        [sys.executable, str(CHECK), "--project", str(folder)],
        env={**own, "PIP_INDEX_URL": address, "UV_DEFAULT_INDEX": address, "UV_NO_CACHE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@needs_uv
@pytest.mark.slow
def test_ci_passes_extras_that_resolve(tmp_path: Path, index: str) -> None:
    done = check(write_project(tmp_path / "project", "sample-vllm==1.0"), index)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resolves") == 4, done.stdout


@needs_uv
@pytest.mark.slow
def test_ci_fails_on_a_pin_that_no_release_meets(tmp_path: Path, index: str) -> None:
    done = check(write_project(tmp_path / "project", "sample-vllm==9.9"), index)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "does not resolve" in done.stdout
    assert "sample-vllm" in done.stdout


def test_ci_skips_with_a_reason_where_no_index_answers(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        done = check(write_project(tmp_path / "project", "sample-vllm==1.0"), address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped, no package index answers" in done.stdout


def test_ci_checks_every_extra_of_the_engine_and_every_python() -> None:
    text = CHECK.read_text("utf-8")
    namespace: dict[str, object] = {"__name__": "extras"}
    exec(compile(text, str(CHECK), "exec"), namespace)
    assert namespace["EXTRAS"] == EXTRAS
    versions = namespace["PYTHONS"]
    assert isinstance(versions, tuple)
    table = project()["project"]
    assert isinstance(table, dict)
    allowed = SpecifierSet(table["requires-python"])
    assert versions == ("3.10", "3.11", "3.12")
    assert all(allowed.contains(version) for version in versions)
    assert 'python" .ci/extras.py' in (ROOT / ".ci" / "run").read_text("utf-8")


def test_linters_check_for_the_oldest_python() -> None:
    tools = project()["tool"]
    assert isinstance(tools, dict)
    assert tools["ruff"]["target-version"] == "py310"
    assert tools["mypy"]["python_version"] == "3.10"


def test_the_extras_take_verl_with_its_own_pins() -> None:
    verl = requirements("verl")["verl"]
    assert verl.extras == {"vllm"}
    assert str(verl.specifier) == "==0.9.1"


@pytest.mark.full_env
@needs_verl
def test_our_ranges_and_this_environment_hold_what_verl_pins() -> None:
    ours = {**requirements(), **requirements("vllm"), **requirements("video")}
    seen = set()
    for line in importlib.metadata.requires("verl") or []:
        pin = Requirement(line)
        if pin.marker is None or not pin.marker.evaluate({"extra": "vllm"}):
            continue
        for exact in pin.specifier:
            if exact.operator == "==" and pin.name in ours:
                assert ours[pin.name].specifier.contains(exact.version), (str(ours[pin.name]), line)
                found = importlib.metadata.version(pin.name).split("+")[0]
                assert found == exact.version, f"{line}: .ci/full_env.txt has another"
                seen.add(pin.name)
    assert seen == {"torch", "torchvision", "transformers", "vllm"}


@pytest.mark.full_env
@needs_verl
def test_our_ranges_hold_what_this_environment_has() -> None:
    """The versions that the full environment's tests ran with are ones that users may get."""
    for name, requirement in {**requirements(), **requirements("vllm")}.items():
        found = importlib.metadata.version(name).split("+")[0]
        assert requirement.specifier.contains(found), (name, found)


def test_extras_are_installed_from_the_clone() -> None:
    """The package is on no index, so ``pip install "reopold-agent[...]"`` would fail."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("docker/*")]
    files += [
        path for name in ("reopold_agent", "examples") for path in (ROOT / name).rglob("*.py")
    ]
    wrong = [
        str(path) for path in files if re.search(r"reopold[-_]agent\[", path.read_text("utf-8"))
    ]
    assert wrong == []
    assert str(MissingExtraError("peft", "lora", "x")).endswith('pip install -e ".[lora]"')
