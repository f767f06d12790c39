"""Playing a benchmark: every question, every sample, written as it comes, resumable."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reopold_agent.eval.benchmarks import Benchmark
from reopold_agent.judges import grade
from reopold_agent.policies.base import Policy
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.tracking.metrics import JsonLines, read_json_lines
from reopold_agent.tracking.trajectories import save_pictures
from reopold_agent.types import Sampling, StopReason, Task, TaskSource, Trajectory

Row = Mapping[str, Any]


def play_benchmark(
    runner: RolloutRunner,
    policy: Policy,
    benchmark: Benchmark,
    tasks: TaskSource,
    *,
    sampling: Sampling,
    seed: int,
    responses: Path,
    folder: Path,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Plays what is not in ``responses`` yet and returns all rows, by question and sample.

    Each answer is graded by rule and appended the moment its episode ends. The random draws of an
    answer depend on seed, benchmark, question and sample only, so an interrupted evaluation
    continues as if nothing had happened.

    Args:
        runner: plays split ``eval`` of an environment made of ``tasks``.
        policy: who answers.
        benchmark: what is played.
        tasks: its rows.
        sampling: temperature and top_p.
        seed: of the sampling.
        responses: JSON lines, one answer each.
        folder: pictures go to ``folder/pictures``; rows refer to them relative to it.
        on_row: called with each new row.

    Raises:
        DataError: ``responses`` is damaged.
    """
    done = {(row["index"], row["sample"]): row for row in read_rows(responses, benchmark.name)}
    missing = [
        EpisodeSpec("eval", index, sample)
        for index in range(len(tasks))
        for sample in range(benchmark.samples)
        if (index, sample) not in done
    ]
    salt = int.from_bytes(hashlib.sha256(benchmark.name.encode()).digest()[:4], "big")
    # One thread beside the model's grades, encodes pictures and writes, in the order of the ends.
    # Leaving the block waits for it, also after Ctrl-C: what was answered is on disk.
    with JsonLines(responses) as writer, ThreadPoolExecutor(1, "reopold-rows") as beside:

        def finish(trajectory: Trajectory) -> None:
            row = response_row(benchmark, tasks[trajectory.index], trajectory, folder)
            writer.write(row)
            done[trajectory.index, trajectory.sample] = row
            if on_row is not None:
                on_row(row)

        writes: deque[Future[None]] = deque()

        def hand_over(trajectory: Trajectory) -> None:
            writes.append(beside.submit(finish, trajectory))
            while writes and writes[0].done():
                writes.popleft().result()  # a full disk ends the run now, not at its end

        runner.run(policy, missing, sampling, (seed, 5, salt), on_done=hand_over)
        for write in writes:
            write.result()
    return [done[key] for key in sorted(done)]


def read_rows(responses: Path, benchmark: str) -> list[Row]:
    """The rows of one benchmark that are on disk; a half-written last line is dropped."""
    if not responses.is_file():
        return []
    return [row for row in read_json_lines(responses) if row["benchmark"] == benchmark]


def response_row(
    benchmark: Benchmark, task: Task, trajectory: Trajectory, folder: Path
) -> dict[str, Any]:
    """One answer with everything that is needed to look at it and to grade it again."""
    response = trajectory.turns[-1].text if trajectory.turns else ""
    kind = grading_kind(benchmark, task)
    options = [str(option) for option in task.metadata.get("options", ())]
    verdict = grade(response, list(task.answers), kind, options=options)
    failed = trajectory.stop_reason in (StopReason.ENV_ERROR, StopReason.POLICY_ERROR)
    return {
        "benchmark": benchmark.name,
        "index": trajectory.index,
        "sample": trajectory.sample,
        "id": task.id,
        "question": task.question,
        "answers": list(task.answers),
        "kind": kind,
        "category": task.metadata.get("category", ""),
        "options": options,
        "group": {
            key: task.metadata[key]
            for key in ("problem", "key", "figure", "question")
            if key in task.metadata
        },
        "response": response,
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "how": verdict.how,
        "undecided": verdict.undecided and not failed,
        "stop": str(trajectory.stop_reason),
        "error": trajectory.info.get("error"),
        "turns": [_turn(turn) for turn in trajectory.turns],
        "pictures": save_pictures(trajectory, folder),
        "tokens": trajectory.response_tokens,
        "seconds": round(trajectory.seconds, 3),
    }


def grading_kind(benchmark: Benchmark, task: Task) -> str:
    """The row's own kind, or the benchmark's where the row does not say."""
    kind = str(task.metadata.get("answer_kind", "auto"))
    return benchmark.kind if kind == "auto" else kind


def by_question(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows grouped by question, samples in order."""
    groups: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["index"], r["sample"])):
        groups.setdefault(row["index"], []).append(row)
    return list(groups.values())


def _turn(turn: Any) -> dict[str, Any]:
    call = turn.tool_call
    return {
        "text": turn.text,
        "observation": turn.observation,
        "tool": None
        if call is None
        else {
            "name": call.name,
            "arguments": call.arguments,
            "ok": call.ok,
            "error": call.error,
            "regions": [{"image": r.image, "box": list(r.box)} for r in call.regions],
        },
    }
