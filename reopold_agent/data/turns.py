"""The turns of a row's conversation, and where its pictures stand in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from reopold_agent.data.checks import RowError
from reopold_agent.data.pictures import Given, PictureFolder, is_empty, picture_of, video_frames
from reopold_agent.types import IMAGE_MARK, ImageSource, Role

MARKS = "picture marks"
"""Kind of the problem that marks and pictures do not agree."""

Turns: TypeAlias = "tuple[tuple[Role, str], ...]"


def read_turns(
    messages: Sequence[Any], given: Given, pictures: PictureFolder
) -> tuple[Turns, tuple[ImageSource, ...], bool]:
    """Returns the turns of a conversation with an `IMAGE_MARK` where each picture stands.

    Content is a text in which ``<image>`` stands for the next of the row's pictures, ``<image2>``
    for the second and ``<video>`` for all frames, or a list of parts, of which those with a picture
    may hold it. Without any mark, pictures stand before the last turn. Marks at the beginning of a
    conversation of one turn are left out: there they say nothing. Also returns the pictures in
    order, and whether they are the frames of a video.

    Args:
        messages: objects with ``role`` and ``content``.
        given: the row's pictures.
        pictures: where they are.

    Raises:
        RowError: a message is no such object, its role is unknown, or marks and pictures do not
            agree.
    """
    turns: list[tuple[Role, list[Any]]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant"):
            raise RowError("wrong type", f"a message must have the role system, user or assistant, "
                           f"got {str(role)[:40]}")  # fmt: skip
        pieces = list(_pieces(message.get("content")))
        if role != "user" and any(isinstance(piece, _Mark) for piece in pieces):
            # The words "<image>" of a system message, say about how pictures are marked.
            pieces = [_plain(message["content"])]
        turns.append((cast(Role, role), pieces))
    marks = [piece for _, pieces in turns for piece in pieces if not isinstance(piece, str)]
    own_video = [mark for mark in marks if mark.video and mark.value is not None]
    if own_video and len(own_video) < len(marks):
        raise RowError("video", "both pictures and a video in the messages; give one of them")
    chosen = _chosen(marks, given)
    opened = tuple(picture_of(value, pictures) for values in chosen for value in values)
    if not marks:
        shown = tuple(picture_of(value, pictures) for value in given.values)
        return _texts(turns, ()), shown, given.is_video
    texts = _texts(turns, [len(values) for values in chosen])
    *earlier, (role, words) = texts
    first = words.lstrip(f"{IMAGE_MARK} \t\r\n")
    if IMAGE_MARK not in first and all(role == "system" for role, _ in earlier):
        texts = (*earlier, (role, first))
    return texts, opened, given.is_video or bool(own_video)


@dataclass(frozen=True)
class _Mark:
    """A place for a picture: ``value`` is the picture, or else it is in the row's columns.

    ``number`` counts the row's pictures from 1, or is None for the next one.
    """

    value: Any = None
    number: int | None = None
    video: bool = False


_MARK = re.compile(
    r"<image[\s_]?(\d*)>|(<video>)|<\|image_(?P<number>\d+)\|>"
    r"|<\|vision_start\|><\|image_pad\|><\|vision_end\|>"
)


def _pieces(content: Any) -> Iterator[str | _Mark]:
    """Yields the texts and marks of a message's content in reading order."""
    if content is None:
        return
    if isinstance(content, str):
        end = 0
        for found in _MARK.finditer(content):
            yield content[end : found.start()].replace(IMAGE_MARK, " ")
            number = found[1] or found["number"]
            yield _Mark(number=int(number) if number else None, video=bool(found[2]))
            end = found.end()
        yield content[end:].replace(IMAGE_MARK, " ")
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError("wrong type", "the content of a message must be a text or a list of parts")
    for part in content:
        if isinstance(part, str):
            yield from _pieces(part)
        elif not isinstance(part, Mapping):
            raise RowError("wrong type", "a part of a message must be a text or an object")
        else:
            yield from _part(part)


_PART_KINDS = ("image", "image_url", "video")


def _plain(content: Any) -> str:
    """Returns the text of a message that is not the user's, which has no pictures."""
    if isinstance(content, str):
        return content.replace(IMAGE_MARK, " ")
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise RowError(MARKS, "only the user's messages may hold pictures")
    return "".join(texts).replace(IMAGE_MARK, " ")


def _part(part: Mapping[str, Any]) -> Iterator[str | _Mark]:
    kind = str(part.get("type") or "")
    given = {name: part.get(name) for name in _PART_KINDS if not is_empty(part.get(name))}
    if given and part.get("text"):
        raise RowError("wrong type", "a part of a message has both text and a picture")
    for name in _PART_KINDS:
        if name not in given and kind != name:
            continue
        if kind == name and name not in given:  # as {"type": "image", "path": ...}
            where = {key: part[key] for key in ("path", "url", "bytes") if part.get(key)}
            given[name] = where or None
        if name == "video" and given[name] is not None:
            for frame in video_frames([given[name]]):
                yield _Mark(frame, video=True)
        else:
            yield _Mark(given[name], video=name == "video")
        return
    if not isinstance(part.get("text"), str):
        raise RowError("wrong type", f"a part of a message has neither text nor picture: {kind}")
    yield from _pieces(part["text"])


def _chosen(marks: Sequence[_Mark], given: Given) -> list[list[Any]]:
    """Returns the pictures for each mark."""
    waiting = list(given.values)
    own = [mark for mark in marks if mark.value is not None]
    if own and len(own) == len(marks):
        if waiting and len(waiting) != len(own):
            raise _disagree(f"{len(own)} pictures in the messages", given)
        return [[mark.value] for mark in own]  # the columns repeat them
    numbers = [mark.number for mark in marks if mark.number is not None]
    if numbers:
        # In another order, pictures would have to be numbered anew, but words may name the numbers.
        if numbers != list(range(1, len(waiting) + 1)) or len(numbers) != len(marks):
            raise _disagree(f"the marks {', '.join(f'<image{n}>' for n in numbers[:6])}", given)
        return [[value] for value in waiting]
    chosen: list[list[Any]] = []
    for mark in marks:
        if mark.value is not None:
            chosen.append([mark.value])
        elif not waiting:
            raise _disagree(_counted(marks), given)
        else:
            count = len(waiting) if mark.video and given.is_video else 1
            chosen.append([waiting.pop(0) for _ in range(count)])
    if marks and waiting:
        raise _disagree(_counted(marks), given)
    return chosen


def _counted(marks: Sequence[_Mark]) -> str:
    return f"{len(marks)} picture mark{'s' * (len(marks) != 1)}"


def _disagree(marks: str, given: Given) -> RowError:
    count = len(given.values)
    what = ("frame" if given.is_video else "picture") + "s" * (count != 1)
    return RowError(MARKS, f"{marks} in the text, but {count} {what} in the row")


def _texts(turns: Sequence[tuple[Role, list[Any]]], counts: Sequence[int]) -> Turns:
    remaining = iter(counts)
    return tuple(
        (role, "".join(p if isinstance(p, str) else IMAGE_MARK * next(remaining) for p in pieces))
        for role, pieces in turns
    )
