"""The environment: it defines tasks, tools and guideline; `ToolEnv` does the rest."""

from __future__ import annotations

from typing import Any, ClassVar

from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError
from reopold_agent.types import TaskSource
from reopold_rotated.tasks import RotatedDigits


class RotatedDigitsEnv(ToolEnv):
    """``reopold_rotated/RotatedDigits-v0``.

    Args:
        size: tasks per split.
        seed: of the tasks.
        **settings: passed to `ToolEnv`.
    """

    default_tools: ClassVar[tuple[str, ...]] = ("rotate_image", "brighten_image", "crop_image")
    default_guideline: ClassVar[str] = (
        "Turn and brighten the picture, zoom in on the card, and put the digit in \\boxed{}."
    )

    def __init__(self, *, size: int = 4096, seed: int = 0, **settings: Any) -> None:
        if size < 1 or seed < 0:
            raise ConfigError(f"size must be >= 1 and seed >= 0, got {size} and {seed}")
        settings.setdefault("tool_options", {"crop_image": {"padding": 0.0}})
        super().__init__(size=size, seed=seed, **settings)

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        """Returns the tasks of a split; ``source`` has the settings that are not `ToolEnv`'s."""
        if split not in ("train", "eval"):
            raise ConfigError(f"split must be 'train' or 'eval', got '{split}'")
        unknown = set(source) - {"size", "seed"}
        if unknown:
            raise ConfigError(f"unknown settings: {', '.join(sorted(unknown))}")
        return RotatedDigits("train" if split == "train" else "eval", **source)
