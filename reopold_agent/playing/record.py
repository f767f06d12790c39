"""Episodes as demonstrations: what ``objective=sft objective.source=recorded`` learns from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reopold_agent.errors import DataError
from reopold_agent.playing.screen import Part
from reopold_agent.types import PixelArray


class Recorder:
    """Appends episodes to a file of JSON lines that `reopold_agent.data.demonstrations` reads.

    Args:
        file: ``*.jsonl``; pictures go to a folder of its name beside it.

    Raises:
        DataError: another kind of file, or it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        if file.suffix != ".jsonl":
            raise DataError(f"record={file}: the file's name must end in .jsonl")
        self._file = file
        self._pictures = file.parent / f"{file.stem}_pictures"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise DataError(f"record={file} cannot be written: {error.strerror}") from error

    def add(
        self,
        turns: Sequence[tuple[str, Sequence[Part]]],
        facts: Mapping[str, Any],
    ) -> None:
        """Writes one episode.

        Args:
            turns: role and parts, from the system message or the question to the last answer.
            facts: further columns: ``id``, ``success``, ``reward`` ...
        """
        messages = [
            {"role": role, "content": [self._part(part) for part in parts]} for role, parts in turns
        ]
        line = json.dumps({**facts, "messages": messages}, ensure_ascii=False)
        with self._file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")

    def _part(self, part: Part) -> dict[str, str]:
        return {"text": part} if isinstance(part, str) else {"image": self._saved(part)}

    def _saved(self, pixels: PixelArray) -> str:
        """The picture's path from the file's folder; equal pictures are one file."""
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:20]
        path = self._pictures / f"{digest}.png"
        if not path.is_file():
            self._pictures.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
        return path.relative_to(self._file.parent).as_posix()
