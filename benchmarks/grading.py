"""Grading LUFFY's 2,019 reference answers against themselves: several workers against one.

    REOPOLD_REAL_DATA=DIR python benchmarks/grading.py          # DIR/luffy/valid.parquet
    python benchmarks/grading.py --file valid.parquet --workers 2 --repeats 5

First the rate of `grade` as it is: most pairs are decided by a rule, without a worker. Then the
rate when every pair is sent to math-verify, one worker against several, in turns; printed is the
median ratio. Workers are started before the clock runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as parquet

from reopold_agent.judges import close_workers, grade
from reopold_agent.judges.math import LONGEST, MathPool
from reopold_agent.judges.text import latex_plain

DEFAULT = Path(os.environ.get("REOPOLD_REAL_DATA", "."), "luffy", "valid.parquet")


def seconds(workers: int, answers: Sequence[str]) -> float:
    # New workers each time: old ones have cached what they happened to be asked before.
    pool = MathPool(workers)
    with contextlib.closing(pool), ThreadPoolExecutor(workers) as threads:
        # Each thread asks once at the same time, so that all workers have been started.
        list(threads.map(lambda _: pool.equal("x", "x+1"), range(4 * workers)))
        started = time.perf_counter()
        list(threads.map(lambda answer: pool.equal(answer, answer), answers))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=DEFAULT)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if not chosen.file.is_file():
        raise SystemExit(f"no {chosen.file}; give LUFFY's data/valid.parquet with --file")
    rows = parquet.read_table(chosen.file).to_pylist()
    golds = [row["reward_model"]["ground_truth"] for row in rows]

    started = time.perf_counter()
    right = sum(grade(f"\\boxed{{{gold}}}", gold).correct for gold in golds)
    taken = time.perf_counter() - started
    print(f"grade: {right} of {len(golds)} right, {len(golds) / taken:,.0f} pairs/s in one thread")
    close_workers()

    answers = [latex_plain(gold) for gold in golds if len(gold) < LONGEST]
    ratios = []
    for _ in range(chosen.repeats):
        one, several = (seconds(workers, answers) for workers in (1, chosen.workers))
        ratios.append(one / several)
        print(
            f"math-verify for each: 1 worker {len(answers) / one:,.0f} pairs/s, "
            f"{chosen.workers} workers {len(answers) / several:,.0f} pairs/s, "
            f"ratio {one / several:.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
