"""The turns of a row's conversation, and where its pictures stand in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from reopold_agent.data.checks import RowError
from reopold_agent.data.pictures import (
    MESSAGES,
    NESTED,
    Given,
    PictureFolder,
    as_list,
    given_pictures,
    is_empty,
    is_picture_column,
    looks_like_picture,
    picture_of,
    refuse_animation,
    repeats_pictures,
    target_is_picture,
)
from reopold_agent.types import IMAGE_MARK, ImageSource, Role

MARKS = "picture marks"
"""Kind of the problem that marks and pictures do not agree."""

Turns: TypeAlias = "tuple[tuple[Role, str], ...]"


@dataclass(frozen=True)
class Mark:
    """A place for pictures in a text.

    Attributes:
        values: the pictures, or the frames of a video; empty if they are in the row's columns.
        number: counts the row's pictures from 1; None for the next one.
        video: whether they are the frames of a video.
    """

    values: tuple[Any, ...] = ()
    number: int | None = None
    video: bool = False


Pieces: TypeAlias = "list[str | Mark]"


def read_turns(
    messages: Sequence[Any], given: Given, pictures: PictureFolder
) -> tuple[Turns, tuple[ImageSource, ...], bool]:
    """Returns the turns of a conversation with an `IMAGE_MARK` where each picture stands.

    Content is a text with marks, or a list of parts, of which those with a picture may hold it; a
    message may have pictures in keys of its own. The mark ``<image>`` stands for the next of the
    row's or the message's pictures, ``<image2>`` for the second and ``<video>`` for all frames.
    Without any mark, a row's pictures stand before the last turn, a message's before its text.
    Marks at the beginning of a conversation of one turn are left out: there they say nothing. Also
    returns the pictures in order, and whether they are the frames of a video.

    Args:
        messages: objects with ``role`` and ``content``.
        given: the row's pictures.
        pictures: where they are.

    Raises:
        RowError: a message is no such object, holds what would be lost, or its role is unknown; or
            marks and pictures do not agree.
    """
    turns = [_turn(message, pictures) for message in messages]
    marks = [piece for _, pieces in turns for piece in pieces if isinstance(piece, Mark)]
    videos = [mark for mark in marks if mark.video and mark.values]
    if videos and len(videos) < len(marks):
        raise RowError("video", "both pictures and a video in the messages; give one of them")
    if len(videos) > 1:
        raise RowError("video", f"{len(videos)} videos in the messages; one is possible")
    if not marks:
        asked = [piece for role, pieces in turns if role == "user" for piece in pieces]
        if given.values:
            _refuse_lookalikes(asked)
        else:
            refuse_named_pictures(asked)
    chosen = chosen_pictures(marks, given, pictures)
    shown = [value for values in chosen for value in values] if marks else given.values
    opened = tuple(picture_of(value, pictures) for value in shown)
    if given.is_video or videos:
        refuse_animation(opened)
    remaining = iter(chosen)
    texts = tuple(
        (role, "".join(p if isinstance(p, str) else IMAGE_MARK * len(next(remaining)) for p in ps))
        for role, ps in turns
    )
    if marks:
        *earlier, (role, words) = texts
        first = words.lstrip(f"{IMAGE_MARK} \t\r\n")
        if IMAGE_MARK not in first and all(role == "system" for role, _ in earlier):
            texts = (*earlier, (role, first))
    return texts, opened, given.is_video or bool(videos)


_MESSAGE = ("role", "content", "name", "id", "index", "weight")
"""Keys of a message. The last four say nothing to a model, neither do chat templates."""


def _turn(message: Any, pictures: PictureFolder) -> tuple[Role, Pieces]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("system", "user", "assistant"):
        raise RowError("wrong type", f"a message must have the role system, user or assistant, "
                       f"got {str(role)[:40]}")  # fmt: skip
    if not is_empty(message.get("tool_calls")):
        raise RowError("lost", "'tool_calls' of an earlier turn would be lost; write them into its "
                       "'content' as the student's chat template does")  # fmt: skip
    _refuse_unknown(message, _MESSAGE, "a message")
    return cast(Role, role), pieces_of(message, pictures, shows_pictures=role == "user")


def pieces_of(
    message: Mapping[str, Any], pictures: PictureFolder, *, shows_pictures: bool
) -> Pieces:
    """Returns the texts and marks of a message in reading order.

    Args:
        message: an object with ``content`` and perhaps pictures in keys of its own.
        pictures: where they are.
        shows_pictures: whether it may have pictures: it is the user's, or a tool's. In others,
            marks are words.

    Raises:
        RowError: the content is of another kind, holds what would be lost, or has pictures where
            there may be none.
    """
    content, own = as_list(message.get("content")), given_pictures(message, pictures)
    if content is None:
        raise RowError(
            "wrong type", f"a message of the role {message.get('role')} has no 'content'"
        )
    pieces = list(_pieces(content))
    if shows_pictures:
        return _filled(pieces, own, pictures) if own.values else pieces
    if any(isinstance(piece, Mark) for piece in pieces):
        # The words "<image>" of a system message, say about how pictures are marked.
        pieces = [_plain(content)]
    if own.values:
        raise _not_the_users()
    return pieces


_SYSTEM = ("system", "system_prompt", "system_message")


def system_column(row: Mapping[str, Any], messages: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Returns the system message of a row's column, if the messages have none.

    Raises:
        RowError: it is no text, or there are different ones.
    """
    given = {name: row[name] for name in _SYSTEM if not is_empty(row.get(name))}
    opening = [
        _plain(as_list(message.get("content") or ""))
        for message in messages[:1]
        if isinstance(message, Mapping) and message.get("role") in ("system", "developer")
    ]
    for name, text in given.items():
        if not isinstance(text, str):
            raise RowError("wrong type", f"'{name}' must be a text, the system message")
        if any(text != other for other in (*given.values(), *opening)):
            raise RowError(
                "system message",
                f"'{name}' and another system message of the row differ; leave one of them out",
            )
    texts = [] if opening else list(given.values())[:1]
    return [{"role": "system", "content": text} for text in texts]


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], what: str) -> None:
    for key, value in given.items():
        if key not in known and not is_picture_column(key) and not is_empty(value):
            raise RowError(
                "lost",
                f"'{str(key)[:40]}' of {what} is not read, and would be lost; leave it out, or put "
                "it into 'content'",
            )


def _filled(pieces: Pieces, given: Given, pictures: PictureFolder) -> Pieces:
    """Returns a message with the pictures of its own keys at its marks, or else first."""
    marks = [piece for piece in pieces if isinstance(piece, Mark)]
    if not marks:
        _refuse_lookalikes(pieces)
        return [Mark(given.values, video=given.is_video), *pieces]
    chosen = iter(chosen_pictures(marks, given, pictures))
    return [p if isinstance(p, str) else Mark(next(chosen), video=given.is_video) for p in pieces]


_MARK = re.compile(
    r"<image[\s_-]?(\d{0,3})>|<\|image_(?P<number>\d{1,3})\|>"
    r"|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>"
    r"|(?P<video><video>|<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>|<\|video_pad\|>)",
    re.IGNORECASE,
)

_LOOKALIKE = re.compile(
    r"<\|?/?(?:image|img|picture|photo|video|frame|vision)[\w\s-]{0,20}/?\|?>"
    r"|<img\s[^<>]{0,200}>"
    r"|\[(?:image|img|picture|photo|video)s?[\s_-]?\d{0,3}\]"
    r"|(?<!\w)\{\{?\s?(?:image|img|picture|photo|video)s?[\s_-]?\d{0,3}\s?\}"
    r"|!\[[^\[\]\n]{0,200}\]\(",
    re.IGNORECASE,
)
"""What other programs write where a picture stands: ``<img>``, ``[image1]``, ``{image}``."""


def _refuse_lookalikes(pieces: Collection[str | Mark]) -> None:
    for piece in pieces:
        if isinstance(piece, str) and (found := _LOOKALIKE.search(piece)):
            raise RowError(
                MARKS,
                f"'{found[0][:40]}' in the text is no mark that is read; write <image> where each "
                "picture stands, or first if it marks none",
            )


_NAMED = re.compile(
    r"!\[[^\[\]\n]{0,200}\]\(\s*<?(?P<markdown>(?:[^()<>\s]+|\([^()\s]*\))+)"
    r"|<img\s[^<>]{0,200}?src\s*=\s*[\"']?(?P<html>[^<>\"'\s]+?)/?(?=[\"'\s>])",
    re.IGNORECASE,
)
"""A picture in Markdown or HTML, with its path or URL."""


def refuse_named_pictures(pieces: Collection[str | Mark]) -> None:
    """Refuses texts that show a picture by its name, as Markdown and HTML do.

    Args:
        pieces: the user's, in a row without pictures: what they show would not be seen.

    Raises:
        RowError: there is one.
    """
    texts = [piece for piece in pieces if isinstance(piece, str)]
    for found in (found for text in texts for found in _NAMED.finditer(text)):
        target = found["markdown"] or found["html"]
        if target_is_picture(target):
            raise RowError(
                MARKS,
                f"the text shows the picture '{target[:60]}', but 0 pictures in the row; put it "
                "into a column 'images' and write <image> in its place",
            )


def _pieces(content: Any) -> Iterator[str | Mark]:
    """Yields the texts and marks of a message's content in reading order."""
    if isinstance(content, str):
        end = 0
        for found in _MARK.finditer(content):
            yield content[end : found.start()].replace(IMAGE_MARK, " ")
            number = found[1] or found["number"]
            yield Mark(number=int(number) if number else None, video=bool(found["video"]))
            end = found.end()
        yield content[end:].replace(IMAGE_MARK, " ")
        return
    for part in _parts(content):
        if isinstance(part, str):
            yield from _pieces(part)
        elif not isinstance(part, Mapping):
            raise RowError("wrong type", "a part of a message must be a text or an object")
        else:
            yield from _part(part)


def _parts(content: Any) -> Sequence[Any]:
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError("wrong type", "the content of a message must be a text or a list of parts")
    return content


def _plain(content: Any) -> str:
    """Returns the text of a message that is not the user's, which has no pictures."""
    if isinstance(content, str):
        return content.replace(IMAGE_MARK, " ")
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in _parts(content)]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise _not_the_users()
    return "".join(texts).replace(IMAGE_MARK, " ")


def _not_the_users() -> RowError:
    return RowError(MARKS, "only the user's messages may hold pictures")


_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_VIDEOS = ("video", "video_url", "input_video")
_PLACES = ("path", "url", "bytes", "base64", "source")
"""Keys with the picture of a part whose type says that it is one."""

_PART = (
    "type", "text", *_PLACES, "detail", "cache_control", "min_pixels", "max_pixels", "fps",
    "resized_height", "resized_width", "nframes",
)  # fmt: skip
"""Keys of a part. The sizes are those of Qwen's tools; here, settings decide on them."""


def _part(part: Mapping[str, Any]) -> Iterator[str | Mark]:
    """Yields the text or the mark of a part, in the forms of Qwen, OpenAI and Anthropic."""
    kind, text = part.get("type") or None, part.get("text")
    if kind not in (None, *_TEXTS, *_IMAGES, *_VIDEOS):
        raise RowError(
            "lost",
            f"a part of a message has the type '{str(kind)[:40]}', which is not read; text, image "
            "and video are",
        )
    _refuse_unknown(part, _PART, "a part of a message")
    given = given_pictures(part)
    places = {name: part[name] for name in _PLACES if not is_empty(part.get(name))}
    if places and (given.values or kind in (None, *_TEXTS)):
        raise RowError("wrong type", f"a part of the type '{kind}' has '{next(iter(places))}'")
    if places:
        given = Given((places,), kind in _VIDEOS)
    pictured = bool(given.values) or kind in (*_IMAGES, *_VIDEOS)
    if pictured and (text or kind in _TEXTS):
        raise RowError("wrong type", "a part of a message has both text and a picture")
    if given.is_video and kind in _IMAGES:
        raise RowError("video", f"a part of the type '{kind}' has a video")
    if pictured:  # without values, it is in the row's columns
        yield Mark(given.values, video=given.is_video or kind in _VIDEOS)
    elif isinstance(text, str):
        yield from _pieces(text)
    else:
        raise RowError("wrong type", f"a part of a message has neither text nor picture: {kind}")


_WORDS = ("role", "name", "text", "tool_calls")
"""Keys of a message and its parts in which the name of a picture's file is a word."""


def refuse_unread_messages(row: Mapping[str, Any], read: Collection[str] = ()) -> None:
    """Refuses a row whose pictures are only in messages that its reader does not read.

    Args:
        row: a row in which the reader has found no picture.
        read: the columns with messages that it reads.

    Raises:
        RowError: another column's messages hold pictures.
    """
    nested = [(f"{name}.", row[name]) for name in NESTED if isinstance(row.get(name), Mapping)]
    for where, group in [("", row), *nested]:
        for name in MESSAGES:
            if where + name not in read and _shows(group.get(name)):
                raise RowError(
                    "lost",
                    f"'{where}{name}' holds pictures and is not read, and the row has none "
                    "elsewhere; put them into a column 'images'",
                )


def _shows(messages: Any, depth: int = 8) -> bool:
    """Returns whether messages, or one of them, or a part of one, hold or mark a picture."""
    messages = as_list(messages)
    if isinstance(messages, (list, tuple)):
        return depth > 0 and any(_shows(each, depth - 1) for each in messages)
    if not isinstance(messages, Mapping):  # a text
        return False
    if messages.get("type") in (*_IMAGES, *_VIDEOS):
        return True
    return any(
        _shows(value, depth - 1)
        if key == "content"
        else (not is_empty(value) if is_picture_column(key) else looks_like_picture(value))
        for key, value in messages.items()
        if key not in _WORDS
    )


def chosen_pictures(
    marks: Sequence[Mark], given: Given, pictures: PictureFolder
) -> list[tuple[Any, ...]]:
    """Returns the pictures for each mark of a conversation.

    Args:
        marks: in reading order.
        given: the row's pictures. Where the messages hold their own, they repeat all of these or
            some; without any mark, they have no place yet.
        pictures: where they are.

    Raises:
        RowError: marks and pictures do not agree.
    """
    waiting = list(given.values)
    own = [value for mark in marks for value in mark.values]
    if given.is_video and not waiting and not own:
        raise RowError("video", "'is_video' is true, but the row has no pictures; put the frames "
                       "into a column 'videos'")  # fmt: skip
    if not marks:
        return []
    if all(mark.values for mark in marks):
        if len(waiting) > len(own):
            raise _disagree(f"{len(own)} pictures in the messages", given)
        if not repeats_pictures(waiting, own, pictures):
            raise RowError(
                "pictures differ",
                "the messages and the row's columns hold different pictures; leave one of them out",
            )
        return [mark.values for mark in marks]
    if own:
        raise RowError(MARKS, "some parts of the messages hold pictures and others mark them; give "
                       "all pictures in the parts, or all in 'images'")  # fmt: skip
    numbers = [mark.number for mark in marks if mark.number is not None]
    if numbers:
        # In another order, pictures would have to be numbered anew, but words may name the numbers.
        if numbers != list(range(1, len(waiting) + 1)) or len(numbers) != len(marks):
            raise _disagree(f"the marks {', '.join(f'<image{n}>' for n in numbers[:6])}", given)
        return [(value,) for value in waiting]
    chosen: list[tuple[Any, ...]] = []
    for mark in marks:
        if mark.video and given.values and not given.is_video:
            raise RowError("video", "<video> in the text, but the row's pictures are no video; say "
                           "so with 'is_video': true, or write <image>")  # fmt: skip
        if not waiting:
            raise _disagree(_counted(marks), given)
        count = len(waiting) if mark.video else 1
        chosen.append(tuple(waiting[:count]))
        del waiting[:count]
    if waiting:
        raise _disagree(_counted(marks), given)
    return chosen


def _counted(marks: Sequence[Mark]) -> str:
    return f"{len(marks)} picture mark{'s' * (len(marks) != 1)}"


def _disagree(marks: str, given: Given) -> RowError:
    count = len(given.values)
    what = ("frame" if given.is_video else "picture") + "s" * (count != 1)
    return RowError(MARKS, f"{marks} in the text, but {count} {what} in the row")
