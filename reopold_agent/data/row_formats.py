"""Reading the rows of published data sets as tasks, for training and for benchmarks.

A task's metadata says how its answer is graded (``answer_kind``), its ``category``, its
``options`` if it has any, and what a metric over several rows needs.
"""
# ruff: noqa: RUF001  # options are written with full-width punctuation too

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reopold_agent.data.checks import NO_QUESTION, Columns, RowError
from reopold_agent.data.formats import (
    acceptable_answers,
    answers_of,
    choice_task,
    pixel_reasoner_task,
    question_task,
    text_of,
    verl_task,
)
from reopold_agent.data.options import (
    LETTERS,
    is_blank,
    labelled_option,
    list_of,
    options_in,
    options_of,
    right_options,
    with_options,
)
from reopold_agent.data.pictures import PictureFolder, is_null, picture_of
from reopold_agent.judges.boxed import extract_boxed
from reopold_agent.types import ImageSource, Task

_QUESTION = ("problem", "question")

RowMaker = Callable[[Mapping[str, Any], int, Path, PictureFolder], Task]
"""(row, its number, folder of its file, pictures there) -> task; raises `DataError`."""


def pixel_reasoner(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """Reads Pixel-Reasoner's evaluation rows: V-Star, InfoVQA, TallyQA, Pixel."""
    task = pixel_reasoner_task(row, number, pictures)
    return _with(task, category=str(row.get("category") or row.get("type") or ""))


def verl(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads LUFFY's and verl's parquet rows; ``data_source`` becomes the category."""
    task = choice_task(verl_task(row, number, pictures), row)
    return _with(task, category=str(row.get("data_source", "")), id=f"{number}")


def math_jsonl(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads Qwen2.5-Math's files: AIME, AMC, MATH-500, Minerva, OlympiadBench, GSM8K.

    The answer is ``answer`` or ``final_answer``. GSM8K's ends in ``#### n``; Minerva's is the last
    box of ``solution``.
    """
    category = str(row.get("subject") or row.get("subfield") or row.get("type") or "")
    return question_task(
        row,
        pictures,
        id=_name(row, number, "id", "unique_id", "idx"),
        question=text_of(row, *_QUESTION),
        answers=_math_answers(row),
        metadata={"answer_kind": "math", "category": category},
    )


def mathematics(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads LUFFY's rows (`verl`) or Qwen2.5-Math's (`math_jsonl`), whichever a row is."""
    if "reward_model" not in row:
        return math_jsonl(row, number, root, pictures)
    task = verl(row, number, root, pictures)
    kind = "option" if task.metadata.get("options") else "math"
    return replace(task, metadata={**task.metadata, "answer_kind": kind})


def geometry3k_intergps(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """Reads InterGPS's folders; the right option becomes a free-form answer (NoisyRollout)."""
    options = [str(option) for option in list_of(row, "choices")]
    letter = str(row.get("answer", ""))
    if letter not in list(LETTERS[: len(options)]):
        raise RowError(
            "no answer", f"the answer '{letter[:40]}' is none of the {len(options)} options"
        )
    name = _name(row, number, "id")
    images = row.get("image") or f"{name}/img_diagram.png"
    return Task(
        name,
        _words(row, "annotat_text", "problem_text"),
        (options[LETTERS.index(letter)],),
        (pictures.find(str(images)),),
        metadata={"answer_kind": "math", "category": str(row.get("problem_type_goal", ""))},
    )


def parquet_pictures(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """Reads Geometry3K: hiyouga's and xyliu6's images with bytes, ``problem``, ``answer``.

    InterGPS's rows, which have ``choices`` and name the question otherwise, are read by
    `geometry3k_intergps`.
    """
    if "choices" in row and not any(name in row for name in _QUESTION):
        return geometry3k_intergps(row, number, root, pictures)
    return question_task(
        row,
        pictures,
        id=_name(row, number, "id"),
        question=text_of(row, *_QUESTION),
        answers=answers_of(row),
        metadata={"answer_kind": "math", "category": ""},
    )


def mathvision(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads MATH-V's jsonl and hub parquet, and VLMEvalKit's tsv with or without pictures."""
    options = options_of(row)
    question = _words(row, "question")
    name = _name(row, number, "id", "index")
    file = f"images/{_name(row, number, 'index', 'id')}.jpg"  # as NoisyRollout names them
    picture = row.get("decoded_image") or row.get("image") or file
    answers = acceptable_answers(row.get("answer"))
    return Task(
        name,
        with_options(question, options),
        right_options(answers, options, by_letter=True) if options else answers,
        (picture_of(picture, pictures),),
        metadata={
            "answer_kind": "option" if options else "math",
            "options": options,
            "category": str(row.get("subject") or row.get("category") or ""),
        },
    )


def mathverse(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads MathVerse's testmini, as json, parquet or VLMEvalKit's tsv.

    The options are in the question, after "Choices:".
    """
    choice = row.get("question_type") == "multi-choice"
    question = text_of(row, "query_cot", "question")
    listed = re.split(r"(?i)\b(?:choices|options)\s*[:：]", question)[1:]
    return Task(
        _name(row, number, "sample_index", "index"),
        question,
        acceptable_answers(row.get("answer")),
        (picture_of(row.get("image"), pictures),),
        metadata={
            "answer_kind": "option" if choice else "math",
            "options": options_in(listed[-1]) if choice and listed else [],
            "category": str(row.get("problem_version", "")),
        },
    )


def mathvista(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads MathVista's testmini: its json and parquet, or VLMEvalKit's tsv.

    The text of the right option becomes its letter; numbers stay as written.
    """
    options = options_of(row)
    answers = acceptable_answers(row.get("answer"))
    more = row.get("metadata")
    category = str((more if isinstance(more, Mapping) else row).get("task") or "")
    metadata: dict[str, Any] = {"answer_kind": "auto", "category": category}
    if row.get("question_type") == "multi_choice":
        if answers[0] in options:
            answers = (LETTERS[options.index(answers[0])],)  # also if the text is a letter
        else:
            answers = right_options(answers, options)
        metadata = {**metadata, "answer_kind": "option", "options": options}
    elif row.get("answer_type") == "float" and row.get("precision") not in (None, ""):
        # MathVista's own script rounds the answer to so many decimals.
        metadata["precision"] = int(float(row["precision"]))
    elif row.get("answer_type") == "integer":
        metadata["precision"] = "whole"  # and takes 14.7 for 14
    return Task(
        _name(row, number, "pid", "index"),
        text_of(row, "query", "question"),
        answers,
        (picture_of(row.get("decoded_image") or row.get("image"), pictures),),
        metadata=metadata,
    )


def wemath(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads We-Math's testmini.json, or VLMEvalKit's tsv with a column for each option.

    ``key`` and ``ID`` group the sub-problems of one problem.
    """
    problem, key = _name(row, number, "ID", "id"), _cell(row, "key")
    listed, options = str(row.get("option", "")), options_of(row)
    if options:
        question = with_options(text_of(row, "question"), options)
    else:
        question, options = f"{text_of(row, 'question')}\n\nOptions: {listed}", options_in(listed)
    return Task(
        f"{problem}@{key}",
        question,
        acceptable_answers(row.get("answer")),
        (picture_of(row.get("image_path") or row.get("image"), pictures),),
        metadata={
            "answer_kind": "option",
            "options": options,
            "category": key,
            "problem": problem,
            "key": key,
        },
    )


def hallusionbench(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """Reads HallusionBench's json, or VLMEvalKit's tsv: yes or no.

    Rows without a picture stay without one. The demand for a box is NoisyRollout's.
    """
    answer = str(row.get("gt_answer", row.get("answer", "")))
    if answer.lower() not in _YES_NO:
        raise RowError("no answer", f"the answer must be 0 or 1, or yes or no; got '{answer[:40]}'")
    name = row.get("local_image") or row.get("filename") or row.get("image")
    images: tuple[ImageSource, ...] = (picture_of(name, pictures),) if name else ()
    keys = [_cell(row, key) for key in ("set_id", "figure_id", "question_id")]
    if not any(keys):  # the tsv's index ends in them
        keys = _name(row, number, "index").split("_")[-3:]
    group = [_cell(row, key) for key in ("category", "subcategory", "l2-category")]
    group = group[:1] + [each for each in group[1:] if each]
    return Task(
        "_".join([*group, *keys]),
        text_of(row, "question") + " Your final answer can only be \\boxed{yes} or \\boxed{no}.",
        (_YES_NO[answer.lower()],),
        images,
        metadata={
            "answer_kind": "yes_no",
            "category": "/".join(group),
            # The benchmark's own script leaves questions without a picture out of fAcc.
            "figure": "_".join([*group, *keys[:2]]) if name else None,
            "question": "_".join([*group, keys[0], keys[-1]]),
        },
    )


_YES_NO = {"0": "no", "1": "yes", "no": "no", "yes": "yes"}


def vlmevalkit(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Reads VLMEvalKit's tsv files: ``image`` in base64, ``question``, ``answer``.

    Options are in columns ``A``, ``B`` and so on; ``hint`` is put before the question. Several
    accepted answers are a list that is written as text.
    """
    hint = "" if is_blank(row.get("hint")) else str(row["hint"]).strip()
    return question_task(
        row,
        pictures,
        id=_name(row, number, "index"),
        question=f"Hint: {hint}\n" * bool(hint) + text_of(row, "question").strip(),
        answers=answers_of(row),
        metadata={"answer_kind": "auto", "category": str(row.get("category") or "")},
        lettered=True,
    )


def _words(row: Mapping[str, Any], *columns: str) -> str:
    """Returns a question without the marks of its one picture, which comes first."""
    question = re.sub(r"<image\d*>", "", text_of(row, *columns)).strip()
    if not question:
        raise RowError(NO_QUESTION, "the question has no words beside its picture")
    return question


def _name(row: Mapping[str, Any], number: int, *columns: str) -> str:
    """Returns the first of the columns that is not empty, or the row's number."""
    given = (row.get(each) for each in columns)
    return str(next((value for value in given if not is_null(value) and value != ""), number))


def _cell(row: Mapping[str, Any], column: str) -> str:
    return "" if is_null(value := row.get(column)) else str(value)


FORMATS: Mapping[str, RowMaker] = {
    "pixel_reasoner": pixel_reasoner,
    "verl": verl,
    "math_jsonl": math_jsonl,
    "mathematics": mathematics,
    "vlmevalkit": vlmevalkit,
    "geometry3k_intergps": geometry3k_intergps,
    "parquet_pictures": parquet_pictures,
    "mathvision": mathvision,
    "mathverse": mathverse,
    "mathvista": mathvista,
    "wemath": wemath,
    "hallusionbench": hallusionbench,
}


COLUMNS: Mapping[str, Columns] = {
    "pixel_reasoner": (("question",), ("answer", "label")),
    "verl": (("prompt",), ("reward_model",)),
    "math_jsonl": (_QUESTION, ("answer", "final_answer", "solution", "label")),
    "mathematics": (
        ("prompt", *_QUESTION),
        ("reward_model", "answer", "final_answer", "solution", "label"),
    ),
    "vlmevalkit": (("question",), ("answer", "label")),
    "geometry3k_intergps": (("annotat_text", "problem_text"), ("choices",), ("answer",)),
    "parquet_pictures": ((*_QUESTION, "annotat_text", "problem_text"), ("answer", "label")),
    "mathvision": (("question",), ("answer",)),
    "mathverse": (("query_cot", "question"), ("answer",), ("image",)),
    "mathvista": (("query", "question"), ("answer",)),
    "wemath": (("question",), ("answer",), ("image_path", "image")),
    "hallusionbench": (("question",), ("gt_answer", "answer")),
}
"""The columns that a row of each format must have, each as its alternative names."""


def _with(task: Task, *, category: str, id: str | None = None) -> Task:
    metadata = {"answer_kind": "auto", **task.metadata, "category": category}
    return replace(task, id=id or task.id, metadata=metadata)


def _math_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    if not is_blank(row.get("answer")):
        answers = acceptable_answers(row["answer"])
    elif not is_blank(row.get("final_answer")):
        # OlympiadBench lists the parts of one answer.
        answers = (", ".join(acceptable_answers(row["final_answer"])),)
    elif (option := labelled_option(row)) is not None:
        answers = (option,)
    elif (boxed := extract_boxed(str(row.get("solution", "")))) is not None:
        answers = (boxed,)
    else:
        raise RowError("no answer", "neither answer nor final_answer, and no box in the solution")
    return tuple(each.rsplit("####", 1)[-1].strip() for each in answers)
