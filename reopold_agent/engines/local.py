"""The local engine: one process, one CPU or GPU.

A step: roll out with the student, let the teacher score the very same ids and pictures, update
on the objective, log. This module gets a run ready; `session` is the run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from reopold_agent.config import TrainConfig, config_differences
from reopold_agent.engines.checkpoint import load_trainer_state, newest_checkpoint
from reopold_agent.engines.environments import make_env, num_tasks
from reopold_agent.engines.interrupts import Interrupts
from reopold_agent.engines.session import Session
from reopold_agent.errors import CheckpointError, ConfigError
from reopold_agent.objectives import Needs, Objective, RunFacts, make_objective
from reopold_agent.policies.loading import (
    ModelSpec,
    check_available,
    check_vocabularies,
    device_name,
    load_model,
    pick_device,
)
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.summary import print_summary

FREE_TO_CHANGE = ("resume", "checkpoint", "logging")
"""Sections that do not influence what is computed; a resumed run may change them."""


class LocalEngine:
    """Trains a student in this process.

    Args:
        config: the checked configuration.
        raw: the same as plain values, for the run folder and for comparing on resume.
        folder: the run folder; an earlier run in it is continued (``resume``).
        command: words of a command line that would start this run again, for messages.
    """

    def __init__(
        self,
        config: TrainConfig,
        raw: Mapping[str, Any],
        folder: Path,
        command: Sequence[str],
    ) -> None:
        self.config, self._raw, self._command = config, dict(raw), list(command)
        self.folder = RunFolder(folder)

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary that ``summary.json`` holds.

        Raises:
            ReopoldError: anything the user can mend; the message says how.
            KeyboardInterrupt: after Ctrl-C, once the step is finished and saved.
        """
        with self.folder.lock():
            return self._run()

    def _run(self) -> dict[str, Any]:
        config = self.config
        checkpoint = self._resumable()
        if checkpoint is not None and self._finished(checkpoint):
            return self._show_again()
        objective = self._objective()
        following = config.model.teacher is not None and config.model.teacher.follow is not None
        specs = self._specs(bool(objective.needs & Needs.TEACHER))
        for role, spec in specs.items():
            check_available(spec, role)
        device, autocast = self._device()
        if config.engine.threads is not None:
            torch.set_num_threads(config.engine.threads)
        _seed_everything(config.seed)

        probe = make_env(config)  # tasks are loaded and checked here, before any model
        tasks = {split: num_tasks(probe, split) for split in ("train", "eval")}
        probe.close()

        student = load_model(
            specs["student"],
            "student",
            device,
            autocast=autocast,
            saved=checkpoint / "model" if checkpoint else None,
        )
        teacher = None
        if "teacher" in specs:
            teacher = load_model(
                specs["teacher"],
                "teacher",
                device,
                autocast=autocast,
                saved=checkpoint / "teacher" if checkpoint and following else None,
            )
            teacher.adapter.model.requires_grad_(False)
            check_vocabularies(student, teacher)

        if checkpoint is None:
            self.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(self._raw)))
        self.folder.write_versions(
            device=device_name(device)
        )  # a resumed run keeps those of before beside them
        with Interrupts() as interrupts, Progress(config.steps) as progress:
            session = Session(config, objective, self.folder, student, teacher, tasks, progress)
            return session.train(checkpoint, interrupts, self._command)

    def _objective(self) -> Objective:
        config = self.config
        settings = {key: value for key, value in config.objective.items() if key != "name"}
        objective = make_objective(config.objective["name"], settings)
        if objective.needs & Needs.OUTCOME and config.batch.samples < 2:
            raise ConfigError(
                f"objective={config.objective['name']} compares the episodes of one task, so "
                "batch.samples must be at least 2 (8, say, with fewer batch.prompts and "
                "batch.mini_batch)"
            )
        facts = RunFacts(config.steps, config.rollout.max_response_tokens)
        return objective.for_run(facts)

    def _specs(self, needs_teacher: bool) -> dict[str, ModelSpec]:
        """The checkpoints that this run loads, by role."""
        models = self.config.model
        specs = {"student": ModelSpec(**vars(models.student))}
        if not (needs_teacher or self.config.evaluation.teacher):
            return specs
        if models.teacher is None:
            name = self.config.objective["name"]
            if needs_teacher:
                raise ConfigError(f"objective={name} needs model.teacher, which is null")
            raise ConfigError(
                f"model.teacher is null, which suits objective={name}; set "
                "evaluation.teacher=false too, or there is none to evaluate"
            )
        values = vars(models.teacher)
        plain = {key: values[key] for key in values if not key.startswith("follow")}
        return {**specs, "teacher": ModelSpec(**plain)}

    def _device(self) -> tuple[torch.device, torch.dtype | None]:
        device = pick_device(self.config.engine.device)
        precision = self.config.engine.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        return device, torch.bfloat16 if precision == "bfloat16" else None

    def _resumable(self) -> Path | None:
        """The checkpoint to continue from, or None for a fresh start."""
        newest = newest_checkpoint(self.folder.checkpoints)
        resume = self.config.resume
        if resume == "never" and (newest is not None or self.folder.config.exists()):
            raise CheckpointError(
                f"{self.folder.path} already holds a run. Choose another hydra.run.dir, or "
                "resume=auto to continue it."
            )
        if newest is None:
            if resume == "must":
                raise CheckpointError(f"resume=must, but {self.folder.path} holds no checkpoint")
            return None
        if not self.folder.config.is_file():
            raise CheckpointError(f"{self.folder.path} has checkpoints, but no config.yaml")
        saved = OmegaConf.to_container(OmegaConf.load(self.folder.path / "config.yaml"))
        if not isinstance(saved, dict):
            raise CheckpointError(f"{self.folder.path / 'config.yaml'} is not a configuration")
        different = config_differences(
            {str(k): v for k, v in saved.items()}, self._raw, FREE_TO_CHANGE
        )
        if different:
            raise CheckpointError(
                f"{self.folder.path} was started with other settings (saved -> now):\n  "
                + "\n  ".join(different)
                + "\nGive the same settings to continue it, or another hydra.run.dir to start anew."
            )
        return newest

    def _finished(self, checkpoint: Path) -> bool:
        done = int(load_trainer_state(checkpoint)["step"])
        return done >= self.config.steps and self.folder.summary.is_file()

    def _show_again(self) -> dict[str, Any]:
        """The summary of a run that is complete; nothing is computed or written again."""
        summary: dict[str, Any] = json.loads(self.folder.summary.read_text(encoding="utf-8"))
        make_plots(self.folder.path)  # the only files that come after the summary
        print_summary(summary)
        return summary


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
