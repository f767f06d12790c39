"""Reading the values of rows, and the formats that are written too: Pixel-Reasoner's and verl's."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.data.checks import NO_QUESTION, RowError
from reopold_agent.data.pictures import PictureFolder, as_list, given_pictures, is_null
from reopold_agent.data.turns import Turns, read_turns, system_column
from reopold_agent.types import IMAGE_MARK, Task


def pixel_reasoner_task(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Task:
    """Reads a row of Pixel-Reasoner: question, answer (text or list), image (list), is_video, qid.

    Raises:
        DataError: a column is missing or wrong.
    """
    return question_task(
        row,
        pictures,
        id=_first(row.get("qid"), number),
        question=text_of(row, "question"),
        answers=acceptable_answers(row.get("answer")),
    )


def question_task(
    row: Mapping[str, Any],
    pictures: PictureFolder,
    *,
    id: str,
    question: str,
    answers: tuple[str, ...],
    metadata: Mapping[str, Any] | None = None,
) -> Task:
    """Returns the task of a question with the row's pictures, under whichever name they have.

    Raises:
        RowError: a picture is missing, or marks and pictures do not agree.
    """
    given = given_pictures(row, pictures)
    message = {"role": "user", "content": question}
    turns, images, is_video = read_turns([message], given, pictures)
    return Task(id, turns[0][1].strip(), answers, images, is_video, metadata or {})


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


def verl_row(task: Task, index: int, split: str, paths: Sequence[str]) -> dict[str, Any]:
    """Returns a task as a row of verl with pictures at ``paths``; `verl_task` reads it back."""
    answers: Any = task.answers[0] if len(task.answers) == 1 else list(task.answers)
    turns: Turns = (*task.history, ("user", task.question))
    if not any(IMAGE_MARK in text for _, text in turns):
        turns = (*task.history, ("user", IMAGE_MARK * len(paths) + task.question))
    if "system_message" in task.metadata:
        turns = (("system", task.metadata["system_message"]), *turns)
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


def list_of(row: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the list in a column, or an empty one if the column is missing or null.

    A list that is written as text, as in tsv files, is read (``['3', '4']``).

    Raises:
        RowError: the column holds something else.
    """
    value = row.get(name)
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise RowError("wrong type", f"'{name}' is no list: {value[:40]}") from error
    if not isinstance(value, (list, tuple)):
        raise RowError("wrong type", f"'{name}' must be a list, got {type(value).__name__}")
    return list(value)


def acceptable_answers(value: Any) -> tuple[str, ...]:
    """Returns a row's answer, a single one or a list, as strings.

    Raises:
        RowError: there is no answer, or it is neither a text nor a number.
    """
    value = as_list(value)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for each in values:
        if each is not None and not isinstance(each, (str, int, float)):
            kind = type(each).__name__
            raise RowError("wrong type", f"an answer must be a text or a number, got {kind}")
    answers = tuple(str(v).strip() for v in values if not is_null(v) and str(v).strip())
    if not answers:
        raise RowError("no answer", "no answer")
    return answers
