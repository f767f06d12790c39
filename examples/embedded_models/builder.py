"""Shared parts of the recipes: policy, traces, held-out figures, saving, command line."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import gymnasium
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent import demo
from reopold_agent.common.pixels import PixelLimits
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.demonstrations import unsampled
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.types import Message, Observation, Sampling, Trajectory

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

WEIGHTS: Final = Path(demo.__file__).parent / "weights"

Log = Callable[[str], None]


class ModelBuilder:
    """The tokenizer, renderer, picture processor and environment shared by a recipe's models.

    Subclasses define budgets, pixel limits and `figures`.

    Args:
        tokenizer: of all the models.
        make_env: makes the real environment on the embedded tasks.
        processor: for pictures; None for text-only models.
        cache_bytes: size of the cache of encoded pictures.
    """

    limits: ClassVar[RolloutLimits]
    prompt_pixels: ClassVar[PixelLimits] = PixelLimits(56 * 56, 56 * 56)
    observation_pixels: ClassVar[PixelLimits] = PixelLimits(56 * 56, 56 * 56)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        make_env: Callable[[], gymnasium.Env[Observation, str]],
        processor: Qwen2VLImageProcessorPil | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatRenderer(tokenizer)
        self.processor = processor
        self._vision = (
            None if processor is None else VisionProcessor(processor, cache_bytes=cache_bytes)
        )
        self._make_env = make_env
        self.env = make_env()

    @property
    def vision(self) -> VisionProcessor:
        """The picture processor.

        Raises:
            ValueError: the models read text only.
        """
        if self._vision is None:
            raise ValueError("these models read text only")
        return self._vision

    def policy(self, model: Any) -> TransformersPolicy:
        """Makes a policy that generates with ``model``."""
        image_id = None if self._vision is None else self.chat.image_id
        return TransformersPolicy(
            ModelAdapter(model, self._vision, image_id),
            allowed_ids=len(self.tokenizer),
            forbidden_ids=self.chat.forbidden_ids,
            stop_ids=self.chat.stop_ids,
        )

    def exchange(
        self, name: str, messages: Sequence[Message], text: str, *, index: int = 0
    ) -> Trajectory:
        """Makes the trajectory of a prompt and the assistant's one turn, with reward 0.

        It has the ids and pixels that a rollout records.
        """
        ids, images = self.chat.prompt(messages)
        turn_ids = self.chat.turn_ids(text)
        mask = [False] * len(ids) + [True] * len(turn_ids)
        return unsampled(name, len(ids), ids + turn_ids, mask, images, index=index)

    def figures(self, episodes: Sequence[Trajectory]) -> dict[str, Any]:
        """Returns what is reported about held-out episodes, beside their number."""
        raise NotImplementedError(f"{type(self).__name__} reports nothing")

    def evaluate(self, model: Any, count: int, temperature: float) -> dict[str, Any]:
        """Plays held-out tasks as training does and returns their `figures`."""
        runner = RolloutRunner(
            self._make_env,
            self.chat,
            self._vision,
            prompt_pixels=self.prompt_pixels,
            observation_pixels=self.observation_pixels,
            limits=self.limits,
        )
        specs = [EpisodeSpec("eval", index) for index in range(count)]
        try:
            episodes = runner.run(self.policy(model), specs, Sampling(temperature), (7,))
        finally:
            runner.close()
        return {"n": count, **self.figures(episodes)}

    def evaluate_both(self, log: Log, name: str, model: Any, count: int) -> dict[str, Any]:
        """Runs `evaluate` at temperature 1 and greedily, and logs the figures of both."""
        figures = {
            label: self.evaluate(model, count, temperature)
            for label, temperature in (("sampled", 1.0), ("greedy", 0.0))
        }
        for label, row in figures.items():
            log(f"{name}, held out, {label}: " + ", ".join(f"{k} {v}" for k, v in row.items()))
        return figures

    def save(self, folder: Path, model: Any) -> None:
        """Saves a model with its tokenizer and processor in Hugging Face layout."""
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner may read


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean rounded to four digits, or None if there are no values."""
    return round(sum(values) / len(values), 4) if values else None


def of_step(step: int, count: int) -> range:
    """Returns the rows of a step (from 0) that takes ``count`` of them."""
    return range(step * count, (step + 1) * count)


def progress(log: Log, name: str, steps: int) -> Callable[[int, float], None]:
    """Returns a report function for `train_supervised` that logs every 50th step and its loss.

    The function raises FloatingPointError if the loss is not finite.
    """
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss of step {step} is {loss}")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            log(f"{name} {step + 1}/{steps}  loss {loss:.4f}  {seconds:.0f} s")

    return report


def write_report(
    file: Path, recipe: DataclassInstance, prompts: str, held_out: dict[str, dict[str, Any]]
) -> None:
    """Writes the recipe, the fingerprint of its prompts and the held-out figures as JSON."""
    report = {"recipe": asdict(recipe), "prompts": prompts, "held_out": held_out}
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run_recipe(
    build: Callable[[Path, R, Log], object],
    recipe: R,
    description: str | None,
    argv: Sequence[str] | None,
) -> int:
    """Runs a recipe from the command line: ``--out`` and an option for each of its numbers."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder (default: in the package)"
    )
    for name, value in asdict(recipe).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    build(out, type(recipe)(**options), lambda line: print(line, flush=True))
    print(f"saved under {out}")
    return 0
