"""The local engine, ``engine=local``: one process on one CPU or GPU.

This module checks a run, loads its models and assembles the loop; `loop` is the run itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reopold_agent.config import TrainConfig
from reopold_agent.data.demonstrations import Demonstration
from reopold_agent.objectives import Needs, Objective
from reopold_agent.policies.loading import (
    LoadedModel,
    Processing,
    check_available,
    check_vocabularies,
    context_length,
    device_name,
    load_model,
    load_processing,
    pick_device,
)
from reopold_agent.policies.registry import is_trainers_own, reads_weights
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.checks import checked_run
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train.banner import banner, exploration_note, show_banner
from reopold_agent.train.behaviour import old_logp_source
from reopold_agent.train.checkpoint import check_files, load_trainer_state, newest_checkpoint
from reopold_agent.train.collect import Collector, read_demonstrations
from reopold_agent.train.engine import Engine, model_specs, run_objective
from reopold_agent.train.evaluation import HeldOutEvaluation
from reopold_agent.train.finish import save_student, show_summary, write_summary
from reopold_agent.train.following import following_teacher
from reopold_agent.train.interrupts import Interrupts
from reopold_agent.train.loop import TrainingLoop
from reopold_agent.train.nonfinite import NonFiniteGuard
from reopold_agent.train.recovery import Recovery
from reopold_agent.train.roles import check_roles, make_roles, teacher_name
from reopold_agent.train.scoring import Scoring
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.update import Updater


class LocalEngine(Engine):
    """Trains a student in this process."""

    def _run(self) -> dict[str, Any]:
        config = self.config
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        saved = self._state.check(checkpoint)
        if checkpoint is not None and self._finished(checkpoint):
            return self._state.show_again()
        if checkpoint is not None:
            check_files(checkpoint)
        objective = run_objective(config, saved)
        check_roles(config, objective)
        following = config.model.teacher is not None and config.model.teacher.follow is not None
        specs = model_specs(config, objective)
        weights = reads_weights(config.policy.teacher)
        contexts = [
            context_length(check_available(spec, role, weights=role == "student" or weights))
            for role, spec in specs.items()
        ]
        device, autocast = self._device()
        if config.engine.threads is not None:
            torch.set_num_threads(config.engine.threads)
        _seed_everything(config.seed)

        config, tasks = checked_run(  # before any model is loaded
            config, load_processing(specs["student"], "student"), contexts, self.folder.data_report
        )
        recorded = read_demonstrations(config, objective)
        notes = [
            self._state.check_data(checkpoint is not None, recorded),
            exploration_note(config, objective),
        ]

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

        self._begin(objective, saved)
        self.folder.write_versions(device=device_name(device))
        with Interrupts() as interrupts, Progress(config.steps) as progress:
            lines = banner(
                config,
                self.folder,
                student,
                tasks,
                device=device_name(device),
                precision=str(autocast or torch.float32).removeprefix("torch."),
                teacher=teacher is not None,
            )
            show_banner(progress, lines, config, student, notes)
            loop = make_loop(
                config,
                objective,
                self.folder,
                student,
                teacher,
                tasks,
                progress=progress,
                interrupts=interrupts,
                command=self._command,
                recorded=recorded,
            )
            try:
                return loop.run(checkpoint)
            finally:
                loop.close()

    def _device(self) -> tuple[torch.device, torch.dtype | None]:
        device = pick_device(self.config.engine.device)
        precision = self.config.engine.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        return device, torch.bfloat16 if precision == "bfloat16" else None

    def _finished(self, checkpoint: Path) -> bool:
        done = int(load_trainer_state(checkpoint)["step"])
        return done >= self.config.steps and self.folder.summary.is_file()


def make_loop(
    config: TrainConfig,
    objective: Objective,
    folder: RunFolder,
    student: LoadedModel,
    teacher: Processing | None,
    tasks: Mapping[str, int],
    *,
    progress: Progress,
    interrupts: Interrupts,
    command: Sequence[str] = (),
    recorded: Sequence[Demonstration] | None = None,
) -> TrainingLoop:
    """Assembles the loop of a run from its parts.

    Args:
        config: the run's configuration.
        objective: the objective made for this run.
        folder: the run folder, locked.
        student: the model that learns.
        teacher: a `LoadedModel` if the teacher is in this process; None without a teacher.
        tasks: number of tasks by split.
        progress: shows the run to the user.
        interrupts: the signals received.
        command: the command line's arguments, for messages.
        recorded: the conversations that the objective trains on: `read_demonstrations`.
    """
    chat = ChatRenderer(student.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
    following = following_teacher(config.model.teacher, teacher, student)
    roles = make_roles(config, chat, student, teacher)
    scoring = None
    if objective.needs & Needs.TEACHER and not objective.needs & Needs.DEMONSTRATIONS:
        scoring = Scoring(roles.required_teacher(), teacher_name(config))
    guard = NonFiniteGuard(config.on_nonfinite)
    updater = Updater(
        roles.trainer,
        objective,
        config.optimizer,
        max_tokens=config.engine.max_tokens_per_micro_batch,
        teacher=roles.own_teacher,
        skip_nonfinite=guard.skips,
    )
    train_runner, eval_runner = (
        make_runner(config, chat, student.vision, max_turns=max_turns)
        for max_turns in (config.rollout.max_turns, config.evaluation.max_turns)
    )
    collector = Collector(
        config,
        objective,
        train_runner,
        roles.sampler,
        roles.teacher,
        tasks["train"],
        guard,
        recorded,
    )
    log = StepLog(config, objective, folder, roles, collector, guard, chat.raw, progress)
    recovery = Recovery(
        config,
        objective,
        folder,
        student,
        None if following is None else following.teacher,
        updater,
        log,
        guard,
        progress,
        interrupts,
        command,
    )

    def finish() -> dict[str, Any]:
        if config.steps and not save_student(student, folder, chat):
            progress.note(f"{folder.final} was not read back: too little memory is free")
        train_runner.close()
        eval_runner.close()
        note = exploration_note(config, objective)
        summary = write_summary(config, folder, recovery.seconds, command, note)
        progress.stop()
        show_summary(summary, folder)
        return summary

    # The student did not sample demonstrations, and a separate sampler gives no entropies.
    recompute = bool(objective.needs & Needs.DEMONSTRATIONS) or roles.separate
    source = "recompute" if recompute else config.engine.old_logp
    return TrainingLoop(
        config=config,
        objective=objective,
        roles=roles,
        collector=collector,
        behaviour_source=old_logp_source(source, roles.trainer),
        scoring=scoring,
        updater=updater,
        following=following,
        evaluation=HeldOutEvaluation(
            config, eval_runner, roles, tasks.get("eval", 0), log.metrics, progress, interrupts
        ),
        log=log,
        guard=guard,
        recovery=recovery,
        finish=finish,
    )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
