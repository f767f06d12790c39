"""The teacher's scores of a step, asked for while other episodes are still being generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from reopold_agent.engines.roles import computing
from reopold_agent.errors import ModelServerError, NonFiniteError
from reopold_agent.policies.base import Policy, ScoresBeside
from reopold_agent.types import FloatArray, Trajectory

_log = logging.getLogger(__name__)


class Scoring:
    """Scores trajectories with one teacher.

    A teacher in this process scores a step's trajectories in one batch at the end. One that can
    score beside the student's generation gets each trajectory as its episode ends. Which is which
    changes no result.
    """

    def __init__(self, teacher: Policy) -> None:
        self._teacher = teacher
        self._pool: ThreadPoolExecutor | None = None
        if isinstance(teacher, ScoresBeside):
            self._pool = ThreadPoolExecutor(teacher.scoring_threads, "reopold-teacher")
        self._begun: dict[int, Future[FloatArray]] = {}

    def begin(self, trajectory: Trajectory) -> None:
        """An episode has ended."""
        if self._pool is not None and trajectory.trainable:
            self._begun[id(trajectory)] = self._pool.submit(self._one, trajectory)

    def finish(self, trajectories: Sequence[Trajectory], step: int) -> list[Trajectory]:
        """Sets ``teacher_logp`` of all these and returns those whose scoring failed.

        Raises:
            NonFiniteError: a score is not finite, or not of its trajectory's length.
            ModelServerError: the scoring of every one failed.
        """
        if self._pool is None:
            with computing(self._teacher):
                scores = self._teacher.score(trajectories)
            for trajectory, score in zip(trajectories, scores, strict=True):
                trajectory.teacher_logp = checked(score.logp, trajectory, "teacher", step)
            return []
        for trajectory in trajectories:
            if id(trajectory) not in self._begun:
                self.begin(trajectory)
        failed = []
        error: ModelServerError | None = None
        for trajectory in trajectories:
            try:
                logp = self._begun.pop(id(trajectory)).result()
            except ModelServerError as caught:
                error = caught
                failed.append(trajectory)
                _log.error("task %s is dropped: %s", trajectory.task_id, caught)
            else:
                trajectory.teacher_logp = checked(logp, trajectory, "teacher", step)
        self._begun.clear()
        if error is not None and len(failed) == len(trajectories):
            raise ModelServerError(f"step {step}: the teacher scored nothing; {error}") from error
        return failed

    def close(self) -> None:
        """Forgets what has not been asked for yet."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, trajectory: Trajectory) -> FloatArray:
        return self._teacher.score([trajectory])[0].logp


def checked(values: FloatArray, trajectory: Trajectory, whose: str, step: int) -> FloatArray:
    """The log-probs themselves.

    Raises:
        NonFiniteError: some are not finite, or there are not as many as ids.
    """
    if len(values) != len(trajectory.ids) or not np.isfinite(values).all():
        raise NonFiniteError(
            f"step {step}: the {whose}'s log-probs of task {trajectory.task_id} are "
            f"{'of the wrong length' if len(values) != len(trajectory.ids) else 'not finite'}; "
            "nothing was updated"
        )
    return values
