"""What an evaluation asks: the questions of a benchmark or of an environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from reopold_agent.evaluate.benchmarks import Benchmark
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import RolloutRunner
from reopold_agent.types import Sampling, Trajectory

LOOKED_AT = 4
"""Number of first questions that are opened, also for their pictures, before a model is loaded."""

MakeRunner: TypeAlias = "Callable[[ChatRenderer, VisionProcessor | None], RolloutRunner]"


@dataclass(frozen=True)
class Questions:
    """Questions that are played and graded in one way.

    Attributes:
        name: name of the benchmark or the environment in the results.
        count: number of questions, which are the first ones of the split ``eval``.
        samples: answers per question.
        sampling: temperature and top_p.
        seed: seed of all random draws, with question and sample.
        make_runner: makes a runner that plays them.
        row_of: returns the row of an answer, except for what `answers.response_row` adds.
        has_pictures: whether the first questions show pictures, to any model.
        facts: settings for the results.
        stop_at_tool_call: whether a turn ends with its first tool call.
        identities: yields what identifies each of these questions in its rows (`answers.identity`).
            A key may be missing where only playing it would tell.
        benchmark: the benchmark, whose metric is reported; None for an environment.
    """

    name: str
    count: int
    samples: int
    sampling: Sampling
    seed: tuple[int, ...]
    make_runner: MakeRunner
    row_of: Callable[[Trajectory], Mapping[str, Any]]
    has_pictures: bool
    facts: Mapping[str, Any]
    stop_at_tool_call: bool = True
    benchmark: Benchmark | None = None
    identities: Callable[[Sequence[int]], Iterator[Mapping[str, Any]]] | None = None
