"""The environment: it defines tasks, tools and guideline; `ToolEnv` does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError
from reopold_agent.types import TaskSource
from reopold_rotated.tasks import RotatedDigits


class RotatedDigitsEnv(ToolEnv):
    """``reopold_rotated/RotatedDigits-v0``. Its settings are those of `load_tasks`."""

    default_tools: ClassVar[tuple[str, ...]] = ("rotate_image", "brighten_image", "crop_image")
    default_guideline: ClassVar[str] = (
        "Turn and brighten the picture, zoom in on the card, and put the digit in \\boxed{}."
    )

    def default_tool_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Returns settings of tools, which ``env.kwargs.tool_options`` overrides."""
        return {"crop_image": {"padding": 0.0}}

    def load_tasks(self, split: str, *, size: int = 4096, seed: int = 0) -> TaskSource:
        """Returns ``size`` tasks of a split: "train" or "eval"."""
        if size < 1 or seed < 0:
            raise ConfigError(f"size must be >= 1 and seed >= 0, got {size} and {seed}")
        return RotatedDigits("train" if split == "train" else "eval", size, seed)
