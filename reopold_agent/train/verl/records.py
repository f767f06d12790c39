"""Converts trajectories to rows of verl's TransferQueue, and back.

verl's alignment: ``prompts`` and ``responses`` apart; a value of the response at index ``i``
belongs to the response's token ``i``; ``teacher_logprobs`` runs over the whole sequence and is
shifted, entry ``i`` belongs to token ``i + 1``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reopold_agent.train.rows import Row
from reopold_agent.types import (
    FloatArray,
    PixelArray,
    Region,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

EPISODE = "reopold_episode"
"""Field with the values of an episode that are not tensors, as JSON."""

PIXELS = "pixels"
"""Key of a row's pictures in verl's field ``multi_modal_inputs``. They are sent once, as uint8; the
model's float patches, eight times as large, are made where they are used."""


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """Returns the fields of a trajectory's row; without ``teacher_logprobs`` before it is scored.

    ``position_ids`` count from 0; the engine computes multimodal ones from the pictures. (verl's
    nested 3-axis position ids break when all rows of a batch have the same length.)
    """
    ids = torch.from_numpy(trajectory.ids)
    start = trajectory.prompt_length
    mask = torch.from_numpy(trajectory.loss_mask[start:].astype(np.int64))
    reward = torch.zeros(len(mask), dtype=torch.float32)
    reward[-1] = trajectory.reward
    teacher = trajectory.teacher_logp
    scores = {} if teacher is None else {"teacher_logprobs": torch.from_numpy(np.roll(teacher, -1))}
    return {
        "prompts": ids[:start].clone(),
        "responses": ids[start:].clone(),
        "input_ids": ids.clone(),
        "position_ids": torch.arange(len(ids)),
        "response_mask": mask,
        "loss_mask": mask.clone(),
        "rollout_log_probs": torch.from_numpy(trajectory.logp[start:].copy()),
        **scores,
        "rm_scores": reward,
        "num_turns": len(trajectory.turns),
        "multi_modal_inputs": {PIXELS: [image.pixels for image in trajectory.images]},
        EPISODE: _written(trajectory),
    }


def from_row(row: Mapping[str, Any]) -> Row:
    """Returns a training row whose trajectory has no pictures.

    The trajectory's ``logp`` are those of the server that sampled; servers give no entropies, so
    its ``entropy`` is the trainer's, as the row's.

    Args:
        row: fields as `to_row` wrote them, and verl's ``old_log_probs`` and ``entropy`` if they
            were computed already (else zeros).
    """
    prompt, response = _array(row["prompts"]), _array(row["responses"])
    start = len(prompt)

    def whole(name: str) -> FloatArray:
        values = np.zeros(start + len(response), dtype=np.float32)
        if name in row:
            values[start:] = _array(row[name])
        return values

    teacher = row.get("teacher_logprobs")
    episode = json.loads(row[EPISODE])
    turns = [_turn(turn) for turn in episode.pop("turns")]
    mask = np.concatenate(
        [np.zeros(start, np.bool_), _array(row["response_mask"]).astype(np.bool_)]
    )
    trajectory = Trajectory(
        prompt_length=start,
        ids=np.concatenate([prompt, response]).astype(np.int64),
        loss_mask=mask,
        logp=whole("rollout_log_probs"),
        entropy=whole("entropy") * mask,
        images=[],
        turns=turns,
        stop_reason=StopReason(episode.pop("stop_reason")),
        teacher_logp=None if teacher is None else np.roll(_array(teacher), 1).astype(np.float32),
        **episode,
    )
    return Row(trajectory, old_logp=whole("old_log_probs") * mask, entropy=trajectory.entropy)


def environment_of(row: Mapping[str, Any]) -> str:
    """Returns the name of the environment of a row that `to_row` made."""
    return str(json.loads(row[EPISODE])["env"])


def pixels_of(row: Mapping[str, Any]) -> list[PixelArray]:
    """Returns the pictures of a row that `to_row` made."""
    return list(row["multi_modal_inputs"].get(PIXELS, ()))


def _written(trajectory: Trajectory) -> str:
    """Returns JSON, since verl's tables turn dataclasses into dictionaries."""
    names = ("task_id", "env", "teacher", "index", "sample", "stop_reason", "reward", "success")
    also = ("prompt_digest", "info", "seconds")
    episode = {name: getattr(trajectory, name) for name in (*names, *also)}
    episode["turns"] = [asdict(turn) for turn in trajectory.turns]
    return json.dumps(episode, default=str)  # an environment may put any value into info


def _turn(values: dict[str, Any]) -> Turn:
    call = values.pop("tool_call")
    if call is not None:
        regions = tuple(Region(r["image"], tuple(r["box"])) for r in call.pop("regions"))
        call = ToolCall(**call, regions=regions)
    return Turn(**values, tool_call=call)


def plain_rows(table: Any) -> list[dict[str, Any]]:
    """Returns the rows of verl's ``TensorDict``, with nested tensors and objects unpacked."""
    names = list(table.keys())
    return [{name: _item(table, name, i) for name in names} for i in range(len(table))]


def _item(table: Any, name: str, index: int) -> Any:
    value = table.get(name)
    if isinstance(value, Tensor):
        return value[index]
    item = value[index] if isinstance(value, Sequence) or hasattr(value, "__getitem__") else value
    return getattr(item, "data", item)


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
