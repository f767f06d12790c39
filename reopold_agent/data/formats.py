"""The row formats of the field, as tasks: Pixel-Reasoner's and verl's (VerlTool's)."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reopold_agent.data.checks import RowError
from reopold_agent.data.images import BytesImage, FileImage, ZipImage, safe_join
from reopold_agent.data.urls import UrlRules, is_url, url_image
from reopold_agent.errors import DataError
from reopold_agent.types import ImageSource, Task


@dataclass
class PictureFolder:
    """Where the pictures of a data folder are: extracted, or in its zip archives.

    Attributes:
        root: the folder.
        urls: what may be downloaded where a row names a URL; None for nothing.
    """

    root: Path
    urls: UrlRules | None = None
    _members: dict[str, tuple[Path, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for archive in sorted(self.root.glob("*.zip")):
            try:
                with zipfile.ZipFile(archive) as opened:
                    for name in opened.namelist():
                        # Archives may or may not carry their own name as top folder.
                        for key in (name, name.removeprefix(f"{archive.stem}/")):
                            self._members.setdefault(key, (archive, name))
            except zipfile.BadZipFile as error:
                raise DataError(f"{archive} is not a zip archive: {error}") from error

    def find(self, relative: str) -> ImageSource:
        """The picture of that path, or of that URL.

        Raises:
            RowError: it is nowhere, the path leaves the folder, or URLs are not allowed.
        """
        if is_url(relative):
            return url_image(relative, self.urls)
        for name in (relative, f"images/{relative}", f"videos/{relative}"):
            try:
                path = safe_join(self.root, name)
            except DataError as error:
                raise RowError("path", str(error)) from error
            if path.is_file():
                return FileImage(path)
        keys = [relative.removeprefix("./"), relative.removeprefix("images/")]
        for key in (*keys, relative.removeprefix("videos/")):
            if key in self._members:
                return ZipImage(*self._members[key])
        raise RowError(
            "missing picture",
            f"the picture '{relative}' is neither in {self.root} nor in its zip archives; "
            "download images.zip and videos.zip of the dataset beside its rows",
        )


def pixel_reasoner_task(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Task:
    """A row of Pixel-Reasoner: question, answer (string or list), image (list), is_video, qid.

    Raises:
        DataError: a column is missing or wrong.
    """
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowError("wrong type", "'image' must be a path or a list of paths")
    return Task(
        id=_first(row.get("qid"), number),
        question=_without_markers(text_of(row, "question")),
        answers=acceptable_answers(row.get("answer")),
        images=tuple(pictures.find(name) for name in names),
        is_video=bool(row.get("is_video", False)),
    )


def verl_task(row: Mapping[str, Any], number: int, pictures: PictureFolder) -> Task:
    """A row of verl: prompt, images, reward_model.ground_truth, extra_info.

    The question is the last user message. Pictures are given by path (relative to the file's
    folder, or absolute inside it) or by bytes.

    Raises:
        DataError: a column is missing or wrong.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise RowError("wrong type", "'prompt' must be a list of messages")
    words = [m.get("content") for m in prompt if isinstance(m, Mapping) and m.get("role") == "user"]
    if not words or not isinstance(words[-1], str):
        raise RowError("no question", "'prompt' has no user message")
    extra, graded = _group(row, "extra_info"), _group(row, "reward_model")
    shown = row.get("images") or extra.get("images") or []
    if isinstance(shown, (str, bytes, Mapping)):
        shown = [shown]
    if not isinstance(shown, list):
        raise RowError("wrong type", "'images' must be a list of pictures")
    return Task(
        id=_first(extra.get("qid"), extra.get("index"), number),
        question=_without_markers(words[-1]),
        answers=acceptable_answers(graded.get("ground_truth")),
        images=tuple(_verl_picture(each, pictures) for each in shown),
        is_video=bool(extra.get("is_video", False)),
        metadata={"data_source": row.get("data_source", "")},
    )


def verl_row(task: Task, index: int, split: str, paths: Sequence[str]) -> dict[str, Any]:
    """A task as a row of verl, its pictures at ``paths``; `verl_task` reads it back."""
    answers: Any = task.answers[0] if len(task.answers) == 1 else list(task.answers)
    return {
        "data_source": str(task.metadata.get("data_source") or "reopold"),
        "prompt": [{"role": "user", "content": "<image>" * len(paths) + task.question}],
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


def _verl_picture(value: Any, pictures: PictureFolder) -> ImageSource:
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return BytesImage(value["bytes"])
        value = value.get("image") or value.get("path")
    if isinstance(value, bytes):
        return BytesImage(value)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError("wrong type", f"a picture must be a path or bytes, got {kind}")
    name = value.removeprefix("file://")
    absolute, root = Path(name), pictures.root.resolve()
    if absolute.is_absolute() and absolute.is_relative_to(root):
        name = str(absolute.relative_to(root))
    return pictures.find(name)


def _group(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = row.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError("wrong type", f"'{name}' must be an object, got {type(value).__name__}")
    return value


def _first(*values: Any) -> str:
    """The first that is not None; 0 is an id like any other."""
    return str(next(value for value in values if value is not None))


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """The first of these columns that holds a text with something in it.

    Raises:
        RowError: there is none; says what there is instead.
    """
    values = [row.get(name) for name in names]
    for value in values:
        if isinstance(value, str) and value.strip():
            return value
    other = next((v for v in values if v is not None and not isinstance(v, str)), None)
    if other is not None:
        wanted = " or ".join(f"'{name}'" for name in names)
        raise RowError("wrong type", f"{wanted} must be a text, got {type(other).__name__}")
    raise RowError("no question", f"no {' or '.join(names)}")


def list_of(row: Mapping[str, Any], name: str) -> list[Any]:
    """A column that holds a list; without the column, or where it is null, an empty one.

    Raises:
        RowError: it holds something else.
    """
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError("wrong type", f"'{name}' must be a list, got {type(value).__name__}")
    return list(value)


def acceptable_answers(value: Any) -> tuple[str, ...]:
    """A row's answer, one or a list, as strings.

    Raises:
        RowError: there is none, or it is neither a text nor a number.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for each in values:
        if each is not None and not isinstance(each, (str, int, float)):
            kind = type(each).__name__
            raise RowError("wrong type", f"an answer must be a text or a number, got {kind}")
    # NaN is how pandas writes that there is none.
    given = [v for v in values if v is not None and not (isinstance(v, float) and math.isnan(v))]
    answers = tuple(str(v).strip() for v in given if str(v).strip())
    if not answers:
        raise RowError("no answer", "no answer")
    return answers


def _without_markers(text: str) -> str:
    """Peers mark pictures in the text; here they come first anyway."""
    return text.replace("<image>", "").replace("<video>", "").strip()
