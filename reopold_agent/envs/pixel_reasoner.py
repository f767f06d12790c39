"""Pixel-Reasoner's environment: a question about a picture or a video, and tools to look closer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.data import load_tasks
from reopold_agent.envs.base import ToolEnv
from reopold_agent.errors import ConfigError
from reopold_agent.types import TaskSource

DEMO_DATA: Mapping[str, Mapping[str, Any]] = {
    "train": {"source": "demo", "split": "train"},
    "eval": {"source": "demo", "split": "eval"},
}


class PixelReasonerEnv(ToolEnv):
    """``reopold/PixelReasoner-v0``.

    Args:
        data: for each split, tasks or a specification for `reopold_agent.data.load_tasks`.
            Without it, the embedded digits: a task that runs anywhere.
        **settings: see `ToolEnv`. With the embedded digits, the crop's padding defaults to 0:
            padded, a cell would take in its neighbours.
    """

    default_tools: ClassVar[tuple[str, ...]] = ("crop_image", "select_frames")
    default_guideline: ClassVar[str] = (
        "Guidelines: Understand the given visual information and the user query. Determine if it "
        "is beneficial to employ the given visual operations (tools). For a video, we can look "
        "closer by `select_frames`. For an image, we can look closer by `crop_image`. Reason with "
        "the visual information step by step, and put your final answer within \\boxed{}."
    )

    def __init__(
        self,
        *,
        data: Mapping[str, Mapping[str, Any] | TaskSource | None] | None = None,
        **settings: Any,
    ) -> None:
        self._data = {**DEMO_DATA} if data is None else dict(data)
        if all(_is_demo(spec) for spec in self._data.values()):
            given = settings.get("tool_options") or {}
            crop = {"padding": 0.0, **given.get("crop_image", {})}
            # First, so that what is given under an alias overrides it.
            settings["tool_options"] = {"crop_image": crop} | {**given, "crop_image": crop}
        super().__init__(**settings)
        if self._source:
            raise ConfigError(f"unknown settings: {', '.join(self._source)}")

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        """The tasks of a split, as its specification says."""
        spec = self._data.get(split)
        if spec is None:
            raise ConfigError(f"no data for the split '{split}'; set data.{split}")
        return load_tasks(spec) if isinstance(spec, Mapping) else spec


def _is_demo(spec: Mapping[str, Any] | TaskSource | None) -> bool:
    return isinstance(spec, Mapping) and spec.get("source") == "demo"
