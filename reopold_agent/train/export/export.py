"""Reads a run's student, merges and converts it, writes it, and uploads it."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from reopold_agent.config import TrainConfig, build
from reopold_agent.errors import ConfigError, MissingExtraError, ModelError
from reopold_agent.policies.loading import LoadedModel, final_student, load_model, student_spec
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.tracking.run_folder import RunFolder, run_settings
from reopold_agent.train.checkpoint import check_files, newest_checkpoint, save_final
from reopold_agent.train.finish import probe_ids

DTYPES = ("bfloat16", "float16", "float32")


def export(run: Path, folder: Path, dtype: str) -> bool:
    """Writes the student of a run as a complete model; returns whether it was read back.

    The student is ``final/``, or that of the newest checkpoint while the run is not finished.

    Args:
        run: the run folder.
        folder: where to write; it must not exist, or be empty.
        dtype: of the weights.

    Raises:
        ConfigError: a setting is wrong, or ``run`` has no student.
        ModelError: the student cannot be read, or what was written is not the student.
        StorageError: it cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: there is no such dtype.\nUse {', '.join(DTYPES)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already.\nName a new folder, or remove this one.")
    student = _student(run, folder)
    return save_final(student, folder, probe_ids(ChatRenderer(student.tokenizer)), dtype=dtype)


def check_push(name: str) -> None:
    """Checks that an upload can be tried, before anything is loaded.

    Raises:
        ConfigError: this is not the name of a repository.
        MissingExtraError: the hub's package is not installed.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise ConfigError(f"push={name} is no repository of the hub.\nWrite push=ORG/NAME.")
    if find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub", "push=")


def push(folder: Path, name: str) -> str:
    """Uploads a folder to a repository of the hub, private if it is new; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder).repo_url)


def _student(run: Path, folder: Path) -> LoadedModel:
    try:
        values = run_settings(run)
    except OSError as error:
        raise ConfigError(
            f"{run} is not the folder of a training run: it has no config.yaml.\n"
            f"Give the folder that training printed: `reopold export RUN {folder}`."
        ) from error
    models, kept = build(TrainConfig, values).model, RunFolder(run).chat_template
    spec = student_spec(replace(models, chat_template=str(kept) if kept.is_file() else None))
    checkpoint = newest_checkpoint(run / "checkpoints")
    final = final_student(run, has_checkpoint=checkpoint is not None)
    if final is not None:
        return load_model(spec.saved_in(final), "student", torch.device("cpu"))
    if checkpoint is None:
        raise ModelError(f"{run} has no student yet.\nWait for its first checkpoint.")
    check_files(checkpoint)
    return load_model(spec, "student", torch.device("cpu"), saved=checkpoint / "model")
