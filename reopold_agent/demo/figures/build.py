"""Makes the figures' tokenizer and models again: ``python -m reopold_agent.demo.figures.build``.

One thread, seeded, minutes. The teacher first learns to read labels and to calculate (exercises,
cheap), then to solve whole figures from an expert's texts. The student is the teacher plus careless
habits: it can read and knows the rules, but mostly guesses.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gymnasium
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from reopold_agent.demo.figures.scripts import (
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
from reopold_agent.demo.figures.tasks import KINDS, FigureTasks, Problem
from reopold_agent.demo.models import image_processor, new_model
from reopold_agent.demo.tokenizer import train_tokenizer
from reopold_agent.demo.training import Schedule, train_supervised
from reopold_agent.demo.workshop import BaseWorkshop, command, mean, progress
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.policies.vision import PixelLimits
from reopold_agent.rollout.chat import observation_message
from reopold_agent.rollout.demonstrations import unsampled
from reopold_agent.rollout.runner import RolloutLimits
from reopold_agent.types import (
    IMAGE_MARK,
    Message,
    Observation,
    Trajectory,
)

PREFIX: Final = "figures_"
PIXELS: Final = PixelLimits(140 * 140, 140 * 140)
EASE: Final = 0.45
"""Nats per token (about 2.5 per exercise) below which the next exercises are a little harder."""
HARDER: Final = 0.01
LIMITS: Final = RolloutLimits(
    max_response_tokens=64, max_turn_tokens=64, max_turns=1, env_seconds=60.0, concurrency=64
)
"""Budgets that the texts fit: an expert's take about 15 to 35 tokens."""
PAPER_MEAN: Final = 0.96
PAPER_SPREAD: Final = 0.3
"""White paper becomes about 0: with CLIP's statistics, made for photographs, every patch would
start as one large constant with a little ink on it."""
CACHE_BYTES: Final = 2_500_000_000
"""The recipe's pictures as patches: 170 kB each in exercises, 470 kB each in figures."""
LAYERS: Final = 3
DEPTH: Final = 2


@dataclass(frozen=True)
class Recipe:
    """How long each part trains, and on how much.

    Attributes:
        reading_steps, reading_batch: exercises: labels among lines.
        teacher_steps, teacher_batch: whole figures, and beside them exercises and equations.
        student_steps, student_batch: careless texts on top of the teacher.
        pool: number of different figures, and of different exercises of each sort beside them.
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
"""A handful of steps, to see that the recipe runs."""


def make_env() -> gymnasium.Env[Observation, str]:
    """The real environment on the embedded figures."""
    return SingleTurnEnv(data={"train": FigureTasks("train"), "eval": FigureTasks("eval")})


class Workshop(BaseWorkshop):
    """What the models share."""

    limits = LIMITS
    prompt_pixels = PIXELS
    observation_pixels = PIXELS

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        processor = image_processor(PIXELS.max_pixels, mean=PAPER_MEAN, spread=PAPER_SPREAD)
        # Most of a step would go into drawing and cutting patches if pools did not keep them.
        super().__init__(tokenizer, make_env, processor, CACHE_BYTES)

    def trace(self, tasks: FigureTasks, index: int, script: Script) -> Trajectory:
        """The episode in which the student says what the script says.

        It has the ids and pixels that a rollout records; the turn is not graded: reward is 0.
        """
        task = tasks[index]
        observation, info = self.env.reset(options={"task": task})
        images = [self.vision.encode(image, PIXELS) for image in observation["images"]]
        messages = [observation_message(observation, images)]
        if info["system_prompt"]:
            messages.insert(0, Message("system", (info["system_prompt"],)))
        kind, given = task.metadata["kind"], task.metadata["given"]
        problem = Problem(kind, given, KINDS[kind].solve(given))
        text = script(problem, np.random.default_rng((tasks.seed, 1, index)))
        return self._trajectory(task.id, messages, text)

    def reading(self, seed: int, index: int, difficulty: float = 1.0) -> Trajectory:
        """An exercise: the numbers of a small picture."""
        rng = np.random.default_rng((seed, 2, index))
        pixels, numbers = exercise_picture(rng, difficulty)
        side = len(pixels) // 2
        image = self.vision.encode(pixels, PixelLimits(side * side, side * side))
        question = Message("user", (image, f"\n{READ}"))
        return self._trajectory(f"reading-{index}", [question], reading(numbers))

    def calculation(self, seed: int, index: int) -> Trajectory:
        """An exercise without a picture: equations, of which the right-hand sides count."""
        lines = equations(np.random.default_rng((seed, 3, index)))
        trace = self._trajectory(
            f"calculation-{index}", [Message("user", (CALCULATE,))], ". ".join(lines) + "."
        )
        counts, pieces = False, [self.chat.raw([int(i)]) for i in trace.ids]
        for place in range(trace.prompt_length, len(pieces)):
            trace.loss_mask[place] = counts
            counts = "=" in pieces[place] or (counts and pieces[place].isdigit())
        return trace

    def _trajectory(self, name: str, messages: Sequence[Message], text: str) -> Trajectory:
        ids, images = self.chat.prompt(messages)
        own = self.chat.turn_ids(text)
        mask = [False] * len(ids) + [True] * len(own)
        return unsampled(name, len(ids), ids + own, mask, images)

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Success, length, and success by kind."""
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
    """What the environment says about one figure of each kind: system messages and questions."""
    texts = []
    for kind in KINDS:
        observation, info = env.reset(options={"task": FigureTasks("eval", kind=kind)[0]})
        texts += [str(info["system_prompt"]), observation["text"]]
    return texts


def fingerprint(env: gymnasium.Env[Observation, str]) -> str:
    """Changes whenever a prompt changes: models know only the prompts they were trained on."""
    return hashlib.sha256("\0".join(prompts(env)).encode()).hexdigest()


def corpus(env: gymnasium.Env[Observation, str]) -> list[str]:
    """Texts to train the tokenizer on: the prompt's words and the pieces of the answers."""
    headers = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n"]
    words = [text.replace(IMAGE_MARK, "") for text in prompts(env)]
    return [*[*phrases(), *headers] * 40, *words * 10]


def build(
    out: Path, recipe: Recipe, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves both models under ``out``/figures_teacher and ``out``/figures_student.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/figures.json together with
        the recipe and a fingerprint of the prompts that the models were trained on.
    """
    torch.set_num_threads(1)
    env = make_env()
    shop = Workshop(train_tokenizer(corpus(env), vocab_size=768))
    say(f"tokenizer: {len(shop.tokenizer)} ids")
    model = new_model(shop.tokenizer, recipe.seed, layers=LAYERS, depth=DEPTH)
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    policy = shop.policy(model)
    figures: dict[str, dict[str, Any]] = {}

    def finish(name: str) -> None:
        shop.save(out / f"{PREFIX}{name}", model)
        figures[name] = shop.both_held_out(say, name, model, recipe.held_out)

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
        rows = range(step * batch, (step + 1) * batch)
        beside = range(rows.start // 4, rows.stop // 4)
        return [
            *(
                pooled("figure", seed, row, lambda _, i: shop.trace(tasks, i, script))
                for row in rows
            ),
            *(pooled("reading", seed, row, shop.reading) for row in beside),
            *(pooled("calculation", seed, row, shop.calculation) for row in beside),
        ]

    difficulty, smooth = 0.0, 1.0
    say_reading = progress(say, "reading", recipe.reading_steps)

    def exercises(step: int) -> list[Trajectory]:
        rows = range(step * recipe.reading_batch, (step + 1) * recipe.reading_batch)
        return [shop.reading(recipe.seed, row, difficulty) for row in rows]

    def paced(step: int, loss: float) -> None:
        nonlocal difficulty, smooth
        smooth += 0.1 * (loss - smooth)
        if smooth < EASE:
            difficulty = min(1.0, difficulty + HARDER)
        say_reading(step, loss)
        if (step + 1) % 50 == 0:
            say(f"difficulty {difficulty:.2f}")

    train_supervised(policy, Schedule(recipe.reading_steps, peak=3e-3), exercises, paced)
    train_supervised(
        policy,
        Schedule(recipe.teacher_steps, peak=2e-3),
        lambda step: whole(step, recipe.teacher_batch, expert, 1),
        progress(say, "teacher", recipe.teacher_steps),
    )
    finish("teacher")
    train_supervised(
        policy,
        Schedule(recipe.student_steps, peak=1e-3, warmup=10),
        lambda step: whole(step, recipe.student_batch, Careless(), 2),
        progress(say, "student", recipe.student_steps),
    )
    finish("student")
    note = {"recipe": asdict(recipe), "prompts": fingerprint(env), "held_out": figures}
    (out / "figures.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(build, Recipe(), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
