"""Measures how far the parts of a step overlap with `policy=vllm`.

    python benchmarks/overlap.py [--steps 12] [episodes and other settings as for training]

Needs the extra `vllm`. The student's generation, the teacher's scoring and the update's path
(log-probs and entropies before the update, the update, the synchronisation of the weights) run in
three processes. Each step is timed as training does it; then as many other episodes are generated
alone and scored alone. Printed: medians, and the step over

* the longest of the three alone (what a step could take at least if they did not depend on each
  other), and
* the longer of generation and scoring plus the update's path, which cannot begin before the last
  episode has ended (what a step can take at least on policy).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import demo_config, demo_loop

from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.train.collect import step_episodes
from reopold_agent.train.rows import Row

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    config = demo_config("policy=vllm", *options.settings)
    loop: Any = demo_loop(config, folder)
    alone: dict[str, list[float]] = {"generate": [], "teacher": []}
    position = 0
    try:
        for step in range(options.steps + WARM_UP):
            position = loop.step(step, position)
            # Not the tasks of the step, whose pictures vLLM has cached.
            later = [position + 10**5 + k for k in range(config.batch.prompts)]
            tasks = [loop.collector.order[k] for k in later]
            episodes = step_episodes(tasks, config.batch.samples)
            begun = time.perf_counter()
            played = loop.collector.runner.run(
                loop.roles.sampler, episodes, loop.collector.sampling, (config.seed, 1, step)
            )
            alone["generate"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            loop.scoring.finish([Row(t) for t in played if t.trainable], step)
            alone["teacher"].append(time.perf_counter() - begun)
            loop.roles.sync()  # the next step finds empty caches, as always
    finally:
        loop.close()
    rows = [r for r in read_metrics(folder) if r["kind"] == "train"][WARM_UP:]
    generate, teacher = (np.array(alone[name][WARM_UP:]) for name in ("generate", "teacher"))
    whole = np.array([row["time/step"] for row in rows])
    path = np.array([row["time/old_logp"] + row["time/update"] + row["time/sync"] for row in rows])
    waited = np.array([row["time/teacher"] for row in rows])
    print(f"{len(rows)} steps of {len(episodes)} episodes; medians in seconds")
    for name, values in {
        "step": whole,
        "generation alone": generate,
        "scoring alone": teacher,
        "update's path": path,
        "waiting for scores in the step": waited,
    }.items():
        print(f"{name:32} {np.median(values):.3f}")
    longest = np.maximum(np.maximum(generate, teacher), path)
    chain = np.maximum(generate, teacher) + path
    print(f"step / longest of the three      {np.median(whole / longest):.2f}")
    print(f"step / (longer of two + path)    {np.median(whole / chain):.2f}")


if __name__ == "__main__":
    main()
