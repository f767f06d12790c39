"""Makes the figures' tokenizer and models: ``python -m examples.embedded_models figures``.

It takes minutes on one thread and is seeded. The teacher first learns to read labels (cheap
exercises), then to solve whole figures from an expert's texts, with further exercises in reading
and calculation. The student is the teacher with further training on careless texts: it can read and
knows the rules, but mostly guesses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gymnasium
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from examples.embedded_models.builder import (
    ModelBuilder,
    mean,
    of_step,
    progress,
    run_recipe,
    write_report,
)
from examples.embedded_models.figures.scripts import (
    CALCULATE,
    READ,
    Careless,
    Script,
    equations,
    exercise_picture,
    expert,
    phrases,
    reading,
)
from examples.embedded_models.models import image_processor, new_vision_model
from examples.embedded_models.tokenizer import train_tokenizer
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.common.pixels import PixelLimits
from reopold_agent.demo.figures.tasks import KINDS, FigureTasks, Problem
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.rollout.chat import observation_message
from reopold_agent.rollout.runner import RolloutLimits
from reopold_agent.types import (
    IMAGE_MARK,
    Message,
    Observation,
    Trajectory,
)

PREFIX: Final = "figures_"
PIXELS: Final = PixelLimits(140 * 140, 140 * 140)
EASY_LOSS: Final = 0.45
"""Nats per token (about 2.5 per exercise) below which the difficulty rises by `HARDER`."""
HARDER: Final = 0.01
LIMITS: Final = RolloutLimits(
    max_response_tokens=64, max_turn_tokens=64, max_turns=1, env_seconds=60.0, concurrency=64
)
"""Budgets that fit the texts: an expert's take about 15 to 35 tokens."""
PAPER_MEAN: Final = 0.96
PAPER_SPREAD: Final = 0.3
"""With these, white paper becomes about 0. With CLIP's statistics, made for photographs, every
patch would be a large constant plus a little ink."""
CACHE_BYTES: Final = 2_500_000_000
"""Holds the encoded pictures of the recipe: 170 kB per exercise, 470 kB per figure."""
LAYERS: Final = 3
DEPTH: Final = 2


@dataclass(frozen=True)
class Recipe:
    """Steps and batch size of each stage of training.

    Attributes:
        seed: of weights and tasks.
        reading_steps: stage 1: exercises in reading labels among lines.
        reading_batch: exercises per step.
        teacher_steps: stage 2: whole figures, with some exercises in reading and calculation.
        teacher_batch: figures per step.
        student_steps: stage 3, from the teacher: careless texts.
        student_batch: figures per step.
        pool: number of different figures, and of different exercises of each sort, in stages 2
            and 3.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    reading_steps: int = 450
    reading_batch: int = 64
    teacher_steps: int = 500
    teacher_batch: int = 32
    student_steps: int = 80
    student_batch: int = 32
    pool: int = 4096
    held_out: int = 512


TINY: Final = Recipe(
    reading_steps=2,
    reading_batch=4,
    teacher_steps=2,
    teacher_batch=4,
    student_steps=2,
    student_batch=4,
    pool=8,
    held_out=4,
)
"""A few steps, to test that the recipe runs."""


def make_env() -> gymnasium.Env[Observation, str]:
    """Makes the real environment on the embedded figures."""
    return SingleTurnEnv(data={"train": FigureTasks("train"), "eval": FigureTasks("eval")})


class FiguresBuilder(ModelBuilder):
    """Builds student and teacher."""

    limits = LIMITS
    prompt_pixels = PIXELS
    observation_pixels = PIXELS

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        processor = image_processor(PIXELS.max_pixels, mean=PAPER_MEAN, spread=PAPER_SPREAD)
        # Without the cache, drawing and cutting patches would take most of a step.
        super().__init__(tokenizer, make_env, processor, cache_bytes)

    def trace(self, tasks: FigureTasks, index: int, script: Script) -> Trajectory:
        """Makes the episode of a task in which the student writes the script's text."""
        task = tasks[index]
        observation, info = self.env.reset(options={"task": task})
        images = [self.vision.encode(image, PIXELS) for image in observation["images"]]
        messages = [observation_message(observation, images)]
        if info["system_prompt"]:
            messages.insert(0, Message("system", (info["system_prompt"],)))
        kind, given = task.metadata["kind"], task.metadata["given"]
        problem = Problem(kind, given, KINDS[kind].solve(given))
        text = script(problem, np.random.default_rng((tasks.seed, 1, index)))
        return self.exchange(task.id, messages, text)

    def reading(self, seed: int, index: int, difficulty: float = 1.0) -> Trajectory:
        """Makes an exercise: read the numbers in a small picture."""
        rng = np.random.default_rng((seed, 2, index))
        pixels, numbers = exercise_picture(rng, difficulty)
        side = len(pixels) // 2
        image = self.vision.encode(pixels, PixelLimits(side * side, side * side))
        question = Message("user", (image, f"\n{READ}"))
        return self.exchange(f"reading-{index}", [question], reading(numbers))

    def calculation(self, seed: int, index: int) -> Trajectory:
        """Makes an exercise without a picture: equations; only their right-hand sides count."""
        lines = equations(np.random.default_rng((seed, 3, index)))
        trace = self.exchange(
            f"calculation-{index}", [Message("user", (CALCULATE,))], ". ".join(lines) + "."
        )
        counts, pieces = False, [self.chat.raw([int(i)]) for i in trace.ids]
        for place in range(trace.prompt_length, len(pieces)):
            trace.loss_mask[place] = counts
            counts = "=" in pieces[place] or (counts and pieces[place].isdigit())
        return trace

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Returns success, length, and success by kind."""
        tasks = FigureTasks("eval")
        kinds = {e.index: tasks[e.index].metadata["kind"] for e in episodes}
        figures: dict[str, Any] = {
            "success": mean([e.success for e in episodes]),
            "tokens": mean([e.response_tokens for e in episodes]),
        }
        for kind in KINDS:
            figures[kind] = mean([e.success for e in episodes if kinds[e.index] == kind])
        return figures


def prompts(env: gymnasium.Env[Observation, str]) -> list[str]:
    """Returns the system message and question of one figure of each kind."""
    texts = []
    for kind in KINDS:
        observation, info = env.reset(options={"task": FigureTasks("eval", kind=kind)[0]})
        texts += [str(info["system_prompt"]), observation["text"]]
    return texts


def fingerprint(env: gymnasium.Env[Observation, str]) -> str:
    """Returns a hash that changes with any prompt: models know only their training prompts."""
    return hashlib.sha256("\0".join(prompts(env)).encode()).hexdigest()


def corpus(env: gymnasium.Env[Observation, str]) -> list[str]:
    """Returns texts to train the tokenizer on: prompts and the pieces of answers."""
    headers = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n"]
    words = [text.replace(IMAGE_MARK, "") for text in prompts(env)]
    return [*[*phrases(), *headers] * 40, *words * 10]


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves both models under ``out``/figures_teacher and ``out``/figures_student.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/figures.json with the recipe
        and a fingerprint of the training prompts.
    """
    torch.set_num_threads(1)
    env = make_env()
    builder = FiguresBuilder(train_tokenizer(corpus(env), vocab_size=768))
    log(f"tokenizer: {len(builder.tokenizer)} ids")
    model = new_vision_model(builder.tokenizer, recipe.seed, layers=LAYERS, depth=DEPTH)
    log(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    policy = builder.policy(model)
    figures: dict[str, dict[str, Any]] = {}

    def finish(name: str) -> None:
        builder.save(out / f"{PREFIX}{name}", model)
        figures[name] = builder.evaluate_both(log, name, model, recipe.held_out)

    pool: dict[tuple[str, int, int], Trajectory] = {}

    def pooled(
        name: str, seed: int, row: int, make: Callable[[int, int], Trajectory]
    ) -> Trajectory:
        key = (name, seed, row % recipe.pool)
        if key not in pool:
            pool[key] = make(*key[1:])
        return pool[key]

    def whole(step: int, batch: int, script: Script, number: int) -> list[Trajectory]:
        seed = 1000 * number + recipe.seed
        tasks = FigureTasks("train", size=2**31, seed=seed)
        rows = of_step(step, batch)
        beside = range(rows.start // 4, rows.stop // 4)
        return [
            *(
                pooled("figure", seed, row, lambda _, i: builder.trace(tasks, i, script))
                for row in rows
            ),
            *(pooled("reading", seed, row, builder.reading) for row in beside),
            *(pooled("calculation", seed, row, builder.calculation) for row in beside),
        ]

    difficulty, smooth = 0.0, 1.0
    log_reading = progress(log, "reading", recipe.reading_steps)

    def exercises(step: int) -> list[Trajectory]:
        rows = of_step(step, recipe.reading_batch)
        return [builder.reading(recipe.seed, row, difficulty) for row in rows]

    def paced(step: int, loss: float) -> None:
        nonlocal difficulty, smooth
        smooth += 0.1 * (loss - smooth)
        if smooth < EASY_LOSS:
            difficulty = min(1.0, difficulty + HARDER)
        log_reading(step, loss)
        if (step + 1) % 50 == 0:
            log(f"difficulty {difficulty:.2f}")

    train_supervised(policy, Schedule(recipe.reading_steps, peak=3e-3), exercises, paced)
    train_supervised(
        policy,
        Schedule(recipe.teacher_steps, peak=2e-3),
        lambda step: whole(step, recipe.teacher_batch, expert, 1),
        progress(log, "teacher", recipe.teacher_steps),
    )
    finish("teacher")
    train_supervised(
        policy,
        Schedule(recipe.student_steps, peak=1e-3, warmup=10),
        lambda step: whole(step, recipe.student_batch, Careless(), 2),
        progress(log, "student", recipe.student_steps),
    )
    finish("student")
    write_report(out / "figures.json", recipe, fingerprint(env), figures)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
