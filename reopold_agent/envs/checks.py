"""Checks what an environment's own code returns: tasks, pictures, rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from reopold_agent.errors import EnvironmentCodeError
from reopold_agent.tools.base import is_verdict
from reopold_agent.types import Task, TaskSource


def checked_source(tasks: Any, where: str) -> TaskSource:
    """Returns what ``load_tasks`` returned if it has a length and is read by position.

    Args:
        tasks: what it returned.
        where: the environment and split, for messages.

    Raises:
        EnvironmentCodeError: it is a generator, say.
    """
    sized = hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__")
    if not sized or isinstance(tasks, (str, Mapping)):
        raise EnvironmentCodeError(
            f"{where} returned {_kind(tasks)}, not a sequence of tasks.\nReturn a list of Task "
            "(list(...) makes one of a generator), or an object with len() and [number]."
        )
    source: TaskSource = tasks
    return source


def checked_task(task: Any, env: str) -> Task:
    """Returns a task if its fields are of the types that `Task` states.

    Args:
        task: what an environment gives as one.
        env: the environment's name, for messages.

    Raises:
        EnvironmentCodeError: it is no `Task`, or a field is of another type.
    """
    if not isinstance(task, Task):
        raise EnvironmentCodeError(
            f"{env} gives {_kind(task)} as a task.\nGive reopold_agent.types.Task(id, question, "
            "answers, pictures)."
        )
    if not _is_list(task.answers) or not all(isinstance(each, str) for each in task.answers):
        answers = list(task.answers) if _is_list(task.answers) else [task.answers]
        raise EnvironmentCodeError(
            f"the answers of task '{task.id}' of {env} are {task.answers!r:.80}, not a tuple of "
            f"strings.\nWrite answers=({', '.join(repr(str(each)[:80]) for each in answers[:3])},)."
        )
    if not isinstance(task.question, str):
        raise EnvironmentCodeError(
            f"the question of task '{task.id}' of {env} is {_kind(task.question)}.\nGive a string."
        )
    if not _is_list(task.images) or not all(hasattr(each, "open") for each in task.images):
        raise EnvironmentCodeError(
            f"the images of task '{task.id}' of {env} are {task.images!r:.80}.\nGive a tuple of "
            "objects whose open() returns a PIL.Image, such as "
            "reopold_agent.data.images.FileImage(Path('FILE'))."
        )
    if not isinstance(task.metadata, Mapping):
        raise EnvironmentCodeError(
            f"the metadata of task '{task.id}' of {env} are {_kind(task.metadata)}.\nGive a dict."
        )
    message = task.metadata.get("system_message")
    if message is not None and not isinstance(message, str):
        raise EnvironmentCodeError(
            f"metadata['system_message'] of task '{task.id}' of {env} is {_kind(message)}.\n"
            "Give a string."
        )
    return task


def check_answers(task: Task, env: str) -> None:
    """Checks that a task has answers to grade by.

    Args:
        task: the task.
        env: the environment's name, for messages.

    Raises:
        EnvironmentCodeError: it has none, or blank ones only.
    """
    if not any(each.strip() for each in task.answers):
        raise EnvironmentCodeError(
            f"task '{task.id}' of {env} has no accepted answers, so that every answer would be "
            f"wrong.\nGive Task(id, question, answers) some, or define {env}.reward(self, task, "
            "answer)."
        )


def opened_pictures(task: Task, env: str) -> list[Image.Image]:
    """Opens the pictures of a task.

    Raises:
        EnvironmentCodeError: one opens as something else than Pillow's picture.
        DataError: one is missing or damaged.
    """
    found = []
    for source in task.images:
        picture: Any = source.open()
        if not isinstance(picture, Image.Image):
            raise EnvironmentCodeError(
                f"open() of a picture of task '{task.id}' of {env} returned {_kind(picture)}.\n"
                "Return a PIL.Image; PIL.Image.fromarray(array) makes one of a uint8 array."
            )
        found.append(picture)
    return found


def outcome(given: Any, hook: str) -> tuple[float, bool]:
    """Returns the reward and success that an environment's hook returned.

    Args:
        given: what it returned.
        hook: its class and name, for messages.

    Raises:
        EnvironmentCodeError: they are no finite number and truth value.
    """
    try:
        reward, success = given
        reward = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError):
        reward, success = math.nan, False
    if not math.isfinite(reward) or not is_verdict(success):
        raise EnvironmentCodeError(
            f"{hook} returned {given!r:.80}, not a reward and a success.\nReturn two values, a "
            "finite number and whether the task is solved: return 1.0, True"
        )
    return reward, bool(success)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
