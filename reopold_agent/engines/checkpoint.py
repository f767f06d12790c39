"""Checkpoints: written whole or not at all, and refused under another configuration."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from reopold_agent.engines.update import Updater
from reopold_agent.errors import CheckpointError
from reopold_agent.policies.loading import LoadedModel

_PREFIX = "step-"


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
) -> Path:
    """Writes ``folder/step-NNNNNN`` and removes all but the newest ``keep`` checkpoints.

    The files go to a temporary folder first, are flushed to disk, and the folder is renamed:
    after kill -9 or with a full disk a checkpoint is there whole or not at all.

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

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"{_PREFIX}{step:06d}"
    temporary = folder / f".writing-{target.name}-{os.getpid()}"
    try:
        for stale in folder.glob(".writing-*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
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
        trainer = {
            "step": step,
            "position": position,
            "phase": phase,
            "seconds": seconds,
            "python_rng": _jsonable(random.getstate()),
            "numpy_rng": _jsonable(np.random.get_state(legacy=False)),
        }
        (temporary / "trainer.json").write_text(json.dumps(trainer), encoding="utf-8")
        _flush_tree(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush_folder(folder)
    # A full disk is an OSError to Python, but safetensors and torch.save have their own kinds.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        newest = newest_checkpoint(folder)
        kept = f"the last good checkpoint is {newest}" if newest else "there is no earlier one"
        raise CheckpointError(
            f"could not write checkpoint {target}: {error}. Free some space or check permissions; "
            f"{kept}."
        ) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``step``, ``position``, ``phase`` and ``seconds``.

    Raises:
        CheckpointError: the folder is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {checkpoint / 'trainer.json'}: {error}") from error
    return state


def restore(checkpoint: Path, updater: Updater) -> None:
    """Puts optimizer, scheduler and random generators back. The weights are loaded as a model.

    Raises:
        CheckpointError: the folder is damaged or belongs to another model.
    """
    try:
        # weights_only: a checkpoint from elsewhere must not be able to run code.
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        updater.optimizer.load_state_dict(state["optimizer"])
        updater.scheduler.load_state_dict(state["scheduler"])
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"cannot restore {checkpoint / 'state.pt'}: {error}") from error
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    trainer = load_trainer_state(checkpoint)
    version, internal, gauss = trainer["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = trainer["numpy_rng"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if (p / "trainer.json").is_file())


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
