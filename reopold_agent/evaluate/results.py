"""Computes the metrics of a benchmark from its answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from reopold_agent.common.statistics import bootstrap_interval
from reopold_agent.evaluate.answers import Row, by_question
from reopold_agent.evaluate.benchmarks import Benchmark
from reopold_agent.evaluate.metrics import (
    anls,
    hallusionbench_scores,
    maj_at_k,
    pass_at_k,
    rmse,
    wemath_scores,
)
from reopold_agent.judges.rules import equivalent, kind_of
from reopold_agent.rollout.runner import PROMPT_TOO_LONG


def benchmark_results(
    rows: Sequence[Row], benchmark: Benchmark | None, *, ks: Sequence[int], seed: int
) -> dict[str, Any]:
    """Returns everything that is reported about a benchmark, or an environment (None).

    ``accuracy`` is the mean over all answers (avg@k), with a 95 % interval by bootstrap over
    questions; an undecided answer counts as wrong. Without accepted answers there is no maj@k. The
    order of ``rows`` does not matter.
    """
    groups = by_question(rows)
    means = [statistics.fmean(row["correct"] for row in group) for group in groups]
    low, high = bootstrap_interval(means, seed=seed)
    samples = min(len(group) for group in groups)
    chosen = [k for k in sorted(set(ks)) if 1 <= k <= samples]
    calls = [turn["tool"] for row in rows for turn in row["turns"] if turn["tool"] is not None]
    return {
        "questions": len(groups),
        "samples": samples,
        "answers": len(rows),
        "accuracy": statistics.fmean(means),
        "low": low,
        "high": high,
        "pass_at_k": {
            str(k): statistics.fmean(
                pass_at_k(len(group), sum(row["correct"] for row in group), k) for group in groups
            )
            for k in chosen
        },
        "maj_at_k": {
            str(k): statistics.fmean(_majority(group[:k]) for group in groups)
            for k in chosen
            if all(row["answers"] for row in rows)
        },
        "categories": _categories(rows),
        "extra": _extra(rows, benchmark),
        "undecided": sum(row["undecided"] for row in rows),
        "errors": sum(row["error"] is not None for row in rows),
        "prompts_too_long": sum(
            str(row["error"] or "").startswith(PROMPT_TOO_LONG) for row in rows
        ),
        "past_context": sum(row.get("past_context", False) for row in rows),
        "judged": sum("judge" in row for row in rows),
        "how": _counts([row["how"] for row in rows]),
        "stop": _counts([row["stop"] for row in rows]),
        "tool_rate": statistics.fmean(
            any(turn["tool"] is not None for turn in row["turns"]) for row in rows
        ),
        "tool_errors": statistics.fmean(not call["ok"] for call in calls) if calls else 0.0,
        "tokens_per_answer": statistics.fmean(row["tokens"] for row in rows),
        "seconds_per_answer": statistics.fmean(row["seconds"] for row in rows),
    }


def _majority(group: Sequence[Row]) -> float:
    # An undecided sample has no answer to vote for.
    votes = [(None if row["undecided"] else row["extracted"], row["correct"]) for row in group]
    first = group[0]
    kinds = {kind_of(answer, first["kind"]) for answer in first["answers"]}
    # The reference says whether "dog" is the option B, or yes the same as true.
    kind = kinds.pop() if kinds in ({"option"}, {"yes_no"}) else first["kind"]
    same = partial(
        equivalent, kind=kind, options=first["options"], precision=first.get("precision")
    )
    return maj_at_k(votes, same=same)


def _categories(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, list[bool]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row["correct"])
    return {
        name: {"answers": len(values), "accuracy": statistics.fmean(values)}
        for name, values in sorted(found.items())
    }


def _extra(rows: Sequence[Row], benchmark: Benchmark | None) -> dict[str, float]:
    """Returns the benchmark's own metrics beside accuracy; an environment's reward if it is not
    its success."""
    if benchmark is None:
        if all(row["reward"] == float(row["correct"]) for row in rows):
            return {}
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        found = {"reward": statistics.fmean(rewards)} if rewards else {}
        lost = len(rows) - len(rewards)
        return {**found, **({"rewards_not_finite": lost} if lost else {})}
    if benchmark.metric == "anls":
        return {
            "ANLS": statistics.fmean(anls(row["extracted"] or "", row["answers"]) for row in rows)
        }
    if benchmark.metric == "rmse":
        value = rmse([(row["extracted"], row["answers"][0]) for row in rows])
        return {} if value is None else {"RMSE": value}
    if benchmark.metric == "hallusionbench":
        keys = [(row["group"]["figure"], row["group"]["question"]) for row in rows]
        correct = [row["correct"] for row in rows]
        scores = hallusionbench_scores([(*key, c) for key, c in zip(keys, correct, strict=True)])
        pictured = [row for row, (figure, _) in zip(rows, keys, strict=True) if figure is not None]
        if 0 < len(pictured) < len(rows):  # NoisyRollout, and so the paper, scores only these
            scores["aAcc_pictured"] = statistics.fmean(row["correct"] for row in pictured)
            scores["pictured"] = len(by_question(pictured))
        return scores
    if benchmark.metric == "wemath":
        return wemath_scores(
            [(row["group"]["problem"], row["group"]["key"], row["correct"]) for row in rows]
        )
    return {}


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}
