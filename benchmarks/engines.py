"""The same short run on both engines: ``python benchmarks/engines.py``.

Twenty steps of the embedded default, local and on verl (two ranks with ``--ranks 2``): the same
tasks, models and settings. The samplers differ (this package's and vLLM's), so the curves agree in
distribution, not token by token: compared are held-out success with its intervals and the mean
reward of each third of the run. Needs the environment with verl and vLLM; no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from reopold_agent.tracking.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    common = [
        *("env=pixel_reasoner", f"steps={arguments.steps}", f"seed={arguments.seed}"),
        *(f"evaluation.tasks={arguments.tasks}", "evaluation.every=0", "evaluation.teacher=false"),
    ]
    verl = [
        *("engine=verl", "engine.device=cpu", f"engine.gpus_per_node={arguments.ranks + 1}"),
        *("engine.teacher_gpus_per_node=1", "engine.rollout_workers=1"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: run([*common, *more], Path(folder) / name)
            for name, more in (("local", []), ("verl", verl))
        }
    print(f"{arguments.steps} steps, seed {arguments.seed}, {arguments.ranks} rank(s)")
    print("engine  success before        success after         reward by thirds      s/step")
    for name, (summary, rows) in runs.items():
        rewards = np.array_split([row["reward/mean"] for row in rows], 3)
        thirds = " ".join(f"{part.mean():6.2f}" for part in rewards)
        seconds = np.median([row["time/step"] for row in rows])
        cells = [interval(summary[when]) for when in ("before", "after")]
        print(f"{name:<7} {cells[0]:<21} {cells[1]:<21} {thirds}  {seconds:6.2f}")
    low = max(summary["after"]["low"] for summary, _ in runs.values())
    high = min(summary["after"]["high"] for summary, _ in runs.values())
    print("intervals after the run overlap" if low <= high else "INTERVALS DO NOT OVERLAP")


def run(overrides: list[str], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    command = [sys.executable, "-m", "reopold_agent.train", *overrides, f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    return json.loads((folder / "summary.json").read_text()), rows


def interval(part: dict[str, Any]) -> str:
    return f"{part['success']:.2f} ({part['low']:.2f} to {part['high']:.2f})"


if __name__ == "__main__":
    main()
