"""Answers the questions of a benchmark; each answer is graded and saved as it comes, resumable."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from reopold_agent.data.fingerprint import task_digest
from reopold_agent.errors import NonFiniteError
from reopold_agent.evaluate.benchmarks import Benchmark
from reopold_agent.evaluate.questions import Questions
from reopold_agent.judges import grade
from reopold_agent.policies.base import Policy
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.tracking.metrics import JsonLines, read_json_lines
from reopold_agent.tracking.trajectories import save_pictures
from reopold_agent.types import IMAGE_MARK, StopReason, Task, Trajectory

Row = Mapping[str, Any]


def answer_questions(
    runner: RolloutRunner,
    policy: Policy,
    questions: Questions,
    *,
    saved: Iterable[Row] = (),
    responses: Path,
    folder: Path,
    on_row: Callable[[Row], None] | None = None,
    context: int | None = None,
) -> list[Row]:
    """Rolls out the answers that are not saved; returns all rows by question and sample.

    Each answer is graded and appended when its episode ends. Its random draws depend only on the
    questions' seed, question and sample, so an interrupted evaluation continues unchanged.

    Args:
        runner: made by ``questions.make_runner``.
        policy: the model to evaluate.
        questions: the questions.
        saved: rows of their answers in ``responses``.
        responses: file of JSON lines, one answer each, to which new answers are appended.
        folder: pictures are saved in ``folder/pictures``, and rows have paths relative to it.
        on_row: called with each new row.
        context: longest sequence of the model; rows of longer episodes say ``past_context``.

    Raises:
        NonFiniteError: the model computes no numbers, so that it answers at random.
    """
    done = {(row["index"], row["sample"]): row for row in saved}
    wanted = [(i, sample) for i in range(questions.count) for sample in range(questions.samples)]
    missing = [EpisodeSpec("eval", *key) for key in wanted if key not in done]
    # One thread beside the model's grades, encodes pictures and writes, in the order in which
    # episodes end. Leaving the block waits for it, also after Ctrl-C: every answer is on disk.
    with JsonLines(responses) as writer, ThreadPoolExecutor(1, "reopold-rows") as beside:

        def finish(trajectory: Trajectory) -> None:
            row = response_row(questions, trajectory, folder)
            if context is not None and len(trajectory.ids) > context:
                row["past_context"] = True
            writer.write(row)
            done[trajectory.index, trajectory.sample] = row
            if on_row is not None:
                on_row(row)

        writes: deque[Future[None]] = deque()

        def hand_over(trajectory: Trajectory) -> None:
            if np.isnan(trajectory.logp).any():
                raise NonFiniteError(
                    f"the log-probs of the model's answer to question {trajectory.index} of "
                    f"'{questions.name}' are not numbers: its weights are broken, or overflow."
                    "\nTake another checkpoint, or dtype=float32; such answers are not kept."
                )
            writes.append(beside.submit(finish, trajectory))
            while writes and writes[0].done():
                writes.popleft().result()  # a full disk ends the run now, not at its end

        runner.run(policy, missing, questions.sampling, questions.seed, on_done=hand_over)
        for write in writes:
            write.result()
    return [done[key] for key in wanted]


def read_rows(responses: Path) -> dict[str, list[Row]]:
    """Reads the saved rows by benchmark; a half-written last line is dropped.

    Raises:
        DataError: the file is damaged.
    """
    found: dict[str, list[Row]] = {}
    for row in read_json_lines(responses) if responses.is_file() else ():
        found.setdefault(row["benchmark"], []).append(row)
    return found


def response_row(questions: Questions, trajectory: Trajectory, folder: Path) -> dict[str, Any]:
    """Returns the row of an answer, with everything needed to view it and to grade it again."""
    return {
        "benchmark": questions.name,
        "index": trajectory.index,
        "sample": trajectory.sample,
        **questions.row_of(trajectory),
        "response": trajectory.turns[-1].text if trajectory.turns else "",
        "stop": str(trajectory.stop_reason),
        "error": trajectory.info.get("error"),
        "turns": [_turn(turn) for turn in trajectory.turns],
        "pictures": save_pictures(trajectory, folder),
        "tokens": trajectory.response_tokens,
        "seconds": round(trajectory.seconds, 3),
    }


def identity(task: Task) -> dict[str, Any]:
    """Returns what rows say about a question, by which it is known again.

    These are its id, words and answers, and a digest of all of it with its pictures, which rows of
    earlier versions lack.
    """
    question = task.question.replace(IMAGE_MARK, "<image>")
    answers = list(task.answers)
    digest = task_digest(task)
    return {"id": task.id, "question": question, "answers": answers, "task_sha256": digest}


def benchmark_row(benchmark: Benchmark, task: Task, trajectory: Trajectory) -> dict[str, Any]:
    """Returns a question of a benchmark and the verdict of the rules on its answer."""
    response = trajectory.turns[-1].text if trajectory.turns else ""
    kind = grading_kind(benchmark, task)
    options = [str(option) for option in task.metadata.get("options", ())]
    precision = task.metadata.get("precision")
    verdict = grade(response, list(task.answers), kind, options=options, precision=precision)
    failed = trajectory.stop_reason in (StopReason.ENV_ERROR, StopReason.POLICY_ERROR)
    return {
        **identity(task),
        "kind": kind,
        "category": task.metadata.get("category", ""),
        "options": options,
        **({} if precision is None else {"precision": precision}),
        "group": {
            key: task.metadata[key]
            for key in ("problem", "key", "figure", "question")
            if key in task.metadata
        },
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "how": verdict.how,
        "undecided": verdict.undecided and not failed,
    }


def benchmark_seed(benchmark: Benchmark, seed: int) -> tuple[int, ...]:
    """Returns the seed of a benchmark's random draws, which differ from other benchmarks'."""
    salt = int.from_bytes(hashlib.sha256(benchmark.name.encode()).digest()[:4], "big")
    return (seed, 5, salt)


def grading_kind(benchmark: Benchmark, task: Task) -> str:
    """Returns the answer kind of the task, or of the benchmark if the task has none."""
    kind = str(task.metadata.get("answer_kind", "auto"))
    return benchmark.kind if kind == "auto" else kind


def by_question(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows by question, with samples in order."""
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
