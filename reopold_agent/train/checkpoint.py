"""Checkpoints: written whole or not at all, checked when read."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from reopold_agent.common.files import remove_folder, replaced_folder, writing
from reopold_agent.errors import CheckpointError, StorageError, first_line
from reopold_agent.policies.loading import LoadedModel
from reopold_agent.policies.saving import save_checked
from reopold_agent.train.update import Updater

_PREFIX = "step-"
_ROLLOUTS = "rollouts.pt"

# A full disk is an OSError to Python, but safetensors and torch.save have their own kinds.
_NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    position: int,
    phase: str,
    student: LoadedModel,
    updater: Updater,
    keep: int,
    seconds: float = 0.0,
    teacher: LoadedModel | None = None,
    rollouts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``folder/step-NNNNNN`` and removes all but the newest ``keep`` checkpoints.

    The files go to a temporary folder first, are flushed to disk, and the folder is renamed:
    after kill -9 or with a full disk a checkpoint is there whole or not at all. The length and
    checksum (CRC-32) of each file stand in ``trainer.json``.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: number of steps done.
        position: number of task draws used so far.
        phase: phase of the next step, for people.
        student: model to save in Hugging Face layout under ``model/``.
        updater: optimizer and scheduler to save.
        keep: how many checkpoints stay.
        seconds: time spent on the run so far, over all its processes.
        teacher: model to save under ``teacher/``, where it changes in the run.
        rollouts: state of episodes that are generated ahead (`Rollouts.state`).

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, step)
    trainer = {
        "step": step,
        "position": position,
        "phase": phase,
        "seconds": seconds,
        "python_rng": _jsonable(random.getstate()),
        "numpy_rng": _jsonable(np.random.get_state(legacy=False)),
    }
    with new_checkpoint(target, newest_checkpoint(folder)) as temporary:
        student.save(temporary / "model")
        if teacher is not None:
            teacher.save(temporary / "teacher")
        torch.save(
            {
                "optimizer": updater.optimizer.state_dict(),
                "scheduler": updater.scheduler.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            temporary / "state.pt",
        )
        if rollouts is not None:
            torch.save(dict(rollouts), temporary / _ROLLOUTS)
        trainer["files"] = _checksums(temporary)
        (temporary / "trainer.json").write_text(json.dumps(trainer), encoding="utf-8")
    with writing(folder):
        for old in _checkpoints(folder)[:-keep]:
            remove_folder(old)
    return target


@contextmanager
def new_checkpoint(target: Path, newest: Path | None) -> Iterator[Path]:
    """Yields an empty folder that becomes the checkpoint ``target`` when the block succeeds.

    Args:
        target: the checkpoint's folder.
        newest: the last good checkpoint, if there is one, for the message.

    Raises:
        CheckpointError: the disk is full or not writable; ``target`` and others are unchanged.
    """
    try:
        with replaced_folder(target) as temporary, _full_disk_said(target.parent):
            yield temporary
    except _NOT_WRITTEN as error:
        kept = f"the last good checkpoint is {newest}" if newest else "there is no earlier one"
        reason = _reason(error.__cause__ if isinstance(error, StorageError) else error)
        raise CheckpointError(
            f"could not write checkpoint {target}: {reason}\n"
            f"Free some space or check permissions, then give the same command again; {kept}."
        ) from error


def save_final(
    student: LoadedModel, folder: Path, ids: Sequence[int], *, dtype: str | None = None
) -> bool:
    """Writes the trained student, complete, in Hugging Face layout; whole or not at all.

    Training cannot continue afterwards: a LoRA adapter is merged.

    Args:
        student, ids, dtype: as for `save_checked`.
        folder: replaced once the new one is complete and checked.

    Returns:
        Whether the files were read back and compared.

    Raises:
        StorageError: it cannot be written; an earlier one is unchanged.
        ModelError: what was written is not the trained student; an earlier one is unchanged.
    """
    try:
        with replaced_folder(folder) as temporary, _full_disk_said(folder.parent):
            return save_checked(student, temporary, ids, dtype=dtype)
    except StorageError:
        raise
    except _NOT_WRITTEN as error:
        raise StorageError(
            f"cannot write {folder}: {_reason(error)}\n"
            "Free some space or check permissions, then give the same command again."
        ) from error


@contextmanager
def _full_disk_said(folder: Path) -> Iterator[None]:
    """Raises an OSError about the full disk in place of torch's error about stream positions."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def checkpoint_path(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint after ``step`` steps, whether it exists or not."""
    return folder / f"{_PREFIX}{step:06d}"


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint with the most steps; None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``step``, ``position``, ``phase``, ``seconds`` and ``files``.

    Raises:
        CheckpointError: the folder is damaged.
    """
    path = checkpoint / "trainer.json"
    try:
        state = json.loads(path.read_text("utf-8"))
        if not isinstance(state, dict) or not {"step", "position", "seconds"} <= state.keys():
            raise ValueError("it is not the state of a trainer")
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    return state


def check_files(checkpoint: Path) -> None:
    """Compares every file with the length and checksum recorded when it was written.

    Raises:
        CheckpointError: one differs or cannot be read; the message names it and says how to go on.
    """
    # The first checkpoints of this project were written without checksums.
    for name, (size, checksum) in load_trainer_state(checkpoint).get("files", {}).items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
            if found != size:
                raise ValueError(f"it has {found} bytes instead of {size}")
            if _checksum(path) != checksum:
                raise ValueError("its checksum differs from the recorded one")
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Makes the error for an unusable file of a checkpoint; it says how to continue."""
    checkpoint = next(p for p in (path, *path.parents) if p.name.startswith(_PREFIX))
    before = [p for p in _checkpoints(checkpoint.parent) if p.name < checkpoint.name]
    way = f"from {before[-1]}" if before else "from the start (there is no earlier checkpoint)"
    return CheckpointError(
        f"cannot use the checkpoint's file {path}: {_reason(error)}\n"
        f"Make it readable or put a copy back; or remove {checkpoint} and give the same command "
        f"again to go on {way}."
    )


def restore(checkpoint: Path, updater: Updater) -> None:
    """Restores optimizer, scheduler and random generators; the weights are loaded with the model.

    Raises:
        CheckpointError: the folder is damaged or belongs to another model.
    """
    path = checkpoint / "state.pt"
    state = _loaded(path)
    try:
        updater.optimizer.load_state_dict(state["optimizer"])
        updater.scheduler.load_state_dict(state["scheduler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise damaged(path, error) from error
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    trainer = load_trainer_state(checkpoint)
    version, internal, gauss = trainer["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = trainer["numpy_rng"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)


def load_rollouts(checkpoint: Path) -> dict[str, Any] | None:
    """Reads the state of episodes that were generated ahead; None if there were none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / _ROLLOUTS
    return _loaded(path) if path.exists() else None


def _loaded(path: Path) -> dict[str, Any]:
    try:
        # weights_only: a checkpoint from elsewhere must not be able to run code.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
        raise damaged(path, error) from error
    return state


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if (p / "trainer.json").is_file())


def _reason(error: BaseException | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def _checksums(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns the length and CRC-32 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _checksum(path))
        for path in files
    }


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
