"""Scripted players: an expert that looks before it answers, and a careless one.

A script is a function from a task to the assistant's texts. `record` plays them in the real
environment and renders them with the real chat renderer, so that a recorded trace has exactly the
ids and pixels that a rollout with the same texts would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gymnasium
import numpy as np

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.demo.tasks import (
    CELL,
    GRID,
    SIDE,
    DemoTasks,
    backdrop,
    card,
    digit,
    digit_indices,
    place_card,
)
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.rollout.demonstrations import unsampled
from reopold_agent.rollout.reading import Reader
from reopold_agent.types import (
    Message,
    Observation,
    StopReason,
    Task,
    Trajectory,
    Turn,
)

PROMPT_LIMITS = PixelLimits(112 * 112, 112 * 112)
OBSERVATION_LIMITS = PixelLimits(56 * 56, 56 * 56)

Script = Callable[[Task, np.random.Generator], list[str]]


def tool_call(thought: str, name: str, arguments: dict[str, object]) -> str:
    """Returns an assistant turn that ends with a tool call, in Qwen's format."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"{thought}\n<tool_call>\n{call}\n</tool_call>"


def crop_turn(cell: tuple[int, int], target_image: int = 1, grid: int = GRID) -> str:
    """Returns the turn that crops cell (row, column) of a grid; pictures count from 1."""
    row, column = cell
    box = [column / grid, row / grid, (column + 1) / grid, (row + 1) / grid]
    arguments: dict[str, object] = {"bbox_2d": box, "target_image": target_image}
    return tool_call("I will zoom in on the card.", "crop_image", arguments)


def select_turn(frame: int) -> str:
    """Returns the turn that selects one frame, counted from 1."""
    arguments: dict[str, object] = {"target_frames": [frame]}
    return tool_call("I will look at the frame with the card.", "select_frames", arguments)


def answer_turn(digit: str) -> str:
    """Returns the turn that answers."""
    return f"The digit on the card is \\boxed{{{digit}}}."


def expert_turns(task: Task) -> list[str]:
    """Returns the expert's turns: it looks at the right place, then answers correctly."""
    places = task.metadata
    looks = [crop_turn(places["cell"])] if places["kind"] == "image" else []
    if task.is_video:
        looks.append(select_turn(places["legible"][0]))
    if places["kind"] == "small_video":
        # The selected frame is numbered after those of the video.
        looks.append(crop_turn(places["cells"][0], len(task.images) + 1, grid=2))
    return [*looks, answer_turn(task.answers[0])]


def expert(task: Task, rng: np.random.Generator) -> list[str]:
    """Is `expert_turns` as a script; not random."""
    return expert_turns(task)


@dataclass(frozen=True)
class Careless:
    """Often guesses: answers without looking, or looks at a random place.

    Attributes:
        at_once: probability of answering at once.
        astray: probability of guessing after a look at a random place; otherwise `expert`.
    """

    at_once: float = 0.55
    astray: float = 0.25

    def __call__(self, task: Task, rng: np.random.Generator) -> list[str]:
        """Returns the assistant's texts for a task."""
        habit = rng.random()
        if habit >= self.at_once + self.astray:
            return expert(task, rng)
        guess = answer_turn(str(rng.integers(10)))
        if habit < self.at_once:
            return [guess]
        if task.is_video:
            return [select_turn(int(rng.integers(len(task.images))) + 1), guess]
        row, column = (int(v) for v in rng.integers(GRID, size=2))
        return [crop_turn((row, column)), guess]


def record(
    env: gymnasium.Env[Observation, str],
    task: Task,
    turns: Sequence[str],
    renderer: ChatRenderer,
    vision: VisionProcessor,
    reader: Reader | None = None,
) -> Trajectory:
    """Plays ``turns`` on ``task`` and records the episode as a rollout would.

    The trajectory's ``logp`` and ``entropy`` are zeros, because no policy sampled it. With a reader
    it is in the form that this gives a teacher.

    Raises:
        ValueError: the environment ended the episode before the last turn, or did not end it.
    """
    observation, info = env.reset(options={"task": task})
    read = None if reader is None else reader.begin(observation, info, reader.opening(env))
    images = [vision.encode(image, PROMPT_LIMITS) for image in observation["images"]]
    system = Message("system", (info["system_prompt"],))
    ids, shown = renderer.prompt([system, observation_message(observation, images)])
    prompt_length = len(ids)
    mask = [False] * prompt_length
    recorded: list[Turn] = []
    reward, done = 0.0, False
    for number, text in enumerate(turns):
        if done:
            raise ValueError(f"the episode of {task.id} ended after {number} of {len(turns)} turns")
        turn_ids = renderer.turn_ids(text)
        ids += turn_ids
        mask += [True] * len(turn_ids)
        observation, gain, terminated, truncated, info = env.step(text)
        call = info.get("tool_call")
        recorded.append(Turn(len(ids) - len(turn_ids), len(ids), text, "stop", call))
        reward += float(gain)
        done = terminated or truncated
        if not done:
            images = [vision.encode(image, OBSERVATION_LIMITS) for image in observation["images"]]
            more, seen = renderer.continuation(observation_message(observation, images), ids[-1])
            ids += more
            mask += [False] * len(more)
            shown += seen
            recorded[-1].observation = observation["text"]
            if reader is not None and read is not None:
                reader.observe(read, observation)
    if not done:
        raise ValueError(f"the episode of {task.id} did not end after its {len(turns)} turns")
    trajectory = unsampled(task.id, prompt_length, ids, mask, shown)
    trajectory.turns = recorded
    trajectory.stop_reason = StopReason.ANSWER if terminated else StopReason.MAX_TURNS
    trajectory.reward = reward
    trajectory.success = bool(info.get("success", False))
    if reader is None or read is None:
        return trajectory
    return reader.read(trajectory, read).trajectory


def reading_lesson(
    tasks: DemoTasks, index: int, renderer: ChatRenderer, vision: VisionProcessor
) -> Trajectory:
    """Makes the last exchange of an episode alone: a crop that shows a card, and the answer.

    It has a quarter of a whole trace's tokens, so that reading, the slowest skill, costs less.
    """
    rng = np.random.default_rng((tasks.seed, 2, index))
    digit_index = int(rng.choice(digit_indices(tasks.split)))
    scene = backdrop(rng, tasks.split, tasks.backdrop)
    y, x = (int(v) for v in rng.integers(SIDE - CELL + 1, size=2))
    cell = scene[y : y + CELL, x : x + CELL].copy()
    place_card(rng, cell, card(digit_index))
    text = f"Here is the cropped image (Image Size: {CELL}x{CELL}):\n"
    image = vision.encode(cell, OBSERVATION_LIMITS)
    ids, images = renderer.prompt([Message("user", (text, image))])
    own = renderer.turn_ids(answer_turn(digit(digit_index)))
    mask = [False] * len(ids) + [True] * len(own)
    return unsampled(f"lesson-{index}", len(ids), ids + own, mask, images)
