"""Projects a whole run from a preflight's episodes: hours, GPU-hours and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reopold_agent.errors import ReopoldError, first_line
from reopold_agent.evaluate.paper import PAPER_TABLES
from reopold_agent.plan.compose import plan_run, recipe_of
from reopold_agent.plan.estimate import Plan
from reopold_agent.plan.hardware import find_gpu
from reopold_agent.plan.paper import PAPER_RUNS
from reopold_agent.preflight.play import Played

_PUBLISHED: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "paper_agentic": ("agentic", "SFT start", ("pixel", "vstar")),
    "paper_geometry_3b": ("visual", "3B", ("geometry3k",)),
    "paper_geometry_7b": ("visual", "7B", ("geometry3k",)),
    "paper_math_1_5b": ("math", "1.5B", ("math500", "aime24")),
}
"""Table, row and columns of the paper's student before training, by recipe; the questions are
those of benchmarks."""


@dataclass(frozen=True)
class Projection:
    """What a whole run takes, without evaluations and checkpoints.

    Attributes:
        step_seconds: of each phase of a step, from the preflight's own seconds; None with
            ``engine=verl``, whose phases other processes compute.
        plan: the plan with the lengths of the episodes; None if there is none.
        why_not: why there is no plan.
        on_cpu: the run stays on this CPU, so that the plan's seconds say nothing.
    """

    step_seconds: dict[str, float] | None
    plan: Plan | None
    why_not: str = ""
    on_cpu: bool = False


def project(played: Played, words: Sequence[str]) -> Projection:
    """Projects the run.

    Args:
        played: what the episodes have shown.
        words: the arguments of the command line, with the plan's own (``gpu=``, ``gpus=``).
    """
    lengths = played.lengths
    given = {
        "prompt": lengths.prompt - lengths.picture_tokens,
        "pictures": lengths.pictures,
        "response": max(1.0, lengths.response),
        "observation": lengths.observation,
    }
    keys = {word.partition("=")[0] for word in words}
    more = [f"{key}={value:.6g}" for key, value in given.items() if key not in keys]
    on_cpu = played.device == "cpu" and played.config.engine.name == "local" and "gpu" not in keys
    if on_cpu:
        more += [] if "engine.precision" in keys else ["engine.precision=float32"]
    gpu = None
    if played.gpu_memory is not None and "gpu" not in keys:
        gpu = replace(find_gpu("h100_80gb"), name=played.device, memory=played.gpu_memory)
    try:
        plan, why = plan_run([*words, *more], gpu), ""
    except ReopoldError as error:
        plan, why = None, first_line(error)
    return Projection(_step_seconds(played), plan, why, on_cpu)


def _step_seconds(played: Played) -> dict[str, float] | None:
    """Returns the seconds per phase of a step, in proportion to its episodes.

    An upper bound for generation, of which more at once take less time each.
    """
    config = played.config
    if config.engine.name != "local":
        return None
    share = config.batch.prompts * config.batch.samples / played.outcome.episodes
    return {name: share * value for name, value in played.seconds.items() if name != "start"}


def published(words: Sequence[str]) -> dict[str, Any] | None:
    """Returns the paper's figures for the recipe among the words; None without one.

    ``success`` has shares by benchmark (empty where the paper gives none), ``gpu_hours`` is that of
    the whole run.
    """
    recipe = recipe_of(words)
    if recipe not in PAPER_RUNS:
        return None
    success = {}
    if recipe in _PUBLISHED:
        table, row, columns = _PUBLISHED[recipe]
        success = {name: round(PAPER_TABLES[table][1][row][name] / 100, 4) for name in columns}
    return {"success": success, "gpu_hours": PAPER_RUNS[recipe].gpu_hours}
