"""Makes the demo's tokenizer, student and teacher again: ``python -m reopold_agent.demo.build``.

One thread, seeded, minutes. The teacher learns to read cards (short exchanges, cheap), then to
look and answer from an expert's traces. The student is the teacher plus careless habits: it can
read and crop, but mostly answers without looking. The gap is one of behaviour, not of perception.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from reopold_agent.demo.experts import (
    OBSERVATION_LIMITS,
    PROMPT_LIMITS,
    Careless,
    Script,
    expert,
    reading_lesson,
    record,
)
from reopold_agent.demo.models import image_processor, new_model
from reopold_agent.demo.setting import make_env, prompt_texts
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.demo.tokenizer import train_tokenizer
from reopold_agent.demo.training import Schedule, train_supervised
from reopold_agent.demo.workshop import BaseWorkshop, command, mean, progress
from reopold_agent.rollout.runner import RolloutLimits
from reopold_agent.types import Observation, Trajectory

LIMITS = RolloutLimits(
    max_response_tokens=256, max_turn_tokens=64, max_turns=3, env_seconds=60.0, concurrency=64
)
"""Budgets that the demo's episodes fit: an expert's take about 50 to 120 tokens."""


@dataclass(frozen=True)
class Recipe:
    """How long each part trains, and on how much.

    Attributes:
        reading_steps, reading_batch: short exchanges, one crop and its digit. The other two parts
            go on with half a batch of them beside their traces, so that reading is not forgotten.
        teacher_steps, teacher_batch: the expert's whole traces.
        fade_steps: of each of those two, over which the photographs fade in.
        student_steps, student_batch: careless traces on top of the teacher.
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
"""A handful of steps, to see that the recipe runs."""


def _env() -> gymnasium.Env[Observation, str]:
    return make_env(DemoTasks("train"), DemoTasks("eval"))


class Workshop(BaseWorkshop):
    """What student and teacher share."""

    limits = LIMITS
    prompt_pixels = PROMPT_LIMITS
    observation_pixels = OBSERVATION_LIMITS

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # Pictures are seen once or twice here, so a large cache would only hold memory.
        super().__init__(tokenizer, _env, image_processor(), cache_bytes=64 * 2**20)

    def traces(
        self, tasks: DemoTasks, indices: Sequence[int], script: Script, seed: int
    ) -> list[Trajectory]:
        """Episodes of a script on some tasks, through the real environment."""
        traces = []
        for index in indices:
            task = tasks[index]
            turns = script(task, np.random.default_rng((seed, index)))
            traces.append(record(self.env, task, turns, self.chat, self.vision))
        return traces

    def lessons(self, tasks: DemoTasks, indices: Sequence[int]) -> list[Trajectory]:
        """Short exchanges that train reading."""
        return [reading_lesson(tasks, index, self.chat, self.vision) for index in indices]

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Success and tool rate, and success by kind."""
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
    out: Path, recipe: Recipe, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves both models under ``out``/student and ``out``/teacher.

    Returns:
        Held-out figures by model and sampling; also written to ``out``/recipe.json together with
        the recipe and a fingerprint of the prompts that the models were trained on.
    """
    torch.set_num_threads(1)
    texts = prompt_texts()
    shop = Workshop(train_tokenizer(texts.corpus()))
    say(f"tokenizer: {len(shop.tokenizer)} ids")
    model = new_model(shop.tokenizer, recipe.seed)
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")

    policy = shop.policy(model)
    base = DemoTasks(
        "train", size=2**31, seed=1000 + recipe.seed, video_share=0.35, small_share=0.45
    )  # more of the rarer kinds than a run meets

    def faded(step: int) -> DemoTasks:
        return replace(base, backdrop=min(1.0, step / recipe.fade_steps))

    def lessons(step: int, batch: int) -> list[Trajectory]:
        return shop.lessons(faded(step), range(step * batch, (step + 1) * batch))

    def traces(step: int, tasks: DemoTasks, script: Script, batch: int) -> list[Trajectory]:
        rows = range(step * batch, (step + 1) * batch)
        beside = 2 * recipe.reading_steps + recipe.fade_steps + step  # lessons not had before
        return [
            *shop.traces(tasks, rows, script, tasks.seed),
            *lessons(beside, recipe.reading_batch // 2),
        ]

    train_supervised(
        policy,
        Schedule(recipe.reading_steps, peak=3e-3),
        lambda step: lessons(step, recipe.reading_batch),
        progress(say, "reading", recipe.reading_steps),
    )
    train_supervised(
        policy,
        Schedule(recipe.teacher_steps, peak=2e-3),
        lambda step: traces(step, faded(step), expert, recipe.teacher_batch),
        progress(say, "teacher", recipe.teacher_steps),
    )
    shop.save(out / "teacher", model)
    others = replace(base, seed=2000 + recipe.seed)
    figures = {"teacher": shop.both_held_out(say, "teacher", model, recipe.held_out)}

    train_supervised(
        policy,
        Schedule(recipe.student_steps, peak=1e-3, warmup=10),
        lambda step: traces(step, others, Careless(), recipe.student_batch),
        progress(say, "student", recipe.student_steps),
    )
    shop.save(out / "student", model)
    figures["student"] = shop.both_held_out(say, "student", model, recipe.held_out)
    note = {"recipe": asdict(recipe), "prompts": texts.fingerprint(), "held_out": figures}
    (out / "recipe.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(build, Recipe(), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
