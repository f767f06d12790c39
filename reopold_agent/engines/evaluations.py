"""Held-out evaluations of a run: which are due, their rows, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reopold_agent.config import TrainConfig
from reopold_agent.eval.heldout import EvaluationResult
from reopold_agent.types import Sampling

GREEDY = Sampling(temperature=0.0)

Row = Mapping[str, Any]


def ends_due(rows: Sequence[Row], who: str, step: int, sampling: Sampling) -> list[Sampling]:
    """How ``who`` is still to be evaluated before or after the run: as in training, and greedy.

    A run that was killed between its last step and its end has some of them in its rows already.
    """
    done = _ends(rows, who, step)
    return [each for each in (sampling, GREEDY) if _kind(each) not in done]


def curve_due(rows: Sequence[Row], step: int, config: TrainConfig) -> bool:
    """Whether a point of the curve after ``step`` steps is wanted and not in the rows yet."""
    every = config.evaluation.every
    if not every or step % every or not 0 < step < config.steps:
        return False
    return not any(
        row["kind"] == "eval" and (row["who"], row["step"], row["curve"]) == ("student", step, True)
        for row in rows
    )


def evaluation_row(
    result: EvaluationResult, who: str, step: int, sampling: Sampling, *, curve: bool
) -> dict[str, Any]:
    """A row of ``metrics.jsonl``; ``curve`` marks the points between the ends of a run."""
    return {
        "kind": "eval",
        "step": step,
        "who": who,
        "sampling": _kind(sampling),
        "curve": curve,
        **result.row(),
    }


def summarise(rows: Sequence[Row], config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The figures a newcomer looks for, from the rows of ``metrics.jsonl``."""
    fields = ("success", "low", "high", "n", "tool_rate")

    def find(who: str, step: int) -> dict[str, Any] | None:
        ends = _ends(rows, who, step)
        found = {kind: {name: row[name] for name in fields} for kind, row in ends.items()}
        if "sampled" not in found:
            return None
        return {**found["sampled"], "greedy": found.get("greedy")}

    # Seconds from the rows too, so that a resumed run counts all its steps.
    steps = [row["time/step"] for row in rows if row["kind"] == "train"]
    return {
        "before": find("student", 0),
        "after": find("student", config.steps),
        "teacher": find("teacher", 0),
        "env": config.env.name,
        "seed": config.seed,
        "steps": config.steps,
        "run": str(folder),
        "train_seconds": round(sum(steps), 1),
    }


def _ends(rows: Sequence[Row], who: str, step: int) -> dict[str, Row]:
    """By kind of sampling."""
    return {
        row["sampling"]: row
        for row in rows
        if row["kind"] == "eval" and (row["who"], row["step"], row["curve"]) == (who, step, False)
    }


def _kind(sampling: Sampling) -> str:
    return "greedy" if sampling.temperature == 0 else "sampled"
