"""Runs a training from its first step to its last, and each step from top to bottom.

Read this file first. `TrainingLoop.run` is the run, `TrainingLoop.step` is a step::

    roll out -> behaviour -> score -> weigh and update -> log -> save
    student     old log-     teacher  objective, AdamW
    plays       probs        scores

`setup` makes the loop; each part is in the file that it is imported from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.objectives import Objective
from reopold_agent.train.behaviour import set_behaviour
from reopold_agent.train.collect import Collector, mini_batches
from reopold_agent.train.evaluation import HeldOutEvaluation
from reopold_agent.train.following import FollowingTeacher
from reopold_agent.train.nonfinite import NonFiniteGuard
from reopold_agent.train.recovery import Recovery
from reopold_agent.train.reference import Reference
from reopold_agent.train.roles import Roles
from reopold_agent.train.rollouts import Rollouts
from reopold_agent.train.rows import StepBatch, entropy_threshold
from reopold_agent.train.scoring import Scoring, ScoringByTeacher, use_sampled_as_teacher
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.timing import Clock
from reopold_agent.train.update import Updater, UpdateStats


@dataclass
class TrainingLoop:
    """A run whose models are loaded.

    Attributes:
        config: the run's configuration.
        objective: the loss.
        roles: the policies that learn, generate and teach.
        collector: rolls out, or reads, the trajectories of a step.
        rollouts: says when they are generated, and with which weights.
        behaviour_source: the source of log-probs before the update: `behaviour.old_logp_source`.
        importance_cap: the largest importance weight of a token; None: no weights.
        scoring: the scoring by the teachers; None for objectives that need none.
        reference: the reference model's scoring; None for objectives without one.
        updater: makes the updates; owns the optimizer.
        following: updates a teacher that follows its student; else None.
        evaluation: held-out evaluations.
        log: files and progress.
        guard: rejects rows whose numbers cannot be trained on.
        recovery: checkpoints, and what happens when the run ends early.
        finish: saves the trained student; writes and returns the summary.
    """

    config: TrainConfig
    objective: Objective
    roles: Roles
    collector: Collector
    rollouts: Rollouts
    behaviour_source: str
    importance_cap: float | None
    scoring: Scoring | ScoringByTeacher | None
    reference: Reference | None
    updater: Updater
    following: FollowingTeacher | None
    evaluation: HeldOutEvaluation
    log: StepLog
    guard: NonFiniteGuard
    recovery: Recovery
    finish: Callable[[], dict[str, Any]]

    def run(self, checkpoint: Path | None = None) -> dict[str, Any]:
        """Trains from the first step, or from a checkpoint, to the last; returns the summary.

        Raises:
            NonFiniteError: numbers cannot be trained on (``on_nonfinite``); the run is saved.
            KeyboardInterrupt: a signal was received; the run is saved.
            ReopoldError: any other problem that the user can fix.
        """
        step, position = self.recovery.start(checkpoint)
        if checkpoint is None:
            with self.recovery.stop_explained(step):
                self.evaluation.before_training()
        else:
            self.evaluation.during_training(step)  # if the earlier process was killed in it
            self.recovery.stop_if_asked(step, position)
        while step < self.config.steps:
            with self.recovery.saved_before_failure(step, position):
                position = self.step(step, position)
            step += 1
            if self.following is not None:
                self.following.after_step(step)
            self.recovery.save_if_due(step, position)
            # After the checkpoint: a run that is killed in an evaluation loses no step.
            self.evaluation.during_training(step)
            self.recovery.stop_if_asked(step, position)
        with self.recovery.stop_explained(step):
            self.evaluation.after_training()
        return self.finish()

    def step(self, step: int, position: int) -> int:
        """Makes one training step.

        Args:
            step: number of the step, from 0.
            position: number of task draws used before the step.

        Returns:
            Number of task draws used after the step.

        Raises:
            NonFiniteError: numbers cannot be trained on, and the run does not skip them.
        """
        clock, updates = Clock(), self.updater.updates
        self.guard.begin(step)

        # Roll out: the student plays `batch.samples` episodes of each of `batch.prompts` tasks. A
        # teacher that can score meanwhile gets each row as its episode ends.
        batch = self.rollouts.collect(step, position)
        self.guard.reject(batch.invalid)
        clock.lap("rollout")
        self.rollouts.before_update(step, batch.position)
        clock.lap("sync")

        # Behaviour: the student's log-probs and entropies before the update, and importance
        # weights where the sampler computed other log-probs.
        invalid = set_behaviour(
            batch.chosen, self.roles.trainer, self.behaviour_source, self.importance_cap
        )
        batch.drop(self.guard.reject(invalid))
        clock.lap("old_logp")

        # Score: the teacher's log-probs of the tokens that the student sampled.
        unscored = self._score(batch, step)
        self.roles.release_teachers()
        clock.lap("teacher")

        # Weigh and update: the objective turns log-probs into token rewards, masks and a loss, one
        # AdamW step per mini-batch.
        update = UpdateStats.none()
        if batch.chosen:
            threshold = entropy_threshold(
                self.objective,
                batch.chosen,
                by_environment=self.config.by_environment("threshold_over"),
            )
            batches = mini_batches(batch.chosen, self.config.batch, (self.config.seed, 4, step))
            update = self.updater.step(batches, step, threshold)
            self.guard.note(self.updater.rejected)
        clock.lap("update")
        self.rollouts.after_update(changed=bool(batch.chosen))
        clock.lap("sync")

        # Log; `run` saves.
        self.log.write(step, batch, update, unscored, clock)
        self.guard.end(updated=self.updater.updates > updates)
        return batch.position

    def _score(self, batch: StepBatch, step: int) -> int:
        """Sets the teacher's scores where the objective needs them; returns how many failed."""
        if self.scoring is None:
            if self.collector.actor == "teacher":
                use_sampled_as_teacher(batch.usable)
            return 0
        problems = self.scoring.finish(batch.usable, step)
        batch.drop([*problems.failed, *self.guard.reject(problems.invalid)])
        if self.reference is not None and batch.usable:
            batch.drop(self.guard.reject(self.reference.score(batch.usable)))
        return len(problems.failed)

    def close(self) -> None:
        """Closes policies and files, after which the loop cannot be used."""
        self.rollouts.close()
        self.log.close()
        if self.scoring is not None:
            self.scoring.close()
        self.roles.close()
