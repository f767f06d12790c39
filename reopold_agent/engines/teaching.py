"""The teacher's scores of a step, asked for while other episodes are still being generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reopold_agent.engines.nonfinite import Finding, named, unusable_logp
from reopold_agent.engines.roles import computing
from reopold_agent.errors import ModelError, ModelServerError, NonFiniteError
from reopold_agent.policies.base import Policy, ScoresBeside
from reopold_agent.types import Trajectory

_log = logging.getLogger(__name__)


@dataclass
class Scored:
    """What became of a step's scoring where it was not well: trajectories whose scoring ``failed``
    after all retries, and those that were scored with ``garbage``, each with what is wrong."""

    failed: list[Trajectory] = field(default_factory=list)
    garbage: list[Finding] = field(default_factory=list)


class Scoring:
    """Scores trajectories with one teacher.

    A teacher in this process scores a step's trajectories in one batch at the end. One that can
    score beside the student's generation gets each trajectory as its episode ends. Which is which
    changes no result.

    Args:
        teacher: the policy.
        name: of the teacher, for messages.
    """

    def __init__(self, teacher: Policy, name: str = "") -> None:
        self._teacher = teacher
        self._whose = f"teacher's ({name})" if name else "teacher's"
        self._pool: ThreadPoolExecutor | None = None
        if isinstance(teacher, ScoresBeside):
            self._pool = ThreadPoolExecutor(teacher.scoring_threads, "reopold-teacher")
        self._begun: dict[int, Future[Any]] = {}

    def begin(self, trajectory: Trajectory) -> None:
        """An episode has ended."""
        if self._pool is not None and trajectory.trainable:
            self._begun[id(trajectory)] = self._pool.submit(self._one, trajectory)

    def finish(self, trajectories: Sequence[Trajectory], step: int) -> Scored:
        """Sets ``teacher_logp`` of all these, but for those that it returns.

        Raises:
            ModelError: the teacher answered about something else, or raised.
            ModelServerError: the scoring of every one failed.
        """
        scored = Scored()
        if self._pool is None:
            with computing(self._teacher):
                scores = self._teacher.score(trajectories)
            if len(scores) != len(trajectories):
                raise ModelError(
                    f"step {step}: the {self._whose} scores are {len(scores)} for "
                    f"{len(trajectories)} trajectories; the update was not made"
                )
            for trajectory, score in zip(trajectories, scores, strict=True):
                self._take(trajectory, getattr(score, "logp", score), scored)
            return scored
        for trajectory in trajectories:
            if id(trajectory) not in self._begun:
                self.begin(trajectory)
        error: ModelServerError | None = None
        for trajectory in trajectories:
            try:
                logp = self._begun.pop(id(trajectory)).result()
            except ModelServerError as caught:
                error = caught
                scored.failed.append(trajectory)
                _log.error("%s is dropped: %s", named(trajectory), caught)
            except NonFiniteError as caught:
                scored.garbage.append((trajectory, f"the {self._whose} scores: {caught}"))
            else:
                self._take(trajectory, logp, scored)
        self._begun.clear()
        if error is not None and len(scored.failed) == len(trajectories):
            raise ModelServerError(f"step {step}: the teacher scored nothing; {error}") from error
        return scored

    def close(self) -> None:
        """Forgets what has not been asked for yet."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, trajectory: Trajectory) -> Any:
        try:
            (score,) = self._teacher.score([trajectory])
            return getattr(score, "logp", score)
        except (ModelServerError, NonFiniteError):
            raise
        except Exception as error:
            # The boundary to other packages' policies: whatever it was, it is told by name.
            raise ModelError(
                f"the {self._whose} scores of {named(trajectory)} cannot be had: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _take(self, trajectory: Trajectory, logp: Any, scored: Scored) -> None:
        wrong = unusable_logp(logp, trajectory, self._whose)
        if wrong is not None:
            scored.garbage.append((trajectory, wrong))
        if isinstance(logp, np.ndarray):  # for the record, whatever it is
            trajectory.teacher_logp = logp
