"""Pixel-Reasoner's environment: questions about pictures and videos, and tools to look closer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from reopold_agent.data.loading import DEFAULT_DATA
from reopold_agent.envs.data_env import DataEnv, SplitData


class PixelReasonerEnv(DataEnv):
    """``reopold/PixelReasoner-v0``.

    Args:
        data: as for `DataEnv`; by default tasks that need no files
            (`reopold_agent.data.loading.DEFAULT_DATA`).
        **settings: of `ToolEnv`.
    """

    default_tools: ClassVar[tuple[str, ...]] = ("crop_image", "select_frames")
    default_guideline: ClassVar[str] = (
        "Guidelines: Understand the given visual information and the user query. Determine if it "
        "is beneficial to employ the given visual operations (tools). For a video, we can look "
        "closer by `select_frames`. For an image, we can look closer by `crop_image`. Reason with "
        "the visual information step by step, and put your final answer within \\boxed{}."
    )

    def __init__(self, *, data: Mapping[str, SplitData] | None = None, **settings: Any) -> None:
        super().__init__(data=DEFAULT_DATA if data is None else data, **settings)
