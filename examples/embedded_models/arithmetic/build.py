"""Makes the arithmetic models: ``python -m examples.embedded_models arithmetic``.

It takes minutes on one thread and is seeded. The teacher learns the written method. Both students
are the teacher with further training: the careless one mostly guesses, but in the teacher's style;
the far one writes in a style to which the teacher gives almost no probability. So they differ in
behaviour: both have learnt the method.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gymnasium
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.embedded_models.arithmetic.scripts import Careless, Script, Talkative, expert
from examples.embedded_models.builder import (
    ModelBuilder,
    mean,
    of_step,
    progress,
    run_recipe,
    write_report,
)
from examples.embedded_models.models import new_text_model
from examples.embedded_models.tokenizer import train_tokenizer
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.demo.arithmetic.tasks import OPERATIONS, ArithmeticTasks, Operation
from reopold_agent.demo.base import Split
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.rollout.chat import observation_message
from reopold_agent.rollout.runner import RolloutLimits
from reopold_agent.types import Message, Observation, Trajectory

PREFIX: Final = "arithmetic_"
LIMITS: Final = RolloutLimits(
    max_response_tokens=160, max_turn_tokens=160, max_turns=1, env_seconds=60.0, concurrency=128
)
"""Budgets that fit the texts: the expert's take about 30 to 50 tokens, the far style's 100."""


@dataclass(frozen=True)
class Recipe:
    """Steps and batch size of each stage of training.

    Attributes:
        seed: of weights and tasks.
        teacher_steps: stage 1: the expert's texts, with a few careless ones.
        teacher_batch: texts per step.
        student_steps: stage 2a, from the teacher: careless texts.
        student_batch: texts per step.
        far_steps: stage 2b, from the teacher: talkative texts.
        far_batch: texts per step.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    teacher_steps: int = 900
    teacher_batch: int = 48
    student_steps: int = 100
    student_batch: int = 48
    far_steps: int = 160
    far_batch: int = 48
    held_out: int = 512


TINY: Final = Recipe(
    teacher_steps=2,
    teacher_batch=4,
    student_steps=2,
    student_batch=4,
    far_steps=2,
    far_batch=4,
    held_out=4,
)
"""A few steps, to test that the recipe runs."""


def make_env(
    operations: tuple[Operation, ...] = OPERATIONS,
) -> gymnasium.Env[Observation, str]:
    """Makes the real environment on the embedded problems of these kinds."""
    splits: tuple[Split, ...] = ("train", "eval")
    return SingleTurnEnv(data={s: ArithmeticTasks(s, operations=operations) for s in splits})


class ArithmeticBuilder(ModelBuilder):
    """Builds models for the embedded problems.

    Args:
        tokenizer: of all the models.
        operations: kinds of the held-out problems.
    """

    limits = LIMITS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        operations: tuple[Operation, ...] = OPERATIONS,
        processor: Qwen2VLImageProcessorPil | None = None,
    ) -> None:
        super().__init__(tokenizer, lambda: make_env(operations), processor)
        self.operations = operations

    def trace(self, tasks: ArithmeticTasks, index: int, script: Script) -> Trajectory:
        """Makes the episode of a task in which the student writes the script's text."""
        task = tasks[index]
        observation, info = self.env.reset(options={"task": task})
        messages = [observation_message(observation, [])]
        if info["system_prompt"]:
            messages.insert(0, Message("system", (info["system_prompt"],)))
        text = script(tasks.problem(index), np.random.default_rng((tasks.seed, 1, index)))
        return self.exchange(task.id, messages, text, index=index)

    def traces(self, tasks: ArithmeticTasks, rows: range, script: Script) -> list[Trajectory]:
        """Makes the `trace` of each row."""
        return [self.trace(tasks, row, script) for row in rows]

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Returns success, length, and success by operation."""
        tasks = ArithmeticTasks("eval", operations=self.operations)
        figures: dict[str, Any] = {
            "success": mean([e.success for e in episodes]),
            "tokens": mean([e.response_tokens for e in episodes]),
        }
        for operation in self.operations:
            chosen = [e.success for e in episodes if tasks.problem(e.index).operation == operation]
            figures[f"success_{operation}"] = mean(chosen)
        return figures


STYLES: Final[tuple[Script, ...]] = (expert, Careless(at_once=1.0), Talkative(proper=0.0))
"""Scripts that between them write every word."""


def corpus(
    env: gymnasium.Env[Observation, str],
    operations: tuple[Operation, ...] = OPERATIONS,
    scripts: Sequence[Script] = STYLES,
    count: int = 60,
) -> list[str]:
    """Returns texts to train the tokenizer on: the chat format, prompts and every style.

    Args:
        env: shows the prompts.
        operations: kinds of the problems.
        scripts: write each problem's texts.
        count: number of problems.
    """
    tasks = ArithmeticTasks("train", seed=9, operations=operations)
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    for index in range(count):
        observation, _ = env.reset(options={"task": tasks[index]})
        rng = np.random.default_rng((tasks.seed, index))
        texts += [observation["text"], *(script(tasks.problem(index), rng) for script in scripts)]
    return texts * 2  # words that occur only once are not merged


def fingerprint(env: gymnasium.Env[Observation, str]) -> str:
    """Returns a hash that changes with any prompt: models know only their training prompts."""
    texts = []
    for index in range(32):
        observation, info = env.reset(options={"task": ArithmeticTasks("eval")[index]})
        texts += [str(info["system_prompt"]), observation["text"]]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves the models under ``out``/arithmetic_teacher, _student and _far.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/arithmetic.json with the
        recipe and a fingerprint of the training prompts.
    """
    torch.set_num_threads(1)
    builder = ArithmeticBuilder(
        train_tokenizer(corpus(make_env()), vocab_size=768, qwen_words=True)
    )
    log(f"tokenizer: {len(builder.tokenizer)} ids")
    teacher = new_text_model(builder.tokenizer, recipe.seed)
    log(f"model: {sum(p.numel() for p in teacher.parameters()):,} parameters")
    figures: dict[str, dict[str, Any]] = {}

    def train(
        name: str, model: Any, script: Script, schedule: Schedule, tasks: ArithmeticTasks
    ) -> None:
        def batch(step: int) -> list[Trajectory]:
            return builder.traces(tasks, of_step(step, schedule.batch), script)

        policy = builder.policy(model)
        train_supervised(policy, schedule, batch, progress(log, name, schedule.steps))
        builder.save(out / f"{PREFIX}{name}", model)
        figures[name] = builder.evaluate_both(log, name, model, recipe.held_out)

    def tasks(number: int, *more: Operation) -> ArithmeticTasks:
        kinds = (*OPERATIONS, *more)
        return ArithmeticTasks("train", 2**31, 1000 * number + recipe.seed, kinds)

    train(
        "teacher",
        teacher,
        Careless(at_once=0.015, no_carries=0.01),  # even a teacher sometimes slips
        Schedule(recipe.teacher_steps, peak=3e-3, batch=recipe.teacher_batch, final_share=0.02),
        tasks(1, "x"),  # the hardest kind is drawn twice as often
    )
    train(
        "student",
        copy.deepcopy(teacher),
        Careless(),
        Schedule(recipe.student_steps, peak=1e-3, batch=recipe.student_batch, warmup=10),
        tasks(2),
    )
    train(
        "far",
        copy.deepcopy(teacher),
        Talkative(),
        Schedule(recipe.far_steps, peak=2e-3, batch=recipe.far_batch, warmup=10),
        tasks(3),
    )
    write_report(out / "arithmetic.json", recipe, fingerprint(make_env()), figures)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
