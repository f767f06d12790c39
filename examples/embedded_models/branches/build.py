"""Makes the branching arithmetic models: ``python -m examples.embedded_models branches``.

A teacher and a smaller student learn the same sums and differences in the same format. Only at a
few places do they choose differently: so most of the student's tokens are as likely under the
teacher, and some are nearly impossible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from examples.embedded_models.arithmetic.build import (
    ArithmeticBuilder,
    corpus,
    fingerprint,
    make_env,
)
from examples.embedded_models.branches.scripts import FOREIGN, Branching
from examples.embedded_models.builder import of_step, progress, run_recipe, write_report
from examples.embedded_models.models import TEXT_WIDTH, new_text_model
from examples.embedded_models.tokenizer import train_tokenizer
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.demo.arithmetic.tasks import ArithmeticTasks, Operation
from reopold_agent.types import Trajectory

PREFIX: Final = "branches_"
OPERATIONS: Final[tuple[Operation, ...]] = ("+", "-")

TEACHER: Final = Branching(at_once=0.03, forget=0.05, upwards=0.04, foreign=0.3, filler=0.12)
"""It reads the foreign words, but does not learn to write them (`BranchingBuilder.read_only`): so
it knows how to go on after the student's."""

STUDENT: Final = Branching(at_once=0.3, forget=0.6, upwards=0.45, foreign=0.3, filler=0.12)


@dataclass(frozen=True)
class Recipe:
    """Steps, batch size and the student's size.

    Attributes:
        seed: of weights and tasks.
        teacher_steps: steps of the teacher.
        student_steps: steps of the student.
        student_width: of its hidden states, a multiple of 32; the teacher's is 96.
        batch: texts per step.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    teacher_steps: int = 1100
    student_steps: int = 1000
    student_width: int = 64
    batch: int = 32
    held_out: int = 512


TINY: Final = Recipe(teacher_steps=2, student_steps=2, batch=4, held_out=4)
"""A few steps, to test that the recipe runs."""


STYLES: Final = (TEACHER, STUDENT, Branching(1.0, 0.0, 0.0), Branching(0.0, 0.0, 0.5, 1.0, 1.0))
"""Scripts that between them write every word."""


class BranchingBuilder(ArithmeticBuilder):
    """Builds the two models."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer, OPERATIONS)
        words = [tokenizer.encode(word) for word in sorted(FOREIGN)]
        if any(len(ids) != 1 for ids in words):
            raise ValueError("every foreign word must be one token, to be left out of the loss")
        self.foreign_ids = [ids[0] for ids in words]

    def read_only(self, trace: Trajectory) -> Trajectory:
        """Returns the trace without the foreign words in its loss mask."""
        return replace(trace, loss_mask=trace.loss_mask & ~np.isin(trace.ids, self.foreign_ids))


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves the models under ``out``/branches_teacher and branches_student.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/branches.json with the
        recipe and a fingerprint of the training prompts.
    """
    torch.set_num_threads(1)
    texts = corpus(make_env(), OPERATIONS, STYLES, 120)
    builder = BranchingBuilder(train_tokenizer(texts, vocab_size=512, qwen_words=True))
    log(f"tokenizer: {len(builder.tokenizer)} ids")
    figures: dict[str, dict[str, Any]] = {}

    def train(name: str, number: int, script: Branching, width: int, schedule: Schedule) -> None:
        model = new_text_model(builder.tokenizer, recipe.seed, width=width)
        log(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        tasks = ArithmeticTasks("train", 2**31, 1000 * number + recipe.seed, OPERATIONS)

        def batch(step: int) -> list[Trajectory]:
            traces = builder.traces(tasks, of_step(step, schedule.batch), script)
            return [builder.read_only(t) for t in traces] if name == "teacher" else traces

        policy = builder.policy(model)
        train_supervised(policy, schedule, batch, progress(log, name, schedule.steps))
        builder.save(out / f"{PREFIX}{name}", model)
        figures[name] = builder.evaluate_both(log, name, model, recipe.held_out)

    train(
        "teacher",
        1,
        TEACHER,
        TEXT_WIDTH,
        Schedule(recipe.teacher_steps, peak=3e-3, batch=recipe.batch, final_share=0.02),
    )
    train(
        "student",
        2,
        STUDENT,
        recipe.student_width,
        Schedule(recipe.student_steps, peak=4e-3, batch=recipe.batch, final_share=0.02),
    )
    write_report(out / "branches.json", recipe, fingerprint(make_env()), figures)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
