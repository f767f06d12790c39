"""Makes rows of ``trajectories.jsonl`` and saves their pictures."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from reopold_agent.common.files import write_bytes_atomic, writing
from reopold_agent.types import BoolArray, EncodedImage, FloatArray, PixelArray, Trajectory, Turn

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenUse:
    """Use of a trajectory's tokens in an update.

    Attributes:
        reward: (L,) float32, reward of each token in the objective (above its floor); 0 where the
            student did not sample.
        kept: (L,) bool: whether the objective's mask kept the token.
    """

    reward: FloatArray
    kept: BoolArray


def trajectory_record(
    trajectory: Trajectory,
    step: int,
    *,
    kind: Literal["train", "eval"] = "train",
    who: str = "student",
    pictures: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
    use: TokenUse | None = None,
) -> dict[str, Any]:
    """Returns an episode as a row, with everything needed to read it or to recompute it.

    Args:
        trajectory: the episode.
        step: training step from 0 (kind "train") or number of updates done (kind "eval").
        kind: kind of the row, which `JsonLines.truncate_after` needs.
        who: "student", "teacher", or "recorded" for an expert's conversations.
        pictures: paths from `save_pictures`, one per image, or none.
        decode: converts ids to text, with control tokens, for readers without the tokenizer; it
            gives ``prompt`` and ``tokens``.
        use: use of its tokens in the update; None if it was not trained on.

    Returns:
        ``kind``, ``step``, ``who``, ``env``, ``task_id``, ``index``, ``sample``, ``success``,
        ``reward``, ``advantage`` (null where the objective has none), ``stop_reason``, ``seconds``,
        ``prompt`` (null without ``decode``; a run of one id, such as an image's placeholders,
        is written as "token*count"), ``prompt_length``, ``response_tokens``,
        ``turns`` (``start``, ``end``, ``text``, ``finish``, ``tool_call``, ``observation``,
        ``env_seconds``), ``images`` (``grid``, ``tokens``, ``width``, ``height``, ``picture``),
        ``info`` (only plain values), ``token_means`` (see `token_means`) and, each as long as
        ``ids``: ``ids``, ``loss_mask`` (0
        or 1), ``logp``, ``entropy``, ``teacher_logp`` (null when not scored), ``token_reward`` and
        ``kept`` (0 or 1; both null when not trained on), ``tokens`` (one text per id; null without
        ``decode``). Floats are the shortest that read back as the same float32. An episode that
        its teacher reads in another form also has ``teacher_prompt``, as ``prompt``; one whose task
        names its teacher has ``teacher``.

    Raises:
        ValueError: ``pictures`` has another length than the images.
    """
    if pictures and len(pictures) != len(trajectory.images):
        raise ValueError(f"{len(pictures)} picture paths for {len(trajectory.images)} images")
    paths: Sequence[str | None] = pictures or [None] * len(trajectory.images)
    ids = [int(i) for i in trajectory.ids]
    plain = str | int | float | bool | None
    by_token: dict[str, Any] = {
        "ids": ids,
        "loss_mask": [int(m) for m in trajectory.loss_mask],
        "logp": _shortest(trajectory.logp),
        "entropy": _shortest(trajectory.entropy),
        "teacher_logp": None
        if trajectory.teacher_logp is None
        else _shortest(trajectory.teacher_logp),
        "token_reward": None if use is None else _shortest(use.reward),
        "kept": None if use is None else [int(kept) for kept in use.kept],
        "tokens": decode and _tokens(ids, decode),
        **_read(trajectory, decode),
    }
    return {
        "kind": kind,
        "step": step,
        "who": who,
        "env": trajectory.env,
        "task_id": trajectory.task_id,
        "index": trajectory.index,
        "sample": trajectory.sample,
        "success": bool(trajectory.success),
        "reward": float(trajectory.reward),
        "advantage": trajectory.advantage,
        "stop_reason": trajectory.stop_reason.value,
        "seconds": trajectory.seconds,
        "prompt": decode and _prompt(ids[: trajectory.prompt_length], decode),
        "prompt_length": trajectory.prompt_length,
        "response_tokens": trajectory.response_tokens,
        "turns": [_turn(turn) for turn in trajectory.turns],
        "images": [
            _image(image, path) for image, path in zip(trajectory.images, paths, strict=True)
        ],
        "info": {key: value for key, value in trajectory.info.items() if isinstance(value, plain)},
        **({"teacher": trajectory.teacher} if trajectory.teacher else {}),
        # After these the row is long: see `row_head`.
        "token_means": token_means(by_token),
        **by_token,
    }


def row_head(line: bytes) -> dict[str, Any] | None:
    """Returns a row up to its ``token_means``, which is a small part of it.

    Args:
        line: of ``trajectories.jsonl``.

    Returns:
        None for a row without ``token_means`` or in another order, as other versions and programs
        write them.
    """
    # A quotation mark in a text is escaped, so only keys match, and the last match is the row's.
    end = line.rfind(b'}, "ids": [')
    start = line.rfind(b', "token_means": {', 0, end)
    if end < 0 or start < 0 or not line.rstrip().endswith(b"}"):
        return None
    try:
        row = json.loads(line[: end + 1] + b"}")
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and next(reversed(row)) == "token_means" else None


def token_means(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns means over the student's tokens of a row, which may come from any program.

    Returns:
        ``ratio`` (teacher's log-prob less the student's, nats), ``entropy`` (nats) and ``kept``
        (share); None where the row does not have them for each token.
    """
    live = _floats(row.get("loss_mask")) == 1

    def mean(values: Floats) -> float | None:
        if values.shape != live.shape:
            return None
        chosen = values[live & np.isfinite(values)]
        return float(chosen.mean()) if chosen.size else None

    student, teacher = _floats(row.get("logp")), _floats(row.get("teacher_logp"))
    return {
        "ratio": mean(teacher - student) if teacher.shape == student.shape else None,
        "entropy": mean(_floats(row.get("entropy"))),
        "kept": mean(_floats(row.get("kept"))),
    }


def _floats(values: Any) -> Floats:
    """Returns a list of numbers as an array with NaN for null; empty for anything else."""
    try:
        array = np.asarray(values if isinstance(values, list) else [], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(0)
    return array if array.ndim == 1 else np.zeros(0)


def _read(
    trajectory: Trajectory, decode: Callable[[Sequence[int]], str] | None
) -> dict[str, str | None]:
    if trajectory.reading is None:
        return {}
    read = trajectory.for_teacher
    ids = [int(i) for i in read.ids[: read.prompt_length]]
    own = trajectory.reading.decode or decode
    return {"teacher_prompt": decode and own and _prompt(ids, own)}


def _tokens(ids: list[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    texts = {i: decode([i]) for i in set(ids)}
    return [texts[i] for i in ids]


def _prompt(ids: list[int], decode: Callable[[Sequence[int]], str]) -> str:
    text, pending = "", list[int]()
    for token, group in itertools.groupby(ids):
        count = sum(1 for _ in group)
        if count <= 3:  # "..." and blank lines are text; longer runs are placeholders
            pending += [token] * count
            continue
        text += (decode(pending) if pending else "") + f"{decode([token])}*{count}"
        pending = []
    return text + (decode(pending) if pending else "")


def _turn(turn: Turn) -> dict[str, Any]:
    call = turn.tool_call
    return {
        "start": turn.start,
        "end": turn.end,
        "text": turn.text,
        "finish": turn.finish,
        "tool_call": None
        if call is None
        else {
            "name": call.name,
            "arguments": dict(call.arguments),
            "ok": call.ok,
            "error": call.error,
            "seconds": call.seconds,
            "regions": [{"image": r.image, "box": list(r.box)} for r in call.regions],
        },
        "observation": turn.observation,
        "env_seconds": turn.env_seconds,
    }


def _image(image: EncodedImage, path: str | None) -> dict[str, Any]:
    height, width = image.pixels.shape[:2]
    return {
        "grid": [int(side) for side in image.grid],
        "tokens": image.tokens,
        "width": width,
        "height": height,
        "picture": path,
    }


def _shortest(values: FloatArray) -> list[float]:
    # str of a float32 is the shortest decimal that reads back as it, a third of float64's length.
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


def picture_name(pixels: PixelArray) -> str:
    """Returns the file name of a picture: a hash, so that equal pictures share a file."""
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode() + pixels.tobytes())
    return f"{digest.hexdigest()[:24]}.png"


def save_pictures(trajectory: Trajectory, run_dir: str | Path) -> list[str]:
    """Writes the pictures that the model saw as PNG, unless they exist already.

    Args:
        trajectory: trajectory whose resized ``images`` to write.
        run_dir: the run folder; its ``pictures`` is created if missing.

    Returns:
        One path per image, ``pictures/<hash>.png``, relative to the run folder, with slashes.
    """
    folder = Path(run_dir) / "pictures"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths: list[str] = []
    for image in trajectory.images:
        name = picture_name(image.pixels)
        if not (folder / name).exists():
            encoded = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image.pixels)).save(
                encoded,
                format="PNG",
                compress_level=1,  # three times faster, a tenth larger
            )
            write_bytes_atomic(folder / name, encoded.getvalue(), flush=False)
        paths.append(f"pictures/{name}")
    return paths
