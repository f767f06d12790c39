"""The local engine, ``engine=local``: one process on one CPU or GPU.

This module checks a run, loads its models and assembles the loop; `loop` is the run itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reopold_agent.config import EngineConfig, TrainConfig, model_key
from reopold_agent.data.demonstrations import Demonstration
from reopold_agent.objectives import Needs, Objective
from reopold_agent.policies.attention import packed_kernel
from reopold_agent.policies.compiling import check_compiler
from reopold_agent.policies.loading import (
    LoadedModel,
    ModelSpec,
    Processing,
    check_attention,
    check_available,
    check_for_vllm,
    check_vocabularies,
    context_length,
    device_name,
    load_model,
    load_processing,
    pick_device,
)
from reopold_agent.policies.registry import is_trainers_own, reads_weights
from reopold_agent.policies.spans import Aligner
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.checks import checked_run
from reopold_agent.rollout.from_config import make_reader, make_runner
from reopold_agent.rollout.reading import Reader, Readers, make_aligner
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.rollout.view_checks import check_view
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train.banner import (
    banner,
    exploration_note,
    importance_note,
    leak_note,
    learning_rate_note,
    outcome_note,
    preflight_note,
    self_teacher_note,
    show_banner,
)
from reopold_agent.train.behaviour import old_logp_source
from reopold_agent.train.checkpoint import check_files, load_trainer_state, newest_checkpoint
from reopold_agent.train.collect import Collector, read_demonstrations
from reopold_agent.train.data_order import tasks_of
from reopold_agent.train.engine import (
    Engine,
    effective_importance_cap,
    model_specs,
    reference_spec,
    run_objective,
)
from reopold_agent.train.evaluation import HeldOutEvaluation
from reopold_agent.train.finish import save_student, show_summary, write_summary
from reopold_agent.train.following import following_teacher
from reopold_agent.train.interrupts import Interrupts
from reopold_agent.train.loop import TrainingLoop
from reopold_agent.train.nonfinite import NonFiniteGuard
from reopold_agent.train.recovery import Recovery
from reopold_agent.train.reference import Reference
from reopold_agent.train.roles import Roles, check_roles, make_roles, own_policy
from reopold_agent.train.rollouts import Rollouts, RolloutsAhead
from reopold_agent.train.scoring import Scoring, ScoringByTeacher
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.teachers import Teachers, TeacherSettings, run_teachers, teaches
from reopold_agent.train.update import Updater, trainable_parameters
from reopold_agent.train.vocabularies import check_fit, teacher_chat


class LocalEngine(Engine):
    """Trains a student in this process."""

    def _run(self) -> dict[str, Any]:
        config = self.config
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        saved = self._check_folder(checkpoint)
        if checkpoint is not None and self._finished(checkpoint):
            return self._state.show_again()
        if checkpoint is not None:
            check_files(checkpoint)
        objective = run_objective(config, saved)
        following = config.model.teacher is not None and config.model.teacher.follow is not None
        config, specs, tasks = prepared(config, objective, self.folder.data_report)
        self._state.check_models(checkpoint is not None, specs)
        recorded = read_demonstrations(config, objective)
        notes = [
            self._state.check_data(checkpoint is not None, recorded),
            exploration_note(config, objective),
            learning_rate_note(config, saved),
            importance_note(config, objective),
            outcome_note(config),
            preflight_note(config, objective, checkpoint is not None),
            self_teacher_note(config, objective),
            leak_note(self.folder.data_report),
        ]
        device, autocast = compute_device(config.engine)
        student, teachers = load_models(
            config,
            specs,
            saved_student=checkpoint / "model" if checkpoint else None,
            saved_teacher=checkpoint / "teacher" if checkpoint and following else None,
        )

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
                objective=objective,
                teacher=bool(teachers),
                kernel=packed_kernel(config.engine, device.type),
            )
            show_banner(progress, lines, config, student, notes)
            loop = make_loop(
                config,
                objective,
                self.folder,
                student,
                teachers,
                tasks,
                progress=progress,
                interrupts=interrupts,
                command=self._command,
                recorded=recorded,
            )
            try:
                return loop.run(checkpoint)
            finally:
                self.interrupted = interrupts.error() if interrupts.received else None
                loop.close()

    def _finished(self, checkpoint: Path) -> bool:
        done = int(load_trainer_state(checkpoint)["step"])
        return done >= self.config.steps and self.folder.summary.is_file()


def compute_device(engine: EngineConfig) -> tuple[torch.device, torch.dtype | None]:
    """Returns the device, and the dtype of the computation if it is not the weights'.

    Raises:
        ConfigError: the settings name a GPU and PyTorch sees none.
    """
    device, precision = pick_device(engine.device), engine.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return device, torch.bfloat16 if precision == "bfloat16" else None


def prepared(
    config: TrainConfig, objective: Objective, report: Path
) -> tuple[TrainConfig, dict[str, ModelSpec], dict[str, dict[str, int]]]:
    """Checks policies, checkpoints, chat template and rows before any model is loaded.

    It also sets PyTorch's threads and seeds all random numbers.

    Args:
        config: the run's configuration.
        objective: made for this run.
        report: file for the report on the rows.

    Returns:
        The configuration as `checked_run` completes it, the checkpoints by role, and the number of
        tasks by environment and split.

    Raises:
        ReopoldError: something does not fit; the message says what to do.
    """
    check_roles(config, objective)
    specs = model_specs(config, objective)
    served = {t.role for t in run_teachers(config) if not reads_weights(t.policy)}
    policies = {t.role: t.policy for t in run_teachers(config)} | {"student": config.policy.student}
    contexts = {}
    for role, spec in specs.items():
        found = check_available(spec, role, weights=role not in served)
        if policies.get(role, {}).get("name") == "vllm":
            check_for_vllm(found, spec.path, role)
        contexts[role] = context_length(found)
    device, _ = compute_device(config.engine)  # refuses a GPU that there is not
    kernel = packed_kernel(config.engine, device.type)
    for role, spec in specs.items():
        check_attention(spec.attention, role, kernel)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    _seed_everything(config.seed)
    student = load_processing(specs["student"], "student")
    if "reference" in specs and objective.reference_path is not None:
        reference = load_processing(specs["reference"], "reference")
        check_vocabularies(student, reference, "reference")
    config, tasks = checked_run(config, student, contexts.values(), report)
    by_role = {each.role: each for each in run_teachers(config) if each.role in specs}
    for name, member in config.members.items():
        for teacher in by_role.values():
            if config.model.teacher_key is None and not teaches(config, teacher, name):
                continue
            context, view = contexts[teacher.role], model_key(teacher.role, "view")
            taught = partial(teaches, config, teacher, name)
            check_view(member, teacher.model, student, context, view, taught)
    return config, specs, tasks


def load_models(
    config: TrainConfig,
    specs: Mapping[str, ModelSpec],
    *,
    saved_student: Path | None = None,
    saved_teacher: Path | None = None,
) -> tuple[LoadedModel, dict[str, Processing]]:
    """Loads the student, and each teacher unless another process serves it.

    Args:
        config: the run's configuration.
        specs: the checkpoints by role.
        saved_student, saved_teacher: folders of a checkpoint of the run, whose weights replace
            those of ``specs``.

    Returns:
        The student, and the teachers by role.

    Raises:
        ModelError: a model cannot be loaded, or they do not fit each other.
        ConfigError: ``engine.compile`` is set and nothing can be compiled here.
    """
    device, autocast = compute_device(config.engine)
    how: dict[str, Any] = {
        "autocast": autocast,
        "kernel": packed_kernel(config.engine, device.type),
        "compiled": config.engine.compile,
    }
    if config.engine.compile:
        check_compiler(device)
    student = load_model(specs["student"], "student", device, saved=saved_student, **how)
    if device.type == "cpu":
        # Out of the mapped file, where they lie at odd addresses: decoding takes 0.8 of the time.
        # An update would copy them anyway.
        for parameter in trainable_parameters(student.adapter.model):
            parameter.data = parameter.data.clone()
    teachers: dict[str, Processing] = {}
    for teacher in run_teachers(config):
        role = teacher.role
        if role not in specs:
            continue
        if is_trainers_own(teacher.policy):
            model = load_model(specs[role], role, device, saved=saved_teacher, **how)
            model.adapter.model.requires_grad_(False)
            teachers[role] = model
        else:
            weights = reads_weights(teacher.policy)
            teachers[role] = load_processing(specs[role], role, weights=weights)
        check_fit(config, teacher, student, teachers[role])
    return student, teachers


def make_reference(
    config: TrainConfig, objective: Objective, chat: ChatRenderer
) -> Reference | None:
    """Loads the objective's reference model; None for objectives without one.

    `prepared` has checked that it has the student's vocabulary.

    Raises:
        ModelError: it cannot be loaded.
    """
    spec = reference_spec(config, objective)
    if spec is None:
        return None
    device, autocast = compute_device(config.engine)
    model = load_model(
        spec,
        "reference",
        device,
        autocast=autocast,
        kernel=packed_kernel(config.engine, device.type),
        compiled=config.engine.compile,
    )
    model.adapter.model.requires_grad_(False)
    return Reference(own_policy(config, chat, model))


def run_reader(
    config: TrainConfig,
    chat: ChatRenderer,
    student: Processing,
    teachers: Mapping[str, Processing],
) -> Reader | Mapping[str, Reader | Readers | None] | None:
    """Returns what gives teachers their form of the episodes; None if they read them as they are.

    With several teachers there is one for each environment, or `Readers` where tasks name them.

    Args:
        config: the run's configuration.
        chat: renders the student's conversations.
        student: its pictures are the teacher's too, unless that is aligned.
        teachers: by role; empty in runs without one.
    """
    here = {each.role: each for each in run_teachers(config) if each.role in teachers}
    aligners: dict[str, Aligner | None] = {}  # each reads two whole vocabularies
    known = Teachers.of_run(config, here)

    def made(teacher: TeacherSettings, member: TrainConfig) -> Reader | None:
        processing, aligner = teachers[teacher.role], None
        own, vision = chat, student.vision
        if teacher.model.align is not None:
            own, vision = teacher_chat(config, processing), processing.vision
            if teacher.role not in aligners:
                aligners[teacher.role] = make_aligner(chat, own, teacher.role)
            aligner = aligners[teacher.role]
        context = context_length(processing.config)
        return make_reader(member, teacher.model, own, vision, context, aligner)

    if len(here) < 2:
        return None if known.only is None else made(known.only, config)
    if config.model.teacher_key is None:
        return {name: made(known.named(name), each) for name, each in config.members.items()}
    readers: dict[str, Reader | Readers | None] = {}
    for name, member in config.members.items():
        named = {n: made(teacher, member) for teacher in here.values() for n in teacher.names}
        readers[name] = Readers(named, named.get(config.model.teacher_name(name) or ""))
    return readers


def evaluated_by(
    config: TrainConfig, runner: RolloutRunner, teachers: Mapping[str, Processing]
) -> Teachers[RolloutRunner]:
    """Returns what plays each teacher's held-out episodes.

    Args:
        config: the run's configuration.
        runner: plays the student's, and those of teachers with its vocabulary and no view.
        teachers: by role.
    """
    made = {}
    for teacher in run_teachers(config):
        made[teacher.role] = runner
        processing, view = teachers.get(teacher.role), teacher.model.view
        if processing is None or (teacher.model.align is None and view.empty):
            continue
        aligned = teacher.model.align is not None
        chat = teacher_chat(config, processing) if aligned else runner.chat
        vision = processing.vision if aligned else runner.vision
        # An attempt of its own is to be judged, so that feedback on it cannot be given before.
        plays_as = None if view.empty else Reader(view, chat, vision, pixels=config.pixels)
        made[teacher.role] = make_runner(config, chat, vision, split="eval", plays_as=plays_as)
    return Teachers.of_run(config, made)


def make_scoring(
    config: TrainConfig, objective: Objective, roles: Roles
) -> Scoring | ScoringByTeacher | None:
    """Returns the scoring by the teachers; None for objectives that need none."""
    distributions = bool(objective.needs & Needs.DISTRIBUTIONS)
    scored = objective.needs & Needs.TEACHER and not objective.needs & Needs.DEMONSTRATIONS
    if not scored and not distributions:
        return None
    scorings = Teachers.of_run(
        config,
        {
            each.role: Scoring(
                roles.teacher_of(each.names[0]), each.label, with_states=distributions
            )
            for each in run_teachers(config)
        },
    )
    return ScoringByTeacher(scorings) if scorings.only is None else scorings.only


def make_updater(
    config: TrainConfig, objective: Objective, roles: Roles, guard: NonFiniteGuard
) -> Updater:
    """Returns what computes the student's gradients and updates it."""
    return Updater(
        roles.trainer,
        objective,
        config.optimizer,
        max_tokens=config.engine.max_tokens_per_micro_batch,
        teachers=roles.teachers,
        skip_nonfinite=guard.skips,
        means_by_environment=config.by_environment("normalise_over"),
        run_updates=config.updates,
    )


def make_loop(
    config: TrainConfig,
    objective: Objective,
    folder: RunFolder,
    student: LoadedModel,
    teachers: Mapping[str, Processing],
    tasks: Mapping[str, Mapping[str, int]],
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
        teachers: by role; a `LoadedModel` if the teacher is in this process.
        tasks: number of tasks by environment and split.
        progress: shows the run to the user.
        interrupts: the signals received.
        command: the command line's arguments, for messages.
        recorded: the conversations that the objective trains on: `read_demonstrations`.
    """
    chat = ChatRenderer(student.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
    following = following_teacher(config.model.teacher, teachers.get("teacher"), student)
    roles = make_roles(config, chat, student, teachers)
    scoring = make_scoring(config, objective, roles)
    reference = make_reference(config, objective, chat)
    guard = NonFiniteGuard(config.on_nonfinite)
    updater = make_updater(config, objective, roles, guard)
    reader = run_reader(config, chat, student, teachers)
    train_runner, eval_runner = (
        make_runner(config, chat, student.vision, split=split, reader=read)
        for split, read in (("train", reader), ("eval", None))
    )
    collector = Collector(
        config,
        objective,
        train_runner,
        roles.sampler,
        roles.teacher,
        tasks_of(tasks, "train"),
        recorded,
    )
    on_done = None if scoring is None else scoring.begin
    rollouts = Rollouts(collector, roles, on_done)
    if config.engine.ahead:
        rollouts = RolloutsAhead(collector, roles, on_done, updater, config.steps)
    log = StepLog(config, objective, folder, roles, collector, guard, chat.raw, progress)
    recovery = Recovery(
        config,
        objective,
        folder,
        student,
        None if following is None else following.teacher,
        updater,
        rollouts,
        log,
        guard,
        progress,
        interrupts,
        command,
    )

    teacher_runners = evaluated_by(config, eval_runner, teachers)

    def finish() -> dict[str, Any]:
        if config.steps and not save_student(student, folder, chat):
            progress.note(f"{folder.final} was not read back: too little memory is free")
        train_runner.close()
        for runner in {eval_runner, *teacher_runners.distinct}:
            runner.close()
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
        rollouts=rollouts,
        behaviour_source=old_logp_source(source, roles.trainer),
        importance_cap=effective_importance_cap(config, objective),
        scoring=scoring,
        reference=reference,
        updater=updater,
        following=following,
        evaluation=HeldOutEvaluation(
            config,
            eval_runner,
            roles,
            tasks_of(tasks, "eval"),
            log.metrics,
            progress,
            interrupts,
            teacher_runners,
            rollouts.use_current,
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
