"""Tables of the paper, in percent, to be shown beside results of this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

PaperTable: TypeAlias = tuple[Sequence[str], Mapping[str, Mapping[str, float]]]


def _table(columns: Sequence[str], **rows: Sequence[float]) -> PaperTable:
    return columns, {
        name.replace("__", " + ").replace("_", " "): dict(zip(columns, values, strict=True))
        for name, values in rows.items()
    }


PAPER_JUDGE = (
    "The paper's judge, gemini-2.0-flash-001, has not been served since June 2026, so answers that "
    "only a judge can read are read by another model here."
)

PAPER_TABLES: Mapping[str, PaperTable] = {
    # Section 5.3: a 3B student from the 7B Pixel-Reasoner.
    "agentic": _table(
        ["pixel", "vstar", "infovqa", "tallyqa"],
        SFT_start=[46.00, 71.20, 34.88, 56.91],
        GRPO=[60.00, 76.96, 59.47, 60.56],
        RKL=[52.00, 76.55, 61.09, 64.34],
        Reopold=[57.00, 77.43, 63.12, 65.43],
    ),
    # Section 5.2: Qwen2.5-VL students from Qwen2.5-VL-32B with NoisyRollout.
    "visual": _table(
        ["geometry3k", "mathverse", "mathvision", "mathvista", "wemath", "hallusionbench"],
        teacher_32B=[56.74, 58.86, 39.82, 78.30, 75.51, 72.45],
        **{
            "3B": [26.46, 35.58, 22.83, 59.40, 53.41, 61.51],
            "3B__RKL": [48.09, 33.25, 24.78, 62.50, 64.48, 60.83],
            "3B__Reopold": [50.58, 46.40, 26.39, 61.50, 64.60, 63.62],
            "7B": [39.77, 45.72, 25.05, 67.80, 64.77, 65.62],
            "7B__RKL": [51.75, 47.71, 28.79, 71.27, 70.06, 69.51],
            "7B__Reopold": [53.58, 51.43, 29.21, 72.40, 69.77, 70.14],
        },
    ),
    # Section 5.1: DeepSeek-R1-Distill-Qwen-1.5B from SkyWork-OR1-Math-7B.
    "math": _table(
        ["aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench"],
        teacher_7B=[69.8, 52.3, 94.1, 95.8, 49.3, 73.5],
        **{
            "1.5B": [28.6, 22.7, 62.6, 82.9, 26.4, 43.6],
            "1.5B__GRPO": [31.8, 23.7, 62.0, 85.4, 33.8, 49.8],
            "1.5B__SFT": [33.5, 24.6, 76.1, 86.6, 36.4, 55.6],
            "1.5B__RKL": [37.1, 30.6, 80.2, 88.0, 34.6, 56.0],
            "1.5B__Reopold": [41.6, 32.6, 83.0, 89.2, 38.6, 57.3],
        },
    ),
}
