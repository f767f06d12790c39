"""Makes a student and its three teachers: ``python -m examples.embedded_models generalist``.

It takes minutes on one thread and is seeded. A base model starts from the figures' teacher, whose
weights the package ships; it learns to read digits, then all three tasks, then to find cards, then
all three tasks again. Each specialist is the base trained further on one task alone, which makes it
forget the others (the teachers of MiMo-V2-Flash, arXiv 2601.02780, also begin from one model). The
student is the base trained a little further on texts most of which guess at once. So all four share
tokenizer and architecture, and the student can do all tasks but has the habit of guessing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerFast

from examples.embedded_models.arithmetic import build as sums
from examples.embedded_models.arithmetic import scripts as sum_scripts
from examples.embedded_models.builder import (
    WEIGHTS,
    ModelBuilder,
    of_step,
    progress,
    run_recipe,
    write_report,
)
from examples.embedded_models.digits import build as cards
from examples.embedded_models.digits import scripts as card_scripts
from examples.embedded_models.digits.prompts import prompt_texts
from examples.embedded_models.digits.scripts import PROMPT_LIMITS
from examples.embedded_models.figures import build as drawings
from examples.embedded_models.figures import scripts as drawing_scripts
from examples.embedded_models.models import new_vision_model
from examples.embedded_models.tokenizer import train_tokenizer
from examples.embedded_models.training import Schedule, train_supervised
from reopold_agent.demo.arithmetic.tasks import OPERATIONS, ArithmeticTasks
from reopold_agent.demo.figures.tasks import FigureTasks
from reopold_agent.demo.tasks import DemoTasks
from reopold_agent.rollout.chat import observation_message
from reopold_agent.types import Trajectory

PREFIX: Final = "generalist_"
START: Final = "figures_teacher"
LAYERS: Final = 4
VOCABULARY: Final = 1408
AT_ONCE: Final = 0.75
"""Share of the student's texts that answer at once with a guess; the others are an expert's."""
TASKS: Final = ("pixel_reasoner", "math", "geometry")
"""The environments, after which the teachers are named."""

Batch = Callable[[int], list[Trajectory]]
"""Makes the texts of a step, counted from 0."""


@dataclass(frozen=True)
class Recipe:
    """Steps and batch size of each stage of training.

    Attributes:
        seed: of weights and tasks.
        reading_steps: stage 1: digits to read, with exercises in reading figures.
        reading_lessons: digits per step of stage 1.
        reading_figures: exercises per step of stage 1.
        base_steps: stage 2, all three tasks.
        lessons: digits to read per step of the later stages.
        digit_traces: whole traces of digits per step.
        problems: sums per step.
        figures: figures per step, with a quarter as many exercises of each sort.
        fade_steps: steps of stage 1 over which the digits' photographs fade in.
        looking_steps: stage 3: cards to find in small pictures, without the long system message.
        looking_lessons: cards per step of stage 3.
        practice_steps: stage 4, all three tasks again, with twice as many sums and figures.
        specialist_steps: stage 5, from stage 4, one task each; twice as many texts of it.
        math_steps: the same for sums, whose texts have no picture and make a model forget slowly.
        student_steps: stage 6, from stage 4: careless texts.
        pool: number of different figures, and of different exercises of each sort.
        held_out: number of held-out tasks for the final figures.
    """

    seed: int = 0
    reading_steps: int = 600
    reading_lessons: int = 64
    reading_figures: int = 6
    base_steps: int = 750
    lessons: int = 40
    digit_traces: int = 12
    problems: int = 32
    figures: int = 10
    fade_steps: int = 150
    looking_steps: int = 300
    looking_lessons: int = 64
    practice_steps: int = 600
    specialist_steps: int = 120
    math_steps: int = 200
    student_steps: int = 40
    pool: int = 1024
    held_out: int = 256


TINY: Final = Recipe(
    reading_steps=2,
    reading_lessons=2,
    reading_figures=1,
    base_steps=2,
    lessons=2,
    digit_traces=2,
    problems=2,
    figures=4,
    fade_steps=1,
    looking_steps=2,
    looking_lessons=2,
    practice_steps=2,
    specialist_steps=2,
    math_steps=2,
    student_steps=2,
    pool=8,
    held_out=2,
)
"""A few steps, to test that the recipe runs."""


class Builders:
    """What plays and records the three tasks, with one tokenizer and picture processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self._recipe = recipe
        self.geometry = drawings.FiguresBuilder(tokenizer, cache_bytes=2**26)
        self.digits = cards.DigitsBuilder(tokenizer, self.geometry.processor)
        self.sums = sums.ArithmeticBuilder(tokenizer, processor=self.geometry.processor)
        self._pool: dict[tuple[str, int, int], Trajectory] = {}

    @property
    def by_task(self) -> Mapping[str, ModelBuilder]:
        """The builders by the name of their environment."""
        return dict(zip(TASKS, (self.digits, self.sums, self.geometry), strict=True))

    def reading(self, step: int) -> list[Trajectory]:
        """Returns a step's exercises in reading digits and figures."""
        tasks = self._cards(1000 + self._recipe.seed, min(1.0, step / self._recipe.fade_steps))
        digits, drawn = self._recipe.reading_lessons, self._recipe.reading_figures
        rows = of_step(step, drawn)
        return [
            *self.digits.lessons(tasks, of_step(step, digits)),
            *(self._pooled("reading", 0, row, self.geometry.reading) for row in rows),
        ]

    def looking(self, step: int) -> list[Trajectory]:
        """Returns a step's exercises in finding cards."""
        tasks = DemoTasks("train", 2**31, 4000 + self._recipe.seed, video_share=0.0)
        count = self._recipe.looking_lessons
        return [self._place(tasks, row) for row in of_step(step, count)]

    def _place(self, tasks: DemoTasks, index: int) -> Trajectory:
        """Makes an exercise: the box of the card in a picture; only its numbers count.

        Without the system message, which takes most of a prompt, it costs little. In whole traces a
        model that starts from the figures' hardly learns the column.
        """
        digits, task = self.digits, tasks[index]
        observation, _ = digits.env.reset(options={"task": task})
        images = [digits.vision.encode(image, PROMPT_LIMITS) for image in observation["images"]]
        turn = card_scripts.expert_turns(task)[0]
        trace = digits.exchange(task.id, [observation_message(observation, images)], turn)
        for place in range(trace.prompt_length, len(trace.ids)):
            token = digits.chat.raw([int(trace.ids[place])])
            trace.loss_mask[place] = token.strip()[:1].isdigit()
        return trace

    def pixel_reasoner(
        self, step: int, seed: int, script: card_scripts.Script, traces: int, lessons: int
    ) -> list[Trajectory]:
        """Returns a step's traces of the digits, with short exchanges that train reading."""
        tasks = self._cards(seed)
        return [
            *self.digits.traces(tasks, of_step(step, traces), script, seed),
            *self.digits.lessons(tasks, of_step(step, lessons)),
        ]

    def _cards(self, seed: int, backdrop: float = 1.0) -> DemoTasks:
        """Returns the digits' tasks, with a larger share of the rare kinds than in evaluation."""
        return DemoTasks(
            "train", 2**31, seed, video_share=0.35, small_share=0.45, backdrop=backdrop
        )

    def math(
        self, step: int, seed: int, script: sum_scripts.Script, count: int
    ) -> list[Trajectory]:
        """Returns a step's sums; the hardest kind is drawn twice as often."""
        tasks = ArithmeticTasks("train", 2**31, seed, (*OPERATIONS, "x"))
        return self.sums.traces(tasks, of_step(step, count), script)

    def figures(
        self, step: int, seed: int, script: drawing_scripts.Script, count: int
    ) -> list[Trajectory]:
        """Returns a step's figures, with exercises in reading and calculation."""
        tasks = FigureTasks("train", size=2**31, seed=seed)
        rows = of_step(step, count)
        beside = range(rows.start // 4, rows.stop // 4)
        drawing = self.geometry
        return [
            *(
                self._pooled("figure", seed, row, lambda _, i: drawing.trace(tasks, i, script))
                for row in rows
            ),
            *(self._pooled("reading", 0, row, drawing.reading) for row in beside),
            *(self._pooled("calculation", seed, row, drawing.calculation) for row in beside),
        ]

    def experts(self, seed: int, times: int = 1) -> Batch:
        """Returns what makes a step's texts of experts; ``times`` as many sums and figures."""
        size = self._recipe
        return lambda step: [
            *self.pixel_reasoner(
                step, 500 + seed, card_scripts.expert, size.digit_traces, size.lessons
            ),
            *self.math(step, seed, sum_scripts.expert, times * size.problems),
            *self.figures(step, seed, drawing_scripts.expert, times * size.figures),
        ]

    def careless(self, seed: int) -> Batch:
        """Returns what makes a step's careless texts of all tasks."""
        size = self._recipe
        return lambda step: [
            *self.pixel_reasoner(
                step, seed, card_scripts.Careless(AT_ONCE, 0.0), size.digit_traces, size.lessons
            ),
            *self.math(step, seed, sum_scripts.Careless(AT_ONCE, 0.0), size.problems),
            *self.figures(step, seed, drawing_scripts.Careless(AT_ONCE, 0.0), size.figures),
        ]

    def specialist(self, task: str, seed: int) -> Batch:
        """Returns what makes a step's texts of an expert of one task, twice as many."""
        size = self._recipe
        batches: dict[str, Batch] = {
            "pixel_reasoner": lambda step: self.pixel_reasoner(
                step, seed, card_scripts.expert, 2 * size.digit_traces, 2 * size.lessons
            ),
            "math": lambda step: self.math(step, seed, sum_scripts.expert, 2 * size.problems),
            "geometry": lambda step: self.figures(
                step, seed, drawing_scripts.expert, 2 * size.figures
            ),
        }
        return batches[task]

    def _pooled(
        self, name: str, seed: int, row: int, make: Callable[[int, int], Trajectory]
    ) -> Trajectory:
        key = (name, seed, row % self._recipe.pool)
        if key not in self._pool:
            self._pool[key] = make(*key[1:])
        return self._pool[key]


def grown(start: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """Makes a model that computes what the checkpoint ``start`` does, with more words and layers.

    A token that both tokenizers have keeps its embedding; another one gets the mean of the
    embeddings of its parts. New layers add nothing at first: their output projections are zero.
    """
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    old: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    old_tokenizer = AutoTokenizer.from_pretrained(start)
    model = new_vision_model(tokenizer, seed, layers=LAYERS, depth=drawings.DEPTH)
    weights = model.state_dict()
    known = old.state_dict()
    table = old.get_input_embeddings().weight.detach()
    old_ids = old_tokenizer.get_vocab()
    for name, value in known.items():
        if value.shape == weights[name].shape:
            weights[name] = value
    for name in weights:
        if name not in known and name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])
    words = torch.zeros_like(model.get_input_embeddings().weight)
    for token, index in tokenizer.get_vocab().items():
        if token in old_ids:
            words[index] = table[old_ids[token]]
            continue
        text = tokenizer.decode([index])
        parts = old_tokenizer.encode(text, add_special_tokens=False)
        words[index] = table[parts].mean(dim=0)
    model.load_state_dict(weights)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(words)
    return model


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Trains and saves the models under ``out``/generalist_student and ``out``/generalist_<task>.

    Returns:
        Held-out figures at temperature 1, by model and task; also written to
        ``out``/generalist.json with the recipe and a fingerprint of the training prompts.
    """
    torch.set_num_threads(1)
    builders = Builders(train_tokenizer(corpus(), vocab_size=VOCABULARY), recipe)
    shared = builders.geometry
    log(f"tokenizer: {len(shared.tokenizer)} ids")
    base = grown(WEIGHTS / START, shared.tokenizer, recipe.seed)
    log(f"model: {sum(p.numel() for p in base.parameters()):,} parameters")
    held_out: dict[str, dict[str, Any]] = {}

    def train(name: str, model: Any, schedule: Schedule, batch: Batch) -> None:
        train_supervised(shared.policy(model), schedule, batch, progress(log, name, schedule.steps))

    def finish(name: str, model: Any) -> None:
        shared.save(out / f"{PREFIX}{name}", model)
        held_out[name] = {
            task: builder.evaluate(model, recipe.held_out, 1.0)
            for task, builder in builders.by_task.items()
        }
        told = (f"{task} {row['success']}" for task, row in held_out[name].items())
        log(f"{name}, held out: {', '.join(told)}")

    train("reading", base, Schedule(recipe.reading_steps, peak=3e-3), builders.reading)
    batch = builders.experts(1000 + recipe.seed)
    train("base", base, Schedule(recipe.base_steps, peak=2e-3, final_share=0.05), batch)
    train("looking", base, Schedule(recipe.looking_steps, peak=3e-3), builders.looking)
    batch = builders.experts(3000 + recipe.seed, times=2)
    schedule = Schedule(recipe.practice_steps, peak=2e-3, warmup=20, final_share=0.05)
    train("practice", base, schedule, batch)
    for name in TASKS:
        model = copy.deepcopy(base)
        batch = builders.specialist(name, 2000 + recipe.seed)
        steps = recipe.math_steps if name == "math" else recipe.specialist_steps
        train(name, model, Schedule(steps, peak=2e-3, warmup=10), batch)
        finish(name, model)
    batch = builders.careless(2001 + recipe.seed)
    train("student", base, Schedule(recipe.student_steps, peak=1e-3, warmup=10), batch)
    finish("student", base)
    write_report(out / "generalist.json", recipe, fingerprint(), held_out)
    return held_out


def corpus() -> list[str]:
    """Returns texts of all three tasks to train the tokenizer on."""
    return [
        *prompt_texts().corpus(),
        *sums.corpus(sums.make_env()),
        *drawings.corpus(drawings.make_env()),
    ]


def fingerprint() -> str:
    """Returns a hash that changes with any prompt: models know only their training prompts."""
    return "-".join(
        whole[:16]
        for whole in (
            prompt_texts().fingerprint(),
            sums.fingerprint(sums.make_env()),
            drawings.fingerprint(drawings.make_env()),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line."""
    return run_recipe(build, Recipe(), __doc__, argv)
