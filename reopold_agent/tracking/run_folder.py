"""The folder of a run: its layout, its lock, and the versions that the run was made with."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from typing_extensions import Self

import reopold_agent
from reopold_agent.common.files import (
    remove_leftovers,
    write_json_atomic,
    write_text_atomic,
    writing,
)
from reopold_agent.errors import CheckpointError, DataError

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "numpy", "gymnasium", "hydra-core", "pillow", "safetensors")

STARTED_IN = "# in "
"""Begins the line of ``config.yaml`` that names the folder in which the run was started."""

_CHECKPOINT = re.compile(r"step-(\d{6,})")


class RunFolder:
    """Paths of the files of a run. Creating one touches nothing; `lock` creates the folders.

    Attributes:
        path: the folder, absolute.
        config, versions, metrics, trajectories, summary, data_report, data, model, log: paths of
            its files.
        chat_template: the chat template that a setting gave, as it was when the run started.
        pictures, plots, checkpoints: paths of its folders.
        final: folder of the trained student, created when it is saved.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.chat_template = self.path / "chat_template.jinja"
        self.versions = self.path / "versions.json"
        self.metrics = self.path / "metrics.jsonl"
        self.trajectories = self.path / "trajectories.jsonl"
        self.summary = self.path / "summary.json"
        self.data_report = self.path / "data_report.json"
        self.data = self.path / "data.json"
        self.model = self.path / "model.json"
        self.log = self.path / "train.log"
        self.pictures = self.path / "pictures"
        self.plots = self.path / "plots"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    @contextmanager
    def lock(self) -> Iterator[Self]:
        """Creates the folders and locks the run folder for this process during the context.

        The lock is ``flock`` on ``RUN/.lock``: the kernel releases it when the process ends in any
        way, including SIGKILL, so no stale lock can block a resume. (A child made by a bare fork
        shares it.) On Windows there is no lock. Partial files of a killed process are removed,
        and in the end what this created, if no ``config.yaml`` was written.

        Raises:
            CheckpointError: another process (or this one, by another context) has the lock, or
                the folder cannot be created.
        """
        try:
            for folder in (self.pictures, self.plots, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            # "a" neither fails on the file of a living owner nor empties it.
            stream = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot make the run folder {self.path}: {error}") from error
        with stream:
            self._acquire(stream)
            with writing(self.path):
                remove_leftovers(self.path, self.pictures, self.plots, self.checkpoints)
            try:
                yield self
            finally:
                self._remove_unused()

    def _remove_unused(self) -> None:
        """Removes what `lock` created if nothing was run, which begins with ``config.yaml``."""
        if self.config.exists():
            return
        for folder in (self.pictures, self.plots, self.checkpoints):
            if not any(folder.iterdir()):
                folder.rmdir()
        if [path.name for path in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()

    def checkpoint(self, step: int) -> Path:
        """Returns the folder of the checkpoint after ``step`` updates."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Lists the steps of existing checkpoints, ascending; other folders do not count."""
        found = (_CHECKPOINT.fullmatch(p.name) for p in self.checkpoints.iterdir() if p.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def refuse_other(self, command: Literal["train", "evaluate"]) -> None:
        """Checks, before anything is written, that the folder holds nothing of another command.

        Both write ``config.yaml``: a run whose own is lost cannot be continued.

        Raises:
            CheckpointError: it holds an evaluation, and this is ``train``, or the other way round.
        """
        holds = self._holds()
        if holds in (None, command):
            return
        what, doing = (
            ("a training run", "evaluate") if holds == "train" else ("an evaluation", "train")
        )
        raise CheckpointError(
            f"{self.path} holds {what}, which `{doing}` would overwrite.\n"
            "Give another hydra.run.dir, or leave it out for a new folder."
        )

    def _holds(self) -> str | None:
        """Returns the command whose files the folder has; above all ``config.yaml`` tells."""
        try:
            keys = set(re.findall(r"^(\w+):", self.config.read_text("utf-8"), re.MULTILINE))
        except (OSError, ValueError):
            keys = set()
        if "objective" in keys or "benchmarks" in keys:
            return "train" if "objective" in keys else "evaluate"
        if (self.path / "responses.jsonl").is_file():
            return "evaluate"
        saved = self.checkpoints.is_dir() and self.checkpoint_steps()
        return "train" if saved or self.metrics.is_file() else None

    def write_config(self, text: str) -> None:
        """Writes ``config.yaml``, the resolved configuration, atomically."""
        write_text_atomic(self.config, text)

    def same_template(self, saved: dict[str, Any], now: dict[str, Any], text: str | None) -> None:
        """Checks that a run goes on with the chat template that it was started with.

        Its text decides: a file may have got another name, and one that is named may have changed.
        So the setting is taken out of both mappings.

        Args:
            saved, now: the settings that hold ``chat_template``, then and now.
            text: the template now; None for the model's own.

        Raises:
            CheckpointError: it is another one.
        """
        if not self.chat_template.is_file():
            return  # the model's own: then the setting decides
        if self.chat_template.read_text("utf-8") != text:
            raise CheckpointError(
                f"{self.path} was started with the chat template {saved.get('chat_template')}, and "
                f"its text is not that of {now.get('chat_template')} now.\nGive chat_template="
                f"{self.chat_template} to continue it (model.chat_template= in train), or another "
                "hydra.run.dir to start anew."
            )
        for settings in (saved, now):
            settings.pop("chat_template", None)

    def write_template(self, text: str | None) -> None:
        """Writes ``chat_template.jinja``, if a setting gave one."""
        if text is not None:
            write_text_atomic(self.chat_template, text)

    def write_versions(self, device: str = "cpu") -> dict[str, Any]:
        """Writes ``versions.json``: platform and package versions of this process (see `versions`).

        When a run resumes with other versions, the earlier ones stay under ``earlier``.
        """
        now = versions(device)
        earlier: list[Any] = []
        if self.versions.exists():
            try:
                before = json.loads(self.versions.read_bytes())
                earlier = before.pop("earlier", [])
            except (ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.versions} is damaged ({error}); delete it to continue"
                ) from error
            if before != now:
                earlier = [*earlier, before]
        write_json_atomic(self.versions, {**now, "earlier": earlier} if earlier else now)
        return now

    def _acquire(self, stream: IO[str]) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip()
            raise CheckpointError(
                f"the run folder {self.path} is in use"
                + (f" by {owner}" if owner else "")
                + "; wait for that run to end, or choose another folder with hydra.run.dir="
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # Some network file systems have no locks; training without one is better than none.
            _log.warning("%s: this file system has no locks (%s)", self.path, error)
        with writing(self.path / ".lock"):  # unbuffered: a buffer would be flushed again on closing
            os.ftruncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def run_settings(run: Path) -> dict[str, Any]:
    """Returns the values of a run's ``config.yaml``, with paths that hold in any folder.

    The paths of rows and models are made absolute where they are files or folders, seen from where
    the run was started (`STARTED_IN`; earlier versions did not record it).

    Raises:
        DataError: it is not a configuration.
        OSError, YAMLError: it cannot be read.
    """
    text = (run / "config.yaml").read_text("utf-8")
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise DataError(f"{run / 'config.yaml'} is not a configuration")
    found = re.search(rf"^{STARTED_IN}(.+)$", text, re.MULTILINE)
    if found is not None:
        folder = Path(found.group(1))
        members = (values.get("mix") or {}).get("envs") or {}
        for part in (values, *members.values()):
            for section in ("data", "model"):
                _make_absolute(part.get(section), folder)
    return {str(key): value for key, value in values.items()}


def _make_absolute(settings: Any, folder: Path) -> None:
    """Makes the local paths in a section ``data`` or ``model`` absolute, in place."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            teachers = value if key == "teachers" else ("path",)
            for name in teachers:
                path = value.get(name)
                if not isinstance(path, str) or path in ("", "self") or path.startswith("~"):
                    continue
                if (folder / path).exists():
                    value[name] = str(folder / path)
            _make_absolute(value, folder)


def versions(device: str = "cpu") -> dict[str, Any]:
    """Returns platform and package versions; null where a package or the checkout is absent.

    Args:
        device: name of the training device ("cpu", "NVIDIA H100 80GB HBM3").

    Returns:
        ``reopold_agent``, ``python``, ``platform``, ``cpu_count``, ``device``, ``packages`` (name
        to version) and ``git`` (``commit``, ``dirty``), null when the package does not run from
        its own checkout.
    """
    return {
        "reopold_agent": reopold_agent.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(Path(reopold_agent.__file__).resolve().parents[1]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path) -> dict[str, Any] | None:
    # Only the project's own checkout: an installed copy may be inside another repository.
    if not ((root / ".git").exists() and (root / "pyproject.toml").exists()):
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.info("git is not usable in %s: %s", root, error)
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    if status is None:
        return None
    return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": bool(status)}
