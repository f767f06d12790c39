"""Counts tokens of prompt, turns and observations as a rollout does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.envs.spaces import as_observation
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.types import EncodedImage


class Budget:
    """Counts the tokens of an episode; `begin` starts the next one.

    Args:
        config: budgets, pixel limits and chat template.
        path: checkpoint whose tokenizer and picture processor are loaded (not its weights): a
            folder, ``demo:student`` or a hub id.

    Raises:
        ModelError: they cannot be loaded.
    """

    def __init__(self, config: TrainConfig, path: str) -> None:
        processing = load_processing(
            ModelSpec(path, chat_template=config.model.chat_template), "model", weights=False
        )
        chat = ChatRenderer(
            processing.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call
        )
        self._runner = make_runner(config, chat, processing.vision, max_turns=1)  # it only renders
        self._limits = config.rollout
        self.prompt = self.used = self._last = 0
        self.fits = True

    @property
    def factor(self) -> int | None:
        """Patch x merge of the model; None if it sees no pictures."""
        vision = self._runner.vision
        return None if vision is None else vision.factor

    def begin(self, observation: Any, info: Mapping[str, Any]) -> str:
        """Counts the prompt; returns a line that says how much.

        Args:
            observation, info: what the environment's ``reset`` returned.
        """
        ids, images = self._runner.prompt(as_observation(observation), info)
        self.prompt, self.used, self._last, self.fits = len(ids), 0, ids[-1], True
        return f"prompt {self.prompt} tokens{_sizes(images)}"

    def turn(self, text: str) -> str:
        """Counts a turn; returns a line that says how much."""
        ids = self._runner.chat.turn_ids(text)
        self.used, self._last = self.used + len(ids), ids[-1]
        most = self._limits.max_turn_tokens
        cut = f"; a model would be cut off after {most}" if len(ids) > most else ""
        return f"turn {len(ids)} tokens{cut}; {self._left()}"

    def answer(self, observation: Any) -> str:
        """Counts what the environment answered; returns a line about it."""
        ids, images = self._runner.continuation(as_observation(observation), self._last)
        self.used, self._last = self.used + len(ids), ids[-1]
        # One more for the student, as in `RolloutRunner`.
        self.fits = self.used + 1 <= self._limits.max_response_tokens
        over = "" if self.fits else "; a rollout would end here, out of tokens"
        return f"observation {len(ids)} tokens{_sizes(images)}; {self._left()}{over}"

    def _left(self) -> str:
        return f"{self.used} of {self._limits.max_response_tokens} used"


def _sizes(images: Sequence[EncodedImage]) -> str:
    if not images:
        return ""
    seen = (f"{i.pixels.shape[1]}x{i.pixels.shape[0]} = {i.tokens}" for i in images)
    return f" (pictures as the model sees them: {', '.join(seen)})"
