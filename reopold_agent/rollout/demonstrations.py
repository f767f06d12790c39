"""Recorded conversations as trajectories: the same ids and pixels that a rollout would have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reopold_agent.data.demonstrations import Demonstration, Parts
from reopold_agent.errors import DataError
from reopold_agent.policies.vision import PixelLimits
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.types import EncodedImage, Message, Role, StopReason, Trajectory, Turn


def demonstrated(demonstration: Demonstration, index: int, runner: RolloutRunner) -> Trajectory:
    """Renders a conversation as ``runner`` would have recorded it.

    The trajectory's ``logp`` and ``entropy`` are zeros: nobody sampled. The assistant's tokens,
    with the end of each turn, are its loss tokens. Its outcome is unknown: ``success`` is false
    and ``reward`` 0.

    Raises:
        DataError: it is longer than the runner's response budget, or has pictures that the
            model cannot see.
    """
    chat = runner.chat
    turns = list(demonstration.turns)
    opening = turns[: 2 if turns[0][0] == "system" else 1]
    messages = [
        _message(role, parts, runner, runner.prompt_pixels, demonstration.id)
        for role, parts in opening
    ]
    ids, shown = chat.prompt(messages)
    prompt_length = len(ids)
    mask = [False] * prompt_length
    recorded: list[Turn] = []
    for role, parts in turns[len(opening) :]:
        if role == "assistant":
            text = "".join(part for part in parts if isinstance(part, str))
            own = chat.turn_ids(text)
            recorded.append(Turn(len(ids), len(ids) + len(own), text, "stop"))
            ids += own
            mask += [True] * len(own)
            continue
        message = _message(role, parts, runner, runner.observation_pixels, demonstration.id)
        more, seen = chat.continuation(message, ids[-1])
        ids += more
        mask += [False] * len(more)
        shown += seen
    longest = runner.limits.max_response_tokens
    if len(ids) - prompt_length > longest:
        raise DataError(
            f"the conversation {demonstration.id} has {len(ids) - prompt_length} tokens after its "
            f"prompt, but rollout.max_response_tokens is {longest}: raise it or leave the row out"
        )
    trajectory = unsampled(demonstration.id, prompt_length, ids, mask, shown, index=index)
    trajectory.turns = recorded
    return trajectory


def unsampled(
    task_id: str,
    prompt_length: int,
    ids: Sequence[int],
    loss_mask: Sequence[bool],
    images: Sequence[EncodedImage] = (),
    *,
    index: int = 0,
) -> Trajectory:
    """A trajectory of tokens that nobody sampled: ``logp`` and ``entropy`` are zeros, and so is the
    outcome, which is unknown."""
    return Trajectory(
        task_id=task_id,
        index=index,
        sample=0,
        prompt_length=prompt_length,
        ids=np.asarray(ids, dtype=np.int64),
        loss_mask=np.asarray(loss_mask, dtype=np.bool_),
        logp=np.zeros(len(ids), dtype=np.float32),
        entropy=np.zeros(len(ids), dtype=np.float32),
        images=list(images),
        turns=[],
        stop_reason=StopReason.ANSWER,
        reward=0.0,
        success=False,
    )


def _message(
    role: Role,
    parts: Parts,
    runner: RolloutRunner,
    limits: PixelLimits,
    name: str,
) -> Message:
    content: list[str | EncodedImage] = []
    for part in parts:
        if isinstance(part, str):
            content.append(part)
            continue
        if runner.vision is None:
            raise DataError(f"the conversation {name} has pictures, but the model reads text only")
        opened = np.asarray(part.open())
        content.append(runner.vision.encode(opened, limits))
    return Message(role, tuple(content))
