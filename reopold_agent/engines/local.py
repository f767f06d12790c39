"""The local engine: one process, one CPU or GPU.

A step: roll out with the student, let the teacher score the very same ids and pictures, update
on the objective, log. This module gets a run ready; `session` is the run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reopold_agent.engines.checkpoint import check_files, load_trainer_state, newest_checkpoint
from reopold_agent.engines.environments import checked_tasks
from reopold_agent.engines.interrupts import Interrupts
from reopold_agent.engines.roles import check_roles
from reopold_agent.engines.run_state import Engine, model_specs, run_objective
from reopold_agent.engines.session import Session
from reopold_agent.policies.loading import (
    Processing,
    check_available,
    check_vocabularies,
    device_name,
    load_model,
    load_processing,
    pick_device,
)
from reopold_agent.policies.registry import is_trainers_own, reads_weights
from reopold_agent.tracking.progress import Progress


class LocalEngine(Engine):
    """Trains a student in this process."""

    def _run(self) -> dict[str, Any]:
        config = self.config
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        self._state.check(checkpoint)
        if checkpoint is not None and self._finished(checkpoint):
            return self._state.show_again()
        if checkpoint is not None:
            check_files(checkpoint)
        objective = run_objective(config)
        check_roles(config, objective)
        following = config.model.teacher is not None and config.model.teacher.follow is not None
        specs = model_specs(config, objective)
        weights = reads_weights(config.policy.teacher)
        for role, spec in specs.items():
            check_available(spec, role, weights=role == "student" or weights)
        device, autocast = self._device()
        if config.engine.threads is not None:
            torch.set_num_threads(config.engine.threads)
        _seed_everything(config.seed)

        tasks = checked_tasks(config, self.folder.data_report)  # before any model is loaded

        student = load_model(
            specs["student"],
            "student",
            device,
            autocast=autocast,
            saved=checkpoint / "model" if checkpoint else None,
        )
        teacher: Processing | None = None
        if "teacher" in specs and is_trainers_own(config.policy.teacher):
            model = load_model(
                specs["teacher"],
                "teacher",
                device,
                autocast=autocast,
                saved=checkpoint / "teacher" if checkpoint and following else None,
            )
            model.adapter.model.requires_grad_(False)
            teacher = model
        elif "teacher" in specs:
            teacher = load_processing(specs["teacher"], "teacher", weights=weights)
        if teacher is not None:
            check_vocabularies(student, teacher)

        if checkpoint is None:
            self.folder.write_config(self._config_text())
        self.folder.write_versions(
            device=device_name(device)
        )  # a resumed run keeps those of before beside them
        with Interrupts() as interrupts, Progress(config.steps) as progress:
            session = Session(config, objective, self.folder, student, teacher, tasks, progress)
            try:
                return session.train(checkpoint, interrupts, self._command)
            finally:
                session.close()

    def _device(self) -> tuple[torch.device, torch.dtype | None]:
        device = pick_device(self.config.engine.device)
        precision = self.config.engine.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        return device, torch.bfloat16 if precision == "bfloat16" else None

    def _finished(self, checkpoint: Path) -> bool:
        done = int(load_trainer_state(checkpoint)["step"])
        return done >= self.config.steps and self.folder.summary.is_file()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
