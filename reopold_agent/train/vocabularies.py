"""Checks that teachers read the student's tokens: the very ids, or aligned by their bytes."""

from __future__ import annotations

from reopold_agent.config import TrainConfig
from reopold_agent.policies.loading import Processing, check_sees, check_vocabularies
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.reading import make_aligner
from reopold_agent.train.teachers import TeacherSettings


def check_fit(
    config: TrainConfig, teacher: TeacherSettings, student: Processing, processing: Processing
) -> None:
    """Checks that a teacher can score what the student writes and sees.

    Args:
        config: the run's.
        teacher: its settings.
        student: of the student.
        processing: of this teacher.

    Raises:
        VocabularyMismatchError: their tokens differ, or cannot be aligned.
        ModelError: they prepare pictures differently, the teacher cannot see them, or its chat
            template cannot be used for several turns.
    """
    if teacher.model.align is None:
        check_vocabularies(student, processing, teacher.role)
        return
    check_sees(student, processing, teacher.role)
    ours, theirs = (teacher_chat(config, each) for each in (student, processing))
    make_aligner(ours, theirs, f"the {teacher.role} '{processing.spec.path}'")
    if config.rollout.max_turns > 1:
        theirs.check_appends()


def teacher_chat(config: TrainConfig, processing: Processing) -> ChatRenderer:
    """Returns what renders conversations with a checkpoint's own tokenizer and template."""
    stop = config.rollout.stop_at_tool_call
    return ChatRenderer(processing.tokenizer, stop_at_tool_call=stop)
