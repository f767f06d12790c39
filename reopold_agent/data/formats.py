"""Reading the values of rows, and the formats that are written too: Pixel-Reasoner's and verl's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from reopold_agent.data.checks import NO_QUESTION, RowError
from reopold_agent.data.options import (
    check_label,
    is_blank,
    labelled_option,
    options_of,
    right_options,
    text_of_value,
    with_options,
    written,
)
from reopold_agent.data.pictures import PictureFolder, as_list, given_pictures, is_null
from reopold_agent.data.turns import Turns, read_turns, refuse_unread_messages, system_column
from reopold_agent.types import IMAGE_MARK, Task


def pixel_reasoner_task(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Task:
    """Reads a row of Pixel-Reasoner: question, answer (text or list), image (list), is_video, qid.

    Options are shown if the question does not list them (`question_task`).

    Raises:
        DataError: a column is missing or wrong.
    """
    return question_task(
        row,
        pictures,
        id=_first(row.get("qid"), number),
        question=text_of(row, "question"),
        answers=answers_of(row),
    )


def question_task(
    row: Mapping[str, Any],
    pictures: PictureFolder,
    *,
    id: str,
    question: str,
    answers: tuple[str, ...],
    metadata: Mapping[str, Any] | None = None,
    lettered: bool = False,
) -> Task:
    """Returns the task of a question with the row's pictures, under whichever name they have.

    If the row has options, the question shows them, and the answers are letters.

    Args:
        row: the row.
        pictures: where its pictures are.
        id: of the task.
        question: its words.
        answers: the acceptable ones.
        metadata: of the task; the kind of answer and the options are added.
        lettered: whether the row's format says that columns A, B and so on are options, and that
            the answer to a question with options is a letter.

    Raises:
        RowError: a picture is missing, marks and pictures do not agree, or an answer is no option.
    """
    options = options_of(row, None if lettered else answers)
    given = given_pictures(row, pictures)
    message = {"role": "user", "content": with_options(question, options)}
    turns, images, is_video = read_turns([message], given, pictures)
    if not images:
        refuse_unread_messages(row)
    metadata = dict(metadata or {})
    if options:
        answers = right_options(answers, options, by_letter=lettered)
        check_label(row, answers, len(options))
        metadata.update(answer_kind="option", options=options)
    return Task(id, turns[0][1].strip(), answers, images, is_video, metadata)


def verl_task(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Task:
    """Reads a row of verl (and VerlTool): prompt, images, reward_model.ground_truth, extra_info.

    The question is the last message, which must be the user's. Earlier turns become the task's
    ``history``, and a system message, which may be in the column ``system``, its metadata
    ``system_message``.

    Raises:
        DataError: a column is missing or wrong.
    """
    prompt = as_list(row.get("prompt"))
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise RowError("wrong type", "'prompt' must be a list of messages")
    extra, graded = _group(row, "extra_info"), _group(row, "reward_model")
    messages = [*system_column(row, prompt), *prompt]
    turns, images, is_video = read_turns(messages, given_pictures(row, pictures), pictures)
    if not images:
        refuse_unread_messages(row, read=("prompt",))
    system = turns[0][1] if turns and turns[0][0] == "system" else None
    dialogue = turns if system is None else turns[1:]
    roles = [role for role, _ in dialogue]
    if "user" not in roles:
        raise RowError(NO_QUESTION, "'prompt' has no user message")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise RowError(
            "wrong type",
            "'prompt' must be a system message or none, and then user and assistant in turn, the "
            f"user last; got {', '.join(role for role, _ in turns)}",
        )
    return Task(
        id=_first(extra.get("qid"), extra.get("index"), number),
        question=dialogue[-1][1].strip(),
        answers=acceptable_answers(graded.get("ground_truth")),
        images=images,
        is_video=is_video,
        metadata={
            "data_source": row.get("data_source", ""),
            **({} if system is None else {"system_message": system}),
        },
        history=dialogue[:-1],
    )


def solution_of(row: Mapping[str, Any], column: str) -> str:
    """Returns a row's reference solution: a text, or messages (LUFFY's), of which the last counts.

    Raises:
        RowError: the row has none in this column.
    """
    value = as_list(row.get(column))
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content")
    if not isinstance(value, str) or not value.strip():
        raise RowError("no solution", f"no reference solution in the column '{column}'")
    return value.strip()


def teacher_of(row: Mapping[str, Any], column: str) -> str | None:
    """Returns the name of a row's teacher; None if the row has none in this column.

    Raises:
        RowError: it is neither a text nor a whole number.
    """
    value = row.get(column)
    if value is None or value == "":
        return None
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        told = f"the column '{column}' must name a teacher, got {value!r:.60}"
        raise RowError("no teacher", told)
    return str(value)


def choice_task(task: Task, row: Mapping[str, Any]) -> Task:
    """Returns a task with the options in its row, as `question_task` shows and checks them.

    They may be in ``extra_info`` too, as ``options`` or ``choices``.

    Raises:
        RowError: an answer is none of the options, or these cannot be read.
    """
    options = options_of(row, task.answers)
    extra = row.get("extra_info")
    if not options and isinstance(extra, Mapping):
        names = [name for name in ("options", "choices") if name in extra]
        options = options_of({name: extra[name] for name in names}, task.answers)
    if not options:
        return task
    return replace(
        task,
        question=with_options(task.question, options),
        answers=right_options(task.answers, options),
        metadata={**task.metadata, "answer_kind": "option", "options": options},
    )


def verl_row(task: Task, index: int, split: str, paths: Sequence[str]) -> dict[str, Any]:
    """Returns a task as a row of verl with pictures at ``paths``; `verl_task` reads it back."""
    answers: Any = task.answers[0] if len(task.answers) == 1 else list(task.answers)
    turns: Turns = (*task.history, ("user", task.question))
    if not any(IMAGE_MARK in text for _, text in turns):
        turns = (*task.history, ("user", IMAGE_MARK * len(paths) + task.question))
    if "system_message" in task.metadata:
        turns = (("system", task.metadata["system_message"]), *turns)
    options = list(task.metadata.get("options") or ())
    return {
        "data_source": str(task.metadata.get("data_source") or "reopold"),
        "prompt": [
            {"role": role, "content": text.replace(IMAGE_MARK, "<image>")} for role, text in turns
        ],
        "images": [{"image": path} for path in paths],
        "ability": "visual_reasoning",
        "reward_model": {"style": "rule", "ground_truth": answers},
        "extra_info": {
            "split": split,
            "index": index,
            "qid": task.id,
            "is_video": task.is_video,
            "images": list(paths),
        },
        **({"options": options} if options else {}),
    }


def _group(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = row.get(name)
    if is_null(value):
        return {}
    if not isinstance(value, Mapping):
        raise RowError("wrong type", f"'{name}' must be an object, got {type(value).__name__}")
    return value


def _first(*values: Any) -> str:
    """Returns the first value that is not missing as a string; 0 is a valid id."""
    return str(next(value for value in values if not is_null(value)))


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """Returns the first non-empty text in these columns.

    Raises:
        RowError: the row has none of them; the message says what it has instead.
    """
    values = [row.get(name) for name in names]
    for value in values:
        if isinstance(value, str) and value.strip():
            return value
    other = next((v for v in values if v is not None and not isinstance(v, str)), None)
    if other is not None:
        wanted = " or ".join(f"'{name}'" for name in names)
        raise RowError("wrong type", f"{wanted} must be a text, got {type(other).__name__}")
    raise RowError(NO_QUESTION, f"no {' or '.join(names)}")


def answers_of(row: Mapping[str, Any], name: str = "answer") -> tuple[str, ...]:
    """Returns the acceptable answers in a column, or the option that the hub's ``label`` counts.

    Raises:
        RowError: there is no answer, or it is neither a text nor a number.
    """
    value = row.get(name)
    return acceptable_answers(labelled_option(row) if is_blank(value) else value)


def acceptable_answers(value: Any) -> tuple[str, ...]:
    """Returns a row's answer, a single one or a list, as strings.

    A list may be written as text (``['3', 'three']``); one of numbers alone is an interval or a
    point, and one answer. Of ``<answer> B </answer>`` and of the object ``{"answer": "B"}`` that is
    written as text, what is inside counts.

    Raises:
        RowError: there is no answer, or it is neither a text nor a number.
    """
    value = as_list(value)
    if isinstance(value, str):
        value = _unwrapped(value)
    if isinstance(value, str) and value.strip().startswith("["):
        listed = written(value)
        if isinstance(listed, list) and any(
            each is None or isinstance(each, (str, bool)) for each in listed
        ):
            value = listed
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = [_unwrapped(each) if isinstance(each, str) else each for each in values]
    for each in values:
        if each is not None and not isinstance(each, (str, int, float)):
            kind = type(each).__name__
            raise RowError("wrong type", f"an answer must be a text or a number, got {kind}")
    answers = tuple(text_of_value(v) for v in values if not is_null(v) and str(v).strip())
    if not answers:
        raise RowError("no answer", "no answer")
    return answers


_TAGGED = re.compile(
    r"\s*(?:<think>.*</think>\s*)?<answer>((?:(?!</answer>).)*)</answer>\s*", re.DOTALL
)
"""A response as the answer, as in the rows of R1-V and Vision-R1."""

_OBJECT = re.compile(r"\s*\{\s*([\"']).*?\1\s*:")


def _unwrapped(text: str) -> Any:
    """Returns the answer in a text: in its tags, or in the object that is written in it.

    Raises:
        RowError: the object has no ``answer``.
    """
    if tagged := _TAGGED.fullmatch(text):
        text = tagged[1]
    value = written(text) if _OBJECT.match(text) else None
    if not isinstance(value, Mapping):
        return text
    if "answer" not in value:
        raise RowError("no answer", f"the answer is an object without 'answer': {text[:40]}")
    return value["answer"]
