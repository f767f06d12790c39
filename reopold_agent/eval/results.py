"""From answers to figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from reopold_agent.eval.benchmarks import Benchmark
from reopold_agent.eval.metrics import (
    anls,
    bootstrap_interval,
    hallusionbench_scores,
    maj_at_k,
    pass_at_k,
    rmse,
    wemath_scores,
)
from reopold_agent.eval.play import Row, by_question


def benchmark_results(
    rows: Sequence[Row], benchmark: Benchmark, *, ks: Sequence[int], seed: int
) -> dict[str, Any]:
    """Everything that is reported of one benchmark.

    ``accuracy`` is the mean over all answers (avg@k), with a 95 % interval by bootstrap over
    questions; an undecided answer counts as wrong. The order of ``rows`` changes nothing.
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
            str(k): statistics.fmean(_majority(group[:k]) for group in groups) for k in chosen
        },
        "categories": _categories(rows),
        "extra": _extra(rows, benchmark),
        "undecided": sum(row["undecided"] for row in rows),
        "errors": sum(row["error"] is not None for row in rows),
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
    # What is undecided has no answer that could win.
    votes = [(None if row["undecided"] else row["extracted"], row["correct"]) for row in group]
    return maj_at_k(votes, group[0]["kind"])


def _categories(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, list[bool]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row["correct"])
    return {
        name: {"answers": len(values), "accuracy": statistics.fmean(values)}
        for name, values in sorted(found.items())
    }


def _extra(rows: Sequence[Row], benchmark: Benchmark) -> dict[str, float]:
    """The benchmark's own metric beside accuracy."""
    if benchmark.metric == "anls":
        return {
            "ANLS": statistics.fmean(anls(row["extracted"] or "", row["answers"]) for row in rows)
        }
    if benchmark.metric == "rmse":
        value = rmse([(row["extracted"], row["answers"][0]) for row in rows])
        return {} if value is None else {"RMSE": value}
    if benchmark.metric == "hallusionbench":
        return hallusionbench_scores(
            [(row["group"]["figure"], row["group"]["question"], row["correct"]) for row in rows]
        )
    if benchmark.metric == "wemath":
        return wemath_scores(
            [(row["group"]["problem"], row["group"]["key"], row["correct"]) for row in rows]
        )
    return {}


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}
