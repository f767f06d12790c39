"""The environment of the digits, and the texts that its models read there."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Final

import gymnasium

from examples.embedded_models.digits.scripts import expert_turns
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.types import IMAGE_MARK, Observation, TaskSource

ENV_KWARGS: Final[dict[str, Any]] = {
    "max_turns": 3,
    "tool_options": {
        "crop_image": {"padding": 0.0, "sizes": "original"},
        "select_frames": {"sizes": "original"},
    },
}
"""The card fits its cell exactly, so the crop is not padded."""

PHRASES: Final = (
    "I will ",
    "zoom in on ",
    "look at ",
    "the frame ",
    "with ",
    "the card.",
    "on the card ",
    "The digit ",
    "is ",
    "\\boxed{",
    "}.",
    '\n{"name": "',
    "crop_image",
    "select_frames",
    '", "arguments": {"bbox_',
    '", "arguments": {"target_frames": [',
    'd": [',
    ", ",
    '], "target_image": ',
    "]}}\n",
    "}}\n",
)
"""Pieces of the assistant's turns that become one token each. Larger pieces do not, so that a turn
still has about thirty decisions."""

HEADERS: Final = ("system\n", "user\n", "assistant\n", "\n")


def make_env(train: TaskSource, held_out: TaskSource) -> gymnasium.Env[Observation, str]:
    """Makes the real environment on the given tasks, with the demo's settings."""
    return PixelReasonerEnv(data={"train": train, "eval": held_out}, **ENV_KWARGS)


@dataclass(frozen=True)
class PromptTexts:
    """The environment's texts: system message, first user turns, observations."""

    system: str
    questions: tuple[str, ...]
    observations: tuple[str, ...]

    def corpus(self) -> list[str]:
        """Returns texts to train the tokenizer on; frequent ones are merged first."""
        return [
            *[*PHRASES, *HEADERS] * 40,
            *self.observations * 20,
            *[self.system, *self.questions] * 4,
        ]

    def fingerprint(self) -> str:
        """Returns a hash that changes with any text: models know only their training prompts."""
        whole = "\0".join((self.system, *self.questions, *self.observations))
        return hashlib.sha256(whole.encode()).hexdigest()


def prompt_texts() -> PromptTexts:
    """Collects the environment's texts by playing the expert on some tasks of each kind."""
    tasks = DemoTasks("train", seed=0, video_share=0.5, small_share=0.5)
    env = make_env(tasks, tasks)
    system = ""
    questions: dict[str, None] = {}
    observations: dict[str, None] = {}
    for index in range(40):
        task = tasks[index]
        observation, info = env.reset(options={"task": task})
        system = str(info["system_prompt"])
        questions[observation["text"].replace(IMAGE_MARK, "")] = None
        for turn in expert_turns(task)[:-1]:
            observation, *_ = env.step(turn)
            # Sizes and numbers differ from task to task; digits are single tokens anyway.
            text = re.sub(r"\d+", "5", observation["text"].replace(IMAGE_MARK, ""))
            observations[text] = None
    env.close()
    return PromptTexts(system, tuple(sorted(questions)), tuple(sorted(observations)))
