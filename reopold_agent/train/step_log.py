"""Records training steps: one row of ``metrics.jsonl`` each, and some episodes in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.objectives import Objective, WithOutcome
from reopold_agent.tracking.metrics import JsonLines, MetricsWriter
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.statistics import (
    distillation_statistics,
    environment_statistics,
    gap_statistics,
    importance_statistics,
    part_statistics,
    rollout_statistics,
)
from reopold_agent.tracking.trajectories import save_pictures, trajectory_record
from reopold_agent.train.collect import Collector
from reopold_agent.train.engine import effective_importance_cap
from reopold_agent.train.nonfinite import NonFiniteGuard
from reopold_agent.train.roles import Roles
from reopold_agent.train.rows import Row, StepBatch, kept_tokens, trajectories_of
from reopold_agent.train.teachers import by_teacher
from reopold_agent.train.timing import Clock, step_times
from reopold_agent.train.update import UpdateStats
from reopold_agent.types import StopReason, Trajectory, span_count


def training_metrics(
    objective: Objective,
    step: int,
    rows: Sequence[Row],
    update: UpdateStats,
    importance_cap: float | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a step that every engine logs.

    Args:
        objective: the objective of the run.
        step: training step from 0.
        rows: the rows that the update was made on.
        update: the figures of the update.
        importance_cap: the largest importance weight (`train.engine.effective_importance_cap`).
    """
    pairs = [row.behaviour for row in rows]
    logp = [old_logp for old_logp, _ in pairs]
    more = {}
    if importance_cap is not None:
        more = importance_statistics(trajectories_of(rows), logp, importance_cap)
    if isinstance(objective, WithOutcome):
        more["outcome/alpha"] = objective.outcome.alpha(step)
        more["outcome/taught_share"] = sum(row.taught for row in rows) / max(1, len(rows))
    threshold, own = update.threshold, {}
    if isinstance(threshold, Mapping):  # of each environment; there is none of the batch
        own = {f"env/{name}/threshold": each for name, each in threshold.items()}
        threshold = None
    return {
        "kind": "train",
        "step": step,
        "phase": objective.phase(step),
        **update.row(),
        **more,
        **{key: value for key, value in own.items() if value is not None},
        **alignment_statistics(rows),
        **distillation_statistics(
            trajectories_of(rows),
            floor=objective.floor,
            threshold=threshold,
            logp=logp,
            entropy=[entropy for _, entropy in pairs],
        ),
    }


def alignment_statistics(rows: Sequence[Row]) -> dict[str, float]:
    """Returns how the student's tokens were aligned with those of teachers with other vocabularies.

    ``align/span_share`` is the number of spans over that of the student's tokens in them, 1 where
    each token is a span; ``align/unaligned_share`` the share of sampled tokens without a span,
    which are not trained on. Empty if no teacher has another vocabulary.
    """
    spans = [
        each[row.trajectory.loss_mask]
        for row in rows
        if (each := row.trajectory.teacher_spans) is not None
    ]
    if not spans:
        return {}
    tokens = sum(len(each) for each in spans)
    inside = sum(int((each >= 0).sum()) for each in spans)
    count = sum(map(span_count, spans))
    return {
        "align/span_share": count / max(1, inside),
        "align/unaligned_share": 1 - inside / max(1, tokens),
    }


def parts_of_step(
    config: TrainConfig, trajectories: Sequence[Trajectory], kept: Sequence[float]
) -> dict[str, float]:
    """Returns the figures of a step by environment, and by teacher where tasks name theirs.

    Args:
        config: the run's.
        trajectories, kept: as for `environment_statistics`.
    """
    parts = by_teacher(config, trajectories)
    return {
        **environment_statistics(trajectories, kept),
        **part_statistics("teacher", parts, trajectories, kept),
    }


def sampler_gap(rows: Sequence[Row]) -> dict[str, float]:
    """Returns how far the sampler's log-probs are from the trainer's, nats."""
    return gap_statistics(trajectories_of(rows), [row.behaviour[0] for row in rows])


class StepLog:
    """Writes ``metrics.jsonl`` and ``trajectories.jsonl`` of a run, and shows its progress.

    Args:
        config: the run's configuration.
        objective: the objective of the run.
        folder: the run folder.
        roles, collector: tell which policies sampled and scored.
        guard: holds rejected rows, which are written too.
        decode: converts ids to text, with control tokens.
        progress: shows rows to the user.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        folder: RunFolder,
        roles: Roles,
        collector: Collector,
        guard: NonFiniteGuard,
        decode: Callable[[Sequence[int]], str],
        progress: Progress,
    ) -> None:
        self._config, self._objective, self._folder = config, objective, folder
        self._roles, self._collector, self._guard = roles, collector, guard
        self._decode, self._progress = decode, progress
        self._importance_cap = effective_importance_cap(config, objective)
        self.metrics = MetricsWriter(folder.metrics)
        self.trajectories = JsonLines(folder.trajectories)

    def truncate_after(self, step: int) -> None:
        """Removes the rows that a run writes again when it continues from checkpoint ``step``."""
        self.metrics.truncate_after(step)
        self.trajectories.truncate_after(step)

    def write(
        self, step: int, batch: StepBatch, update: UpdateStats, unscored: int, clock: Clock
    ) -> None:
        """Writes a step's row of metrics and its trajectories.

        Args:
            step: training step from 0.
            batch: the rows of the step.
            update: the figures of the update.
            unscored: number of rows that the teacher failed to score.
            clock: the seconds of the step's parts so far.
        """
        row = {
            **training_metrics(self._objective, step, batch.chosen, update, self._importance_cap),
            **self._rollout_metrics(batch.trajectories),
            **parts_of_step(
                self._config, batch.trajectories, [kept_tokens(row) for row in batch.rows]
            ),
            "rollout/trained_share": len(batch.chosen) / len(batch.rows),
            "perf/padding_share": self._roles.take_passes().padding_share,
            **self._serving_metrics(batch, unscored),
        }
        if self._guard.skips:
            row["update/skipped"] = update.skipped
            row["nonfinite/trajectories"] = len(self._guard.rejected)
        if batch.staleness is not None:
            row["rollout/staleness"] = batch.staleness
        self.write_trajectories(step, batch.rows)
        clock.lap("other")
        row.update(step_times(clock, batch.stats, ahead=batch.staleness is not None))
        row["tokens_per_second"] = batch.stats.sampled_tokens / max(1e-9, row["time/step"])
        self.metrics.write(row)
        self._progress.step(row)

    def write_trajectories(self, step: int, rows: Sequence[Row]) -> None:
        """Writes the first rows of a step if they are due, and all rejected ones."""
        settings = self._config.logging
        due = settings.every and step % settings.every == 0
        chosen = list(rows[: settings.trajectories]) if due else []
        for row in dict.fromkeys([*chosen, *self._guard.rejected]):
            self.trajectories.write(
                trajectory_record(
                    row.trajectory,
                    step=step,
                    who=self._collector.actor,
                    pictures=save_pictures(row.trajectory, self._folder.path),
                    decode=self._decode,
                    use=row.use,
                )
            )

    def close(self) -> None:
        """Closes the files."""
        self.metrics.close()
        self.trajectories.close()

    def _rollout_metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        statistics = rollout_statistics(trajectories)
        if self._collector.played:
            return statistics
        # Recorded conversations were not played, so they have no outcome.
        known = ("response_tokens", "turns", "episodes")
        return {key: statistics[key] for key in (f"rollout/{name}" for name in known)}

    def _serving_metrics(self, batch: StepBatch, unscored: int) -> dict[str, float]:
        """Returns failures of other processes that generate or score, and the sampler's gap."""
        row: dict[str, float] = {}
        if len(self._roles.own_teachers) < len(self._roles.teachers.distinct):
            row["teacher/dropped"] = float(unscored)
        if not self._roles.separate or self._collector.actor != "student":
            return row
        failed = [t.stop_reason is StopReason.POLICY_ERROR for t in batch.trajectories]
        row["rollout/dropped"] = float(sum(failed))
        return {**row, **sampler_gap(batch.chosen)}
