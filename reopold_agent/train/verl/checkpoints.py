"""The folders of verl's checkpoints: written whole or not at all, and found again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reopold_agent.common.files import remove_folder, write_text_atomic, writing
from reopold_agent.errors import CheckpointError
from reopold_agent.train.checkpoint import new_checkpoint

_PREFIX = "global_step_"
ADAPTER = "lora_adapter"
"""Folder of the student's LoRA adapter, as peft saves it, beside verl's own files of the actor."""

_TRACKER = "latest_checkpointed_iteration.txt"  # names the checkpoint from which verl continues


def save_checkpoint(
    folder: Path, step: int, keep: int | None, write: Callable[[Path], None]
) -> Path:
    """Writes ``folder/global_step_N`` and removes all but the newest ``keep`` checkpoints.

    verl itself writes into the final folder and empties its tracker file before it writes the new
    number, so that a full disk or a kill would leave a partial checkpoint or no valid tracker.

    Args:
        folder: the run's ``checkpoints`` folder, which all nodes share.
        step: number of steps done.
        keep: how many checkpoints stay, None for all; later ones than ``step``, which the run will
            replace, are left alone.
        write: writes the files into the empty folder that it gets.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"{_PREFIX}{step}"
    with new_checkpoint(target, newest_checkpoint(folder)) as temporary:
        write(temporary)
    with writing(folder):
        write_text_atomic(folder / _TRACKER, str(step))
        numbers = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")]
        done = sorted(int(number) for number in numbers if number.isdigit())
        for old in [number for number in done if number <= step][: -keep if keep else 0]:
            remove_folder(folder / f"{_PREFIX}{old}")
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns verl's newest complete checkpoint: the one that its tracker file names.

    Raises:
        CheckpointError: it names none; going on from the start would throw the others away.
    """
    tracker = folder / _TRACKER
    if not tracker.is_file():
        return None
    step = tracker.read_text(encoding="utf-8").strip()
    found = folder / f"{_PREFIX}{step}"
    if not step.isdigit() or not found.is_dir():
        there = ", ".join(sorted(p.name for p in folder.glob(f"{_PREFIX}*"))) or "none"
        raise CheckpointError(
            f"{tracker} says '{step}', which is not a checkpoint; there are: {there}\n"
            "Write the number of a complete one into it, or remove it to start over."
        )
    return found


def steps_of(checkpoint: Path) -> int:
    """Returns the number of steps done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))
