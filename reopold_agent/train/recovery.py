"""Saves a run so that it can continue, and ends it early without losing finished steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reopold_agent.config import TrainConfig
from reopold_agent.errors import NonFiniteError
from reopold_agent.objectives import Objective
from reopold_agent.policies.loading import LoadedModel
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train.checkpoint import (
    checkpoint_path,
    load_rollouts,
    load_trainer_state,
    restore,
    save_checkpoint,
)
from reopold_agent.train.interrupts import Interrupts, say_stopped
from reopold_agent.train.nonfinite import NonFiniteGuard
from reopold_agent.train.rollouts import Rollouts
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.update import Updater


class Recovery:
    """The checkpoints of a run, from where it starts to its end.

    Args:
        config: the run's configuration.
        objective: gives the phase of a checkpoint.
        folder: the run folder.
        student: the model that learns.
        moving_teacher: the teacher if its weights change during the run.
        updater: owns the optimizer.
        rollouts: may have begun a step's episodes when it is saved.
        log: the run's files.
        guard: holds rejected rows, which are written before the run fails.
        progress: shows notes to the user.
        interrupts: the signals received.
        command: the command line's arguments.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        folder: RunFolder,
        student: LoadedModel,
        moving_teacher: LoadedModel | None,
        updater: Updater,
        rollouts: Rollouts,
        log: StepLog,
        guard: NonFiniteGuard,
        progress: Progress,
        interrupts: Interrupts,
        command: Sequence[str],
    ) -> None:
        self._config, self._objective, self._folder = config, objective, folder
        self._student, self._moving_teacher, self._updater = student, moving_teacher, updater
        self._rollouts, self._log, self._guard, self._progress = rollouts, log, guard, progress
        self._interrupts, self._command = interrupts, command
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds spent on the run so far, over all its processes."""
        return time.perf_counter() - self._started

    def start(self, checkpoint: Path | None) -> tuple[int, int]:
        """Restores the optimizer from a checkpoint and removes later rows from the run's files.

        The checkpoint's weights are loaded with the model.

        Returns:
            Number of steps done, and of task draws used; zeros without a checkpoint.
        """
        step = position = 0
        if checkpoint is not None:
            restore(checkpoint, self._updater)
            state = load_trainer_state(checkpoint)
            step, position = int(state["step"]), int(state["position"])
            begun = load_rollouts(checkpoint)
            if begun is not None:
                self._rollouts.restore(step, begun)
            self._started -= float(state["seconds"])
        # Without a checkpoint the run starts over, so even the rows of step 0 are removed.
        self._log.truncate_after(step if checkpoint is not None else -1)
        self._progress.start(self._config.steps, step)
        if checkpoint is not None:
            self._progress.note(f"continuing from {checkpoint} at step {step}")
        return step, position

    def save_if_due(self, step: int, position: int) -> None:
        """Saves a checkpoint every ``checkpoint.every`` steps, and after the last one."""
        every = self._config.checkpoint.every
        if step == self._config.steps or (every and step % every == 0):
            self._save(step, position)

    def stop_if_asked(self, step: int, position: int) -> None:
        """Ends the run if a signal was received before its last step.

        Raises:
            KeyboardInterrupt: the state after ``step`` steps is saved.
        """
        if not self._interrupts.received or step >= self._config.steps:
            return
        saved = self._ensure_saved(step, position)
        self._progress.stop()
        say_stopped(
            f"after step {step}; saved {saved}.\nContinue with:", self._command, self._folder.path
        )
        raise self._interrupts.error()

    @contextmanager
    def stop_explained(self, step: int) -> Iterator[None]:
        """Says how to go on if a signal ends the evaluation before or after training.

        Raises:
            KeyboardInterrupt: a signal was received.
        """
        try:
            yield
        except KeyboardInterrupt:
            self._progress.stop()
            state = "before the first step; nothing was trained yet.\nStart again with:"
            if step:
                state = f"after the last step; all {step} are saved.\nContinue with:"
            say_stopped(f"in the evaluation {state}", self._command, self._folder.path)
            raise

    @contextmanager
    def saved_before_failure(self, step: int, position: int) -> Iterator[None]:
        """Saves the state before a step that fails because of numbers that are not finite.

        The rejected trajectories are written too.

        Raises:
            NonFiniteError: the step failed; the message says what was saved and how to continue.
        """
        updates = self._updater.updates
        try:
            yield
        except NonFiniteError as error:
            skips = self._guard.skips
            if not skips:  # otherwise they have been written
                self._guard.note(self._updater.rejected)
                self._log.write_trajectories(step, ())
            if self._updater.updates > updates:
                state = "Earlier mini-batches of the step were made; the last checkpoint is valid"
            else:
                state = f"The state before it is in {self._ensure_saved(step, position)}"
            way = "" if skips else " The same command with on_nonfinite=skip leaves them out."
            raise NonFiniteError(
                f"{error}\n{state}, the trajectories in {self._folder.trajectories}.{way}"
            ) from error

    def _ensure_saved(self, step: int, position: int) -> Path:
        saved = checkpoint_path(self._folder.checkpoints, step)
        return saved if saved.exists() else self._save(step, position)

    def _save(self, step: int, position: int) -> Path:
        return save_checkpoint(
            self._folder.checkpoints,
            step=step,
            position=position,
            phase=self._objective.phase(step),
            student=self._student,
            updater=self._updater,
            keep=self._config.checkpoint.keep,
            seconds=self.seconds,
            teacher=self._moving_teacher,
            rollouts=self._rollouts.state(step),
        )
