"""Lets the teacher's weights follow the student's as a moving average, for self-distillation."""

from __future__ import annotations

import torch

from reopold_agent.config import TeacherConfig
from reopold_agent.errors import ModelError
from reopold_agent.policies.loading import LoadedModel, Processing


class FollowingTeacher:
    """Moves a teacher's weights towards the student's (mean teacher, Tarvainen and Valpola 2017).

    Args:
        teacher, student: models of one architecture.
        decay: the share of the teacher's old weights at each update; 0 copies the student.
        every: steps between updates.

    Raises:
        ModelError: the weights of the two do not correspond.
    """

    def __init__(
        self, teacher: LoadedModel, student: LoadedModel, *, decay: float, every: int
    ) -> None:
        self.teacher, self._decay, self._every = teacher, decay, every
        student_weights = dict(student.adapter.model.named_parameters())
        teacher_weights = dict(teacher.adapter.model.named_parameters())
        differing = sorted(
            name
            for name in {*student_weights, *teacher_weights}
            if name not in student_weights
            or name not in teacher_weights
            or student_weights[name].shape != teacher_weights[name].shape
        )
        if differing:
            raise ModelError(
                f"model.teacher.follow averages the student's weights into the teacher's, but "
                f"{len(differing)} of them do not correspond, the first is {differing[0]}; start "
                "the teacher from a checkpoint of the student's own architecture, for example "
                "model.teacher.path=${model.student.path}"
            )
        self._pairs = [(teacher_weights[name], student_weights[name]) for name in teacher_weights]

    @torch.no_grad()
    def after_step(self, done: int) -> None:
        """Updates the teacher if that is due after ``done`` steps; call it after every step."""
        if done % self._every:
            return
        for teacher, student in self._pairs:
            teacher.mul_(self._decay).add_(student, alpha=1 - self._decay)


def following_teacher(
    settings: TeacherConfig | None, teacher: Processing | None, student: LoadedModel
) -> FollowingTeacher | None:
    """Makes the run's following teacher; None if its configuration has none."""
    if not isinstance(teacher, LoadedModel) or settings is None or settings.follow is None:
        return None
    return FollowingTeacher(teacher, student, decay=settings.follow, every=settings.follow_every)
