"""Fingerprints of rows, by which a continued run knows the data that it was started with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from reopold_agent.data.demonstrations import Demonstration, RecordedCall
from reopold_agent.data.images import content_of
from reopold_agent.types import IMAGE_MARK, ImageSource, Task, TaskSource


def tasks_digest(tasks: TaskSource, teacher_key: str | None = None) -> str:
    """Returns the SHA-256 of tasks in order: what is asked and answered; pictures are counted.

    Args:
        tasks: the tasks.
        teacher_key: key of their metadata that counts too, since it names their teacher.
    """
    each = (tasks[index] for index in range(len(tasks)))
    return _digest(_asked(task, teacher_key) for task in each)


def pictures_digest(tasks: TaskSource) -> str:
    """Returns the SHA-256 of the pictures of tasks in order.

    Apart from `tasks_digest`, which earlier runs recorded alone.
    """
    each = (tasks[index] for index in range(len(tasks)))
    return _digest([*map(_content, task.images)] for task in each)


def task_digest(task: Task) -> str:
    """Returns the SHA-256 of one task: what is asked and answered, and its pictures."""
    return _digest([[*_asked(task, None), *map(_content, task.images)]])


def _content(image: ImageSource) -> Any:
    """Returns what tells a picture from others: its bytes as stored, not decoded, if it has any."""
    content = getattr(image, "content", None)
    try:
        if callable(content):
            return content()
        pixels = image.open().convert("RGB")  # a source of a plugin, or one in memory
    except Exception:  # it cannot be read, which is told where it is shown
        return None
    return pixels.size, content_of(pixels.tobytes())


def _asked(task: Task, teacher_key: str | None) -> list[Any]:
    asked = [task.id, task.question, task.answers, task.history, len(task.images)]
    return [*asked, *_asked_otherwise(task, teacher_key)]


def _asked_otherwise(task: Task, teacher_key: str | None) -> list[Any]:
    """Returns what few tasks have; nothing for others, so that earlier runs know their data."""
    also = {key: task.metadata.get(key) for key in ("system_message", "options")}
    given = {key: value for key, value in also.items() if value is not None}
    if task.is_video:
        given["is_video"] = True
    if teacher_key is not None and task.named_teacher(teacher_key):
        given["teacher"] = task.named_teacher(teacher_key)
    return [given] if given else []


def tasks_in_common(train: TaskSource, held_out: TaskSource) -> int:
    """Returns how many held-out tasks are training tasks.

    Tasks are the same if question, answers, earlier turns and pictures are. Pictures are read, not
    decoded, and only of tasks that are asked the same; where that fails, the ids tell.
    """

    def asked(task: Task) -> tuple[Any, ...]:
        return task.question, task.answers, task.history, len(task.images)

    def shown(task: Task) -> tuple[Any, ...]:
        contents = tuple(map(_content, task.images))
        return (task.id, *contents) if None in contents else contents

    known: dict[tuple[Any, ...], list[int]] = {}
    for index in range(len(train)):
        known.setdefault(asked(train[index]), []).append(index)
    seen: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    common = 0
    for task in (held_out[index] for index in range(len(held_out))):
        if (words := asked(task)) in known:
            if words not in seen:
                seen[words] = {shown(train[index]) for index in known[words]}
            common += shown(task) in seen[words]
    return common


def demonstrations_digest(demonstrations: Sequence[Demonstration]) -> str:
    """Returns the SHA-256 of conversations in order: ids, turns, tools; pictures as marks."""
    return _digest(
        [
            d.id,
            [[t.role, t.trained, [*map(_part, t.parts)]] for t in d.turns],
            [*map(dict, d.tools)],
        ]
        for d in demonstrations
    )


def demonstrations_pictures_digest(demonstrations: Sequence[Demonstration]) -> str:
    """Returns the SHA-256 of the pictures of conversations in order (see `pictures_digest`)."""
    return _digest(
        [
            _content(part)
            for turn in each.turns
            for part in turn.parts
            if not isinstance(part, str | RecordedCall)
        ]
        for each in demonstrations
    )


def _part(part: Any) -> Any:
    if isinstance(part, RecordedCall):
        return [part.name, dict(part.arguments)]
    return part if isinstance(part, str) else IMAGE_MARK


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()
