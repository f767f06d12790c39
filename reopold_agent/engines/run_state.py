"""What engines share of a run: may it start or go on here, its objective, its checkpoints."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from reopold_agent.config import TrainConfig, config_differences
from reopold_agent.engines.interrupts import resume_command
from reopold_agent.errors import CheckpointError, ConfigError
from reopold_agent.objectives import Needs, Objective, RunFacts, make_objective
from reopold_agent.policies.loading import ModelSpec
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.signals import sigterm_as_interrupt
from reopold_agent.tracking.summary import print_summary
from reopold_agent.tracking.trackers import follow_run

FREE_TO_CHANGE = ("resume", "checkpoint", "logging", "tracking", "tools", "on_nonfinite")
"""Sections that do not influence what is computed; a resumed run may change them."""


class RunState:
    """The state of a run folder before anything is loaded.

    Args:
        config: the checked configuration.
        raw: the same as plain values.
        folder: the run folder.
    """

    def __init__(self, config: TrainConfig, raw: Mapping[str, Any], folder: RunFolder) -> None:
        self._config, self._raw, self._folder = config, dict(raw), folder

    def check(self, newest: Path | None) -> None:
        """Makes sure that the run may start, or go on from the checkpoint ``newest``.

        Raises:
            CheckpointError: ``resume`` forbids it, or the folder belongs to other settings.
        """
        resume, folder = self._config.resume, self._folder
        if resume == "never" and (newest is not None or folder.config.exists()):
            raise CheckpointError(
                f"{folder.path} already holds a run. Choose another hydra.run.dir, or "
                "resume=auto to continue it."
            )
        if newest is None:
            if resume == "must":
                raise CheckpointError(f"resume=must, but {folder.path} holds no checkpoint")
            return
        if not folder.config.is_file():
            raise CheckpointError(f"{folder.path} has checkpoints, but no config.yaml")
        try:
            saved = OmegaConf.to_container(OmegaConf.load(folder.config))
        except (OSError, ValueError, YAMLError) as error:
            raise CheckpointError(f"cannot read {folder.config}: {error}") from error
        if not isinstance(saved, dict):
            raise CheckpointError(f"{folder.config} is not a configuration")
        different = config_differences(
            {str(key): value for key, value in saved.items()}, self._raw, FREE_TO_CHANGE
        )
        if different:
            raise CheckpointError(
                f"{folder.path} was started with other settings (saved -> now):\n  "
                + "\n  ".join(different)
                + "\nGive the same settings to continue it, or another hydra.run.dir to start anew."
            )

    def show_again(self) -> dict[str, Any]:
        """The summary of a run that is complete; nothing is computed or written again."""
        try:
            summary: dict[str, Any] = json.loads(self._folder.summary.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {self._folder.summary}: {error}\n"
                "Remove it and give the same command again: it is made anew from metrics.jsonl."
            ) from error
        make_plots(self._folder.path)  # the only files that come after the summary
        print_summary(summary)
        return summary


class Engine(ABC):
    """Trains a student; what an engine does is its `_run`.

    Args:
        config: the checked configuration.
        raw: the same as plain values, for the run folder and for comparing on resume.
        folder: the run folder; an earlier run in it is continued (``resume``).
        command: words of a command line that would start this run again, for messages.
    """

    def __init__(
        self, config: TrainConfig, raw: Mapping[str, Any], folder: Path, command: Sequence[str]
    ) -> None:
        self.config, self._raw, self._command = config, dict(raw), list(command)
        self.folder = RunFolder(folder)
        self._state = RunState(config, self._raw, self.folder)

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary that ``summary.json`` holds.

        Raises:
            ReopoldError: anything the user can mend; the message says how.
            KeyboardInterrupt: after Ctrl-C, once the step is finished and saved.
        """
        trackers = follow_run(self.config.tracking, self.folder.path, self._raw)
        with sigterm_as_interrupt(), self.folder.lock(), trackers:
            return self._run()

    def _config_text(self) -> str:
        """Content of ``config.yaml``, headed by the command as a comment of one line."""
        command = " ".join(resume_command(self._command, self.folder.path).splitlines())
        return f"# {command}\n{OmegaConf.to_yaml(OmegaConf.create(self._raw))}"

    @abstractmethod
    def _run(self) -> dict[str, Any]:
        """The run, with the folder held."""


def run_objective(config: TrainConfig) -> Objective:
    """The run's objective with what depends on the run filled in.

    Raises:
        ConfigError: a setting is wrong, or there are no groups to compare.
    """
    settings = {key: value for key, value in config.objective.items() if key != "name"}
    objective = make_objective(config.objective["name"], settings)
    if objective.needs & Needs.OUTCOME and config.batch.samples < 2:
        raise ConfigError(
            f"objective={config.objective['name']} compares the episodes of one task, so "
            "batch.samples must be at least 2 (8, say, with fewer batch.prompts and "
            "batch.mini_batch)"
        )
    return objective.for_run(RunFacts(config.steps, config.rollout.max_response_tokens))


def needs_teacher(config: TrainConfig, objective: Objective) -> bool:
    """Whether the run has something to ask a teacher."""
    return bool(objective.needs & Needs.TEACHER) or config.evaluation.teacher


def model_specs(config: TrainConfig, objective: Objective) -> dict[str, ModelSpec]:
    """The checkpoints that a run needs, by role; ``teacher`` only where it has one to ask.

    Raises:
        ConfigError: a teacher is needed and there is none.
    """
    models = config.model
    specs = {"student": ModelSpec(**vars(models.student))}
    if not needs_teacher(config, objective):
        return specs
    if models.teacher is None:
        name = config.objective["name"]
        if objective.needs & Needs.TEACHER:
            raise ConfigError(f"objective={name} needs model.teacher, which is null")
        raise ConfigError(
            f"model.teacher is null, which suits objective={name}; set "
            "evaluation.teacher=false too, or there is none to evaluate"
        )
    values = vars(models.teacher)
    plain = {key: values[key] for key in values if not key.startswith("follow")}
    return {**specs, "teacher": ModelSpec(**plain)}
