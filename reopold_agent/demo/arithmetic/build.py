"""Makes the arithmetic models again: ``python -m reopold_agent.demo.arithmetic.build``.

One thread, seeded, minutes. The teacher learns the written method. Both students are the teacher
plus habits: a careless one, whom the teacher understands, and a far one, whose style the teacher
finds all but impossible. The gap is one of behaviour: both know the method.
"""

from __future__ import annotations

import copy
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

from reopold_agent.demo.arithmetic.models import new_model
from reopold_agent.demo.arithmetic.scripts import Careless, Script, Talkative, expert
from reopold_agent.demo.arithmetic.tasks import OPERATIONS, ArithmeticTasks, Operation
from reopold_agent.demo.tokenizer import train_tokenizer
from reopold_agent.demo.training import Schedule, train_supervised
from reopold_agent.demo.workshop import BaseWorkshop, command, mean, progress
from reopold_agent.envs.single_turn import SingleTurnEnv
from reopold_agent.rollout.chat import observation_message
from reopold_agent.rollout.demonstrations import unsampled
from reopold_agent.rollout.runner import RolloutLimits
from reopold_agent.types import Message, Observation, Trajectory

PREFIX: Final = "arithmetic_"
LIMITS: Final = RolloutLimits(
    max_response_tokens=160, max_turn_tokens=160, max_turns=1, env_seconds=60.0, concurrency=128
)
"""Budgets that the texts fit: the expert's take about 30 to 50 tokens, the far style's 100."""


@dataclass(frozen=True)
class Recipe:
    """How long each part trains, and on how much.

    Attributes:
        teacher_steps, teacher_batch: the expert's texts, a few careless ones among them.
        student_steps, student_batch: careless texts on top of the teacher.
        far_steps, far_batch: talkative texts on top of the teacher.
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
"""A handful of steps, to see that the recipe runs."""


def make_env() -> gymnasium.Env[Observation, str]:
    """The real environment on the embedded problems."""
    return SingleTurnEnv(data={"train": ArithmeticTasks("train"), "eval": ArithmeticTasks("eval")})


class Workshop(BaseWorkshop):
    """What the three models share."""

    limits = LIMITS

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer, make_env)

    def trace(self, tasks: ArithmeticTasks, index: int, script: Script) -> Trajectory:
        """The episode in which the student says what the script says.

        It has the ids that a rollout records; the turn is not graded, so reward is 0.
        """
        task = tasks[index]
        observation, info = self.env.reset(options={"task": task})
        messages = [observation_message(observation, [])]
        if info["system_prompt"]:
            messages.insert(0, Message("system", (info["system_prompt"],)))
        ids, _ = self.chat.prompt(messages)
        text = script(tasks.problem(index), np.random.default_rng((tasks.seed, 1, index)))
        own = self.chat.turn_ids(text)
        mask = [False] * len(ids) + [True] * len(own)
        return unsampled(task.id, len(ids), ids + own, mask, index=index)

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Success, length, and success by operation."""
        tasks = ArithmeticTasks("eval")
        figures: dict[str, Any] = {
            "success": mean([e.success for e in episodes]),
            "tokens": mean([e.response_tokens for e in episodes]),
        }
        for operation in OPERATIONS:
            chosen = [e.success for e in episodes if tasks.problem(e.index).operation == operation]
            figures[f"success_{operation}"] = mean(chosen)
        return figures


def corpus(env: gymnasium.Env[Observation, str]) -> list[str]:
    """Texts to train the tokenizer on: the chat format's words, prompts, and every style."""
    tasks = ArithmeticTasks("train", seed=9)
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    scripts: tuple[Script, ...] = (expert, Careless(at_once=1.0), Talkative(proper=0.0))
    for index in range(60):
        observation, _ = env.reset(options={"task": tasks[index]})
        rng = np.random.default_rng((tasks.seed, index))
        texts += [observation["text"], *(script(tasks.problem(index), rng) for script in scripts)]
    return texts * 2  # a word that occurs once is not merged


def fingerprint(env: gymnasium.Env[Observation, str]) -> str:
    """Changes whenever a prompt changes: models know only the prompts they were trained on."""
    texts = []
    for index in range(32):
        observation, info = env.reset(options={"task": ArithmeticTasks("eval")[index]})
        texts += [str(info["system_prompt"]), observation["text"]]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def build(
    out: Path, recipe: Recipe, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves the models under ``out``/arithmetic_teacher, _student and _far.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/arithmetic.json together
        with the recipe and a fingerprint of the prompts that the models were trained on.
    """
    torch.set_num_threads(1)
    shop = Workshop(train_tokenizer(corpus(make_env()), vocab_size=768, qwen_words=True))
    say(f"tokenizer: {len(shop.tokenizer)} ids")
    teacher = new_model(shop.tokenizer, recipe.seed)
    say(f"model: {sum(p.numel() for p in teacher.parameters()):,} parameters")
    figures: dict[str, dict[str, Any]] = {}

    def part(
        name: str, model: Any, script: Script, schedule: Schedule, tasks: ArithmeticTasks
    ) -> None:
        def batch(step: int) -> list[Trajectory]:
            rows = range(step * schedule.batch, (step + 1) * schedule.batch)
            return [shop.trace(tasks, row, script) for row in rows]

        policy = shop.policy(model)
        train_supervised(policy, schedule, batch, progress(say, name, schedule.steps))
        shop.save(out / f"{PREFIX}{name}", model)
        figures[name] = shop.both_held_out(say, name, model, recipe.held_out)

    def tasks(number: int, *more: Operation) -> ArithmeticTasks:
        kinds = (*OPERATIONS, *more)
        return ArithmeticTasks("train", 2**31, 1000 * number + recipe.seed, kinds)

    part(
        "teacher",
        teacher,
        Careless(at_once=0.015, no_carries=0.01),  # a teacher slips, too: it is not quite certain
        Schedule(recipe.teacher_steps, peak=3e-3, batch=recipe.teacher_batch, final_share=0.02),
        tasks(1, "x"),  # the hardest kind, twice
    )
    part(
        "student",
        copy.deepcopy(teacher),
        Careless(),
        Schedule(recipe.student_steps, peak=1e-3, batch=recipe.student_batch, warmup=10),
        tasks(2),
    )
    part(
        "far",
        copy.deepcopy(teacher),
        Talkative(),
        Schedule(recipe.far_steps, peak=2e-3, batch=recipe.far_batch, warmup=10),
        tasks(3),
    )
    note = {"recipe": asdict(recipe), "prompts": fingerprint(make_env()), "held_out": figures}
    text = json.dumps(note, indent=2) + "\n"
    (out / "arithmetic.json").write_text(text, encoding="utf-8")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(build, Recipe(), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
