"""Makes the digits' tokenizer, student and teacher: ``python -m examples.embedded_models digits``.

It takes minutes on one thread and is seeded. The teacher learns to read cards (short, cheap
exchanges), then to look and answer from an expert's traces. The student is the teacher with further
training on careless traces: it can read and crop, but mostly answers without looking. So they
differ in behaviour, not in perception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.embedded_models.builder import (
    ModelBuilder,
    mean,
    of_step,
    progress,
    run_recipe,
    write_report,
)
from examples.embedded_models.digits.prompts import make_env, prompt_texts
from examples.embedded_models.digits.scripts import (
    OBSERVATION_LIMITS,
    PROMPT_LIMITS,
    Careless,
    Script,
    expert,
    reading_lesson,
    record,
)
from examples.embedded_models.models import image_processor, new_vision_model
from examples.embedded_models.tokenizer import train_tokenizer
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.rollout.runner import RolloutLimits
from reopold_agent.types import Observation, Trajectory

LIMITS = RolloutLimits(
    max_response_tokens=256, max_turn_tokens=64, max_turns=3, env_seconds=60.0, concurrency=64
)
"""Budgets that fit the episodes: an expert's take about 50 to 120 tokens."""


@dataclass(frozen=True)
class Recipe:
    """Steps and batch size of each stage of training.

    Attributes:
        seed: of weights and tasks.
        reading_steps: stage 1: short exchanges, one crop and its digit.
        reading_batch: exchanges per step. The later stages add half as many to their traces, so
            that reading is not forgotten.
        teacher_steps: stage 2: an expert's whole traces.
        teacher_batch: traces per step.
        fade_steps: steps of both stages over which the photographs fade in.
        student_steps: stage 3, from the teacher: careless traces.
        student_batch: traces per step.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    reading_steps: int = 1200
    reading_batch: int = 64
    teacher_steps: int = 800
    teacher_batch: int = 32
    fade_steps: int = 150
    student_steps: int = 120
    student_batch: int = 32
    held_out: int = 512


TINY = Recipe(
    reading_steps=2,
    reading_batch=2,
    teacher_steps=2,
    teacher_batch=4,
    fade_steps=1,
    student_steps=2,
    student_batch=4,
    held_out=4,
)
"""A few steps, to test that the recipe runs."""


def _env() -> gymnasium.Env[Observation, str]:
    return make_env(DemoTasks("train"), DemoTasks("eval"))


class DigitsBuilder(ModelBuilder):
    """Builds student and teacher."""

    limits = LIMITS
    prompt_pixels = PROMPT_LIMITS
    observation_pixels = OBSERVATION_LIMITS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        processor: Qwen2VLImageProcessorPil | None = None,
    ) -> None:
        # Each picture is used once or twice, so a large cache would only take memory.
        super().__init__(tokenizer, _env, processor or image_processor(), cache_bytes=64 * 2**20)

    def traces(
        self, tasks: DemoTasks, indices: Sequence[int], script: Script, seed: int
    ) -> list[Trajectory]:
        """Plays a script on some tasks in the real environment."""
        traces = []
        for index in indices:
            task = tasks[index]
            turns = script(task, np.random.default_rng((seed, index)))
            traces.append(record(self.env, task, turns, self.chat, self.vision))
        return traces

    def lessons(self, tasks: DemoTasks, indices: Sequence[int]) -> list[Trajectory]:
        """Makes short exchanges that train reading."""
        return [reading_lesson(tasks, index, self.chat, self.vision) for index in indices]

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Returns success, tool rate, and success by kind."""
        tasks = DemoTasks("eval")
        figures: dict[str, Any] = {
            "success": mean([e.success for e in episodes]),
            "tool_rate": mean([bool(e.tool_calls) for e in episodes]),
        }
        for kind in ("image", "video", "small_video"):
            chosen = [e.success for e in episodes if tasks[e.index].metadata["kind"] == kind]
            figures[f"success_{kind}"] = mean(chosen)
        return figures


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves both models under ``out``/student and ``out``/teacher.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/recipe.json with the recipe
        and a fingerprint of the training prompts.
    """
    torch.set_num_threads(1)
    texts = prompt_texts()
    builder = DigitsBuilder(train_tokenizer(texts.corpus()))
    log(f"tokenizer: {len(builder.tokenizer)} ids")
    model = new_vision_model(builder.tokenizer, recipe.seed)
    log(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")

    policy = builder.policy(model)
    base = DemoTasks(
        "train", size=2**31, seed=1000 + recipe.seed, video_share=0.35, small_share=0.45
    )  # a larger share of the rare kinds than in the task itself

    def faded(step: int) -> DemoTasks:
        return replace(base, backdrop=min(1.0, step / recipe.fade_steps))

    def lessons(step: int, batch: int) -> list[Trajectory]:
        return builder.lessons(faded(step), of_step(step, batch))

    def traces(step: int, tasks: DemoTasks, script: Script, batch: int) -> list[Trajectory]:
        rows = of_step(step, batch)
        lesson_step = 2 * recipe.reading_steps + recipe.fade_steps + step  # only new lessons
        return [
            *builder.traces(tasks, rows, script, tasks.seed),
            *lessons(lesson_step, recipe.reading_batch // 2),
        ]

    train_supervised(
        policy,
        Schedule(recipe.reading_steps, peak=3e-3),
        lambda step: lessons(step, recipe.reading_batch),
        progress(log, "reading", recipe.reading_steps),
    )
    train_supervised(
        policy,
        Schedule(recipe.teacher_steps, peak=2e-3),
        lambda step: traces(step, faded(step), expert, recipe.teacher_batch),
        progress(log, "teacher", recipe.teacher_steps),
    )
    builder.save(out / "teacher", model)
    others = replace(base, seed=2000 + recipe.seed)
    figures = {"teacher": builder.evaluate_both(log, "teacher", model, recipe.held_out)}

    train_supervised(
        policy,
        Schedule(recipe.student_steps, peak=1e-3, warmup=10),
        lambda step: traces(step, others, Careless(), recipe.student_batch),
        progress(log, "student", recipe.student_steps),
    )
    builder.save(out / "student", model)
    figures["student"] = builder.evaluate_both(log, "student", model, recipe.held_out)
    write_report(out / "recipe.json", recipe, texts.fingerprint(), figures)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
