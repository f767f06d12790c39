"""One side of ``peers.py``, in a process of its own: this project's training step, or TRL's.

    python benchmarks/peers_side.py ours|trl SPEC.json

It makes a step for each line that it reads, and answers each with a line of JSON: seconds, CPU
seconds, peak memory and what was generated. It ends with its input.

Both sides sample as always, but what they sample is then made comparable (`Script`): no turn ends
before its length, and turns that matter (a call, an answer) end with given tokens. So both have
the same number of tokens, and half of the episodes succeed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch


@dataclass
class Script:
    """What the turns of an episode have to be; token ids.

    Attributes:
        lengths: tokens of each turn.
        tails: how each turn ends, of episodes with an even and an odd number.
        special: control tokens; where one is sampled, ``filler`` is taken.
        rows: so many ids have a token; where another is sampled, ``filler`` is taken.
        filler: an ordinary id.
    """

    lengths: list[int]
    tails: list[list[list[int]]]
    special: list[int]
    rows: int
    filler: int

    def token(self, turn: int, place: int, episode: int, sampled: int) -> int:
        """Returns the token at a place of a turn, given what was sampled there."""
        turn = min(turn, len(self.lengths) - 1)
        tail = self.tails[turn][episode % 2]
        left = self.lengths[turn] - place
        if 0 < left <= len(tail):
            return tail[-left]
        ordinary = sampled < self.rows and sampled not in self.special
        return sampled if ordinary else self.filler


@dataclass
class Side:
    """What a side runs.

    Attributes:
        threads: of PyTorch.
        folder: for its files.
        script: what it generates.
        words: settings of our training command.
        trainer: TRL's: ``distillation`` or ``grpo``.
        student, teacher: checkpoints.
        prompts: of TRL, texts; empty where the environment asks.
        episodes: of a step.
        samples: episodes per prompt.
        response: most tokens of TRL's response, what tools say included.
        beta: of the divergence.
    """

    threads: int
    folder: str
    script: dict[str, Any]
    words: list[str] = field(default_factory=list)
    trainer: str = ""
    student: str = ""
    teacher: str | None = None
    prompts: list[str] = field(default_factory=list)
    episodes: int = 8
    samples: int = 1
    response: int = 64
    beta: float = 0.5


class Meter:
    """Measures a step: seconds, CPU seconds of all threads, and peak resident memory."""

    def __init__(self) -> None:
        # The peak of this step only; where the kernel does not allow that, of the process.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Returns the figures since the beginning."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return {"seconds": wall, "cpu_seconds": cpu, "peak_gib": int(peak.split()[1]) / 2**20}


def ours(side: Side, orders: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Makes steps with this project's training loop."""
    from hydra import compose, initialize_config_module

    from reopold_agent.policies import generation
    from reopold_agent.tracking.progress import Progress
    from reopold_agent.tracking.run_folder import RunFolder
    from reopold_agent.train.engine import run_objective
    from reopold_agent.train.interrupts import Interrupts
    from reopold_agent.train.settings import load_config
    from reopold_agent.train.setup import load_models, make_loop, prepared

    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, _ = load_config(compose("train", side.words))
    folder = RunFolder(Path(side.folder))
    folder.path.mkdir(parents=True)
    objective = run_objective(config)
    config, specs, tasks = prepared(config, objective, folder.data_report)
    student, teachers = load_models(config, specs)
    progress, interrupts = Progress(config.steps), Interrupts()
    loop = make_loop(
        config, objective, folder, student, teachers, tasks,
        progress=progress, interrupts=interrupts,
    )  # fmt: skip

    script = Script(**side.script)
    rows: list[Any] = []
    turns: dict[int, int] = {}
    sample, draw = generation.TransformersGenerator._sample, generation.sample_tokens

    def remember(self: Any, given: Sequence[Any], hidden: torch.Tensor) -> None:
        rows[:] = given
        sample(self, given, hidden)

    def scripted(*args: Any) -> torch.Tensor:
        ids = draw(*args).tolist()
        drawn = [rows.pop(0) for _ in ids]  # a few rows of a pass at a time
        for index, row in enumerate(drawn):
            place = len(row.sampled)
            if place == 0:
                turns[row.key] = turns.get(row.key, -1) + 1
            ids[index] = script.token(turns[row.key], place, row.key, ids[index])
        return torch.tensor(ids, device=args[0].device)

    generation.TransformersGenerator._sample = remember  # type: ignore[method-assign]
    generation.sample_tokens = scripted
    batches: list[Any] = []
    collect = loop.collector.collect

    def collected(*args: Any) -> Any:
        batches[:] = [collect(*args)]
        return batches[0]

    loop.collector.collect = collected  # type: ignore[method-assign]
    position, tokenizer = 0, student.tokenizer
    for step, _ in enumerate(orders):
        turns.clear()
        meter = Meter()
        position = loop.step(step, position)
        figures: dict[str, Any] = dict(meter.read())
        last = (folder.path / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
        row = json.loads(last)
        assert row["grad_norm"] > 0, "the update had nothing to learn from"
        played = batches[0].trajectories
        texts = [tokenizer.decode(t.ids[: t.prompt_length].tolist()) for t in played]
        prompts = list(dict.fromkeys(texts))
        answer(
            figures
            | {
                "tokens": sum(t.response_tokens for t in played),
                "prompt_tokens": [t.prompt_length for t in played],
                "prompts": prompts,
                "prompt_of": [t.task_id for t in played],
                "turns": [[[turn.start, turn.end] for turn in t.turns] for t in played],
                "lengths": [len(t.ids) for t in played],
                "pictures": [[image.tokens for image in t.images] for t in played],
                "parts": {k[5:]: v for k, v in row.items() if k.startswith("time/")},
                "grad_norm": row["grad_norm"],
            }
        )  # fmt: skip
    loop.close()


def trl(side: Side, orders: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Makes steps with TRL's trainers."""
    import trl as package
    from datasets import Dataset
    from transformers import GenerationMixin, TrainerCallback

    script = Script(**side.script)
    turn, place = -1, 0
    generate, multinomial = GenerationMixin.generate, torch.multinomial
    sampled: list[int] = []

    def generated(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal turn, place
        turn, place = turn + 1, 0
        return generate(self, *args, **kwargs)

    def scripted(probabilities: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal place
        found = multinomial(probabilities, *args, **kwargs)
        if turn < 0:
            return found
        ids = [
            script.token(turn, place, row, each) for row, each in enumerate(found[:, 0].tolist())
        ]
        place += 1
        sampled.append(len(ids))
        return torch.tensor(ids, device=found.device)[:, None]

    GenerationMixin.generate = generated
    torch.multinomial = scripted  # type: ignore[assignment]
    common: dict[str, Any] = {
        "output_dir": side.folder,
        "per_device_train_batch_size": side.episodes,
        "gradient_accumulation_steps": 1,
        "max_steps": 10_000,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_completion_length": side.response,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": "none",
    }
    data = Dataset.from_list([{"prompt": prompt} for prompt in side.prompts])
    trainer: Any
    if side.trainer == "distillation":
        trainer = package.DistillationTrainer(
            model=side.student,
            teacher_model=side.teacher,
            args=package.DistillationConfig(beta=side.beta, **common),
            train_dataset=data,
        )
    else:
        more: dict[str, Any] = {"reward_funcs": _boxed_one, "train_dataset": data}
        if side.words:
            more = _environment(side)
        arguments = package.GRPOConfig(num_generations=side.samples, beta=0.0, **common)
        trainer = package.GRPOTrainer(model=side.student, args=arguments, **more)
    assert next(trainer.model.parameters()).dtype == torch.float32
    prompts: list[int] = []
    single = trainer._generate_single_turn

    def prompted(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if turn < 0:
            prompts.extend(map(len, prompt_ids))
        return single(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = prompted
    meter: list[Meter] = []

    class Orders(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal turn
            if next(orders, None) is None:
                raise EOFError
            turn = -1
            sampled.clear()
            prompts.clear()
            meter[:] = [Meter()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            figures = meter[0].read()
            answer(figures | {"tokens": sum(sampled), "prompt_tokens": list(prompts)})

    trainer.add_callback(Orders())
    with suppress(EOFError):
        trainer.train()


def _boxed_one(completions: Sequence[str], **_: Any) -> list[float]:
    return [float("\\boxed{1}" in completion) for completion in completions]


def _environment(side: Side) -> dict[str, Any]:
    """Returns the arguments of TRL's trainer for the environment of our words."""
    from datasets import Dataset
    from hydra import compose, initialize_config_module

    from reopold_agent.envs.from_config import make_env
    from reopold_agent.envs.trl import environment_factory, reward, rows
    from reopold_agent.train.settings import load_config

    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, _ = load_config(compose("train", side.words))

    def make() -> Any:
        return make_env(config).unwrapped

    return {
        "environment_factory": environment_factory(make),
        "reward_funcs": reward,
        "train_dataset": Dataset.from_list(rows(make)),
    }


def main() -> None:
    """Runs a side."""
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # others print too
    side = Side(**json.loads(Path(sys.argv[2]).read_text("utf-8")))
    torch.set_num_threads(side.threads)
    torch.manual_seed(0)

    def answer(figures: Mapping[str, Any]) -> None:
        answers.write(json.dumps(figures) + "\n")
        answers.flush()

    {"ours": ours, "trl": trl}[sys.argv[1]](side, iter(sys.stdin.readline, ""), answer)


if __name__ == "__main__":
    main()
