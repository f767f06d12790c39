"""A teacher that follows its student: an average of the student's past, for self-distillation."""

from __future__ import annotations

import torch

from reopold_agent.config import TeacherConfig
from reopold_agent.errors import ModelError
from reopold_agent.policies.loading import LoadedModel, Processing


class FollowingTeacher:
    """Moves a teacher's weights towards the student's (mean teacher, Tarvainen and Valpola 2017).

    Args:
        teacher, student: models of one architecture.
        decay: the teacher's share that stays at each update; 0 copies the student.
        every: steps between updates.

    Raises:
        ModelError: the weights of the two do not correspond.
    """

    def __init__(
        self, teacher: LoadedModel, student: LoadedModel, *, decay: float, every: int
    ) -> None:
        self.teacher, self._decay, self._every = teacher, decay, every
        mine = dict(student.adapter.model.named_parameters())
        theirs = dict(teacher.adapter.model.named_parameters())
        differing = sorted(
            name
            for name in {*mine, *theirs}
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
        )
        if differing:
            raise ModelError(
                f"model.teacher.follow averages the student's weights into the teacher's, but "
                f"{len(differing)} of them do not correspond, the first is {differing[0]}; start "
                "the teacher from a checkpoint of the student's own architecture, for example "
                "model.teacher.path=${model.student.path}"
            )
        self._pairs = [(theirs[name], mine[name]) for name in theirs]

    @torch.no_grad()
    def after_step(self, done: int) -> None:
        """To be called after every step; ``done`` is the number of steps done."""
        if done % self._every:
            return
        for his, own in self._pairs:
            his.mul_(self._decay).add_(own, alpha=1 - self._decay)


def following_teacher(
    settings: TeacherConfig | None, teacher: Processing | None, student: LoadedModel
) -> FollowingTeacher | None:
    """The run's following teacher, if its configuration asks for one."""
    if not isinstance(teacher, LoadedModel) or settings is None or settings.follow is None:
        return None
    return FollowingTeacher(teacher, student, decay=settings.follow, every=settings.follow_every)
