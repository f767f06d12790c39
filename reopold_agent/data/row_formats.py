"""Rows of the field's own files as tasks, for training and for benchmarks.

A task's metadata says how its answer is graded (``answer_kind``), which ``category`` it belongs
to, its ``options`` if it has some, and what a metric over several rows needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.boxed import extract_boxed
from reopold_agent.data.checks import Columns, RowError
from reopold_agent.data.formats import (
    PictureFolder,
    acceptable_answers,
    list_of,
    pixel_reasoner_task,
    text_of,
    verl_task,
)
from reopold_agent.data.images import BytesImage
from reopold_agent.types import ImageSource, Task

LETTERS = "ABCDEFGHIJ"

RowMaker = Callable[[Mapping[str, Any], int, Path, PictureFolder], Task]
"""(row, its number, folder of its file, pictures there) -> task; raises `DataError`."""


def pixel_reasoner(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """V-Star, InfoVQA, TallyQA, Pixel: Pixel-Reasoner's evaluation rows."""
    task = pixel_reasoner_task(row, number, pictures)
    return _with(task, category=str(row.get("category") or row.get("type") or ""))


def verl(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """LUFFY's and verl's parquet rows; ``data_source`` becomes the category."""
    task = verl_task(row, number, pictures)
    return _with(task, category=str(row.get("data_source", "")), id=f"{number}")


def math_jsonl(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """Qwen2.5-Math's files: AIME, AMC, MATH-500, Minerva, OlympiadBench, GSM8K.

    The answer is ``answer`` or ``final_answer``; GSM8K's ends in ``#### n``; Minerva's is the last
    box of ``solution``.
    """
    question = text_of(row, "problem", "question")
    answers = _math_answers(row)
    kind = "math"
    category = str(row.get("subject") or row.get("subfield") or row.get("type") or "")
    name = row.get("id", row.get("unique_id", row.get("idx", number)))
    return Task(str(name), question, answers, metadata={"answer_kind": kind, "category": category})


def geometry3k_intergps(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """InterGPS's folders: the chosen option becomes a free-form answer (NoisyRollout)."""
    options = [str(option) for option in list_of(row, "choices")]
    letter = str(row.get("answer", ""))
    if letter not in list(LETTERS[: len(options)]):
        raise RowError("no answer", f"the answer '{letter[:40]}' is none of {len(options)} options")
    name = str(row.get("id", number))
    images = row.get("image") or f"{name}/img_diagram.png"
    return Task(
        name,
        text_of(row, "annotat_text", "problem_text"),
        (options[LETTERS.index(letter)],),
        (pictures.find(str(images)),),
        metadata={"answer_kind": "math", "category": str(row.get("problem_type_goal", ""))},
    )


def parquet_pictures(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """hiyouga's and xyliu6's Geometry3K: images with bytes, ``problem``, ``answer``."""
    images = row.get("images") or row.get("image") or []
    listed = images if isinstance(images, (list, tuple)) else [images]
    return Task(
        str(row.get("id", number)),
        text_of(row, "problem", "question").replace("<image>", "").strip(),
        acceptable_answers(row.get("answer")),
        tuple(_picture(image, pictures) for image in listed),
        metadata={"answer_kind": "math", "category": ""},
    )


def mathvision(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """MATH-V's json, or the tsv of NoisyRollout's data."""
    options = [str(option) for option in list_of(row, "options")]
    question = re.sub(r"<image\d*>", "", text_of(row, "question")).strip()
    if options:
        question += "\nOptions:\n" + _listed(options)
    name = str(row.get("id", row.get("index", number)))
    picture = row.get("image") or f"images/{name}.jpg"
    answer = str(row.get("answer", ""))
    return Task(
        name,
        question,
        acceptable_answers(answer),
        (_picture(picture, pictures),),
        metadata={
            "answer_kind": "option" if options else "math",
            "options": options,
            "category": str(row.get("subject") or row.get("category") or ""),
        },
    )


def mathverse(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """MathVerse's testmini.json."""
    choice = row.get("question_type") == "multi-choice"
    return Task(
        str(row.get("sample_index", number)),
        text_of(row, "query_cot", "question"),
        acceptable_answers(row.get("answer")),
        (_picture(row.get("image"), pictures),),
        metadata={
            "answer_kind": "option" if choice else "math",
            "category": str(row.get("problem_version", "")),
        },
    )


def mathvista(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """MathVista's testmini; an option's text becomes its letter, numbers keep their precision."""
    options = [str(option) for option in list_of(row, "choices")]
    answer = str(row.get("answer", ""))
    more = row.get("metadata")
    category = str(more.get("task", "")) if isinstance(more, Mapping) else ""
    metadata: dict[str, Any] = {"answer_kind": "auto", "category": category}
    if row.get("question_type") == "multi_choice":
        if answer not in options:
            raise RowError("no answer", f"the answer '{answer[:40]}' is none of the options")
        if options.index(answer) >= len(LETTERS):
            raise RowError("no answer", f"there are {len(options)} options; {len(LETTERS)} fit")
        answer = LETTERS[options.index(answer)]
        metadata = {**metadata, "answer_kind": "option", "options": options}
    return Task(
        str(row.get("pid", number)),
        text_of(row, "query", "question"),
        acceptable_answers(answer),
        (_picture(row.get("decoded_image") or row.get("image"), pictures),),
        metadata=metadata,
    )


def wemath(row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder) -> Task:
    """We-Math's testmini.json; ``key`` and ``ID`` group the sub-problems of one problem."""
    return Task(
        f"{row.get('ID', number)}@{row.get('key', '')}",
        f"{text_of(row, 'question')}\n\nOptions: {row.get('option', '')}",
        acceptable_answers(row.get("answer")),
        (_picture(row.get("image_path"), pictures),),
        metadata={
            "answer_kind": "option",
            "category": str(row.get("key", "")),
            "problem": str(row.get("ID", number)),
            "key": str(row.get("key", "")),
        },
    )


def hallusionbench(
    row: Mapping[str, Any], number: int, root: Path, pictures: PictureFolder
) -> Task:
    """HallusionBench's json: yes or no; rows without a picture are asked without one."""
    answer = str(row.get("gt_answer", ""))
    if answer not in ("0", "1"):
        raise RowError("no answer", f"gt_answer must be '0' or '1', got '{answer[:40]}'")
    name = row.get("local_image") or row.get("filename")
    images: tuple[ImageSource, ...] = (_picture(name, pictures),) if name else ()
    keys = [str(row.get(key, "")) for key in ("set_id", "figure_id", "question_id")]
    group = [str(row.get(key, "")) for key in ("category", "subcategory")]
    return Task(
        "_".join([*group, *keys]),
        f"{text_of(row, 'question')} Your final answer can only be yes or no.",
        ("yes" if answer == "1" else "no",),
        images,
        metadata={
            "answer_kind": "yes_no",
            "category": "/".join(group),
            # The benchmark's own script leaves questions without a picture out of fAcc.
            "figure": "_".join([*group, *keys[:2]]) if name else None,
            "question": "_".join([*group, keys[0], keys[2]]),
        },
    )


FORMATS: Mapping[str, RowMaker] = {
    "pixel_reasoner": pixel_reasoner,
    "verl": verl,
    "math_jsonl": math_jsonl,
    "geometry3k_intergps": geometry3k_intergps,
    "parquet_pictures": parquet_pictures,
    "mathvision": mathvision,
    "mathverse": mathverse,
    "mathvista": mathvista,
    "wemath": wemath,
    "hallusionbench": hallusionbench,
}


_QUESTION = ("problem", "question")

COLUMNS: Mapping[str, Columns] = {
    "pixel_reasoner": (("question",), ("answer",)),
    "verl": (("prompt",), ("reward_model",)),
    "math_jsonl": (_QUESTION, ("answer", "final_answer", "solution")),
    "geometry3k_intergps": (("annotat_text", "problem_text"), ("choices",), ("answer",)),
    "parquet_pictures": (_QUESTION, ("answer",)),
    "mathvision": (("question",), ("answer",)),
    "mathverse": (("query_cot", "question"), ("answer",), ("image",)),
    "mathvista": (("query", "question"), ("answer",)),
    "wemath": (("question",), ("answer",), ("image_path",)),
    "hallusionbench": (("question",), ("gt_answer",)),
}
"""What a row of each format must have; for each entry one of its names."""


def _with(task: Task, *, category: str, id: str | None = None) -> Task:
    return Task(
        id or task.id,
        task.question,
        task.answers,
        task.images,
        task.is_video,
        {"answer_kind": "auto", **task.metadata, "category": category},
    )


def _math_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("final_answer") if row.get("answer") is None else row["answer"]
    if value is None:
        boxed = extract_boxed(str(row.get("solution", "")))
        if boxed is None:
            raise RowError(
                "no answer", "neither answer nor final_answer, and no box in the solution"
            )
        return (boxed,)
    if isinstance(value, str) and "####" in value:
        return (value.rsplit("####", 1)[1].strip(),)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        # OlympiadBench lists the parts of one answer.
        return (", ".join(str(part) for part in value),)
    return acceptable_answers(value)


def _picture(value: Any, pictures: PictureFolder) -> ImageSource:
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return BytesImage(value["bytes"])
        value = value.get("path") or value.get("image")
    if isinstance(value, bytes):
        return BytesImage(value)
    if not isinstance(value, str) or not value:
        raise RowError("missing picture", "no picture")
    return pictures.find(value.removeprefix("./"))


def _listed(options: Sequence[str]) -> str:
    return "\n".join(
        f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
    )
