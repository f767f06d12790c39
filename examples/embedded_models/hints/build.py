"""Makes the student that understands hints: ``python -m examples.embedded_models hints``.

It is the digits' teacher with further training on three kinds of episodes: careless ones as the
digits' student's after the usual prompt; an expert's after a system message with a rule
(``RULE``); and answers at once where the prompt tells them (``hint=answer``). So it can teach
itself: under the rule it is an expert, without it mostly careless. That takes minutes on one thread
and is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from examples.embedded_models.builder import of_step, progress, run_recipe, write_report
from examples.embedded_models.digits.build import DigitsBuilder
from examples.embedded_models.digits.prompts import prompt_texts
from examples.embedded_models.digits.scripts import (
    OBSERVATION_LIMITS,
    PROMPT_LIMITS,
    Careless,
    Script,
    answer_turn,
    expert,
    record,
)
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.config import PixelConfig, PixelsConfig, ViewConfig
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.policies.loading import resolve_path
from reopold_agent.rollout.reading import Reader
from reopold_agent.types import Task, Trajectory

RULE: Final = "Look at the card before you answer."
"""The system message under which the student is an expert (``model.teacher.view.system``)."""

PIXELS = PixelsConfig(*(PixelConfig(**vars(each)) for each in (PROMPT_LIMITS, OBSERVATION_LIMITS)))


@dataclass(frozen=True)
class Recipe:
    """Steps and batch size.

    Attributes:
        seed: of tasks and scripts.
        steps: steps of training.
        careless, ruled, told: traces per step without a view, under the rule, and with the answer.
        lessons: reading exchanges per step, so that reading is not forgotten.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    steps: int = 160
    careless: int = 16
    ruled: int = 12
    told: int = 4
    lessons: int = 24
    held_out: int = 128


TINY = Recipe(steps=2, careless=2, ruled=1, told=1, lessons=1, held_out=4)
"""A few steps, to test that the recipe runs."""


def told_answer(task: Task, rng: np.random.Generator) -> list[str]:
    """Answers at once with the right answer, which the prompt tells; a script, not random."""
    return [answer_turn(task.answers[0])]


class HintsBuilder(DigitsBuilder):
    """Builds the student."""

    def read(
        self, tasks: DemoTasks, indices: Sequence[int], script: Script, view: ViewConfig
    ) -> list[Trajectory]:
        """Plays a script on some tasks; returns the traces as a teacher with a view reads them."""
        reader = Reader(view, self.chat, self.vision, pixels=PIXELS)
        traces = []
        for index in indices:
            task, rng = tasks[index], np.random.default_rng((tasks.seed, index))
            turns = script(task, rng)
            traces.append(record(self.env, task, turns, self.chat, self.vision, reader))
        return traces


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains the model and saves it under ``out``/self_student.

    Returns:
        Held-out figures by sampling, without a view; also written to ``out``/hints.json.
    """
    torch.set_num_threads(1)
    start = resolve_path("demo:teacher")
    builder = HintsBuilder(PreTrainedTokenizerFast.from_pretrained(start))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    tasks = DemoTasks(
        "train", size=2**31, seed=3000 + recipe.seed, video_share=0.35, small_share=0.45
    )
    kinds = (
        (recipe.careless, Careless(), ViewConfig()),
        (recipe.ruled, expert, ViewConfig(system=RULE)),
        (recipe.told, told_answer, ViewConfig(hint="answer")),
    )
    size = sum(count for count, *_ in kinds)

    def traces(step: int) -> list[Trajectory]:
        first, found = step * size, list[Trajectory]()
        for count, script, view in kinds:
            found += builder.read(tasks, range(first, first + count), script, view)
            first += count
        lessons = of_step(step, recipe.lessons)
        return [*found, *builder.lessons(tasks, lessons)]

    train_supervised(
        builder.policy(model),
        Schedule(recipe.steps, peak=1e-3, warmup=min(10, recipe.steps)),
        traces,
        progress(log, "self_student", recipe.steps),
    )
    builder.save(out / "self_student", model)
    figures = {"self_student": builder.evaluate_both(log, "self_student", model, recipe.held_out)}
    write_report(out / "hints.json", recipe, prompt_texts().fingerprint(), figures)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
