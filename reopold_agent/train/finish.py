"""Finishes a run: writes the trained student as ``final/``, ``summary.json`` and the plots."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.cli.groups import key_of, place_words
from reopold_agent.common.files import write_json_atomic
from reopold_agent.config import TrainConfig
from reopold_agent.errors import ModelError
from reopold_agent.policies.loading import LoadedModel
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.summary import print_summary
from reopold_agent.train.checkpoint import save_final
from reopold_agent.train.evaluation import MetricsRow, end_rows, sampling_kind
from reopold_agent.train.interrupts import again
from reopold_agent.types import Message, Sampling


def save_student(student: LoadedModel, folder: RunFolder, chat: ChatRenderer) -> bool:
    """Writes the trained student, merged with its LoRA adapter, and compares what was written.

    Returns:
        Whether the files could be read back: `save_checked`.

    Raises:
        StorageError: it cannot be written.
        ModelError: what was written is not the trained student.
    """
    try:
        return save_final(student, folder.final, probe_ids(chat))
    except ModelError as error:
        raise ModelError(
            f"{error}\nThe checkpoints are whole, and {folder.final} is as it was before. Please "
            "report this with versions.json and model.student of config.yaml."
        ) from error


def probe_ids(chat: ChatRenderer) -> list[int]:
    """Returns the short conversation whose log-probs are compared: see `save_checked`."""
    prompt, _ = chat.prompt([Message("user", ("What is 17 + 25?",))])
    return [*prompt, *chat.turn_ids("17 + 25 = 42, so the answer is \\boxed{42}.")]


def write_summary(
    config: TrainConfig,
    folder: RunFolder,
    seconds: float,
    command: Sequence[str],
    note: str | None = None,
) -> dict[str, Any]:
    """Writes ``summary.json``, which marks the run as complete.

    Args:
        config: the run's configuration.
        folder: the run folder with all rows of metrics.
        seconds: time spent on the run, over all its processes.
        command: the command line's arguments.
        note: what the user should know of the run.
    """
    summary = summarise(read_metrics(folder.metrics), config, folder.path)
    summary["seconds"] = round(seconds, 1)
    if note is not None:
        summary["note"] = note
    summary["next"] = next_commands(config, folder.path, command)
    write_json_atomic(folder.summary, summary)
    return summary


def next_commands(config: TrainConfig, folder: Path, command: Sequence[str]) -> list[str]:
    """Returns commands for after the run, which repeat the words that it was started with.

    The evaluation takes an environment's settings from the run, but looks for its option where the
    run did. Viewer and export read the run's folder only.
    """
    env = [word for word in command if key_of(word) == "env"] or [config.env_word]
    evaluate = ["python", "-m", "reopold_agent.evaluate", *place_words(command), env[-1]]
    if not config.steps:
        return [again(command, "steps=100"), shlex.join([*evaluate, "model=DIR"])]
    held_out = all(
        each.data.eval is not None for each in config.members.values() if each.env.takes_data
    )
    export = ["python", "-m", "reopold_agent.train.export", str(folder), f"{folder}-bf16"]
    return [
        shlex.join(["python", "-m", "reopold_agent.view", str(folder)]),
        *([shlex.join([*evaluate, f"model={folder}"])] if held_out else []),
        again(command, f"seed={config.seed + 1}"),
        again(command, f"steps={2 * config.steps}", f"hydra.run.dir={folder}"),
        shlex.join([*export, "dtype=bfloat16"]),
    ]


def show_summary(summary: Mapping[str, Any], folder: RunFolder) -> None:
    """Draws the plots and prints the summary."""
    make_plots(folder.path)
    print_summary(summary)


def summarise(rows: Sequence[MetricsRow], config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Returns the content of ``summary.json``, from the rows of ``metrics.jsonl``."""
    fields = ("success", "low", "high", "n", "tool_rate")
    own = sampling_kind(Sampling(config.sampling.temperature, config.sampling.top_p))

    def find(who: str, step: int) -> dict[str, Any] | None:
        ends = end_rows(rows, who, step)
        found = {kind: {name: row[name] for name in fields} for kind, row in ends.items()}
        if own not in found:
            return None

        def of_environment(name: str) -> dict[str, Any]:
            each, greedy = (
                {field: ends.get(kind, {}).get(f"env/{name}/{field}") for field in fields}
                for kind in (own, "greedy")
            )
            return {**each, "greedy": greedy}

        part = {**found[own], "greedy": found.get("greedy")}
        if config.mix is not None:
            part["envs"] = {name: of_environment(name) for name in config.members}
        return part

    # Adds up the rows' seconds, so that a resumed run counts all its steps.
    steps = [row["time/step"] for row in rows if row["kind"] == "train"]
    return {
        "before": find("student", 0),
        "after": find("student", config.steps),
        "teacher": find("teacher", 0),
        "env": config.env.name,
        "seed": config.seed,
        "temperature": config.sampling.temperature,
        "steps": config.steps,
        "run": str(folder),
        "train_seconds": round(sum(steps), 1),
    }
