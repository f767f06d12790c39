"""Measures the cost of an evaluation over bare generation, on the demo benchmark.

    python benchmarks/evaluation.py [--tasks 256] [--repeats 3]

Evaluation: playing, grading, pictures, one flushed row per answer. Bare: the same episodes by the
same rollout without any of that; and, below it, the seconds in the model alone. The trained demo
teacher answers, so that every episode has its tool calls. Printed: best of the repeats, ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import demo_config, demo_loop

from reopold_agent.evaluate.answers import answer_questions, benchmark_row, benchmark_seed
from reopold_agent.evaluate.benchmarks import Benchmark, load_benchmark
from reopold_agent.evaluate.questions import Questions
from reopold_agent.rollout.runner import EpisodeSpec
from reopold_agent.types import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    loop = demo_loop(demo_config("data.eval.seed=0"), folder)
    benchmark = Benchmark("demo", "demo", "demo", "agentic", kind="number", limit=options.tasks)
    tasks = load_benchmark(benchmark).tasks
    questions = Questions(
        name=benchmark.name,
        count=options.tasks,
        samples=1,
        sampling=Sampling(),
        seed=benchmark_seed(benchmark, 0),
        make_runner=lambda chat, vision: loop.evaluation.runner,
        row_of=lambda trajectory: benchmark_row(benchmark, tasks[trajectory.index], trajectory),
        has_pictures=True,
        facts={},
        benchmark=benchmark,
    )
    episodes = [EpisodeSpec("eval", index) for index in range(options.tasks)]
    bare, model, whole = [], [], []
    runner, policy = loop.evaluation.runner, loop.roles.teacher
    for repeat in range(options.repeats + 1):
        started = time.perf_counter()
        runner.run(policy, episodes, Sampling(), (0, 5, 1))
        played = time.perf_counter() - started
        generated = runner.stats.generate_seconds
        target = folder / f"evaluation-{repeat}"
        target.mkdir()
        started = time.perf_counter()
        answer_questions(
            runner, policy, questions, responses=target / "responses.jsonl", folder=target
        )
        evaluated = time.perf_counter() - started
        if repeat:  # the first one warms up
            bare.append(played)
            model.append(generated)
            whole.append(evaluated)
    print(f"{options.tasks} episodes with tools, one thread")
    print(f"in the model {min(model):.2f} s, bare rollout {min(bare):.2f} s")
    print(
        f"evaluation {min(whole):.2f} s: {min(whole) / min(bare):.2f} of the bare rollout, "
        f"{min(whole) / min(model):.2f} of the model alone"
    )


if __name__ == "__main__":
    main()
