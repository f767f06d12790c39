"""Reads rows of ``metrics.jsonl`` as series; missing keys and nulls are allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


class History:
    """The recorded metrics of a run. If a step has several rows, the last one counts.

    Attributes:
        train: rows of the training steps, by step.
        evaluations: rows of the evaluations with a success, by step.
        steps: (n,) float64, steps of ``train``.
        switch_step: first step of the refinement phase; None unless another phase precedes it.
        last_step: the greatest number of steps done in any row.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        train: dict[float, Row] = {}
        evaluations: dict[tuple[Any, Any, float], Row] = {}
        for row in rows:
            step = number(row.get("step"))
            if row.get("kind") == "train" and step is not None:
                train[step] = row
            elif row.get("kind") == "eval" and number(row.get("success")) is not None:
                key = (row.get("who"), row.get("sampling"), 0.0 if step is None else step)
                evaluations[key] = {**row, "step": key[2]}
        self.train = [train[step] for step in sorted(train)]
        self.evaluations = sorted(evaluations.values(), key=lambda row: float(row["step"]))
        self.steps: Floats = np.asarray(sorted(train), dtype=np.float64)
        phases = [row.get("phase") for row in self.train]
        at = phases.index("refinement") if "refinement" in phases else 0
        self.switch_step = float(self.steps[at]) if at > 0 else None
        ends = [row["step"] for row in self.evaluations] + [step + 1 for step in self.steps[-1:]]
        self.last_step = float(max(ends, default=0.0))

    def has(self, key: str) -> bool:
        """Returns whether any training row has a value for the key."""
        return any(row.get(key) is not None for row in self.train)

    def series(self, key: str, part: str | None = None) -> tuple[Floats, Floats]:
        """Returns steps and values of a key (or of ``key[part]``) where it is a number."""
        pairs = [
            (step, value)
            for step, row in zip(self.steps, self.train, strict=True)
            if (value := _value(row, key, part)) is not None
        ]
        table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def column(self, key: str) -> Floats:
        """Returns the values of a key at every step, 0 where it is missing."""
        values = [_value(row, key) for row in self.train]
        return np.asarray([0.0 if v is None else v for v in values], dtype=np.float64)

    def last(self, key: str) -> float | None:
        """Returns the last value of a key, or None."""
        _, values = self.series(key)
        return float(values[-1]) if values.size else None

    def evaluation_rows(self, who: str, sampling: str, until: float = math.inf) -> list[Row]:
        """Returns evaluations of a model with a kind of sampling up to a step, by step."""
        return [
            row
            for row in self.evaluations
            if row.get("who") == who and row.get("sampling") == sampling and row["step"] <= until
        ]

    def windows(self, key: str, share: float = 0.1) -> list[tuple[str, list[Row]]]:
        """Returns the first and the last rows that have the key, labelled.

        Both windows have the same number of steps: ``share`` of all, at least one, without
        overlap. A single row gives one window, and no row gives none.
        """
        rows = [row for row in self.train if row.get(key)]
        if not rows:
            return []
        count = max(1, min(len(rows) // 2, math.ceil(share * len(rows))))
        chosen = [rows[:count]] if len(rows) == 1 else [rows[:count], rows[-count:]]
        return [(_span(window), window) for window in chosen]

    @staticmethod
    def histogram(rows: Sequence[Row], key: str) -> tuple[Floats, Floats]:
        """Adds up histograms; returns edges and counts. Rows whose edges differ from the last
        row's are left out."""
        edges = rows[-1][key]["edges"]
        same = [row[key]["counts"] for row in rows if row[key]["edges"] == edges]
        return np.asarray(edges, np.float64), np.asarray(same, np.float64).sum(axis=0)

    @staticmethod
    def mean(rows: Sequence[Row], key: str) -> float | None:
        """Returns the mean of a key over the rows in which it is a number."""
        values = [value for row in rows if (value := _value(row, key)) is not None]
        return sum(values) / len(values) if values else None

    @staticmethod
    def mean_list(rows: Sequence[Row], key: str) -> list[float]:
        """Returns the elementwise mean of the lists as long as the last; 0 where all are null."""
        same = [row[key] for row in rows if len(row[key]) == len(rows[-1][key])]
        columns = zip(*same, strict=True)
        kept = [[v for item in column if (v := number(item)) is not None] for column in columns]
        return [sum(column) / len(column) if column else 0.0 for column in kept]


def number(value: Any) -> float | None:
    """Returns the value as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _value(row: Row, key: str, part: str | None = None) -> float | None:
    value = row.get(key)
    if part is not None:
        value = value.get(part) if isinstance(value, dict) else None
    return number(value)


def _span(rows: Sequence[Row]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"
