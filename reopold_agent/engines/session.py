"""One loaded training run: models, environments, optimizer, files; and its steps in order."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from reopold_agent.config import TrainConfig
from reopold_agent.engines.checkpoint import (
    checkpoint_path,
    load_trainer_state,
    restore,
    save_checkpoint,
    save_final,
)
from reopold_agent.engines.collect import Collected, Collector, mini_batches
from reopold_agent.engines.environments import make_runner
from reopold_agent.engines.evaluations import curve_due, ends_due, evaluation_row, summarise
from reopold_agent.engines.following import following_teacher
from reopold_agent.engines.interrupts import EvaluationStoppedError, Interrupts, resume_command
from reopold_agent.engines.nonfinite import Suspects, unusable_entropy, unusable_logp
from reopold_agent.engines.roles import computing, make_roles, teacher_name
from reopold_agent.engines.teaching import Scoring
from reopold_agent.engines.timing import Clock, step_times
from reopold_agent.engines.update import Updater, UpdateStats
from reopold_agent.errors import ConfigError, NonFiniteError
from reopold_agent.eval.heldout import evaluate_policy
from reopold_agent.objectives import Needs, Objective
from reopold_agent.policies.base import Policy
from reopold_agent.policies.loading import LoadedModel, Processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.tracking.metrics import JsonLines, MetricsWriter, read_metrics
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.statistics import (
    distillation_statistics,
    gap_statistics,
    rollout_statistics,
)
from reopold_agent.tracking.summary import print_summary, write_json_atomic
from reopold_agent.tracking.trajectories import save_pictures, trajectory_record
from reopold_agent.types import FloatArray, Sampling, StopReason, Trajectory


class Session:
    """A loaded run: models, environments, optimizer, files."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        folder: RunFolder,
        student: LoadedModel,
        teacher: Processing | None,
        tasks: Mapping[str, int],
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.student_model = student
        self.tasks = tasks
        chat = ChatRenderer(student.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
        self.following = following_teacher(config.model.teacher, teacher, student)
        self.roles = make_roles(config, chat, student, teacher)
        self.student, self.teacher = self.roles.trainer, self.roles.teacher
        self.scoring = None
        if self.teacher is not None:
            self.scoring = Scoring(self.teacher, teacher_name(config))
        self.objective = objective
        self.suspects = Suspects(config.on_nonfinite)
        self.updater = Updater(
            self.student,
            objective,
            config.optimizer,
            max_tokens=config.engine.max_tokens_per_micro_batch,
            teacher=self.roles.own_teacher,
            skip_nonfinite=self.suspects.skips,
        )
        self.sampling = Sampling(config.sampling.temperature, config.sampling.top_p)
        self.train_runner = self._runner(chat, config.rollout.max_turns)
        self.collector = Collector(
            config,
            objective,
            self.train_runner,
            self.roles.sampler,
            self.teacher,
            tasks["train"],
            self.suspects,
        )
        self.eval_runner = self._runner(chat, config.evaluation.max_turns)
        self.metrics = MetricsWriter(folder.path / "metrics.jsonl")
        self.trajectories = JsonLines(folder.path / "trajectories.jsonl")
        self._chat = chat
        self._interrupts = Interrupts()  # of `train`, while that runs

    def _runner(self, chat: ChatRenderer, max_turns: int) -> RolloutRunner:
        return make_runner(self.config, chat, self.student_model.vision, max_turns=max_turns)

    def close(self) -> None:
        """Ends what the policies started and closes the files; the session cannot go on."""
        self.metrics.close()
        self.trajectories.close()
        if self.scoring is not None:
            self.scoring.close()
        self.roles.close()

    def train(
        self,
        checkpoint: Path | None,
        interrupts: Interrupts,
        command: Sequence[str],
    ) -> dict[str, Any]:
        """The run from its first or resumed step to the summary.

        Raises:
            NonFiniteError: see ``on_nonfinite``; what is good is saved.
            KeyboardInterrupt: a signal came; likewise.
            ReopoldError: anything else that the user can mend.
        """
        started = time.perf_counter()
        config, self._interrupts = self.config, interrupts
        step = position = 0
        if checkpoint is not None:
            restore(checkpoint, self.updater)  # the weights were loaded with the model
            state = load_trainer_state(checkpoint)
            step, position = int(state["step"]), int(state["position"])
            started -= float(state["seconds"])  # of its earlier processes
        # Without a checkpoint the run starts over, and so do its files: rows of step 0 too.
        kept = step if checkpoint is not None else -1
        self.metrics.truncate_after(kept)
        self.trajectories.truncate_after(kept)
        self.progress.start(config.steps, step)
        if checkpoint is not None:
            self.progress.note(f"continuing from {checkpoint} at step {step}")
            self._evaluate_curve(step)
        elif config.evaluation.tasks:
            self._evaluate_ends(0, who="student")
            if config.evaluation.teacher:
                self._evaluate_ends(0, who="teacher")  # as it is at the start

        while step < config.steps:
            updates = self.updater.updates
            try:
                position = self._step(step, position)
            except NonFiniteError as error:
                raise self._stopped_at(
                    step, position, started, self.updater.updates > updates, error
                ) from error
            step += 1
            if self.following is not None:
                self.following.after_step(step)
            due = config.checkpoint.every and step % config.checkpoint.every == 0
            if due or step == config.steps:
                self._save(step, position, started)
            # After the checkpoint: a run that is lost in an evaluation loses no step.
            with suppress(EvaluationStoppedError):  # what asked for it is looked at next
                self._evaluate_curve(step)
            if interrupts.received and step < config.steps:
                saved = checkpoint_path(self.folder.checkpoints, step)
                if not saved.exists():
                    self._save(step, position, started)
                self.progress.stop()
                print(
                    f"\nStopped after step {step}; saved {saved}.\nContinue with:\n"
                    f"  {resume_command(command, self.folder.path)}",
                    file=sys.stderr,
                )
                raise interrupts.error()
        return self._finish(step, started)

    def _save(self, step: int, position: int, started: float) -> Path:
        return save_checkpoint(
            self.folder.checkpoints,
            step=step,
            position=position,
            phase=self.objective.phase(step),
            student=self.student_model,
            updater=self.updater,
            keep=self.config.checkpoint.keep,
            seconds=time.perf_counter() - started,
            teacher=None if self.following is None else self.following.teacher,
        )

    def _stopped_at(
        self, step: int, position: int, started: float, half_done: bool, error: NonFiniteError
    ) -> NonFiniteError:
        """The error to end the run with, once the trajectories to blame and the state are kept."""
        if not self.suspects.skips:  # else they are written already
            self.suspects.note(self.updater.blamed)
            self._write_trajectories(step, ())
        saved = checkpoint_path(self.folder.checkpoints, step)
        if half_done:  # some of the step's updates were made: its start is gone
            state = "Earlier mini-batches of the step were made; the last checkpoint stands"
        else:
            if not saved.exists():
                self._save(step, position, started)
            state = f"The state before it is in {saved}"
        way = (
            ""
            if self.suspects.skips
            else " The same command with on_nonfinite=skip leaves them out."
        )
        return NonFiniteError(
            f"{error}\n{state}, the trajectories in {self.folder.trajectories}.{way}"
        )

    def _finish(self, step: int, started: float) -> dict[str, Any]:
        self._evaluate_ends(step, who="student")
        final = self.folder.final
        save_final(self.student_model, final)
        self.train_runner.close()
        self.eval_runner.close()
        rows = read_metrics(self.folder.path / "metrics.jsonl")
        summary = summarise(rows, self.config, self.folder.path)
        summary["seconds"] = round(time.perf_counter() - started, 1)
        again = f"python -m reopold_agent.train env={self.config.env.name}"
        if self.config.objective["name"] != "reopold":
            again += f" objective={self.config.objective['name']}"
        summary["next"] = [
            f"python -m reopold_agent.view {self.folder.path}  # curves and episodes",
            f"{again} seed={self.config.seed + 1}",
            f"{again} model.student.path={final} hydra.run.dir={self.folder.path}-more",
        ]
        write_json_atomic(self.folder.path / "summary.json", summary)
        self.progress.stop()
        make_plots(self.folder.path)
        print_summary(summary)
        return summary

    # One step

    def _step(self, step: int, position: int) -> int:
        clock = Clock()
        updates = self.updater.updates
        self.suspects.begin(step)
        self.updater.uses, self.updater.blamed = {}, []
        scoring = self._scoring_now()
        rolled = self.collector.collect(step, position, scoring.begin if scoring else None)
        clock.lap("rollout")
        self.roles.rest()
        clock.lap("sync")
        logp_old, entropy = self._behaviour(rolled)
        clock.lap("old_logp")
        unscored: list[Trajectory] = []
        if scoring is not None:
            scored = scoring.finish(rolled.usable, step)
            unscored = scored.failed
            rolled.drop([*unscored, *self.suspects.left_out(scored.garbage)])
        elif self.objective.needs & Needs.TEACHER:
            for trajectory in rolled.usable:  # the teacher's own samples
                trajectory.teacher_logp = trajectory.logp
        clock.lap("teacher")
        update = None
        if rolled.chosen:
            batches = mini_batches(rolled.chosen, self.config.batch, (self.config.seed, 4, step))
            update = self.updater.step(batches, step, logp_old, entropy)
            self.suspects.note(self.updater.blamed)
        clock.lap("update")
        if update is None:
            self.roles.wake()
        else:
            self.roles.sync()
        clock.lap("sync")
        row = self._row(step, rolled, update, logp_old, entropy)
        row.update(self._agreement(rolled, logp_old, len(unscored)))
        if self.suspects.skips:
            row["update/skipped"] = 0 if update is None else update.skipped
            row["nonfinite/trajectories"] = len(self.suspects.trajectories)
        self._write_trajectories(step, rolled.trajectories)
        clock.lap("other")
        row.update(step_times(clock, rolled.stats))
        row["tokens_per_second"] = rolled.stats.sampled_tokens / max(1e-9, row["time/step"])
        self.metrics.write(row)
        self.progress.step(row)
        self.suspects.end(updated=bool(rolled.chosen) and self.updater.updates > updates)
        return rolled.position

    def _scoring_now(self) -> Scoring | None:
        """The teacher's scoring, where the objective needs it."""
        needs = self.objective.needs
        if not needs & Needs.TEACHER or needs & Needs.DEMONSTRATIONS:
            return None
        self._teacher()
        return self.scoring

    def _teacher(self) -> Policy:
        if self.teacher is None:
            raise ConfigError("this run needs a teacher, but model.teacher is null")
        return self.teacher

    def _behaviour(self, rolled: Collected) -> tuple[dict[int, FloatArray], dict[int, FloatArray]]:
        """The student's log-probs and entropies before the update, by trajectory. Those in which
        they are not numbers are left out of the step."""
        trajectories = list(rolled.chosen)
        mode = self.config.engine.old_logp
        if self.objective.needs & Needs.DEMONSTRATIONS or self.roles.separate:
            mode = "recompute"  # another sampled them, or their entropies are not known
        if mode == "auto":
            # In float32 the two agree to 1e-5; in bfloat16 the batched decoder and the full pass
            # differ enough to show up in the ratio.
            weight = self.student.adapter.head.weight
            exact = weight.dtype == torch.float32 and not self.student.adapter.autocasts
            mode = "rollout" if exact else "recompute"
        if mode == "rollout":
            pairs = [(t.logp, t.entropy) for t in trajectories]
        else:
            with self.student.adapter.autocast():
                scores = self.student.score(trajectories, with_entropy=True)
            pairs = [(s.logp, s.entropy) for s in scores]
        findings = [
            (t, wrong)
            for t, (logp, entropy) in zip(trajectories, pairs, strict=True)
            if (wrong := unusable_logp(logp, t, "student's") or unusable_entropy(entropy, t))
        ]
        rolled.drop(self.suspects.left_out(findings))
        logp_old = {id(t): logp for t, (logp, _) in zip(trajectories, pairs, strict=True)}
        return logp_old, {id(t): e for t, (_, e) in zip(trajectories, pairs, strict=True)}

    def _row(
        self,
        step: int,
        rolled: Collected,
        update: UpdateStats | None,
        logp_old: dict[int, FloatArray],
        entropy: dict[int, FloatArray],
    ) -> dict[str, Any]:
        made = update if update is not None else UpdateStats.none()
        chosen = rolled.chosen
        return {
            "kind": "train",
            "step": step,
            "phase": self.objective.phase(step),
            **made.row(),
            **distillation_statistics(
                chosen,
                floor=self.objective.floor,
                threshold=made.threshold,
                logp=[logp_old[id(t)] for t in chosen],
                entropy=[entropy[id(t)] for t in chosen],
            ),
            **self._rollout(rolled.trajectories),
            "rollout/trained_share": len(chosen) / len(rolled.trajectories),
        }

    def _agreement(
        self, rolled: Collected, logp_old: Mapping[int, FloatArray], unscored: int
    ) -> dict[str, float]:
        """Where others generate or score: what they failed to do, and how far the sampler's
        log-probs of the tokens it sampled (nats) are from the trainer's, by which is trained."""
        row: dict[str, float] = {}
        if self.scoring is not None and self.roles.own_teacher is None:
            row["teacher/dropped"] = float(unscored)
        if not self.roles.separate or self.collector.actor != "student":
            return row
        failed = [t.stop_reason is StopReason.POLICY_ERROR for t in rolled.trajectories]
        row["rollout/dropped"] = float(sum(failed))
        own = [logp_old[id(t)] for t in rolled.chosen]
        return {**row, **gap_statistics(rolled.chosen, own)}

    def _rollout(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        statistics = rollout_statistics(trajectories)
        if self.collector.played:
            return statistics
        # Nobody played recorded conversations: how they would have ended is not known.
        known = ("response_tokens", "turns", "episodes")
        return {key: statistics[key] for key in (f"rollout/{name}" for name in known)}

    def _write_trajectories(self, step: int, trajectories: Sequence[Trajectory]) -> None:
        """A sample of the step's, and all whose numbers could not be trained on."""
        logging_config = self.config.logging
        due = logging_config.every and step % logging_config.every == 0
        chosen = list(trajectories[: logging_config.trajectories]) if due else []
        chosen += [t for t in self.suspects.trajectories if all(t is not c for c in chosen)]
        for trajectory in chosen:
            pictures = save_pictures(trajectory, self.folder.path)
            self.trajectories.write(
                trajectory_record(
                    trajectory,
                    step=step,
                    who=self.collector.actor,
                    pictures=pictures,
                    decode=self._chat.raw,
                    use=self.updater.uses.get(id(trajectory)),
                )
            )

    # Evaluation

    def _evaluate_ends(self, step: int, who: str) -> None:
        policy = self.roles.sampler if who == "student" else self._teacher()
        rows = read_metrics(self.folder.metrics)
        for sampling in ends_due(rows, who, step, self.sampling):
            try:
                self._evaluate(who, policy, step, sampling, curve=False)
            except EvaluationStoppedError:
                # Before the first step, or after the last: there is nothing to save.
                raise self._interrupts.error() from None

    def _evaluate_curve(self, step: int) -> None:
        if curve_due(read_metrics(self.folder.metrics), step, self.config):
            self._evaluate("student", self.roles.sampler, step, self.sampling, curve=True)

    def _evaluate(
        self, who: str, policy: Policy, step: int, sampling: Sampling, *, curve: bool
    ) -> None:
        settings = self.config.evaluation
        wanted = settings.curve_tasks if curve else settings.tasks
        with computing(policy):
            result = evaluate_policy(
                self.eval_runner,
                policy,
                tasks=min(wanted, self.tasks["eval"]),
                sampling=sampling,
                seed=self.config.seed,
                on_done=self._stop_if_asked,
            )
        row = evaluation_row(result, who, step, sampling, curve=curve)
        self.metrics.write(row)
        self.progress.evaluation(row)

    def _stop_if_asked(self, _: Trajectory) -> None:
        # Nothing need finish between steps: an evaluation is made again on resuming.
        if self._interrupts.received:
            raise EvaluationStoppedError
