"""Sends metrics to Weights & Biases, online or offline."""

from __future__ import annotations

import importlib
import json
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reopold_agent.errors import ConfigError
from reopold_agent.tracking.trackers.base import (
    SENT,
    TRACKERS,
    Point,
    Started,
    TrackedRun,
    require,
)

_MODES = ("online", "offline")

_BLOCK, _HEADER = 32768, 7
_LAST = (1, 4)
"""Types of fragments that end a record: full ones and last parts."""


@TRACKERS.add("wandb")
@dataclass
class WeightsAndBiases:
    """Logs to a Weights & Biases run, whose id is saved in ``RUN/trackers.json``.

    Rows that W&B has are not sent again when a run resumes, since it cannot delete a row. The
    x-axis of every chart is ``step``, as in ``metrics.jsonl``.

    Attributes:
        project, entity: destination; entity null: the account's default.
        mode: ``online``, or ``offline``: files in ``RUN/wandb`` for ``wandb sync``. Null:
            ``WANDB_MODE``, else online.
        name: name of the run; null: the end of the folder's path.
        group: name for runs that belong together, such as seeds.
        tags: tags of the run.

    Raises:
        MissingExtraError: wandb is not installed.
        ConfigError: an unknown mode, or online without an API key.
    """

    project: str = "reopold"
    entity: str | None = None
    mode: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode is None:
            self.mode = os.environ.get("WANDB_MODE", "online")
        if self.mode not in _MODES:
            raise ConfigError(
                f"tracking.wandb.mode must be {' or '.join(_MODES)}, got '{self.mode}'"
            )
        require("wandb", "wandb", "wandb")
        if self.mode == "online" and not _has_key():
            raise ConfigError(
                "tracking=wandb has no API key. Run: wandb login, or set WANDB_API_KEY, or "
                "tracking.wandb.mode=offline to upload later"
            )

    def start(self, run: TrackedRun) -> Started:
        """Resumes the run with this id, or opens a new one."""
        import wandb

        name = run.id or uuid.uuid4().hex[:8]
        offline = self.mode == "offline"
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode="offline" if offline else "online",
            id=name,
            resume=None if offline else "allow",
            name=self.name or run.name,
            group=self.group,
            tags=self.tags or None,
            job_type=run.kind,
            dir=str(run.folder),
            config=dict(run.config),
            # The run folder has the terminal's output and the version of the code.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric(SENT, hidden=True)
        self._run.define_metric("*", step_metric="step")
        return Started(name, held_offline(run.folder, name) if offline else self._held())

    def _held(self) -> int:
        """Returns the number of rows that the server has of a resumed run."""
        held = self._run.summary.get(SENT)
        return int(held) if isinstance(held, int | float) else 0

    def log(self, point: Point, sent: int) -> None:
        """Passes the row to wandb's process.

        A kill of both processes may lose rows; `start` then finds out how many arrived.
        """
        self._run.log({"step": point.step, SENT: sent, **point.values})

    def finish(self, status: str) -> None:
        """Waits for the upload and closes the run."""
        self._run.finish(exit_code=0 if status == "finished" else 1)


def held_offline(folder: Path, name: str) -> int:
    """Counts rows in the offline files of a run; a kill loses those that wandb had not written."""
    held = 0
    for path in sorted((folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")):
        for record in offline_records(path):
            for item in record.history.item:
                if (item.key or "/".join(item.nested_key)) == SENT:
                    held = max(held, int(json.loads(item.value_json)))
    return held


def offline_records(path: Path) -> Iterator[Any]:
    """Reads the records of a ``.wandb`` file, up to where it is cut off.

    The format is LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md)
    after a header of 7 bytes; wandb no longer has a reader in Python.
    """
    # Not a plain import, since mypy does not see the classes that protobuf makes.
    record: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record

    data = path.read_bytes()
    at, whole = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # the rest of a block is too short for a record
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        piece = data[at + _HEADER : at + _HEADER + length]
        if kind == 0 or len(piece) < length:
            return
        at += _HEADER + length
        whole += piece
        if kind in _LAST:
            yield record.FromString(whole)
            whole = b""


def _has_key() -> bool:
    """Returns whether wandb has a key, in the environment or from ``wandb login``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error:
        return False
