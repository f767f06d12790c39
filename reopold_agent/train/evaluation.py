"""Held-out evaluations of a run: which are due, the episodes, and their rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from reopold_agent.common.statistics import wilson_interval
from reopold_agent.config import TrainConfig
from reopold_agent.policies.base import Policy
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.rollout.task_teachers import with_teachers
from reopold_agent.tracking.metrics import MetricsWriter, read_metrics
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.statistics import by_environment, rollout_statistics
from reopold_agent.train.interrupts import EvaluationStoppedError, Interrupts
from reopold_agent.train.roles import Roles, computing
from reopold_agent.train.teachers import Teachers, by_teacher
from reopold_agent.types import Sampling, Trajectory

_log = logging.getLogger(__name__)

GREEDY = Sampling(temperature=0.0)

MetricsRow = Mapping[str, Any]
"""A row of ``metrics.jsonl``."""


class HeldOutEvaluation:
    """Evaluates student and teacher on held-out tasks when that is due.

    Args:
        config: the run's configuration.
        runner: plays the student's episodes.
        roles: the policies.
        tasks: number of held-out tasks of each environment.
        metrics: where rows go; those that are there already are not made again.
        progress: shows rows to the user.
        interrupts: a signal ends an evaluation at once; it is made again on resuming.
        teacher_runners: play the teachers' episodes; None: ``runner`` does.
        use_current: called before the student plays: gives its sampler the trainer's weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        runner: RolloutRunner,
        roles: Roles,
        tasks: Mapping[str, int],
        metrics: MetricsWriter,
        progress: Progress,
        interrupts: Interrupts,
        teacher_runners: Teachers[RolloutRunner] | None = None,
        use_current: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner, self._teacher_runners = runner, teacher_runners
        self._config, self._roles, self._tasks = config, roles, tasks
        self._metrics, self._progress, self._interrupts = metrics, progress, interrupts
        self._sampling = Sampling(config.sampling.temperature, config.sampling.top_p)
        self._use_current = use_current
        self._prompts: dict[tuple[str, int], str] = {}

    def before_training(self) -> None:
        """Evaluates the student, and the teacher as it is at the start.

        Raises:
            KeyboardInterrupt: a signal came; there is nothing to save yet.
        """
        self._evaluate_end("student", 0)
        if self._config.evaluation.teacher:
            self._evaluate_end("teacher", 0)

    def after_training(self) -> None:
        """Evaluates the trained student.

        Raises:
            KeyboardInterrupt: a signal came; the last step is saved.
        """
        self._evaluate_end("student", self._config.steps)

    def during_training(self, step: int) -> None:
        """Evaluates the student after ``step`` steps, if that is due; a signal ends it quietly."""
        if curve_due(read_metrics(self._metrics.path), step, self._config):
            with suppress(EvaluationStoppedError):  # the loop looks at the signal next
                self._evaluate("student", step, self._sampling, curve=True)

    def _evaluate_end(self, who: str, step: int) -> None:
        if not self._config.evaluation.tasks:
            return
        rows = read_metrics(self._metrics.path)
        for sampling in ends_due(rows, who, step, self._sampling):
            try:
                self._evaluate(who, step, sampling, curve=False)
            except EvaluationStoppedError:
                raise self._interrupts.error() from None

    def _evaluate(self, who: str, step: int, sampling: Sampling, *, curve: bool) -> None:
        settings = self._config.evaluation
        self._use_current()
        episodes = held_out(self._tasks, settings.curve_tasks if curve else settings.tasks)
        parts = [(self._roles.sampler, list(range(len(episodes))))]
        if who == "teacher":  # each on its own tasks
            episodes = with_teachers(self._config, episodes)
            parts = self._roles.teachers.parts(episodes)
        played: list[Trajectory] = []
        for policy, places in parts:
            runner = self.runner
            if who == "teacher" and self._teacher_runners is not None:
                runner = self._teacher_runners.of(episodes[places[0]])
            with computing(policy):
                played += play_held_out(
                    runner,
                    policy,
                    [episodes[place] for place in places],
                    sampling=sampling,
                    seed=self._config.seed,
                    on_done=self._stop_if_asked,
                )
        # A teacher may have a prompt of its own.
        if who == "student" and (told := check_prompts(self._prompts, played)) is not None:
            self._progress.note(told)
        row = evaluation_row(EvaluationResult.of(played), who, step, sampling, curve=curve)
        row |= success_by_teacher(self._config, played)
        self._metrics.write(row)
        self._progress.evaluation(row)

    def _stop_if_asked(self, _: Trajectory) -> None:
        if self._interrupts.received:
            raise EvaluationStoppedError


@dataclass(frozen=True)
class EvaluationResult:
    """Success over ``n`` held-out tasks, one episode each.

    ``low`` and ``high`` bound the success rate with 95 % confidence (Wilson's score interval);
    ``stops`` has the share of episodes by ``stop/<reason>``. With several environments each has its
    own result in ``envs``, and the figures are means over them, in which each counts alike; the
    interval is that of ``k**2 / sum(1 / n_i)`` tasks of one kind, no narrower than the mean's.
    """

    success: float
    low: float
    high: float
    n: int
    tool_rate: float
    response_tokens: float
    stops: dict[str, float] = field(default_factory=dict)
    envs: dict[str, EvaluationResult] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> EvaluationResult:
        """Returns the result of these episodes, one per task."""
        parts = by_environment(trajectories)
        if len(parts) > 1:
            return cls._mean({name: cls.of(part) for name, part in parts.items()})
        n = len(trajectories)
        successes = sum(t.success for t in trajectories)
        low, high = wilson_interval(successes, n)
        statistics = rollout_statistics(trajectories)
        return cls(
            success=successes / n,
            low=low,
            high=high,
            n=n,
            tool_rate=statistics["rollout/tool_rate"],
            response_tokens=statistics["rollout/response_tokens"],
            stops={
                name.removeprefix("rollout/"): share
                for name, share in statistics.items()
                if name.startswith("rollout/stop/")
            },
        )

    @classmethod
    def _mean(cls, envs: dict[str, EvaluationResult]) -> EvaluationResult:
        every = list(envs.values())

        def mean(values: Iterable[float]) -> float:
            return sum(values) / len(every)

        success = mean(each.success for each in every)
        like = int(len(every) ** 2 / sum(1 / each.n for each in every))
        low, high = wilson_interval(round(success * like), like)
        return cls(
            success=success,
            low=low,
            high=high,
            n=sum(each.n for each in every),
            tool_rate=mean(each.tool_rate for each in every),
            response_tokens=mean(each.response_tokens for each in every),
            stops={name: mean(each.stops[name] for each in every) for name in every[0].stops},
            envs=envs,
        )

    def row(self) -> dict[str, Any]:
        """Returns plain values; those of an environment are ``env/NAME/success`` and so on."""
        row = {k: v for k, v in vars(self).items() if k not in ("stops", "envs")}
        for name, result in self.envs.items():
            row |= {f"env/{name}/{key}": value for key, value in result.row().items()}
        return {**row, **self.stops}


def play_held_out(
    runner: RolloutRunner,
    policy: Policy,
    episodes: Sequence[EpisodeSpec],
    *,
    sampling: Sampling,
    seed: int,
    on_done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Plays episodes (`held_out`).

    The same seed gives the same random draws to every policy, so that two policies are compared
    on equal terms.
    """
    return runner.run(policy, episodes, sampling, (seed, 2), on_done=on_done)


def held_out(tasks: Mapping[str, int], most: int) -> list[EpisodeSpec]:
    """Returns an episode of each of the first held-out tasks, at most ``most`` per environment.

    Args:
        tasks: number of held-out tasks of each environment.
        most: as said.
    """
    return [
        EpisodeSpec("eval", index, env=name)
        for name, count in tasks.items()
        for index in range(min(most, count))
    ]


def check_prompts(known: dict[tuple[str, int], str], played: Sequence[Trajectory]) -> str | None:
    """Warns, in the log too, of held-out tasks that differ from those of earlier evaluations.

    Args:
        known: digests of the prompts of earlier evaluations, by environment and index; those of
            other tasks are added.
        played: the student's episodes.
    """
    digests = {t.group: t.prompt_digest for t in played if t.prompt_digest}
    differ = [group for group, digest in digests.items() if known.get(group, digest) != digest]
    known |= digests
    if not differ:
        return None
    env, index = differ[0]
    told = (
        f"warning: {len(differ)} of {len(digests)} held-out tasks (first: index {index}"
        f"{f' of env={env}' if env else ''}) were asked otherwise in the evaluation before, so the "
        "two cannot be compared. Let reset(seed=...) alone decide the task; load_tasks must give "
        "the same tasks each time."
    )
    _log.warning("%s", told)
    return told


def ends_due(rows: Sequence[MetricsRow], who: str, step: int, sampling: Sampling) -> list[Sampling]:
    """Returns the samplings with which ``who`` has yet to be evaluated before or after the run:
    as in training, and greedy, which may be the same.

    A run that was killed between its last step and its end has some of the rows already.
    """
    done = end_rows(rows, who, step)
    kinds = {sampling_kind(each): each for each in (sampling, GREEDY)}
    return [each for kind, each in kinds.items() if kind not in done]


def curve_due(rows: Sequence[MetricsRow], step: int, config: TrainConfig) -> bool:
    """Returns whether an evaluation after ``step`` steps is due and not in the rows yet."""
    every = config.evaluation.every
    if not every or step % every or not 0 < step < config.steps:
        return False
    return not any(
        row["kind"] == "eval" and (row["who"], row["step"], row["curve"]) == ("student", step, True)
        for row in rows
    )


def evaluation_row(
    result: EvaluationResult, who: str, step: int, sampling: Sampling, *, curve: bool
) -> dict[str, Any]:
    """Returns a row of ``metrics.jsonl``; ``curve`` marks evaluations between the ends of a run."""
    return {
        "kind": "eval",
        "step": step,
        "who": who,
        "sampling": sampling_kind(sampling),
        "curve": curve,
        **result.row(),
    }


def success_by_teacher(config: TrainConfig, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Returns success on the tasks of each teacher, where tasks name them (``teacher/NAME/...``).

    Args:
        config: the run's.
        trajectories: of a held-out evaluation, the student's or the teachers'.
    """
    row: dict[str, float] = {}
    for name, part in by_teacher(config, trajectories).items():
        row[f"teacher/{name}/success"] = sum(t.success for t in part) / len(part)
        row[f"teacher/{name}/n"] = len(part)
    return row


def end_rows(rows: Sequence[MetricsRow], who: str, step: int) -> dict[str, MetricsRow]:
    """Returns the rows of the evaluations before or after the run, by kind of sampling."""
    return {
        row["sampling"]: row
        for row in rows
        if row["kind"] == "eval" and (row["who"], row["step"], row["curve"]) == (who, step, False)
    }


def sampling_kind(sampling: Sampling) -> str:
    """Returns what rows of ``metrics.jsonl`` call it: ``sampled`` or ``greedy``."""
    return "greedy" if sampling.temperature == 0 else "sampled"
