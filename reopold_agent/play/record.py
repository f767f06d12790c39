"""Saves episodes as demonstrations for ``objective=sft objective.source=recorded``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reopold_agent.envs.spaces import Part
from reopold_agent.errors import DataError
from reopold_agent.types import PixelArray


class Recorder:
    """Appends episodes to a file of JSON lines that `reopold_agent.data.demonstrations` reads.

    Args:
        file: ``*.jsonl``; pictures are saved in a folder with its name beside it.

    Raises:
        DataError: the file has another suffix or cannot be written.
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
        earlier: int = 0,
    ) -> None:
        """Appends an episode.

        Args:
            turns: role and parts, from the system message or the question to the last answer.
            facts: further columns: ``id``, ``success``, ``reward`` ...
            earlier: number of turns that the task begins with, on which nothing is trained.
        """
        messages = [
            {
                "role": role,
                "content": [self._part(part) for part in parts],
                **({"weight": 0} if role == "assistant" and number < earlier else {}),
            }
            for number, (role, parts) in enumerate(turns)
        ]
        line = json.dumps({**facts, "messages": messages}, ensure_ascii=False)
        with self._file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")

    def _part(self, part: Part) -> dict[str, str]:
        return {"text": part} if isinstance(part, str) else {"image": self._saved(part)}

    def _saved(self, pixels: PixelArray) -> str:
        """Saves the picture and returns its path, relative to the file; equal ones share a file."""
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:20]
        path = self._pictures / f"{digest}.png"
        if not path.is_file():
            self._pictures.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
        return path.relative_to(self._file.parent).as_posix()
