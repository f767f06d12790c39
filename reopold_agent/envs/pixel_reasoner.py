"""Pixel-Reasoner's environment: a question about a picture or a video, and tools to look closer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.envs.data_env import DataEnv, SplitData

DEMO_DATA: Mapping[str, Mapping[str, Any]] = {
    "train": {"source": "demo", "split": "train"},
    "eval": {"source": "demo", "split": "eval"},
}


class PixelReasonerEnv(DataEnv):
    """``reopold/PixelReasoner-v0``.

    Args:
        data: see `DataEnv`. Without it, the embedded digits: a task that runs anywhere.
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
        data: Mapping[str, SplitData] | None = None,
        **settings: Any,
    ) -> None:
        data = DEMO_DATA if data is None else data
        if all(_is_demo(spec) for spec in data.values()):
            given = settings.get("tool_options") or {}
            crop = {"padding": 0.0, **given.get("crop_image", {})}
            # First, so that what is given under an alias overrides it.
            settings["tool_options"] = {"crop_image": crop} | {**given, "crop_image": crop}
        super().__init__(data=data, **settings)


def _is_demo(spec: SplitData) -> bool:
    return isinstance(spec, Mapping) and spec.get("source") == "demo"
