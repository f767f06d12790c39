"""Scores the rows of a step with the teacher, while other episodes are still being generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reopold_agent.errors import ModelError, ModelServerError, NonFiniteError, ServerStalledError
from reopold_agent.policies.base import Policy, ScoresBeside
from reopold_agent.train.nonfinite import Finding, invalid_logp
from reopold_agent.train.roles import computing
from reopold_agent.train.rows import Row, trajectories_of
from reopold_agent.train.teachers import Teachers

_log = logging.getLogger(__name__)


@dataclass
class ScoringProblems:
    """Rows of a step whose scoring failed or gave invalid numbers.

    Attributes:
        failed: rows whose scoring failed after all retries.
        invalid: rows with invalid scores, each with what is wrong.
    """

    failed: list[Row] = field(default_factory=list)
    invalid: list[Finding] = field(default_factory=list)


class Scoring:
    """Scores rows with one teacher.

    A teacher in this process scores a step's rows in one batch at the end. A teacher that can score
    beside the student's generation gets each row as its episode ends. The results are the same.

    Args:
        teacher: the policy that scores.
        name: name of the teacher, for messages.
        with_states: keep what the objective needs to compare whole distributions, so that the
            update asks the teacher nothing; for a `TransformersPolicy`.
    """

    def __init__(self, teacher: Policy, name: str = "", *, with_states: bool = False) -> None:
        self._teacher = teacher
        self._settings = {"with_states": True} if with_states else {}
        self._whose = f"teacher's ({name})" if name else "teacher's"
        self._pool: ThreadPoolExecutor | None = None
        if isinstance(teacher, ScoresBeside):
            self._pool = ThreadPoolExecutor(teacher.scoring_threads, "reopold-teacher")

    def begin(self, row: Row) -> None:
        """Starts to score a row whose episode has ended, if the teacher can do so now."""
        if self._pool is not None and row.trajectory.trainable and _unreadable(row) is None:
            row.pending_score = self._pool.submit(self._score_one, row)

    def finish(self, rows: Sequence[Row], step: int) -> ScoringProblems:
        """Sets ``teacher_logp`` of all rows; returns the rows whose scores are missing or invalid.

        Raises:
            ModelError: the number of scores is wrong, or the teacher raised.
            ServerStalledError: the teacher's server stopped, or took longer than its time limit.
            ModelServerError: the scoring of every row failed.
        """
        problems = ScoringProblems()
        rows = self._readable(rows, problems)
        if self._pool is None:
            with computing(self._teacher):
                read = [row.trajectory.for_teacher for row in rows]
                scores = self._teacher.score(read, **self._settings)
            if len(scores) != len(rows):
                raise ModelError(
                    f"step {step}: the {self._whose} scores are {len(scores)} for "
                    f"{len(rows)} trajectories; the update was not made"
                )
            for row, score in zip(rows, scores, strict=True):
                self._take(row, getattr(score, "logp", score), problems)
                row.teacher_states = getattr(score, "states", None)
            return problems
        for row in rows:
            if row.pending_score is None:
                self.begin(row)
        error: ModelServerError | None = None
        for row in rows:
            try:
                assert row.pending_score is not None
                logp = row.pending_score.result()
            except ServerStalledError:
                raise
            except ModelServerError as caught:
                error = caught
                problems.failed.append(row)
                _log.error("%s is dropped: %s", row, caught)
            except NonFiniteError as caught:
                problems.invalid.append((row, f"the {self._whose} scores: {caught}"))
            else:
                self._take(row, logp, problems)
            row.pending_score = None
        if error is not None and all(row in problems.failed for row in rows):
            raise ModelServerError(f"step {step}: the teacher scored nothing; {error}") from error
        return problems

    def close(self) -> None:
        """Cancels the requests that have not been sent yet."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _score_one(self, row: Row) -> Any:
        try:
            (score,) = self._teacher.score([row.trajectory.for_teacher])
            return getattr(score, "logp", score)
        except (ModelServerError, NonFiniteError):
            raise
        except Exception as error:
            # The boundary to other packages' policies: any exception becomes a named one.
            raise ModelError(
                f"the {self._whose} scoring of {row} failed: {type(error).__name__}: {error}"
            ) from error

    @staticmethod
    def _readable(rows: Sequence[Row], problems: ScoringProblems) -> list[Row]:
        """Returns the rows that the teacher can read; the others are problems.

        Raises:
            ModelError: it can read none.
        """
        unreadable = [(row, why) for row in rows if (why := _unreadable(row)) is not None]
        for row, why in unreadable:
            problems.failed.append(row)
            _log.error("%s is dropped: %s", row, why)
        if unreadable and len(unreadable) == len(rows):
            raise ModelError(f"the teacher can read no episode of this step; {unreadable[0][1]}")
        return [row for row in rows if row not in problems.failed]

    def _take(self, row: Row, logp: Any, problems: ScoringProblems) -> None:
        trajectory = row.trajectory
        wrong = invalid_logp(logp, trajectory.for_teacher, self._whose)
        if wrong is not None:
            problems.invalid.append((row, wrong))
        # Invalid ones too, for trajectories.jsonl, if each belongs to an id.
        if isinstance(logp, np.ndarray) and (
            trajectory.reading is None or logp.shape == trajectory.for_teacher.ids.shape
        ):
            trajectory.teacher_logp = trajectory.from_teacher(logp)


def _unreadable(row: Row) -> str | None:
    reading = row.trajectory.reading
    return None if reading is None else reading.error


class ScoringByTeacher:
    """Scores each row with the teacher of its episode.

    Args:
        scorings: the scoring by each teacher.
    """

    def __init__(self, scorings: Teachers[Scoring]) -> None:
        self._scorings = scorings

    def begin(self, row: Row) -> None:
        """Starts to score a row whose episode has ended, if its teacher can do so now."""
        self._scorings.of(row.trajectory).begin(row)

    def finish(self, rows: Sequence[Row], step: int) -> ScoringProblems:
        """Sets ``teacher_logp`` of all rows, as `Scoring.finish` does for each teacher's.

        Raises:
            ModelServerError: one teacher scored none of its rows.
            ReopoldError: as `Scoring.finish`.
        """
        problems = ScoringProblems()
        for scoring, places in self._scorings.parts(trajectories_of(rows)):
            found = scoring.finish([rows[place] for place in places], step)
            problems.failed += found.failed
            problems.invalid += found.invalid
        return problems

    def close(self) -> None:
        """Cancels the requests that have not been sent yet."""
        for scoring in self._scorings.distinct:
            scoring.close()


def use_sampled_as_teacher(rows: Sequence[Row]) -> None:
    """Uses the sampler's log-probs as the teacher's, because the teacher generated these rows."""
    for row in rows:
        row.trajectory.teacher_logp = row.trajectory.logp
