"""Counts tokens of prompt, turns and observations as a rollout does."""

from __future__ import annotations

from typing import Any

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.config import TrainConfig
from reopold_agent.errors import ModelError
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.types import EncodedImage, Message, Observation


class Budget:
    """Counts the tokens of an episode; `begin` starts the next one.

    Args:
        config: budgets and pixel limits.
        path: checkpoint whose tokenizer and picture processor are loaded (not its weights): a
            folder, ``demo:student`` or a hub id.

    Raises:
        ModelError: they cannot be loaded.
    """

    def __init__(self, config: TrainConfig, path: str) -> None:
        processing = load_processing(ModelSpec(path), "model", weights=False)
        self._vision = processing.vision
        self._chat = ChatRenderer(
            processing.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call
        )
        self._pixels, self._limits = config.pixels, config.rollout
        self.prompt = self.used = self._last = 0
        self.fits = True

    @property
    def factor(self) -> int | None:
        """Patch x merge of the model; None if it sees no pictures."""
        return None if self._vision is None else self._vision.factor

    def begin(self, observation: Observation, system: str) -> str:
        """Counts the prompt; returns a line that says how much."""
        images = self._encoded(observation, self._pixels.prompt)
        messages = [observation_message(observation, images)]
        if system:
            messages.insert(0, Message("system", (system,)))
        ids, _ = self._chat.prompt(messages)
        self.prompt, self.used, self._last, self.fits = len(ids), 0, ids[-1], True
        return f"prompt {self.prompt} tokens{_sizes(images)}"

    def turn(self, text: str) -> str:
        """Counts a turn; returns a line that says how much."""
        ids = self._chat.turn_ids(text)
        self.used, self._last = self.used + len(ids), ids[-1]
        most = self._limits.max_turn_tokens
        cut = f"; a model would be cut off after {most}" if len(ids) > most else ""
        return f"turn {len(ids)} tokens{cut}; {self._left()}"

    def answer(self, observation: Observation) -> str:
        """Counts what the environment answered; returns a line about it."""
        images = self._encoded(observation, self._pixels.observation)
        ids, _ = self._chat.continuation(observation_message(observation, images), self._last)
        self.used, self._last = self.used + len(ids), ids[-1]
        # One more for the student, as in `RolloutRunner`.
        self.fits = self.used + 1 <= self._limits.max_response_tokens
        over = "" if self.fits else "; a rollout would end here, out of tokens"
        return f"observation {len(ids)} tokens{_sizes(images)}; {self._left()}{over}"

    def _left(self) -> str:
        return f"{self.used} of {self._limits.max_response_tokens} used"

    def _encoded(self, observation: Observation, limits: Any) -> list[EncodedImage]:
        if self._vision is None and observation["images"]:
            raise ModelError("the environment shows pictures, but this tokenizer's model sees none")
        return [
            self._vision.encode(image, PixelLimits(**vars(limits)))
            for image in observation["images"]
            if self._vision is not None
        ]


def _sizes(images: list[EncodedImage]) -> str:
    if not images:
        return ""
    seen = (f"{i.pixels.shape[1]}x{i.pixels.shape[0]} = {i.tokens}" for i in images)
    return f" (pictures as the model sees them: {', '.join(seen)})"
