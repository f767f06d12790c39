"""How cost grows: a training step with its work, and commands with the length of a run on disk.

    python benchmarks/scaling.py [--parts episodes response pictures tools disk] [--quick]

Each part runs in a process of its own, on one thread. The first four take steps of the embedded
task's models at growing sizes, smallest first: episodes a step (8 to 512); sampled tokens of an
episode (no token ends a turn); pictures in the question; tool calls of an episode (turns as
written down, so nothing is sampled). Printed: CPU seconds of a step (the least of --repeats), what
the process's memory has grown by, and the exponents of both: the slope of a line through the
logarithms, and that of the last doubling. 1 is as the work grows; attention over an episode's
tokens grows with their square.

``disk`` writes 20,000 rows of data and a run with 100,000 trajectories (1.3 GB; a tenth with
--quick) and times in CPU seconds, with peak memory: reading and checking the data, the viewer's
first page and whole list, its export, continuing the run, its plots, `plan` on it, and comparing
two evaluations of 20,000 answers to each of five benchmarks.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from common import demo_config, demo_loop, last_line
from PIL import Image

from reopold_agent.common.files import dump_json
from reopold_agent.compare.tables import paired_lines
from reopold_agent.data.fingerprint import tasks_digest
from reopold_agent.data.loading import load_tasks
from reopold_agent.demo.tasks import ArrayImage
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.plan.measured import read_run
from reopold_agent.tracking.metrics import JsonLines, MetricsWriter
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.trajectories import trajectory_record
from reopold_agent.types import Completion, Request, StopReason, Task, Trajectory, Turn
from reopold_agent.view.export import export_page
from reopold_agent.view.run import Run

SIZES = {
    "episodes": (8, 16, 32, 64, 128, 256, 512),
    "response": (32, 64, 128, 256, 512),
    "pictures": (1, 2, 4, 8, 16),
    "tools": (1, 2, 4, 8, 16),
}
SAMPLED = ("episodes", "response", "pictures")
EPISODES = 8
"""Episodes a step where something else grows."""

TASKS, TRAJECTORIES, PER_STEP = 20_000, 100_000, 32
CROP = {"name": "crop_image", "arguments": {"bbox_2d": [0.25, 0.25, 0.75, 0.75], "target_image": 1}}


class Pictured(PixelReasonerEnv):
    """Questions with so many pictures."""

    pictures = 1

    def load_tasks(self, split: str) -> list[Task]:  # type: ignore[override]
        rng = np.random.default_rng(0)
        return [
            Task(
                f"{split}-{number}",
                "Which digit is written on the white card?",
                ("1",),
                images=tuple(
                    ArrayImage(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8))
                    for _ in range(self.pictures)
                ),
            )
            for number in range(64)
        ]


gymnasium.register("Scaling/Pictured-v0", Pictured)


class Written:
    """A policy's generator whose turns are written down: so many calls, then an answer."""

    def __init__(self, calls: Sequence[int], answer: Sequence[int], count: int) -> None:
        self._calls, self._answer, self._count = tuple(calls), tuple(answer), count
        self._requests: list[Request] = []
        self._made: dict[int, int] = {}

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def submit(self, requests: Sequence[Request]) -> None:
        self._requests += requests

    def release(self, key: int) -> None:
        pass

    def step(self) -> list[Completion]:
        made = []
        for request in self._requests:
            done = self._made[request.key] = self._made.get(request.key, 0) + 1
            ids = self._calls if done <= self._count else self._answer
            zeros = (0.0,) * len(ids)
            made.append(Completion(request.key, ids, zeros, zeros, "stop"))
        self._requests = []
        return made


def step_seconds(part: str, size: int, folder: Path, repeats: int) -> tuple[float, int]:
    """Returns the least CPU seconds of a step, and the sampled tokens of the last one."""
    settings = ["optimizer.lr=1e-12", "logging.trajectories=0"]
    episodes = size if part == "episodes" else EPISODES
    settings += [f"batch.prompts={episodes}", f"batch.mini_batch={episodes}"]
    if part == "response":
        settings += [
            f"rollout.{name}={size}" for name in ("max_response_tokens", "max_turn_tokens")
        ]
    if part in ("pictures", "tools"):
        Pictured.pictures = size if part == "pictures" else 1
        settings += ["env.id=Scaling/Pictured-v0", f"rollout.max_turns={SIZES['tools'][-1] + 1}"]
        settings += ["rollout.max_response_tokens=4096"]
    loop = demo_loop(demo_config(*settings), folder)
    policy: Any = loop.collector.student
    if part == "response":
        policy.stop_ids = frozenset()
    if part == "tools":
        chat = loop.collector.runner.chat
        call = chat.turn_ids(f"<tool_call>\n{json.dumps(CROP)}\n</tool_call>")
        answer = chat.turn_ids("It is \\boxed{1}.")
        policy.generator = lambda _: Written(call, answer, size)
    least, position = float("inf"), 0
    for step in range(repeats):
        started = time.process_time()
        position = loop.step(step, position)
        least = min(least, time.process_time() - started)
    loop.close()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return least, round(row["rollout/response_tokens"] * episodes)


def steps(part: str, repeats: int, quick: bool) -> dict[str, float]:
    sizes = SIZES[part][:3] if quick else SIZES[part]
    with tempfile.TemporaryDirectory() as folder:
        step_seconds(part, sizes[0], Path(folder) / "first", 1)  # warms up
        before = memory()
        points = []
        for size in sizes:
            seconds, tokens = step_seconds(part, size, Path(folder) / str(size), repeats)
            points.append((size, seconds, memory() - before))
            print(
                f"{part} {size}: {seconds:.2f} CPU s a step, {tokens} tokens of the student, "
                f"memory +{points[-1][2]:.0f} MiB",
                flush=True,
            )
    slope, last = exponents([(size, seconds) for size, seconds, _ in points])
    # Of the last doubling: the smallest sizes also use what the first step left. Less than a few
    # MiB is what the allocator keeps.
    _, grown = exponents([(size, max(grown, 4.0)) for size, _, grown in points])
    print(f"{part}: CPU ~ {part}^{slope:.2f}; last doubling {last:.2f}, of the memory {grown:.2f}")
    return {f"{part}_cpu_exponent": slope, f"{part}_memory_exponent": max(grown, 0.01)}


def exponents(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the slope of a line through the logarithms, and between the last two points."""
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def memory() -> float:
    """Returns the most resident memory of this process so far, MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most) / (2**20 if sys.platform == "darwin" else 2**10)


def disk(share: float) -> dict[str, float]:
    """Times the commands; each is a process of its own, so that its memory is its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", round(TASKS * share))
        write_run(folder / "run", round(TRAJECTORIES * share))
        for run in ("one", "two"):
            write_answers(folder / run, round(TASKS * share))
        figures = {}
        for what in COMMANDS:
            script = [sys.executable, __file__, "--command", what, "--folder", name]
            done = subprocess.run(script, check=True, capture_output=True, text=True)
            seconds, peak = json.loads(done.stdout.splitlines()[-1])
            figures[f"{what}_cpu_seconds"] = seconds
            print(f"{what}: {seconds:.2f} CPU s, peak {peak:.0f} MiB", flush=True)
    return figures if share == 1 else {}


def write_data(folder: Path, count: int) -> None:
    (folder / "images").mkdir(parents=True)
    for number in range(200):
        pixels = np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    with (folder / "train.jsonl").open("w") as rows:
        for number in range(count):
            row = {
                "id": f"q{number}",
                "question": f"Question {number}: how many squares are in the picture?",
                "answer": str(number % 10),
                "image": f"images/{number % 200}.png",
            }
            rows.write(json.dumps(row) + "\n")


def write_run(folder: Path, count: int) -> None:
    """Writes a run as training does, of trajectories of 135 tokens."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    length, prompt = 135, 90
    mask = np.arange(length) >= prompt
    values = [np.where(mask, -rng.gamma(0.5, 1.0, length), 0).astype(np.float32) for _ in range(3)]
    trajectory = Trajectory(
        task_id="task",
        index=0,
        sample=0,
        ids=rng.integers(0, 500, length),
        loss_mask=mask,
        logp=values[0],
        entropy=-values[1],
        prompt_length=prompt,
        images=[],
        stop_reason=StopReason.ANSWER,
        reward=1.0,
        success=True,
        turns=[Turn(prompt, length, "I look closer. It is \\boxed{3}." * 3, "stop")],
        teacher_logp=values[2],
    )
    row = trajectory_record(trajectory, 0, decode=lambda ids: " ".join(map(str, ids)))
    with (folder / "trajectories.jsonl").open("wb") as rows:
        for number in range(count):
            changes = {"step": number // PER_STEP, "index": number % TASKS, "task_id": f"q{number}"}
            rows.write(json.dumps({**row, **changes}).encode() + b"\n")
    metrics = {"kind": "train", "loss": 0.5, "time/step": 1.0, "rollout/response_tokens": 45.0}
    with (folder / "metrics.jsonl").open("wb") as lines:
        for step in range(-(-count // PER_STEP)):
            lines.write(dump_json({**metrics, "step": step}) + b"\n")


def write_answers(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(len(folder.name))
    with (folder / "responses.jsonl").open("w") as rows:
        for benchmark in range(5):
            for index in range(count):
                right = bool(rng.random() < 0.5)
                row = {"benchmark": f"b{benchmark}", "index": index, "sample": 0, "id": f"q{index}"}
                turn = {"text": "so it is 3. " * 60, "observation": "", "tool": None}
                rows.write(json.dumps({**row, "correct": right, "turns": [turn]}) + "\n")


def load_data(folder: Path) -> None:
    tasks = load_tasks({"source": "math_jsonl", "path": str(folder / "data" / "train.jsonl")})
    tasks_digest(tasks)


def resume(folder: Path) -> None:
    """What a run does with its files when it continues; as from its last checkpoint but one."""
    steps = sum(1 for _ in (folder / "run" / "metrics.jsonl").open("rb"))
    for file in (MetricsWriter, JsonLines):
        name = "metrics" if file is MetricsWriter else "trajectories"
        with file(folder / "run" / f"{name}.jsonl") as lines:
            assert lines.truncate_after(steps - 2) > 0


COMMANDS: dict[str, Callable[[Path], object]] = {
    "data": load_data,
    "view_first_page": lambda folder: Run(folder / "run").news(),
    "view_whole_list": lambda folder: Run(folder / "run").load_all(),
    "view_export": lambda folder: export_page([Run(folder / "run")], folder / "page.html"),
    "plots": lambda folder: make_plots(folder / "run"),
    "plan_measured": lambda folder: read_run(folder / "run"),
    "compare": lambda folder: paired_lines(
        folder / "one", folder / "two", [f"b{number}" for number in range(5)]
    ),
    "resume": resume,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=[*SIZES, "disk"], default=[*SIZES, "disk"])
    parser.add_argument("--quick", action="store_true", help="the first sizes, a tenth of the run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command is not None:
        started = time.process_time()
        COMMANDS[options.command](options.folder)
        print(json.dumps([time.process_time() - started, memory()]))
        return
    if len(options.parts) > 1:
        figures = {}
        for part in options.parts:
            own = [sys.executable, __file__, "--parts", part, "--repeats", str(options.repeats)]
            own += ["--quick"] * options.quick
            with subprocess.Popen(own, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
            assert process.returncode == 0, f"{part} failed"
            figures |= json.loads(line)
        last_line(figures)
        return
    (part,) = options.parts
    if part == "disk":
        last_line(disk(0.1 if options.quick else 1.0))
    else:
        last_line(steps(part, options.repeats, options.quick))


if __name__ == "__main__":
    main()
