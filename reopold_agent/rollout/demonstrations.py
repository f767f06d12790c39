"""Converts recorded conversations to trajectories, with the ids and pixels of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.data.demonstrations import (
    Demonstration,
    RecordedCall,
    RecordedTurn,
    tool_names,
    unknown_tool,
)
from reopold_agent.errors import DataError, ToolError
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.tools.parse import find_tool_call, write_tool_call
from reopold_agent.tools.prompt import BASE_PROMPT, with_tools
from reopold_agent.types import EncodedImage, Message, StopReason, Trajectory, Turn


def demonstrated(demonstration: Demonstration, index: int, runner: RolloutRunner) -> Trajectory:
    """Renders a conversation as ``runner`` would have recorded it.

    The trajectory's ``logp`` and ``entropy`` are zeros, because no policy sampled it. The
    assistant's tokens, including the end of each turn, are its loss tokens, except in turns that
    are not trained on. Its outcome is unknown: ``success`` is false and ``reward`` 0.

    Raises:
        DataError: the conversation is longer than the runner's response budget, has pictures
            that cannot be opened or the model reads text only, or has calls that the model could
            not make.
    """
    chat = runner.chat
    names = tool_names(demonstration.tools)
    turns = _with_system(demonstration)
    opening = turns[: 2 if turns[0].role == "system" else 1]
    messages = [_message(turn, runner, runner.prompt_pixels, demonstration.id) for turn in opening]
    ids, images = chat.prompt(messages)
    prompt_length = len(ids)
    mask = [False] * prompt_length
    recorded: list[Turn] = []
    for turn in turns[len(opening) :]:
        if turn.role == "assistant":
            text, turn_ids = _said(turn, runner, demonstration.id)
            if names and turn.trained:
                _check_calls(text, names, demonstration.id)
            recorded.append(Turn(len(ids), len(ids) + len(turn_ids), text, "stop"))
            ids += turn_ids
            mask += [turn.trained] * len(turn_ids)
            continue
        message = _message(turn, runner, runner.observation_pixels, demonstration.id)
        observation_ids, more_images = chat.continuation(message, ids[-1])
        ids += observation_ids
        mask += [False] * len(observation_ids)
        images += more_images
    longest = runner.limits.max_response_tokens
    if len(ids) - prompt_length > longest:
        raise DataError(
            f"the conversation {demonstration.id} has {len(ids) - prompt_length} tokens after its "
            f"prompt, but rollout.max_response_tokens is {longest}: raise it or leave the row out"
        )
    trajectory = unsampled(demonstration.id, prompt_length, ids, mask, images, index=index)
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
    """Makes a trajectory that no policy sampled: log-probs, entropies and reward are zeros."""
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


def _with_system(demonstration: Demonstration) -> list[RecordedTurn]:
    """Returns the turns with the tools' descriptions in the system message."""
    turns = list(demonstration.turns)
    if not demonstration.tools:
        return turns
    base = _words(turns.pop(0)) if turns[0].role == "system" else BASE_PROMPT
    return [RecordedTurn("system", (with_tools(base, demonstration.tools),)), *turns]


def _words(turn: RecordedTurn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str))


def _said(turn: RecordedTurn, runner: RolloutRunner, name: str) -> tuple[str, list[int]]:
    """Returns an assistant's turn as text, its calls after its words, and as ids.

    White space after a call that ends the turn is left out: a rollout would not have it.

    Raises:
        DataError: a call cannot be read, or a trained turn goes on where a student's has ended.
    """
    words = _words(turn)
    calls = [part for part in turn.parts if isinstance(part, RecordedCall)]
    try:
        written = [write_tool_call(call.name, call.arguments) for call in calls]
    except ToolError as error:
        raise DataError(
            f"the conversation {name} has a call that cannot be read: {error}"
        ) from error
    text = "\n".join([words] * bool(words) + written)
    ids = runner.chat.turn_ids(text)
    stops = set(runner.chat.stop_ids)
    if not stops.isdisjoint(ids[:-1]):
        text = text.rstrip()
        ids = runner.chat.turn_ids(text)
    if (calls or turn.trained) and not stops.isdisjoint(ids[:-1]):
        raise DataError(
            f"the conversation {name} has several tool calls in one turn, or words after one, but "
            "a turn ends with its first call: give each call a turn of its own and move the words "
            "behind the result, or set rollout.stop_at_tool_call=false if your environment allows "
            "them"
        )
    return text, ids


def _check_calls(text: str, names: Sequence[str], conversation: str) -> None:
    """Refuses calls in the words of a turn of tools that the row's ``tools`` do not describe."""
    for which in ("first", "last"):
        try:
            call = find_tool_call(text, which)
        except ToolError:  # an expert's mistake, which an environment answers with a message
            continue
        if call is not None and call.name not in names:
            raise DataError(f"the conversation {conversation}: {unknown_tool(call.name, names)}")


def _message(turn: RecordedTurn, runner: RolloutRunner, limits: PixelLimits, name: str) -> Message:
    content: list[str | EncodedImage] = []
    for part in turn.parts:
        if isinstance(part, str):
            content.append(part)
            continue
        if isinstance(part, RecordedCall):
            raise ValueError(f"a {turn.role} turn cannot call tools")
        if runner.vision is None:
            raise DataError(f"the conversation {name} has pictures, but the model reads text only")
        try:
            pixels = np.asarray(part.open())
        except DataError as error:
            raise DataError(f"the conversation {name}: {error}") from error
        content.append(runner.vision.encode(pixels, limits))
    return Message(turn.role, tuple(content))
