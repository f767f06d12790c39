"""Kills a training run and an evaluation again and again, and compares the results.

    python benchmarks/faults.py --kills 50

A parent process that has imported everything forks a child per attempt; the child runs the
command's library function, and is killed (SIGKILL) in a phase drawn from a seed, after a random
part of that phase. After each kill everything on disk is read. At the end the results must equal
those of an undisturbed run: all figures but times, and the weights byte for byte.
"""

from __future__ import annotations

import os

# Before PyTorch is imported: a process with threads cannot be forked safely.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import functools
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import reopold_agent.evaluate.run as eval_run
from reopold_agent.judges.llm.base import How, JudgeReply, JudgeRequest
from reopold_agent.judges.llm.none import NoJudge
from reopold_agent.judges.llm.registry import LLM_JUDGES, JudgeMaker
from reopold_agent.tracking.metrics import read_json_lines
from reopold_agent.train import finish, recovery, resume
from reopold_agent.train.checkpoint import check_files
from reopold_agent.train.collect import Collector
from reopold_agent.train.evaluation import HeldOutEvaluation
from reopold_agent.train.settings import load_config
from reopold_agent.train.setup import LocalEngine
from reopold_agent.train.step_log import StepLog
from reopold_agent.train.update import Updater

TRAIN = (
    "batch.prompts=4",
    "batch.mini_batch=2",
    "rollout.max_turns=2",
    "rollout.max_turn_tokens=40",
    "rollout.max_response_tokens=110",
    "evaluation.tasks=4",
    "evaluation.curve_tasks=4",
    "evaluation.every=3",
    "evaluation.max_turns=2",
    "checkpoint.every=1",
    "engine.device=cpu",
    "engine.threads=1",
)
EVALUATE = (
    "judge.name=last_number",
    "samples=2",
    "agentic.max_turn_tokens=6",  # cuts a third of the answers off: work for the judge
    "engine.concurrency=4",
    "engine.device=cpu",
    "engine.threads=1",
)

START, BETWEEN = "start-up", "between"
TRAIN_PHASES: dict[str, list[tuple[Any, str]]] = {
    "rollouts": [(Collector, "collect")],
    "update": [(Updater, "step")],
    "trajectories": [(StepLog, "write_trajectories")],
    "checkpoint": [(recovery, "save_checkpoint")],
    "evaluation": [(HeldOutEvaluation, "_evaluate")],
    "final": [(finish, "save_final")],
    "summary": [(finish, "write_json_atomic")],
    "plots": [(finish, "make_plots"), (resume, "make_plots")],
}
TRAIN_END = ("final", "summary", "plots")
EVALUATE_PHASES: dict[str, list[tuple[Any, str]]] = {
    "answers": [(eval_run, "answer_questions")],
    "judging": [(eval_run, "judge_rows")],
    "results": [(eval_run, "write_json_atomic")],
    "page": [(eval_run, "write_page")],
    "plots": [(eval_run, "make_plots")],
}
EVALUATE_END = ("judging", "results", "page", "plots")
TIMES = ("time/", "tokens_per_second", "seconds", "env_seconds", "played_seconds")


class LastNumber(NoJudge):
    """A judge that takes the last digit of a response for the answer; two milliseconds each."""

    @property
    def name(self) -> str:
        return "last_number"

    def ask(self, request: JudgeRequest) -> JudgeReply:
        time.sleep(0.002)
        digits = [c for c in getattr(request, "response", "") if c.isdigit()]
        found = digits[-1] if digits else None
        how = How.JUDGE if digits else How.NO_ANSWER
        return JudgeReply(found, how, said=str(found), id=request.id)


LLM_JUDGES.register("last_number", JudgeMaker("last_number", lambda settings: LastNumber()))


class Phases:
    """The current phase of a child, which its parent reads from shared memory."""

    def __init__(self, phases: dict[str, list[tuple[Any, str]]]) -> None:
        self.names = [START, BETWEEN, *phases]
        self._phases = phases
        self._now = RawArray("i", 1)
        self._entries = RawArray("i", len(self.names))
        self._seconds = RawArray("d", len(self.names))

    def reset(self) -> None:
        self._now[0] = 0
        for array in (self._entries, self._seconds):
            array[:] = [0] * len(array)

    @property
    def now(self) -> str:
        return self.names[self._now[0]]

    def entries(self, name: str) -> int:
        return self._entries[self.names.index(name)]

    def mean_seconds(self, name: str) -> float:
        at = self.names.index(name)
        return self._seconds[at] / max(1, self._entries[at])

    def watch(self) -> None:
        """Wraps the functions that delimit the phases; called in the child."""
        self._begun = time.perf_counter()
        for number, functions in enumerate(self._phases.values(), start=2):
            for owner, name in functions:
                setattr(owner, name, self._wrapped(getattr(owner, name), number))

    def _wrapped(self, function: Callable[..., Any], number: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(*arguments: Any, **settings: Any) -> Any:
            before, started = self._now[0], time.perf_counter()
            if before == 0:
                self._seconds[0], self._entries[0], before = started - self._begun, 1, 1
            self._now[0] = number
            self._entries[number] += 1
            try:
                return function(*arguments, **settings)
            finally:
                self._seconds[number] += time.perf_counter() - started
                self._now[0] = before

        return inner


@dataclass
class Job:
    """The program to kill: a function that runs it in a folder, its phases, what it leaves."""

    name: str
    run: Callable[[Path], Any]
    phases: Phases
    results: Callable[[Path], dict[str, Any]]
    weights: tuple[tuple[str, int], ...]
    """Phases before the end and how often each is aimed at."""
    end: tuple[str, ...]
    over: str = ""
    """File after which only the last phase of the end happens again."""
    longest: dict[str, float] = field(default_factory=dict)
    """Most seconds into a phase, where that is not the phase's length."""


@dataclass
class Report:
    job: str
    kills: int = 0
    landed: Counter[str] = field(default_factory=Counter)
    runs: int = 1
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems and not self.different

    def row(self) -> dict[str, Any]:
        return {**vars(self), "landed": dict(self.landed), "equal": not self.different}


# Children


def fork(task: Callable[[], Any], log: Path) -> int:
    """A child that does the task and nothing else; 0 is its exit status when all is well."""
    if threading.active_count() != 1:
        raise RuntimeError("a process with threads cannot be forked safely")
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int, log: Path) -> None:
    """Waits for a child that must succeed."""
    _, status = os.waitpid(child, 0)
    if status:
        tail = "\n".join(log.read_text("utf-8").splitlines()[-30:])
        raise RuntimeError(f"an attempt that nobody killed ended with {status}:\n{tail}")


def attempt(job: Job, folder: Path, log: Path) -> int:
    job.phases.reset()

    def task() -> None:
        job.phases.watch()
        job.run(folder)

    return fork(task, log)


def killed(job: Job, folder: Path, log: Path, phase: str, entry: int, delay: float) -> str | None:
    """One attempt, killed ``delay`` seconds into the ``entry``-th ``phase``; None if it ended
    before that."""
    child = attempt(job, folder, log)
    at = None if phase != START else time.perf_counter()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                tail = "\n".join(log.read_text("utf-8").splitlines()[-30:])
                raise RuntimeError(f"an attempt ended by itself with {status}:\n{tail}")
            return None
        now = time.perf_counter()
        if at is None and job.phases.entries(phase) >= entry:
            at = now
        if at is not None and now >= at + delay:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return job.phases.now if os.WIFSIGNALED(status) else None
        time.sleep(0.0003)


# Checks after each kill


def check_disk(folder: Path, since: float) -> list[str]:
    """Returns the damage in a run folder: reads everything; pictures, those since a time."""
    found = []

    def reads(path: Path, read: Callable[[Path], Any]) -> None:
        try:
            read(path)
        except Exception as error:
            found.append(f"{path}: {type(error).__name__}: {error}")

    for checkpoint in (folder / "checkpoints").glob("step-*"):
        reads(checkpoint, check_files)
        reads(checkpoint / "state.pt", functools.partial(torch.load, weights_only=True))
        reads(checkpoint / "model/model.safetensors", load_file)
    if (folder / "final").exists():
        reads(folder / "final/model.safetensors", load_file)
        reads(folder / "final/config.json", lambda path: json.loads(path.read_text("utf-8")))
    for path in folder.glob("*.json"):
        reads(path, lambda path: json.loads(path.read_text("utf-8")))
    for path in folder.glob("*.jsonl"):
        reads(path, read_json_lines)
    if (folder / "config.yaml").exists():
        reads(folder / "config.yaml", lambda path: OmegaConf.load(path)["seed"])
    for path in [*folder.glob("pictures/*"), *folder.glob("plots/*")]:
        if path.suffix == ".png" and path.stat().st_mtime >= since:
            reads(path, lambda path: Image.open(path).load())
    return found


def checked(folder: Path, since: float, log: Path) -> list[str]:
    """`check_disk` in a child: the parent stays without threads."""
    answer = log.with_suffix(".check.json")
    task = functools.partial(_answer, folder, since, answer)
    finish(fork(task, log), log)
    return list(json.loads(answer.read_text("utf-8")))


def _answer(folder: Path, since: float, answer: Path) -> None:
    answer.write_text(json.dumps(check_disk(folder, since)), encoding="utf-8")


# Comparison of the results


def plain(value: Any) -> Any:
    """Returns the rows without times and without the name of the run folder."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not k.startswith(TIMES)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def train_results(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return {
        "metrics.jsonl": plain(read_json_lines(folder / "metrics.jsonl")),
        "trajectories.jsonl": plain(read_json_lines(folder / "trajectories.jsonl")),
        "summary.json": {
            k: v for k, v in plain(summary).items() if k not in ("run", "next", "train_seconds")
        },
        "names": sorted(p.name for p in [*folder.glob("pictures/*"), *folder.glob("plots/*")]),
        **{
            f"final/{path.name}": path.read_bytes() for path in sorted((folder / "final").iterdir())
        },
    }


def evaluate_results(folder: Path) -> dict[str, Any]:
    results = plain(json.loads((folder / "results.json").read_text("utf-8")))
    results["judge"].pop("counters")  # what this process asked

    def by_key(name: str, *keys: str) -> list[Any]:
        rows = plain(read_json_lines(folder / name))
        return sorted(rows, key=lambda row: [row[key] for key in keys])

    return {
        "results.json": results,
        "judged.jsonl": by_key("judged.jsonl", "key"),
        "responses.jsonl": by_key("responses.jsonl", "index", "sample"),
        "names": sorted(p.name for p in [*folder.glob("pictures/*"), *folder.glob("plots/*")]),
        "page": [(folder / name).exists() for name in ("report.html", "results.md")],
    }


# The proof


def prove(job: Job, kills: int, seed: int, place: Path) -> Report:
    """Kills the job so often, lets it end, and compares it with one that nobody disturbed."""
    started = time.perf_counter()
    report, log = Report(job.name), place / f"{job.name}.log"
    rng = random.Random(seed)
    whole = place / f"{job.name}-whole"
    finish(attempt(job, whole, log), log)
    expected = job.results(whole)
    lengths = {name: job.phases.mean_seconds(name) for name in job.phases.names}
    lengths |= job.longest
    drawn = [name for name, weight in job.weights for _ in range(weight)]
    at_end = max(1, kills // 5)
    aims = [rng.choice(drawn) for _ in range(kills - at_end)]
    # In their order: when the summary is there, nothing before it happens again.
    aims += [job.end[number * len(job.end) // at_end] for number in range(at_end)]
    folder = place / f"{job.name}-1"
    while report.kills < kills:
        phase = aims[report.kills]
        if job.over and (folder / job.over).exists():
            phase = job.end[-1]
        # Not the first, mostly: an attempt is to get further than the one before it.
        once = phase in (START, "evaluation", *job.end) or bool(job.longest)
        entry = 1 if once else rng.choice((1, 2, 2, 3))
        since = time.time() - 1
        delay = rng.uniform(0, lengths[phase])
        landed = killed(job, folder, log, phase, entry, delay)
        if landed is None:  # it came to its end first: that is one run more
            report.different += compared(expected, job.results(folder), folder)
            report.runs += 1
            folder = place / f"{job.name}-{report.runs}"
            continue
        report.kills += 1
        report.landed[landed] += 1
        report.problems += checked(folder, since, log)
    finish(attempt(job, folder, log), log)
    report.problems += [f"left over: {p}" for p in folder.rglob(".*.tmp")]
    report.different += compared(expected, job.results(folder), folder)
    report.seconds = round(time.perf_counter() - started, 1)
    return report


def compared(expected: dict[str, Any], found: dict[str, Any], folder: Path) -> list[str]:
    """Names of what differs."""
    return [
        f"{folder}: {name}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


def composed(name: str, words: Sequence[str]) -> Any:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return compose(name, list(words))


def train_job(kills: int, settings: Sequence[str]) -> Job:
    words = [*TRAIN, *settings, f"steps={max(6, 2 * kills)}"]
    config, raw = load_config(composed("train", words))
    return Job(
        "train",
        lambda folder: LocalEngine(config, raw, folder, words).run(),
        Phases(TRAIN_PHASES),
        train_results,
        weights=(
            (START, 1),
            ("rollouts", 2),
            ("update", 2),
            ("trajectories", 1),
            ("checkpoint", 3),
            ("evaluation", 2),
        ),
        end=TRAIN_END,
        over="summary.json",
    )


def evaluate_job(kills: int, settings: Sequence[str]) -> Job:
    words = [*EVALUATE, *settings, f"benchmarks.demo.limit={max(24, 3 * kills)}"]
    config, raw = eval_run.load_config(composed("evaluate", words))
    return Job(
        "evaluate",
        lambda folder: eval_run.Evaluation(config, raw, folder).run(),
        Phases(EVALUATE_PHASES),
        evaluate_results,
        weights=((START, 1), ("answers", 5)),
        end=EVALUATE_END,
        longest={"answers": 0.25},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", choices=("train", "evaluate"), help="only this one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    parser.add_argument("settings", nargs="*", help="further settings: engine.ahead=1")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="reopold-faults-"))
    makers = {"train": train_job, "evaluate": evaluate_job}
    reports = []
    try:
        for name, make in makers.items():
            if given.job in (None, name):
                report = prove(make(given.kills, given.settings), given.kills, given.seed, place)
                reports.append(report)
                where = ", ".join(
                    f"{count} {phase}" for phase, count in report.landed.most_common()
                )
                print(
                    f"{name}: {report.kills} kills over {report.runs} run(s) in {report.seconds} s "
                    f"({where}); broken on disk: {len(report.problems)}; "
                    f"different at the end: {len(report.different)}"
                )
                for line in [*report.problems[:10], *report.different[:10]]:
                    print(f"  {line}")
    finally:
        if given.keep:
            print(f"In {place}")
        else:
            shutil.rmtree(place)
    if given.json is not None:
        given.json.write_text(json.dumps([report.row() for report in reports], indent=2))
    return 0 if all(report.good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
