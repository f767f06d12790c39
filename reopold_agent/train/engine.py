"""The base of every engine: the run folder, its lock, trackers, objective and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from reopold_agent.common.signals import sigterm_as_interrupt
from reopold_agent.config import ModelConfig, TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.objectives import Needs, Objective, RunFacts, make_objective
from reopold_agent.policies.loading import ModelSpec, student_spec
from reopold_agent.tracking.run_folder import STARTED_IN, RunFolder
from reopold_agent.tracking.trackers import follow_run
from reopold_agent.train.interrupts import resume_command
from reopold_agent.train.resume import RunState, filled_in
from reopold_agent.train.teachers import run_teachers


class Engine(ABC):
    """Trains a student; a subclass implements `_run`.

    Args:
        config: the checked configuration.
        raw: the same configuration as plain values, for the run folder and its check on resume.
        folder: the run folder; an earlier run in it is continued (``resume``).
        command: the command line's arguments, for messages.

    Attributes:
        interrupted: what a signal raises that came too late to stop the run, for what would follow;
            else None.
    """

    def __init__(
        self, config: TrainConfig, raw: Mapping[str, Any], folder: Path, command: Sequence[str]
    ) -> None:
        self.config, self._raw, self._command = config, dict(raw), list(command)
        self.folder = RunFolder(folder)
        self._state = RunState(config, self._raw, self.folder)
        self.interrupted: KeyboardInterrupt | None = None

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary that ``summary.json`` holds.

        Raises:
            ReopoldError: any problem that the user can fix; the message says how.
            KeyboardInterrupt: after Ctrl-C, once the step is finished and saved.
        """
        self.folder.refuse_other("train")
        self._trackers = follow_run(self.config.tracking, self.folder.path, self._raw)
        with sigterm_as_interrupt(), self.folder.lock(), self._trackers:
            return self._run()

    def _check_folder(self, newest: Path | None) -> dict[str, Any] | None:
        """Checks as `RunState.check` does; trackers begin anew where the run replaces another."""
        saved = self._state.check(newest)
        if self._state.replaces_run:
            self._trackers.begin_anew()
        return saved

    def _begin(self, objective: Objective, saved: Mapping[str, Any] | None) -> None:
        """Writes ``config.yaml`` if the run starts, or goes on for more steps than before.

        Also what tells the weights of its models from others.

        Args:
            objective: made for this run; settings that it filled in are written.
            saved: the configuration in the folder, if the run continues.
        """
        self._state.record_models()
        if saved is not None and saved["steps"] == self.config.steps:
            return
        self.folder.write_template(self.config.model.chat_template)
        # First, or a run that is killed later would be taken for complete.
        self.folder.summary.unlink(missing_ok=True)
        settings = {
            key: objective.setting(key) if value is None else value
            for key, value in self._raw["objective"].items()
        }
        command = " ".join(resume_command(self._command, self.folder.path).splitlines())
        text = OmegaConf.to_yaml(OmegaConf.create({**self._raw, "objective": settings}))
        self.folder.write_config(f"# {command}\n{STARTED_IN}{Path.cwd()}\n{text}")

    @abstractmethod
    def _run(self) -> dict[str, Any]:
        """Makes the run; the folder is locked."""


def run_objective(config: TrainConfig, saved: Mapping[str, Any] | None = None) -> Objective:
    """Makes the run's objective, with settings that depend on the run filled in.

    Args:
        config: the run's configuration.
        saved: the configuration with which a continued run was started: what it filled in then,
            such as the step of the switch to refinement, stays if the run now gets more steps.

    Raises:
        ConfigError: a setting is wrong or has no effect, or there are no groups to compare.
    """
    settings = {key: value for key, value in config.objective.items() if key != "name"}
    if saved is not None:
        settings = filled_in(settings, saved["objective"])
    objective = make_objective(config.objective["name"], settings)
    if objective.needs & Needs.OUTCOME and config.batch.samples < 2:
        raise ConfigError(
            f"objective={config.objective['name']} compares the episodes of one task, so "
            "batch.samples must be at least 2 (8, say, with fewer batch.prompts and "
            "batch.mini_batch)"
        )
    if objective.needs & Needs.OUTCOME and not config.sampling.temperature:
        raise ConfigError(
            "sampling.temperature=0 gives all samples of a task one answer, so that there are no "
            f"outcomes for objective={config.objective['name']} to compare.\nSet "
            "sampling.temperature=1, or learn from a teacher alone."
        )
    recorded = objective.needs & Needs.DEMONSTRATIONS and not objective.needs & Needs.TEACHER
    if not recorded and any(each.data.demonstrations for each in config.members.values()):
        raise ConfigError(
            "data.demonstrations has no effect without objective.source=recorded.\nSet "
            "objective=sft objective.source=recorded, or leave data.demonstrations out."
        )
    views = [teacher.view for teacher in config.model.all_teachers.values()]
    scores = objective.needs & Needs.TEACHER and not objective.needs & Needs.DEMONSTRATIONS
    if not all(view.empty for view in views) and not scores:
        raise ConfigError(
            f"model.teacher.view is how the teacher reads what it scores, and objective="
            f"{config.objective['name']} asks for no scores.\n"
            "Leave it out, or take another objective."
        )
    steps = config.steps if saved is None else saved["steps"]
    return objective.for_run(RunFacts(steps, config.rollout.max_response_tokens))


def needs_teacher(config: TrainConfig, objective: Objective) -> bool:
    """Returns whether the run uses a teacher."""
    return bool(objective.needs & Needs.TEACHER) or config.evaluation.teacher


def effective_importance_cap(config: TrainConfig, objective: Objective) -> float | None:
    """Returns the largest importance weight of a run's tokens.

    None without weights: by the setting, or because the objective's tokens have none.
    """
    return config.importance_cap if objective.weighs_tokens else None


def reference_spec(config: TrainConfig, objective: Objective) -> ModelSpec | None:
    """Returns the checkpoint of the reference model; None for objectives without one."""
    if not objective.needs & Needs.REFERENCE:
        return None
    student = replace(student_spec(config.model), lora=None, gradient_checkpointing=False)
    path = objective.reference_path
    return student if path is None else replace(student, path=path, revision=None)


def model_specs(config: TrainConfig, objective: Objective) -> dict[str, ModelSpec]:
    """Returns the checkpoints that a run needs, by role; teachers only where they are used.

    The roles are ``student``, those of `run_teachers`, and ``reference``.

    Raises:
        ConfigError: a teacher is needed, but none is configured.
    """
    models = config.model
    specs = {"student": student_spec(models)}
    if not needs_teacher(config, objective):
        return specs
    teachers = run_teachers(config)
    if not teachers:
        name = config.objective["name"]
        if objective.needs & Needs.TEACHER:
            raise ConfigError(f"objective={name} needs model.teacher, which is null")
        raise ConfigError(
            f"model.teacher is null, which suits objective={name}; set "
            "evaluation.teacher=false too, since there is no teacher to evaluate"
        )
    own = {each.name for each in fields(ModelConfig)}
    for teacher in teachers:
        values = vars(teacher.model)
        specs[teacher.role] = ModelSpec(**{key: values[key] for key in values if key in own})
    reference = reference_spec(config, objective)
    if reference is not None:
        specs["reference"] = reference
    return specs
