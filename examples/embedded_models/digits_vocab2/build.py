"""Makes the digits' teacher with another vocabulary: ``... embedded_models digits_vocab2``.

It is the shipped teacher with another tokenizer and chat template: other merges, which cross those
of the student's tokens, and other control tokens around turns. Each token's embedding begins as the
mean of those of its text in the first vocabulary; then the teacher trains on, as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from examples.embedded_models.builder import of_step, progress, run_recipe, write_report
from examples.embedded_models.digits.build import DigitsBuilder
from examples.embedded_models.digits.prompts import HEADERS, prompt_texts
from examples.embedded_models.digits.scripts import expert
from examples.embedded_models.models import new_vision_model
from examples.embedded_models.tokenizer import train_tokenizer
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.policies.loading import ModelSpec, load_model

TURNS = ("<|turn|>", "<|end_of_turn|>")

PHRASES = (
    "I w", "ill zoom", " in on", " the ", "ill look", " at the", " frame", " with the", " card",
    "on the card", ".\n", '{"na', 'me": "crop_', 'image", "argu', 'me": "select_', 'frames", "argu',
    'ments": {"bbox', '_2d": [', 'ments": {"target_fr', 'ames": [', '], "target_', 'image": ',
    "]}}", "}}", "The dig", "it is", " \\bo", "xed{", "}.",
)  # fmt: skip
"""Pieces of the assistant's turns that become tokens. Most begin or end within a token of the
student's, so that spans of several tokens occur."""


@dataclass(frozen=True)
class Recipe:
    """Steps and batch sizes.

    Attributes:
        seed: of the tasks.
        steps: training steps, half of whose rows are an expert's whole traces.
        traces: an expert's traces per step.
        lessons: short exchanges per step, for reading.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    steps: int = 500
    traces: int = 20
    lessons: int = 32
    held_out: int = 512


TINY = Recipe(steps=2, traces=2, lessons=2, held_out=4)
"""A few steps, to test that the recipe runs."""


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer."""
    texts = prompt_texts()
    corpus = [*[*PHRASES, *HEADERS] * 40, *texts.observations * 20]
    return train_tokenizer([*corpus, *[texts.system, *texts.questions] * 4], 960, turns=TURNS)


def transplanted(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Returns the shipped teacher with embeddings for another tokenizer's tokens."""
    first = load_model(ModelSpec("demo:teacher"), "teacher", torch.device("cpu"))
    model = new_vision_model(tokenizer, 0)
    weights = first.adapter.model.state_dict()
    old = weights.pop("model.language_model.embed_tokens.weight")
    weights.pop("lm_head.weight", None)
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }
    renamed = dict(zip(TURNS, ("<|im_start|>", "<|im_end|>"), strict=True))
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        for token in range(len(tokenizer)):
            text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
            ids = first.tokenizer(renamed.get(text, text), add_special_tokens=False)["input_ids"]
            rows[token] = old[ids].mean(0)
    model.tie_weights()
    return model


def build(out: Path, recipe: Recipe, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and saves the teacher under ``out``/teacher_vocab2.

    Returns:
        Held-out figures by sampling; also written to ``out``/teacher_vocab2.json.
    """
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    builder = DigitsBuilder(other_tokenizer())
    model = transplanted(builder.tokenizer)
    log(f"tokenizer: {len(builder.tokenizer)} ids")
    tasks = DemoTasks(
        "train", size=2**31, seed=3000 + recipe.seed, video_share=0.35, small_share=0.45
    )

    def rows(step: int) -> list[Any]:
        played = of_step(step, recipe.traces)
        lessons = of_step(step, recipe.lessons)
        return [
            *builder.traces(tasks, played, expert, tasks.seed),
            *builder.lessons(tasks, lessons),
        ]

    train_supervised(
        builder.policy(model),
        Schedule(recipe.steps, peak=2e-3),
        rows,
        progress(log, "teacher_vocab2", recipe.steps),
    )
    builder.save(out / "teacher_vocab2", model)
    figures = builder.evaluate_both(log, "teacher_vocab2", model, recipe.held_out)
    texts = prompt_texts()
    write_report(
        out / "teacher_vocab2.json", recipe, texts.fingerprint(), {"teacher_vocab2": figures}
    )
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
